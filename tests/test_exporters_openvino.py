"""OpenVINO files: names, free axes, float32 unless asked otherwise, no trace of the machine."""

import json
import sys

import numpy as np
import pytest
import transformers
from program_made import (
    ABOUT,
    SHAPES,
    STEPS,
    arrays,
    assert_same,
    expected,
    plain,
    step,
    with_cache,
)

from lora_export import exporters
from lora_export.errors import ExportFailed, InputError
from lora_export.exporters import Request
from lora_export.exporters import openvino as exporter
from lora_export.records import Form
from lora_export.runners.openvino import OpenvinoRunner

openvino = pytest.importorskip("openvino")


@pytest.fixture(scope="module")
def classifier(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("openvino") / "model.xml"
    model, signature, example = plain(tiny)
    exporter.export(Request(model, signature, example, ABOUT, path))
    return model, signature, path


@pytest.fixture(scope="module")
def decoder(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("openvino") / "model.xml"
    model, signature, example = with_cache(tiny)
    exporter.export(Request(model, signature, example, ABOUT, path))
    return model, signature, path


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_and_padding_gives_the_models_answer(classifier, shape):
    model, signature, path = classifier
    given = arrays(*shape)
    assert_same(exporter.open_runner(path, 1).run(given), expected(model, signature, given))


@pytest.mark.slow
@pytest.mark.parametrize("shape", STEPS, ids=str)
def test_a_cache_of_any_length_goes_in_and_comes_out(decoder, shape):
    model, signature, path = decoder
    given = step(*shape)
    assert_same(exporter.open_runner(path, 1).run(given), expected(model, signature, given))


@pytest.mark.slow
def test_a_decoder_declares_its_axes(decoder):
    artifact = exporters.describe("openvino", decoder[2])
    assert (artifact.inputs, artifact.outputs) == (decoder[1].inputs, decoder[1].outputs)


def test_the_artifact_is_two_files_without_a_trace_of_this_machine(classifier):
    _, signature, path = classifier
    artifact = exporters.describe("openvino", path)
    assert [file.name for file in artifact.files] == ["model.xml", "model.bin"]
    assert sorted(file.name for file in path.parent.iterdir()) == ["model.bin", "model.xml"]
    assert (artifact.inputs, artifact.outputs) == (signature.inputs, signature.outputs)
    assert (artifact.lora_names, artifact.leaked_paths) == ((), ())
    assert artifact.facts["metadata"] == ABOUT
    assert ".onnx" not in path.read_text()


def test_the_answers_of_one_run_outlive_the_next(classifier):
    runner = exporter.open_runner(classifier[2], 1)
    first = runner.run(arrays(3, 8, "none"))["logits"]
    kept = first.copy()
    runner.run(arrays(3, 8, "none", seed=1))
    np.testing.assert_array_equal(first, kept)


def test_it_computes_in_float32_and_with_the_threads_that_were_asked_for(classifier):
    runner = exporter.open_runner(classifier[2], 1)
    assert runner.precision == "float32"
    asked = ("NUM_STREAMS", "PERFORMANCE_HINT", "INFERENCE_NUM_THREADS")
    found = [str(runner.module.get_property(name)).rsplit(".")[-1] for name in asked]
    assert found == ["1", "LATENCY", "1"]


def test_another_precision_is_stated(classifier):
    if not _has_bfloat16():
        pytest.skip("this processor has no bfloat16")
    assert OpenvinoRunner(classifier[2], 1, "bf16").precision == "bfloat16"


def test_the_same_model_gives_the_same_bytes(tiny, classifier, tmp_path):
    model, signature, example = plain(tiny)
    path = tmp_path / "model.xml"
    exporter.export(Request(model, signature, example, ABOUT, path))
    for mine, other in zip(exporter.files(path), exporter.files(classifier[2]), strict=True):
        assert mine.read_bytes() == other.read_bytes()


@pytest.mark.slow
def test_tied_weights_are_stored_once(tmp_path):
    """Of a vocabulary that is not tiny: the ONNX exporter folds what has up to 8192 elements."""
    sizes = []
    for is_tied in (False, True):
        config = transformers.LlamaConfig(
            vocab_size=600, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
            intermediate_size=64, tie_word_embeddings=is_tied, use_cache=False,
        )  # fmt: skip
        model, signature, example = plain(
            lambda _, config=config: transformers.LlamaForCausalLM(config),
            outputs=(("batch", "sequence", 600),),
        )
        path = tmp_path / f"{is_tied}.xml"
        exporter.export(Request(model, signature, example, ABOUT, path))
        sizes.append(path.with_suffix(".bin").stat().st_size)
    assert sizes[0] - sizes[1] == pytest.approx(4 * 600 * 32, abs=64)


@pytest.mark.parametrize("name", ["model.xml", "model.bin"])
def test_a_damaged_file_is_refused(classifier, tmp_path, name):
    for file in exporter.files(classifier[2]):
        content = file.read_bytes()
        size = len(content) // 3 if file.name == name else len(content)
        (tmp_path / file.name).write_bytes(content[:size])
    for ask in (exporter.inspect, lambda path: exporter.open_runner(path, 1)):
        with pytest.raises(ExportFailed, match=r"model\.xml"):
            ask(tmp_path / "model.xml")


def test_a_graph_of_somebody_else_is_refused(classifier, tmp_path):
    graph = openvino.Core().read_model(str(classifier[2]))
    graph.set_rt_info("0", ["lora_export"])
    openvino.save_model(graph, str(tmp_path / "model.xml"))
    with pytest.raises(ExportFailed, match=r"model\.xml is no OpenVINO graph of lora-export"):
        exporter.inspect(tmp_path / "model.xml")


def test_the_name_has_to_end_in_xml(tiny, tmp_path):
    model, signature, example = plain(tiny)
    with pytest.raises(InputError, match=r"NAME\.xml and NAME\.bin; model\.bin is neither"):
        exporter.export(Request(model, signature, example, ABOUT, tmp_path / "model.bin"))


def test_without_the_package_the_extra_is_named(tiny, classifier, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    model, signature, example = plain(tiny)
    path = classifier[2]
    for ask in (
        lambda: exporter.export(Request(model, signature, example, ABOUT, tmp_path / "model.xml")),
        lambda: exporter.inspect(path),
        lambda: exporter.open_runner(path, 1),
    ):
        with pytest.raises(InputError, match=r"pip install 'lora-export\[openvino\]'"):
            ask()
    assert list(tmp_path.iterdir()) == []


def _has_bfloat16():
    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def test_eight_bits_are_smaller_and_near(tiny, classifier, tmp_path):
    model, signature, example = plain(tiny)
    path = tmp_path / "model.xml"
    about = {**ABOUT, "lora_export.precision": '"int8"'}
    runs = [arrays(4, 9, "right", seed) for seed in range(3)]
    exporter.export(Request(model, signature, example, about, path, Form("int8"), runs))
    large, small = (file.with_suffix(".bin").stat().st_size for file in (classifier[2], path))
    assert small < 0.5 * large
    kept = exporter.inspect(path).facts["metadata"]["lora_export.kept_wider"]
    assert len(json.loads(kept)) < 12
    given = arrays(3, 8, "left")
    found = exporter.open_runner(path, 2).run(given)["logits"]
    off = np.abs(found - expected(model, signature, given)["logits"]).max()
    assert 1e-5 < off < 0.1


def test_eight_bits_need_inputs_to_find_ranges_on(tiny, tmp_path):
    with pytest.raises(InputError, match="needs inputs to find ranges on"):
        exporter.export(Request(*plain(tiny), ABOUT, tmp_path / "model.xml", Form("int8")))


@pytest.mark.slow
def test_a_model_that_would_end_the_process_is_refused(tiny, classifier, tmp_path):
    """OpenVINO 2026.4 divides by zero when it compiles a Llama for one thread in bfloat16."""
    if not _has_bfloat16():
        pytest.skip("this processor has no bfloat16")
    path = tmp_path / "model.xml"
    model, signature, example = plain(tiny, "llama", (("batch", "sequence", 100),))
    exporter.export(Request(model, signature, example, ABOUT, path))
    with pytest.raises(ExportFailed, match="ends the process when it compiles"):
        OpenvinoRunner(path, 1, "bf16")
    given = arrays(2, 5, "none")
    assert OpenvinoRunner(path, 2, "bf16").run(given)["logits"].shape == (2, 5, 100)
    assert OpenvinoRunner(classifier[2], 1, "bf16").run(given)["logits"].shape == (2, 2)
