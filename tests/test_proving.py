"""What lies on disk is proven from the files alone, whoever wrote them."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hand_made import edit_tensors
from onnx import helper, numpy_helper

from lora_export import checks, exporters, judging, pipeline, proving, timing
from lora_export.errors import ExportFailed, InputError
from lora_export.opening import open_job
from lora_export.records import MERGED, Policy, Status
from lora_export.stages import load_unmerged

QUERY = "bert.encoder.layer.1.attention.self.query.weight"


@pytest.fixture(scope="module")
def adapter(tiny_base, tiny_adapter, tmp_path_factory):
    return tiny_adapter(tmp_path_factory.mktemp("proving"), str(tiny_base))[0]


@pytest.fixture(scope="module")
def finished(adapter):
    patch = pytest.MonkeyPatch()
    patch.setattr(timing, "LEAST_ROUNDS", 10)
    patch.setattr(timing, "MOST_ROUNDS", 10)
    pipeline.run(adapter, out=adapter.parent / "run", policy=Policy(slowest=1e9))
    patch.undo()
    return adapter.parent / "run"


@pytest.fixture
def run(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def check(adapter, run):
    """Check the run, and return the verdicts that are no pass, by check and subject."""

    def judge(**options):
        found = pipeline.check_files(adapter, folder=run, quick=True, **options)
        return {(v.check, v.subject): v for v in found.verdicts if not v.passed}

    return judge


def _edit(path, change):
    model = onnx.load(path)
    change(model.graph)
    onnx.save(model, path)


def test_what_a_run_made_passes(check):
    assert check() == {}


def test_nothing_is_written_unless_it_is_asked_for(adapter, run, tmp_path):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    pipeline.check_files(adapter, folder=run, quick=True, out=tmp_path / "again")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    written = json.loads((tmp_path / "again" / "certificate.json").read_text())
    assert (written["ok"], written["settings"]["quick"]) == (True, True)


def test_files_that_somebody_else_laid_elsewhere_are_proven(adapter, run, tmp_path):
    (run / "merged" / "lora_export.json").unlink()
    (run / "merged").rename(tmp_path / "theirs")
    (run / "model.onnx").rename(tmp_path / "exported.onnx")
    shutil.copytree(run / "tokenizer", tmp_path / "tokenizer")
    found = pipeline.check_files(
        adapter,
        folder=tmp_path / "none",
        merged=tmp_path / "theirs",
        artifacts=[tmp_path / "exported.onnx"],
        quick=True,
    )
    failed = {(v.check, v.subject) for v in found.verdicts if not v.passed}
    assert failed <= {("provenance", "merged")}
    assert {v.status for v in found.verdicts if v.check in ("exact", "parity", "equivalence")} == {
        Status.PASS
    }


def test_a_weight_that_was_changed_is_named(check, run):
    def change(arrays):
        arrays[QUERY][0, 0] += np.float32(0.5)

    edit_tensors(run / "merged" / "model.safetensors", change)
    found = check()
    assert found["exact", "merged weights"].where == (QUERY,)
    assert ("equivalence", MERGED) in found


def test_a_merged_model_that_does_not_load_fails_and_says_why(check, run):
    edit_tensors(run / "merged" / "model.safetensors", lambda arrays: arrays.pop(QUERY))
    found = check()
    note = found["equivalence", MERGED].note
    assert f"merged and the adapter lack weights of BertForSequenceClassification: {QUERY}" in note
    assert str(Path.home()) not in note
    assert "/tmp" not in note
    assert ("plain", MERGED) in found


def test_a_batch_that_was_baked_in_fails_at_its_shapes(check, run):
    def change(graph):
        (node,) = (n for n in graph.node if graph.output[0].name in n.output)
        node.output[0] = "free"
        shape = numpy_helper.from_array(np.array([2, 2], np.int64), "baked")
        graph.initializer.append(shape)
        graph.node.append(helper.make_node("Reshape", ["free", "baked"], [graph.output[0].name]))

    _edit(run / "model.onnx", change)
    found = check()
    assert any("does not run at batch 1" in place for place in found["structure", "onnx"].where)
    assert ("parity", "onnx") in found


def test_the_tokenizer_of_the_side_under_proof_is_never_asked(adapter, run):
    """A wrong one would turn sentences into other inputs, on which all agree."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (run / "merged" / name).write_text("{}")
    found = pipeline.check_files(adapter, folder=run, quick=True)
    assert not found.ok
    assert {v.status for v in found.verdicts if v.check in ("equivalence", "decisions")} == {
        Status.PASS
    }


def test_what_the_unmerged_model_refuses_is_no_shape_to_hold_others_to(adapter, monkeypatch):
    job = open_job(adapter)
    unmerged = load_unmerged(job)
    forward = type(unmerged).forward

    @functools.wraps(forward)
    def picky(self, input_ids=None, **more):
        if input_ids.shape[0] == 32:
            raise RuntimeError("too many rows")
        return forward(self, input_ids=input_ids, **more)

    monkeypatch.setattr(type(unmerged), "forward", picky)
    truth = proving.truth_of(job, unmerged, proving.Asked(["a good film", "a bad film"]))
    notes = [batch.note for batch in truth.batches]
    assert len(notes) > 5
    assert not any(note.startswith("batch 32") for note in notes)
    assert all(len(r.outputs) == len(notes) and not r.errors for r in truth.recordings.values())


def test_an_unmerged_model_that_reads_no_sentence_is_an_error(adapter, monkeypatch):
    job = open_job(adapter)
    unmerged = load_unmerged(job)
    forward = type(unmerged).forward

    @functools.wraps(forward)
    def broken(self, input_ids=None, **more):
        if torch.is_inference_mode_enabled() and input_ids.shape[1] == 6:
            raise RuntimeError("no")
        return forward(self, input_ids=input_ids, **more)

    monkeypatch.setattr(type(unmerged), "forward", broken)
    with pytest.raises(InputError, match="the unmerged model does not run: no"):
        proving.truth_of(job, unmerged, proving.Asked(["a good film and"]))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"merged": "nothing"}, "no merged model in nothing"),
        ({"artifacts": ["model.tflite"]}, "ends in none of"),
        ({"artifacts": ["nothing.onnx"]}, "no artifact at nothing.onnx"),
        ({"policy": Policy(), "artifacts": ["a.onnx", "b.onnx"]}, "no artifact at a.onnx"),
    ],
)
def test_what_is_not_there_is_an_input_error(check, options, said):
    with pytest.raises(InputError, match=said):
        check(**options)


def test_two_files_of_one_format_are_not_mixed_up(run):
    shutil.copy(run / "model.onnx", run / "other.onnx")
    with pytest.raises(InputError, match="are both onnx; check them one at a time"):
        exporters.by_format(exporters.artifacts_in(run))


def test_the_longest_suffix_tells_the_format(tmp_path):
    for name in ("a.pt2", "b.aoti.pt2", "c.onnx", "c.onnx.data", "d.txt"):
        (tmp_path / name).touch()
    found = exporters.by_format(exporters.artifacts_in(tmp_path))
    assert {name: path.name for name, path in found.items()} == {
        "pt2": "a.pt2", "aoti": "b.aoti.pt2", "onnx": "c.onnx"
    }  # fmt: skip


def test_a_file_that_is_no_onnx_is_an_export_that_failed(check, run):
    (run / "model.onnx").write_bytes(b"nothing of the kind")
    with pytest.raises(ExportFailed, match=r"model\.onnx"):
        check()


def test_limits_that_were_set_are_judged_by_and_stated(adapter, run):
    tight = Policy(tolerance=1e-12)
    found = pipeline.check_files(adapter, folder=run, quick=True, policy=tight)
    failed = {v.check for v in found.verdicts if not v.passed}
    assert {"parity", "equivalence"} <= failed
    assert found.settings["tolerance"] == 1e-12
    (parity,) = (v for v in found.verdicts if (v.check, v.subject) == ("parity", "onnx"))
    assert parity.limit == 1e-12
    assert f"a tolerance of {parity.measured:.1e} would pass" in parity.note


def test_a_quick_look_asks_no_check_that_takes_long(adapter, run):
    found = pipeline.check_files(adapter, folder=run, quick=True)
    asked = {v.check for v in found.verdicts}
    assert {"accounted", "exact", "parity", "decisions", "structure"} <= asked
    assert not asked & {"latency", "reproducible", "generation"}
    assert checks.QUICK == "quick"


# ---------------------------------------------------------------- what is proven sets no limits


def test_an_artifact_does_not_choose_the_limits_that_it_is_judged_by(adapter, run, check):
    model = onnx.load(run / "model.onnx")
    (said,) = (p for p in model.metadata_props if p.key == "lora_export.precision")
    said.value = '"int8"'
    onnx.save(model, run / "model.onnx")
    with pytest.raises(InputError, match=r"model\.onnx is in int8, as it says.*--precision int8"):
        check()
    said.value = '"fp8"'
    onnx.save(model, run / "model.onnx")
    with pytest.raises(ExportFailed, match='says that its precision is "fp8"'):
        check()


def test_a_merge_does_not_choose_how_it_is_derived_again(run, check):
    path = run / "merged" / "lora_export.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps(said | {"options": {"alpha": 32.0}}))
    with pytest.raises(InputError, match=r"options that are to be given here too: alpha 32\.0"):
        check()


def test_a_config_that_transformers_wrote_anew_says_nothing_wrong(run, adapter):
    (run / "merged" / "lora_export.json").unlink()
    path = run / "merged" / "config.json"
    fields = json.loads(path.read_text())
    fields |= {"_name_or_path": "/somewhere/base", "transformers_version": "4.0.0", "new": 1}
    path.write_text(json.dumps(fields))
    found = pipeline.check_files(
        adapter, merged=run / "merged", artifacts=[run / "model.onnx"], quick=True
    )
    assert "provenance" not in {v.check for v in found.verdicts if not v.passed}
    fields["layer_norm_eps"] = 1e-3
    path.write_text(json.dumps(fields))
    found = pipeline.check_files(
        adapter, merged=run / "merged", artifacts=[run / "model.onnx"], quick=True
    )
    failed = {v.check: v for v in found.verdicts if not v.passed}
    assert failed["provenance"].where == ("merged: config.json layer_norm_eps",)


def test_what_was_exported_by_other_versions_is_not_exported_again(run):
    (artifact,) = (
        proving.stages.described(name, path)
        for name, path in exporters.by_format([run / "model.onnx"]).items()
    )
    assert exporters.form_of(artifact) is not None
    said = artifact.facts["metadata"] | {exporters.MADE_WITH: '{"torch": "1.0"}'}
    older = dataclasses.replace(artifact, facts={**artifact.facts, "metadata": said})
    assert exporters.form_of(older) is None


def test_a_certificate_whose_files_lie_elsewhere_is_not_judged_anew(adapter, run, tmp_path):
    pipeline.check_files(adapter, folder=run, quick=True, out=tmp_path / "again")
    before = (tmp_path / "again" / "certificate.json").read_bytes()
    with pytest.raises(InputError, match="the files that were checked lie elsewhere"):
        judging.check_run(tmp_path / "again")
    assert (tmp_path / "again" / "certificate.json").read_bytes() == before


def test_a_note_beside_a_run_is_no_fault(run, check):
    (run / "NOTES.md").write_text("nothing that a loader reads")
    assert check() == {}
