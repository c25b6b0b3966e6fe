"""The whole run on a tiny base: what it leaves behind, and what it refuses."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import transformers
from hand_made import edit_tensors

from lora_export import (
    BaseRef,
    LoraConfig,
    certificates,
    checks,
    codec,
    exporters,
    inject,
    judging,
    merged_files,
    pipeline,
    save_adapter,
    stages,
    storage,
    timing,
)
from lora_export.errors import AdapterMismatch, ExportFailed, InputError
from lora_export.opening import open_job
from lora_export.records import Evidence, Status


@pytest.fixture(scope="module")
def quick():
    """Few rounds: what is timed here is not judged here."""
    patch = pytest.MonkeyPatch()
    patch.setattr(timing, "LEAST_ROUNDS", 20)
    patch.setattr(timing, "MOST_ROUNDS", 20)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def finished(tiny_base, tiny_adapter, tmp_path_factory, quick):
    folder = tmp_path_factory.mktemp("run")
    path, model = tiny_adapter(folder, str(tiny_base))
    certificate = pipeline.run(path, out=folder / "run", command="lora-export run")
    return folder / "run", certificate, model


def test_every_verdict_but_the_timed_ones_passes(finished):
    _, certificate, _ = finished
    found = {(v.check, v.subject): v.status for v in certificate.verdicts if v.check != "latency"}
    assert set(found.values()) == {Status.PASS}
    assert {check for check, _ in found} == set(checks.names()) - {
        "latency", "fidelity", "text", "accuracy", "generation",
    }  # fmt: skip


def test_every_candidate_is_timed_at_batch_1_and_8(finished):
    subjects = {v.subject for v in finished[1].verdicts if v.check == "latency"}
    runners = ("merged", "onnx", "torchscript")
    assert subjects == {f"{name}, batch {batch}" for name in runners for batch in (1, 8)}


def test_a_run_leaves_these_files(finished):
    names = {file.name for file in finished[0].iterdir()}
    assert names == {
        "merged", "model.onnx", "model.pt", "tokenizer", "certificate.json", "report.md",
        "report.xml", "report.html", "evidence",
    }  # fmt: skip


def test_the_certificate_of_a_run_is_of_its_schema_and_read_as_it_was(finished):
    folder, certificate = finished[:2]
    found = certificates.read(folder)
    assert (found.verdicts, found.outputs) == (certificate.verdicts, certificate.outputs)


def test_nothing_is_left_beside_a_run(finished):
    assert {f.name for f in finished[0].parent.iterdir()} == {"run", "sst2.safetensors"}


def test_no_file_of_a_run_holds_a_path_of_this_machine(finished):
    folder = finished[0]
    marks = [str(folder.parent).encode(), str(folder.home()).encode() + b"/"]
    guilty = [
        file.name
        for file in folder.rglob("*")
        if file.is_file() and any(mark in file.read_bytes() for mark in marks)
    ]
    assert guilty == []


def test_the_certificate_on_disk_is_the_one_returned(finished):
    folder, certificate, _ = finished
    written = json.loads((folder / "certificate.json").read_text())
    assert written["ok"] == certificate.ok
    assert len(written["verdicts"]) == len(certificate.verdicts)


def test_the_certificate_digests_every_output(finished):
    folder, certificate, _ = finished
    for file in certificate.outputs:
        assert storage.digest(folder / file.name).digest == file.digest
    assert {"merged/model.safetensors", "model.onnx", "model.pt"} <= {
        file.name for file in certificate.outputs
    }


def test_the_reference_is_the_unmerged_model_in_float64(finished, logits):
    folder, _, model = finished
    evidence = codec.load(Evidence, folder / "evidence", "evidence")
    batch = evidence.batches[0]
    inputs = {name: torch.from_numpy(array) for name, array in batch.arrays.items()}
    with torch.no_grad():
        expected = model.double().eval()(**inputs).logits.numpy()
    model.float()
    found = evidence.recordings["reference"].outputs[0]["logits"]
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_saved_evidence_is_judged_the_same(finished):
    folder, certificate, _ = finished
    again = judging.check_run(folder)
    assert again.verdicts == certificate.verdicts
    assert again.environment == certificate.environment


def test_a_file_that_was_changed_later_fails_the_gate(finished, tmp_path):
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(finished[0], copy)
    with (copy / "model.onnx").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    assert not judging.check_run(copy).ok


# ---------------------------------------------------------------- faults that a run must see


def test_an_artifact_of_another_adapter_fails(finished, tiny_base, tiny_adapter, tmp_path):
    """The exported file is right in itself, and not the one that this adapter makes."""
    folder, _, _ = finished
    other, _ = tiny_adapter(tmp_path, str(tiny_base), seed=5)
    merged_files.merge_files(other, out=tmp_path / "merged")
    subject = stages.load_subject(tmp_path / "merged")
    stages.export_stage("torchscript", subject, tmp_path)
    found = pipeline.check_files(
        finished[0].parent / "sst2.safetensors",
        merged=folder / "merged",
        artifacts=[tmp_path / "model.pt"],
        quick=True,
    )
    failed = {(v.check, v.subject) for v in found.verdicts if not v.passed}
    assert failed == {
        (name, "torchscript") for name in ("parity", "graph", "weights", "provenance")
    }
    (weights,) = (v for v in found.verdicts if v.check == "weights")
    assert "bert.encoder.layer.0.attention.self.query.weight" in weights.where


def test_an_exporter_that_loses_the_mask_fails(finished, monkeypatch, tmp_path):
    folder, _, _ = finished
    whole = exporters.load("torchscript").export

    def careless(request):
        class Maskless(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = request.model

            def forward(self, input_ids, token_type_ids, attention_mask):
                return self.inner(input_ids, token_type_ids, torch.ones_like(attention_mask))

        whole(dataclasses.replace(request, model=Maskless()))

    monkeypatch.setattr(exporters.load("torchscript"), "export", careless)
    certificate = pipeline.export_file(
        "torchscript", model=folder / "merged", out=tmp_path / "model.pt"
    )
    assert {v.check for v in certificate.verdicts if not v.passed} >= {"parity"}
    assert (tmp_path / "model.pt").is_file()


def test_an_exporter_that_freezes_the_batch_fails(finished, monkeypatch, tmp_path):
    folder, _, _ = finished
    whole = exporters.load("torchscript").export

    def careless(request):
        class Frozen(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = request.model

            def forward(self, input_ids, token_type_ids, attention_mask):
                answer = self.inner(input_ids, token_type_ids, attention_mask)
                return answer[:1].expand(int(input_ids.shape[0]), 2)

        whole(dataclasses.replace(request, model=Frozen()))

    monkeypatch.setattr(exporters.load("torchscript"), "export", careless)
    certificate = pipeline.export_file(
        "torchscript", model=folder / "merged", out=tmp_path / "model.pt"
    )
    assert {v.check for v in certificate.verdicts if not v.passed} >= {"parity"}


def test_an_exporter_that_fails_leaves_nothing(finished, monkeypatch, tmp_path):
    def broken(*arguments):
        raise ExportFailed("no such operator")

    monkeypatch.setattr(exporters.load("onnx"), "export", broken)
    with pytest.raises(ExportFailed, match="no such operator"):
        pipeline.export_file("onnx", model=finished[0] / "merged", out=tmp_path / "deep" / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_an_artifact_that_answers_in_another_dtype_fails(finished):
    evidence = codec.load(Evidence, finished[0] / "evidence", "evidence")
    narrow = tuple(
        {name: array.astype(np.float64) for name, array in outputs.items()}
        for outputs in evidence.recordings["onnx"].outputs
    )
    recording = dataclasses.replace(evidence.recordings["onnx"], outputs=narrow)
    changed = dataclasses.replace(evidence, recordings={**evidence.recordings, "onnx": recording})
    failed = [v for v in checks.judge(changed, checks.EXPORT) if not v.passed]
    assert [(v.check, v.subject) for v in failed] == [("parity", "onnx")]
    assert "float64, expected float32" in failed[0].note


def test_a_file_that_was_added_later_fails_the_gate(finished, tmp_path):
    import shutil

    shutil.copytree(finished[0], tmp_path / "run")
    (tmp_path / "run" / "merged" / "model-00002.safetensors").write_bytes(b"stray")
    failed = [v for v in judging.check_run(tmp_path / "run").verdicts if not v.passed]
    assert {v.check for v in failed} - {"latency"} == {"intact"}


def test_a_base_in_half_precision_goes_the_whole_way(tiny_base, fill, tmp_path, quick):
    """Its floor is what bfloat16 costs, and the artifacts hold the merged weights in float32."""
    from lora_export import BaseRef, LoraConfig, inject, save_adapter

    base = tmp_path / "base"
    transformers.BertModel.from_pretrained(tiny_base).bfloat16().save_pretrained(base)
    transformers.AutoTokenizer.from_pretrained(tiny_base).save_pretrained(base)
    model = transformers.BertForSequenceClassification.from_pretrained(base, dtype="bfloat16")
    inject(model, LoraConfig(modules_to_save=("classifier",)))
    about = {"base": BaseRef(id=str(base)), "task_type": "SEQ_CLS"}
    save_adapter(fill(model), tmp_path / "a.safetensors", **about)
    certificate = pipeline.run(tmp_path / "a.safetensors", out=tmp_path / "run")
    assert [v for v in certificate.verdicts if not v.passed and v.check != "latency"] == []
    evidence = codec.load(Evidence, tmp_path / "run" / "evidence", "evidence")
    precisions = {name: r.precision for name, r in evidence.recordings.items()}
    assert precisions["unmerged"] == precisions["merged"] == "bfloat16"
    assert precisions["onnx"] == precisions["torchscript"] == "float32"


# ---------------------------------------------------------------- refusals


def test_an_existing_output_is_not_replaced(finished):
    folder, certificate, _ = finished
    with pytest.raises(InputError, match="exists; choose another name, or pass --overwrite"):
        pipeline.run(folder.parent / "sst2.safetensors", out=folder)
    assert storage.digest(folder / "model.onnx").digest in {f.digest for f in certificate.outputs}


def test_an_adapter_for_another_base_leaves_nothing(tiny_base, tiny_adapter, tmp_path):
    path, _ = tiny_adapter(tmp_path, str(tiny_base))
    other = tmp_path / "other"
    transformers.BertModel(transformers.BertConfig.from_pretrained(tiny_base)).save_pretrained(
        other
    )
    transformers.AutoTokenizer.from_pretrained(tiny_base).save_pretrained(other)
    with pytest.raises(AdapterMismatch, match="is not the one that this adapter was trained on"):
        pipeline.run(path, base=str(other), out=tmp_path / "run")
    assert {f.name for f in tmp_path.iterdir()} == {"other", "sst2.safetensors"}


def test_an_adapter_that_names_no_base_needs_one(tiny_adapter, tmp_path):
    path, _ = tiny_adapter(tmp_path)
    with pytest.raises(InputError, match="names no base model; pass --base"):
        open_job(path)


def test_a_run_loads_the_model_that_a_merge_did_not_need(tiny_base, tmp_path, fill, quick):
    """Where base and head are one checkpoint, names and shapes are enough to plan a merge."""
    model = transformers.BertForSequenceClassification.from_pretrained(tiny_base)
    model.save_pretrained(tmp_path / "base")
    transformers.AutoTokenizer.from_pretrained(tiny_base).save_pretrained(tmp_path / "base")
    inject(model, LoraConfig(targets=("query",)))
    path = tmp_path / "a.safetensors"
    save_adapter(fill(model), path, base=BaseRef(id=str(tmp_path / "base")), labels=())
    assert open_job(path).config is None
    certificate = pipeline.run(path, out=tmp_path / "run", formats=["torchscript"])
    assert not [v for v in certificate.verdicts if not v.passed and v.check != "latency"]


def test_an_untrained_adapter_is_merged_with_a_note_and_not_run(finished, tiny_base, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes((finished[0].parent / "sst2.safetensors").read_bytes())
    edit_tensors(path, lambda arrays: [arrays[n].fill(0) for n in arrays if "lora_B" in n])
    certificate = merged_files.merge_files(path, out=tmp_path / "merged")
    assert certificate.ok
    assert any("the adapter is untrained" in note for note in certificate.settings["notes"])
    with pytest.raises(InputError, match="is untrained: all 13 low-rank updates are zero"):
        pipeline.run(path, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_labels_that_the_model_lacks_are_refused(finished, tmp_path):
    (tmp_path / "data.tsv").write_text("sentence\tlabel\na good film\t7\n")
    with pytest.raises(InputError, match="labels outside 0 to 1: 7"):
        pipeline.export_file(
            "onnx",
            model=finished[0] / "merged",
            out=tmp_path / "m.onnx",
            data=tmp_path / "data.tsv",
        )


def test_accuracy_is_measured_where_labels_are_given(finished, tmp_path):
    (tmp_path / "data.tsv").write_text("sentence\tlabel\na good film\t1\na bad film\t0\n")
    certificate = pipeline.export_file(
        "torchscript", model=finished[0] / "merged", out=tmp_path / "m.pt",
        data=tmp_path / "data.tsv",
    )  # fmt: skip
    found = {m.subject: m for m in certificate.measurements if m.name == "accuracy"}
    assert found.keys() == {"reference", "merged", "torchscript"}
    assert {m.samples for m in found.values()} == {2}


def _exported(folder, out, **more):
    certificate = pipeline.export_file("onnx", model=folder / "merged", out=out, **more)
    metadata = exporters.load("onnx").inspect(out).facts["metadata"]
    return certificate, metadata


@pytest.mark.slow
@pytest.mark.slow
def test_ranges_are_those_of_the_sentences_that_are_given(finished, tmp_path):
    """And not those that it is judged on: other sentences make another file, other data do not."""
    folder = finished[0]
    (tmp_path / "words.txt").write_text("good good good good film\nbad\n")
    form = {"precision": "int8", "static": True, "target": "generic"}
    given = {"calibration": tmp_path / "words.txt"}
    certificate, metadata = _exported(folder, tmp_path / "own.onnx", **form, **given)
    assert certificate.settings["calibration"] == "words.txt"
    assert "words.txt" in {file.name for file in certificate.inputs}
    assert json.loads(metadata["lora_export.quantised"])["static"] is True
    assert not certificate.settings["notes"]
    plain, _ = _exported(folder, tmp_path / "plain.onnx", **form)
    assert any("are those that its layers were chosen on" in n for n in plain.settings["notes"])
    data = {"data": tmp_path / "words.txt"}
    judged, _ = _exported(folder, tmp_path / "judged.onnx", **form, **data)
    assert not judged.settings["notes"]
    bytes_of = {name: (tmp_path / f"{name}.onnx").read_bytes() for name in
                ("own", "plain", "judged")}  # fmt: skip
    assert bytes_of["own"] != bytes_of["plain"] == bytes_of["judged"]


def test_calibration_without_use_is_refused(finished, tmp_path):
    (tmp_path / "words.txt").write_text("good\n")
    with pytest.raises(InputError, match="--calibration is of no use for fp32"):
        _exported(finished[0], tmp_path / "m.onnx", calibration=tmp_path / "words.txt")


def test_a_stray_data_file_is_noticed_before_anything_is_done(finished, tmp_path, monkeypatch):
    (tmp_path / "m.onnx.data").write_text("somebody's")
    monkeypatch.setattr(stages, "load_subject", lambda *_, **__: pytest.fail("it began"))
    with pytest.raises(InputError, match=r"m\.onnx\.data exists"):
        _exported(finished[0], tmp_path / "m.onnx", external_data=True)


def test_the_data_file_of_a_replaced_graph_goes_with_it(finished, tmp_path):
    certificate, _ = _exported(finished[0], tmp_path / "m.onnx", external_data=True)
    assert certificate.ok
    assert (tmp_path / "m.onnx.data").is_file()
    _exported(finished[0], tmp_path / "m.onnx", overwrite=True)
    assert not (tmp_path / "m.onnx.data").exists()


def test_the_certificate_says_how_each_runtime_was_set(finished):
    """Threads, spinning and memory: what a latency depends on beside the file."""
    settings = finished[1].settings
    threads = finished[1].environment["threads"]
    assert settings["runtimes"].keys() == {"unmerged", "merged", "onnx", "torchscript"}
    assert settings["runtimes"]["torchscript"] == {"torch_threads": threads}
    assert settings["runtimes"]["onnx"] == {
        "intra_op_threads": threads,
        "inter_op_threads": 1,
        "spinning": False,
        "memory_arena": True,
        "graph_optimization": "ORT_ENABLE_ALL",
    }
    assert settings["warm_up"] == timing.WARM_UP


@pytest.mark.parametrize("rises", [True, False])
def test_the_peak_of_something_earlier_is_not_that_of_an_export(
    finished, tmp_path, monkeypatch, rises
):
    peaks = iter([9e9, 9e9 + 5e8 * rises])
    monkeypatch.setattr(pipeline, "peak_memory", lambda: next(peaks))
    monkeypatch.setattr(pipeline, "resident_memory", lambda: int(8e9))
    certificate, _ = _exported(finished[0], tmp_path / "m.onnx")
    found = {m.subject: m.value for m in certificate.measurements if m.name == "peak memory"}
    assert found["onnx, model included"] == 9000 + 500 * rises
    assert found.get("onnx, above the model") == (1500 if rises else None)
