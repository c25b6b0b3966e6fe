"""What is fused in the graphs of real small models, as onnxruntime runs them."""

import copy
import dataclasses
import json
from pathlib import Path

import families
import pytest
from torch import nn

from lora_export import calling, fusing, inputs, stages
from lora_export.checks import fusions
from lora_export.records import Evidence, Form, Status


def subject_of(family):
    model = families.build(family)
    model.config.architectures = [type(model).__name__]
    interface = calling.interface_of(model, families.tokens_of(model))
    return stages.Subject(Path(), model, None, interface)


@pytest.fixture
def exported(tmp_path, monkeypatch):
    """`exported(subject, name="onnx", **form)`: an artifact of a model that lies in no folder."""

    def export(subject, name="onnx", **form):
        grid = inputs.grid_batches(subject.signature, 1)
        monkeypatch.setattr(stages, "_copy_processor", lambda source, target: None)
        monkeypatch.setattr(stages, "calibration", lambda *_: [b.arrays for b in grid[3:6]])
        return stages.export_stage(name, subject, tmp_path, form=Form(**form))

    return export


def judged(found):
    (verdict,) = fusions.judge(Evidence(fusions=found))
    return verdict


def counts(found):
    return {fusion.what: (fusion.expected, fusion.found) for fusion in found}


# Those in which it is not plain: shared layers, constants, outputs that keep their shape, permuted
# axes, calls that are dropped.
FAMILIES = ["albert", "deberta-v2", "bert-tokens", "bert-features", "swin", "convnext", "bart",
            "gemma", "opt", "bloom"]  # fmt: skip


@pytest.mark.parametrize(
    "family", ["gpt2", *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES)]
)
def test_what_should_be_one_operation_is(family, exported, tmp_path):
    subject = subject_of(family)
    found = fusing.fusions(subject, exported(subject), tmp_path)
    verdict = judged(found)
    assert (verdict.status, verdict.where) == (Status.PASS, ()), verdict.note


@pytest.mark.slow
def test_of_a_model_without_such_layers_nothing_is_expected(exported, tmp_path):
    subject = subject_of("llama")  # no LayerNorm, no GELU, no bias
    assert fusing.fusions(subject, exported(subject), tmp_path) == ()


def test_the_layers_of_the_model_are_counted_not_the_graphs(exported, tmp_path):
    subject = subject_of("bert")
    assert counts(fusing.fusions(subject, exported(subject), tmp_path)) == {
        "LayerNorm": (5, 5),
        "GELU": (2, 2),
        "linear layers with a bias": (14, 14),
    }


def test_linear_layers_that_are_not_one_operation_fail(exported, tmp_path):
    subject = subject_of("bert")
    artifact = exported(subject, optimize=False)
    verdict = judged(fusing.fusions(subject, artifact, tmp_path))
    assert (verdict.status, verdict.where) == (Status.FAIL, ("linear layers with a bias",))
    asked = fusing.fusions(subject, artifact, tmp_path, Form(optimize=False))
    assert set(counts(asked)) == {"LayerNorm", "GELU"}
    assert judged(asked).passed


class Decomposed(nn.Module):
    """A LayerNorm written out in a way that no runtime knows."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x):
        mean = x.mean(-1, keepdim=True)
        spread = (x * x).mean(-1, keepdim=True) - mean * mean + self.eps
        return (x - mean) * spread.rsqrt() * self.weight + self.bias


def test_a_layer_norm_that_was_written_out_fails(exported, tmp_path):
    subject = subject_of("bert")
    other = copy.deepcopy(subject.model)
    output = other.bert.encoder.layer[1].output
    output.LayerNorm = Decomposed(output.LayerNorm)
    artifact = exported(dataclasses.replace(subject, model=other))
    found = fusing.fusions(subject, artifact, tmp_path)
    assert counts(found)["LayerNorm"] == (5, 4)
    assert (judged(found).status, judged(found).where) == (Status.FAIL, ("LayerNorm",))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "what"),
    [
        ({"precision": "int8"}, "linear layers in eight bits"),
        ({"precision": "int8", "static": True}, "linear layers in eight bits"),
        ({"precision": "int4"}, "linear layers in four bits"),
    ],
)
def test_every_layer_but_those_that_were_kept_is_narrow(exported, tmp_path, form, what):
    subject = subject_of("bert")
    narrow = exported(subject, **form)
    asked = fusing.fusions(subject, narrow, tmp_path, Form(**form))
    expected, found = counts(asked)[what]
    assert 0 < expected == found
    wide = exported(subject)  # the control: none of its layers is narrow
    pretended = dataclasses.replace(wide, facts=narrow.facts, precision=form["precision"])
    missing = fusing.fusions(subject, pretended, tmp_path, Form(**form))
    assert counts(missing)[what] == (expected, 0)
    assert judged(missing).status is Status.FAIL


@pytest.mark.slow
@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_layers_that_were_kept_wider_are_not_expected(exported, tmp_path, name):
    """Of the eight layers and the head, three were kept."""
    if name == "openvino":
        pytest.importorskip("openvino")
    subject = subject_of("gpt2")
    narrow = exported(subject, name, precision="int8")
    kept = json.loads(narrow.facts["metadata"]["lora_export.kept_wider"])
    asked = fusing.fusions(subject, narrow, tmp_path, Form("int8"))
    assert counts(asked)["linear layers in eight bits"] == (9 - len(kept), 9 - len(kept))
    assert 0 < len(kept) < 9
    silent = dataclasses.replace(narrow, facts={"metadata": {}})  # does not say which were kept
    assert not judged(fusing.fusions(subject, silent, tmp_path, Form("int8"))).passed
