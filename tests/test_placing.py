"""Real files: what the merged model has is found inside, and what was damaged there is named."""

import json

import families
import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
import transformers
from conftest import scale_up
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from safetensors.torch import load_file, save_file

from lora_export import (
    calling,
    exporters,
    inputs,
    matching,
    merged_files,
    models,
    placing,
    stages,
)
from lora_export.checks import weights
from lora_export.records import Evidence, Form, Status

QUERY = "bert.encoder.layer.{}.intermediate.dense.weight"


@pytest.fixture(scope="module")
def subjects(tiny_base, tiny_adapter, tmp_path_factory):
    """Two merged models of the same base."""

    def subject(seed):
        folder = tmp_path_factory.mktemp("merged")
        adapter, _ = tiny_adapter(
            folder, str(tiny_base), seed=seed, targets=("query", "intermediate.dense")
        )
        merged_files.merge_files(adapter, out=folder / "merged")
        return stages.load_subject(folder / "merged")

    return [subject(seed) for seed in range(2)]


@pytest.fixture(scope="module")
def onnx_file(subjects, tmp_path_factory):
    """The artifact of the first and its path; the weights lie in a file beside the graph."""
    return with_data(subjects[0], tmp_path_factory.mktemp("onnx"))


def with_data(subject, folder):
    artifact = stages.export_stage("onnx", subject, folder, form=Form(external_data=True))
    return artifact, folder / "model.onnx"


def judged(subject, artifact, path):
    found = placing.placements_of(subject.model, subject.interface, subject.folder, artifact, path)
    (verdict,) = weights.judge(Evidence(artifacts=(artifact,), placements=found))
    return verdict


def test_a_right_file_passes(subjects, onnx_file):
    verdict = judged(subjects[0], *onnx_file)
    assert (verdict.status, verdict.compared) == (Status.PASS, 41)


# ---------------------------------------------------------------- planted faults


@pytest.fixture
def tampered(subjects, onnx_file, tmp_path):
    """`tampered(change)`: the verdict after `change` was made to the arrays of the real file."""

    def judge(change):
        artifact, path = onnx_file
        model = onnx.load(path)
        arrays = {t.name: numpy_helper.to_array(t).copy() for t in model.graph.initializer}
        change(arrays)
        for tensor in model.graph.initializer:
            tensor.CopyFrom(numpy_helper.from_array(arrays[tensor.name], tensor.name))
        onnx.save(model, tmp_path / "model.onnx")
        return judged(subjects[0], artifact, tmp_path / "model.onnx")

    return judge


def test_weights_of_zeros_fails_at_their_tensor(tampered):
    verdict = tampered(lambda arrays: arrays[f"model.{QUERY.format(1)}"].fill(0))
    assert (verdict.status, verdict.where) == (Status.FAIL, (QUERY.format(1),))


def test_weights_of_two_layers_swapped_fails_at_both(tampered):
    first, second = (f"model.{QUERY.format(layer)}" for layer in range(2))

    def swap(arrays):
        arrays[first], arrays[second] = arrays[second], arrays[first]

    verdict = tampered(swap)
    assert (verdict.status, verdict.where) == (
        Status.FAIL,
        (QUERY.format(0), QUERY.format(1)),
    )


def test_a_head_whose_rows_changed_places_fails(tampered):
    def permute(arrays):
        arrays["model.classifier.weight"] = arrays["model.classifier.weight"][::-1].copy()

    assert tampered(permute).where == ("classifier.weight",)


def test_nothing_changed_passes(tampered):
    assert tampered(lambda arrays: None).passed


def changed_by(subjects):
    first, second = (load_file(s.folder / "model.safetensors") for s in subjects)
    return {name for name, value in first.items() if not torch.equal(value, second[name])}


def test_the_file_of_another_adapter_fails_at_what_that_changes(subjects, onnx_file):
    verdict = judged(subjects[1], *onnx_file)
    assert verdict.status is Status.FAIL
    assert set(verdict.where) == changed_by(subjects)
    assert len(verdict.where) < verdict.compared


@pytest.mark.slow
def test_the_data_of_another_run_fails(subjects, onnx_file, tmp_path):
    artifact, path = onnx_file
    _, other = with_data(subjects[1], tmp_path)
    other.write_bytes(path.read_bytes())  # the graph of the first, beside the data of the second
    verdict = judged(subjects[0], artifact, other)
    assert verdict.status is Status.FAIL
    small = {"classifier.weight", "classifier.bias"}  # these stay in the graph
    assert set(verdict.where) == changed_by(subjects) - small


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_flipped_bit_fails_at_its_tensor(subjects, onnx_file, data):
    artifact, path = onnx_file
    held = list(exporters.load("onnx").tensors(path))
    wanted = placing.wanted(subjects[0].model, subjects[0].folder)

    def places(tensors):
        return matching.placements("onnx", "fp32", lambda: tensors, wanted, set)

    at = {name: p.tensor for p in places(held) for name in p.found}
    place = data.draw(st.sampled_from([i for i, (name, _) in enumerate(held) if name in at]))
    name, array = held[place]
    bits = array.copy().view(np.uint32)
    bits.flat[data.draw(st.integers(0, array.size - 1))] ^= 1 << data.draw(st.integers(0, 31))
    damaged = [*held[:place], (name, bits.view(np.float32)), *held[place + 1 :]]
    found = places(damaged)
    (verdict,) = weights.judge(Evidence(artifacts=(artifact,), placements=found))
    assert verdict.status is Status.FAIL
    assert at[name] in verdict.where


# ---------------------------------------------------------------- what is wanted


def test_tensors_come_from_the_merged_files(subjects):
    stored = load_file(subjects[0].folder / "model.safetensors")
    found = placing.wanted(subjects[0].model, subjects[0].folder)
    assert {each.name for each in found} == stored.keys()
    for each in found:
        assert np.array_equal(each.read(), stored[each.name].numpy())


def test_a_file_changed_after_it_was_loaded_fails(subjects, onnx_file, tmp_path):
    """The files are the truth, and not the model that was made from them."""
    subject, name = subjects[0], "bert.pooler.dense.weight"
    stored = load_file(subject.folder / "model.safetensors")
    save_file({**stored, name: stored[name] + 1}, tmp_path / "model.safetensors")
    artifact, path = onnx_file
    found = placing.placements_of(subject.model, subject.interface, tmp_path, artifact, path)
    assert [p.tensor for p in found if p.differing] == [name]


def test_tensors_have_the_dtype_that_the_model_has_them_in(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    scale_up(transformers.LlamaForCausalLM(config)).save_pretrained(tmp_path)
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    found = {each.path: each for each in placing.wanted(model, tmp_path)}
    for path, value in model.state_dict().items():
        array = found[path].read()
        assert array.dtype == ml_dtypes.bfloat16
        assert np.array_equal(array.astype(np.float32), value.float().numpy())
    assert found["lm_head.weight"].name == "lm_head.weight"  # the file has it once
    assert found["model.norm.weight"].name == "model.norm.weight"


def test_tensors_that_are_put_together_as_they_are_loaded_are_the_models_own(tmp_path):
    config = transformers.MixtralConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    with models.quiet():
        scale_up(transformers.MixtralForCausalLM(config)).save_pretrained(tmp_path)
        model = transformers.MixtralForCausalLM.from_pretrained(tmp_path)
    found = {each.path: each for each in placing.wanted(model, tmp_path)}
    assert found.keys() == model.state_dict().keys()
    for path, value in model.state_dict().items():
        assert np.array_equal(found[path].read(), value.numpy())


@pytest.fixture
def pooled(tmp_path):
    """A sentence encoder, whose pooler makes none of the outputs, and how it is called."""
    model = families.build("bert-features")
    with models.quiet():
        model.save_pretrained(tmp_path)
    kinds = [f"sentence_transformers.models.{kind}" for kind in ("Transformer", "Pooling")]
    modules = [{"type": kind, "path": kind[-7:]} for kind in kinds]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "Pooling").mkdir()
    (tmp_path / "Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    return model, calling.interface_of(model, families.tokens_of(model), folder=tmp_path), tmp_path


def test_what_no_output_depends_on_is_not_used(pooled):
    model, interface, _ = pooled
    names = ["pooler.dense.weight", "encoder.layer.0.output.dense.weight"]
    assert placing.used(model, interface, names) == {names[1]}
    assert placing.used(model, interface, names[:1]) == set()
    assert not any(value.requires_grad for value in model.parameters())


def test_what_an_export_leaves_out_because_nothing_depends_on_it_is_no_fault(pooled):
    model, interface, folder = pooled
    path = folder / "model.onnx"
    example = inputs.example(interface.signature)
    exporter = exporters.load("onnx")
    exporter.export(
        exporters.Request(interface.bind(model), interface.signature, example, {}, path)
    )
    found = placing.placements_of(model, interface, folder, exporters.describe("onnx", path), path)
    assert not any(p.differing for p in found)
    left = set(model.state_dict()) - {p.tensor for p in found}
    assert left == {"pooler.dense.weight", "pooler.dense.bias"}


# ---------------------------------------------------------------- precisions


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "precision"),
    [("onnx", "fp16"), ("onnx", "int8"), ("pt2", "bf16"), ("torchscript", "fp16"),
     ("openvino", "bf16"), ("openvino", "int8")],
)  # fmt: skip
def test_each_precision_is_the_merged_tensors_rounded(subjects, tmp_path, name, precision):
    if name == "openvino":
        pytest.importorskip("openvino")
    artifact = stages.export_stage(name, subjects[0], tmp_path, form=Form(precision))
    path = tmp_path / artifact.files[0].name
    right, wrong = (judged(subject, artifact, path) for subject in subjects)
    assert right.passed, right.note
    assert right.compared > 25
    assert wrong.status is Status.FAIL
    assert set(wrong.where) <= changed_by(subjects)
