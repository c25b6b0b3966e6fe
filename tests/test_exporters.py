"""What every exporter must do, asked of each file in the folder."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import transformers

from lora_export import exporters, inputs, merged_files, placing, stages, storage
from lora_export.errors import ExportFailed, InputError
from lora_export.exporters import _onnx_translate
from lora_export.records import Artifact, Form

# Compiling takes half a minute a model.
FORMATS = [
    pytest.param(name, marks=pytest.mark.slow) if name == "aoti" else name
    for name in exporters.names()
]


@pytest.fixture(scope="module")
def subject(tiny_base, tiny_adapter, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    path, _ = tiny_adapter(folder, str(tiny_base))
    merged_files.merge_files(path, out=folder / "merged")
    return stages.load_subject(folder / "merged")


@pytest.fixture(scope="module", params=FORMATS)
def exported(request, subject, tmp_path_factory) -> tuple[str, Artifact, object]:
    if request.param == "openvino":
        pytest.importorskip("openvino")
    folder = tmp_path_factory.mktemp(request.param)
    artifact = stages.export_stage(request.param, subject, folder)
    return request.param, artifact, folder / artifact.files[0].name


def answers(subject, exported, batch):
    name, _, path = exported
    runner = exporters.load(name).open_runner(path, 1)
    found, expected = runner.run(batch.arrays), subject.runner("merged").run(batch.arrays)
    return found["logits"], expected["logits"]


@pytest.mark.parametrize("shape", inputs.GRID, ids=str)
def test_every_shape_and_padding_gives_the_models_answer(subject, exported, shape):
    batch = inputs.grid_batches(subject.signature, seed=1)[inputs.GRID.index(shape)]
    found, expected = answers(subject, exported, batch)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=2e-6, rtol=2e-5)


def test_the_answers_depend_on_the_input(subject, exported):
    batches = inputs.grid_batches(subject.signature, seed=1)
    found, _ = answers(subject, exported, batches[8])
    assert found.std(axis=0).min() > 1e-2


def test_nothing_in_the_artifact_is_named_after_lora(exported):
    assert exported[1].lora_names == ()


def test_the_operators_of_the_graph_are_counted(exported):
    """Of compiled code there are none to count."""
    name, artifact, _ = exported
    assert (sum(artifact.operators.values()) > 50) == (name != "aoti")
    linear = {"onnx": "Gemm", "torchscript": "aten::linear", "pt2": "aten.linear.default",
              "openvino": "MatMul"}  # fmt: skip
    if name in linear:  # two layers of six, pooler and head; OpenVINO has those of attention too
        assert artifact.operators[linear[name]] == 14 + 4 * (name == "openvino")


def test_no_path_of_this_machine_is_in_the_artifact(exported):
    assert exported[1].leaked_paths == ()


def test_inputs_and_outputs_have_the_names_of_the_signature(subject, exported):
    _, artifact, _ = exported
    names = [[spec.name for spec in side] for side in (artifact.inputs, artifact.outputs)]
    assert names == [["input_ids", "token_type_ids", "attention_mask"], ["logits"]]


def test_labels_and_provenance_are_in_the_metadata(exported):
    metadata = exported[1].facts["metadata"]
    assert metadata["lora_export.labels"] == '["negative", "positive"]'
    assert '"sha256"' in metadata["lora_export.adapter"]


def test_the_tokenizer_lies_beside_the_artifact_and_is_digested(exported, subject):
    _, artifact, path = exported
    assert "tokenizer/tokenizer.json" in [file.name for file in artifact.beside]
    tokens = transformers.AutoTokenizer.from_pretrained(path.parent / "tokenizer")
    assert tokens("a good movie").input_ids == subject.tokens("a good movie").input_ids


def test_the_digests_are_those_of_the_files(exported):
    import hashlib

    _, artifact, path = exported
    assert artifact.files[0].digest == f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


def test_a_damaged_file_is_an_export_failure(exported, tmp_path):
    name, _, path = exported
    for file in exporters.files(name, path):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    broken = tmp_path / path.name
    broken.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    with pytest.raises(ExportFailed, match=broken.name):
        exporters.load(name).inspect(broken)
    with pytest.raises(ExportFailed, match=broken.name):
        list(exporters.load(name).tensors(broken))


def test_the_merged_tensors_are_inside_bit_for_bit(exported, subject):
    _, artifact, path = exported
    found = placing.placements_of(subject.model, subject.interface, subject.folder, artifact, path)
    assert {p.tensor for p in found} == storage.Checkpoint.open(subject.folder).tensors.keys()
    assert [p for p in found if p.differing or not p.found] == []


def test_tensors_come_in_the_same_order_each_time(exported):
    name, _, path = exported
    first, second = ([n for n, _ in exporters.load(name).tensors(path)] for _ in range(2))
    assert first == second


def test_an_unknown_format_names_the_known_ones():
    with pytest.raises(InputError, match="aoti, onnx, openvino, pt2, torchscript"):
        exporters.load("savedmodel")


def test_a_path_of_this_machine_would_be_found(exported, tmp_path):
    name, _, path = exported
    leaky = tmp_path / path.name
    if name == "onnx":
        model = onnx.load(path)
        model.doc_string = str(tmp_path.home() / "secret")
        onnx.save(model, leaky)
        assert exporters.describe(name, leaky).leaked_paths
    elif name == "openvino":
        text = path.read_text().replace("</net>", f"<!-- {tmp_path.home()}/secret --></net>")
        leaky.write_text(text)
        leaky.with_suffix(".bin").write_bytes(path.with_suffix(".bin").read_bytes())
        assert exporters.describe(name, leaky).leaked_paths
    else:
        import zipfile

        leaky.write_bytes(path.read_bytes())
        with zipfile.ZipFile(leaky, "a") as archive:
            root = archive.namelist()[0].split("/")[0]
            archive.writestr(f"{root}/extra/note.txt", str(tmp_path.home() / "secret"))
        assert exporters.describe(name, leaky).leaked_paths


def test_a_path_across_two_pieces_would_be_found(tmp_path, monkeypatch):
    monkeypatch.setattr(exporters, "_PIECE", 64)
    mark = f"{tmp_path.home()}/secret".encode()
    file = tmp_path / "file"
    for place in range(130):
        file.write_bytes(b"." * place + mark + b"." * 99)
        assert list(exporters._leaks(file)), place
    file.write_bytes(b"." * 1000)
    assert not list(exporters._leaks(file))


def test_a_lora_operator_would_be_found(tiny_base, tiny_adapter, tmp_path):
    """Exporting the unmerged model is the mistake that this looks for."""
    path, live = tiny_adapter(tmp_path, str(tiny_base))
    merged_files.merge_files(path, out=tmp_path / "merged")
    merged = stages.load_subject(tmp_path / "merged")
    unmerged = stages.Subject(merged.folder, live.eval(), merged.tokens, merged.interface)
    artifact = stages.export_stage("torchscript", unmerged, tmp_path)
    assert any("lora_A" in name for name in artifact.lora_names)


def test_onnx_states_its_opset_and_dynamic_axes(subject, tmp_path):
    artifact = stages.export_stage("onnx", subject, tmp_path)
    assert artifact.facts["opset"] >= 18
    assert {spec.axes for spec in artifact.inputs} == {("batch", "sequence")}
    assert artifact.outputs[0].axes == ("batch", 2)
    onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)


def test_a_large_onnx_model_gets_a_data_file_that_is_digested(subject, tmp_path, monkeypatch):
    monkeypatch.setattr(_onnx_translate, "LARGE", 1000)
    artifact = stages.export_stage("onnx", subject, tmp_path)
    assert [file.name for file in artifact.files] == ["model.onnx", "model.onnx.data"]
    batch = inputs.grid_batches(subject.signature, seed=1)[3]
    found, expected = answers(subject, ("onnx", artifact, tmp_path / "model.onnx"), batch)
    np.testing.assert_allclose(found, expected, atol=2e-6, rtol=2e-5)


@pytest.fixture(scope="module")
def apart(subject, tmp_path_factory):
    """A file with its weights beside it."""
    folder = tmp_path_factory.mktemp("apart")
    return stages.export_stage("onnx", subject, folder, form=Form(external_data=True)), folder


def test_weights_stand_apart_where_that_is_asked_for(subject, apart):
    artifact, folder = apart
    assert [file.name for file in artifact.files] == ["model.onnx", "model.onnx.data"]
    assert artifact.files[1].size_bytes > 80_000
    said = json.loads(artifact.facts["metadata"]["lora_export.data"])
    assert said == {"name": "model.onnx.data", "digest": artifact.files[1].digest}
    batch = inputs.grid_batches(subject.signature, seed=1)[3]
    found, expected = answers(subject, ("onnx", artifact, folder / "model.onnx"), batch)
    np.testing.assert_allclose(found, expected, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("fault", ["another's", "gone", "unsigned"])
def test_a_graph_without_its_own_weights_is_neither_read_nor_run(apart, tmp_path, fault):
    """onnxruntime would take the weights of another model of the same shapes and answer."""
    for file in ("model.onnx", "model.onnx.data"):
        shutil.copy(apart[1] / file, tmp_path / file)
    data = tmp_path / "model.onnx.data"
    if fault == "gone":
        data.unlink()
    elif fault == "unsigned":
        model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
        kept = [entry for entry in model.metadata_props if entry.key != "lora_export.data"]
        assert len(kept) == len(model.metadata_props) - 1
        del model.metadata_props[:]
        model.metadata_props.extend(kept)
        (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
        with pytest.raises(ExportFailed, match="which is not the data of an export"):
            exporters.load("onnx").inspect(tmp_path / "model.onnx")
        return
    else:
        data.write_bytes(bytes(reversed(data.read_bytes())))
        onnxruntime.InferenceSession(tmp_path / "model.onnx")
    exporter = exporters.load("onnx")
    for ask in (exporter.inspect, lambda path: exporter.open_runner(path, 1)):
        with pytest.raises(ExportFailed, match=r"model\.onnx"):
            ask(tmp_path / "model.onnx")


def test_a_form_that_a_format_does_not_heed_is_refused(subject, tmp_path):
    """An option that changes nothing would be taken for one that does."""
    for name, form, word in (
        ("torchscript", Form(external_data=True), "torchscript has no --external-data"),
        ("torchscript", Form(optimize=False), "torchscript has no --no-optimize"),
        ("onnx", Form(static=True), "--static changes nothing for onnx in fp32"),
        ("onnx", Form(target="generic"), "--target changes nothing for onnx in fp32"),
        ("onnx", Form("int8", target="cpu_avx512"), "'cpu_avx512' is none of native, generic"),
        ("onnx", Form("bf16"), "onnx is written in fp32, fp16, int8, int4, not bf16"),
    ):
        with pytest.raises(InputError, match=word):
            stages.export_stage(name, subject, tmp_path, form=form)
    assert not list(tmp_path.iterdir())


def test_torchscript_runs_where_only_torch_is_imported(subject, tmp_path):
    stages.export_stage("torchscript", subject, tmp_path)
    path = tmp_path / "model.pt"
    code = (
        "import sys, torch\n"
        f"model = torch.jit.load({str(path)!r})\n"
        "ids = torch.randint(5, 90, (7, 11))\n"
        "mask = torch.ones_like(ids)\n"
        "mask[2, 4:] = 0\n"
        "answer = model(input_ids=ids, token_type_ids=torch.zeros_like(ids), attention_mask=mask)\n"
        "alone = model(ids[2:3, :4], torch.zeros_like(ids[2:3, :4]), mask[2:3, :4])\n"
        "assert answer.shape == (7, 2) and torch.allclose(answer[2:3], alone, atol=1e-5)\n"
        "assert not {'transformers', 'lora_export'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


@pytest.mark.slow
def test_the_same_model_gives_the_same_bytes_in_a_fresh_process(subject, tmp_path):
    """Names inside a trace count up within one process, so each export gets its own."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom lora_export import exporters, stages\n"
        "subject = stages.load_subject(Path(sys.argv[1]))\n"
        "for name in exporters.names():\n"
        "    stages.export_stage(name, subject, Path(sys.argv[2]))\n"
    )
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
        command = [sys.executable, "-W", "ignore", "-c", code, str(subject.folder), str(folder)]
        subprocess.run(command, check=True, capture_output=True)
    contents = [storage.digest_tree(folder) for folder in folders]
    assert contents[0] == contents[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["onnx", "torchscript"])
def test_an_encoder_decoder_gives_the_same_bytes_in_a_fresh_process(tmp_path, name):
    """Its graph calls functions, which have another place in memory there."""
    code = (
        "import sys, pathlib\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "import families\nfrom lora_export import calling, exporters, inputs\n"
        "for family in sys.argv[4:]:\n"
        "    model = families.build(family)\n"
        "    found = calling.interface_of(model, families.tokens_of(model))\n"
        "    signature, path = found.signature, pathlib.Path(sys.argv[3], family)\n"
        "    exporters.load(sys.argv[2]).export(exporters.Request(\n"
        "        found.bind(model), signature, inputs.example(signature), {}, path))\n"
    )
    digests = []
    for families in (["t5", "llama"], ["llama", "t5"]):
        folder = tmp_path / families[0]
        folder.mkdir()
        here = str(Path(__file__).parent)
        command = [sys.executable, "-W", "ignore", "-c", code, here, name, str(folder), *families]
        subprocess.run(command, check=True, capture_output=True)
        digests.append(storage.digest_tree(folder))
    assert len(digests[0]) == 2
    assert digests[0] == digests[1]
