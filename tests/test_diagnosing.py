"""Faults planted into graphs that were exported rightly: each is found, and at the right module."""

import dataclasses

import families
import numpy as np
import onnx
import onnx_made
import pytest
import torch
from onnx_made import edited, filled, named, nodes, subject_of
from torch import nn

from lora_export import calling, compare, diagnosing, exporters, inputs, models, stages
from lora_export.checks import graph
from lora_export.errors import ExportFailed, InputError
from lora_export.records import Batch, Evidence, GraphAnswer, ModuleOutput
from lora_export.runners.onnx import OnnxRunner


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """`exported(family, name)`: a file that is right, its model and its inputs; made once."""
    made = {}

    def make(family, name="onnx"):
        if (family, name) not in made:
            folder = tmp_path_factory.mktemp(family)
            subject, exporter = subject_of(family, folder), exporters.load(name)
            path = folder / f"model{exporter.SUFFIX}"
            signature = subject.signature
            example = inputs.example(signature)
            request = exporters.Request(
                subject.interface.bind(subject.model), signature, example, {}, path
            )
            with models.quiet():
                exporter.export(request)
            made[family, name] = subject, path, inputs.grid_batches(signature, 3)
        return made[family, name]

    return make


@pytest.fixture
def faulty(exported, tmp_path):
    """`faulty(family, change)`: the same with a copy of the ONNX file, its graph changed."""

    def make(family, change):
        subject, path, batches = exported(family)
        copy = tmp_path / path.name
        copy.write_bytes(path.read_bytes())
        edited(copy, change)
        return subject, copy, batches

    return make


def evidence_of(subject, path, batches, name="onnx"):
    artifact = exporters.describe(name, path)
    answers = diagnosing.graph_answers(subject, artifact, path, batches)
    return artifact, Evidence(
        signature=subject.signature, artifacts=(artifact,), batches=batches, graphs=answers
    )


def parted(subject, path, batches):
    """The verdict on the file's graph, and the module at which it parts from the model."""
    artifact, evidence = evidence_of(subject, path, batches)
    (verdict,) = graph.judge(evidence)
    batch = batches[diagnosing.worst(evidence.graphs)]
    return verdict, compare.parted(diagnosing.module_outputs(subject, artifact, path, batch))


# ---------------------------------------------------------------- faults


def attribute(node, name):
    (found,) = [a for a in node.attribute if a.name == name]
    return found


def no_bias(part):
    def change(graph):
        tensor = named(graph, part)
        filled(tensor, 0 * onnx.numpy_helper.to_array(tensor))

    return change


def one_element(part, by):
    def change(graph):
        tensor = named(graph, part)
        array = onnx.numpy_helper.to_array(tensor).copy()
        array.flat[3] += by
        filled(tensor, array)

    return change


def swapped(first, second):
    def change(graph):
        pair = named(graph, first), named(graph, second)
        arrays = [onnx.numpy_helper.to_array(tensor) for tensor in pair]
        for tensor, array in zip(pair, reversed(arrays), strict=True):
            filled(tensor, array)

    return change


def approximated(graph):
    attribute(nodes(graph, "Gelu")[1], "approximate").s = b"tanh"


def exact_gelu(graph):
    """0.5 x (1 + tanh(...)) becomes x/2 + x tanh(...)/2 with another constant: 0.0447 for 0.044715."""
    for tensor in graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        if array.ndim == 0 and abs(float(array) - 0.044715) < 1e-6:
            filled(tensor, np.array(0.0447))


def epsilon(to):
    def change(graph):
        attribute(nodes(graph, "LayerNormalization")[2], "epsilon").f = to

    return change


def rms_epsilon(graph):
    """Of the first norm of Llama alone: the others share the constant."""
    first = next(node for node in graph.node if node.op_type == "Sqrt")
    (before,) = [node for node in graph.node if first.input[0] in node.output]
    graph.initializer.append(onnx.numpy_helper.from_array(np.float32(1e-3), "other"))
    before.input[1] = "other"


def no_mask(graph):
    always = onnx.helper.make_node("Equal", ["attention_mask"] * 2, ["always"])
    casts = [onnx.helper.make_node("Cast", ["always"], ["ones"], to=onnx.TensorProto.INT64)]
    for node in graph.node:
        if node.op_type in ("Cast", "Reshape"):  # the places are counted by another
            node.input[:] = ["ones" if n == "attention_mask" else n for n in node.input]
    graph.node.insert(0, casts[0])
    graph.node.insert(0, always)


def next_position(find):
    """One is added to the positions that the node reads which `find` chooses, at its last input."""

    def change(graph):
        place = next(i for i, node in enumerate(graph.node) if find(node))
        graph.initializer.append(onnx.numpy_helper.from_array(np.int64(1), "one"))
        graph.node.insert(
            place, onnx.helper.make_node("Add", [graph.node[place].input[-1], "one"], ["next"])
        )
        graph.node[place + 1].input[-1] = "next"

    return change


def other_axis(graph):
    attribute(nodes(graph, "Softmax")[1], "axis").i = -2


def reads(part):
    return lambda node: node.op_type == "Gather" and part in node.input[0]


BERT, GPT2, LLAMA = "bert.encoder.layer", "transformer.h", "model.layers"
FAULTS = [
    ("bert", no_bias("layer.1.intermediate.dense.bias"), f"{BERT}.1.intermediate.dense"),
    ("bert", one_element("layer.0.output.LayerNorm.bias", 1e-4), f"{BERT}.0.output.LayerNorm"),
    ("bert", approximated, f"{BERT}.1.intermediate.intermediate_act_fn"),
    ("bert", epsilon(1e-5), f"{BERT}.0.output.LayerNorm"),
    ("bert", no_mask, f"{BERT}.0.attention.self"),
    (
        "bert",
        next_position(reads("position_embeddings")),
        "bert.embeddings.position_embeddings",
    ),
    (
        "bert",
        swapped("layer.0.output.dense.weight", "layer.1.output.dense.weight"),
        f"{BERT}.0.output.dense",
    ),
    ("bert", other_axis, f"{BERT}.1.attention.self"),
    ("gpt2", no_bias("h.1.mlp.c_fc.bias"), f"{GPT2}.1.mlp.c_fc"),
    ("gpt2", one_element("h.0.ln_2.bias", 1e-4), f"{GPT2}.0.ln_2"),
    ("gpt2", exact_gelu, f"{GPT2}.0.mlp.act"),
    ("gpt2", epsilon(1e-4), f"{GPT2}.1.ln_1"),
    ("gpt2", no_mask, f"{GPT2}.0.attn"),
    ("gpt2", next_position(reads("wpe")), "transformer.wpe"),
    ("gpt2", swapped("h.0.mlp.c_proj.weight", "h.1.mlp.c_proj.weight"), f"{GPT2}.0.mlp.c_proj"),
    ("gpt2", other_axis, f"{GPT2}.1.attn"),
    ("llama", one_element("layers.1.mlp.up_proj.weight", 1e-2), f"{LLAMA}.1.mlp.up_proj"),
    ("llama", rms_epsilon, f"{LLAMA}.0.input_layernorm"),
    ("llama", no_mask, f"{LLAMA}.0.self_attn"),
    ("llama", next_position(lambda node: node.op_type == "Cast" and node.output[0] == "to_7"),
     "model.rotary_emb"),
    ("llama", swapped("layers.0.mlp.gate_proj", "layers.1.mlp.gate_proj"),
     f"{LLAMA}.0.mlp.gate_proj"),
    ("llama", other_axis, f"{LLAMA}.1.self_attn"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "change", "module"), FAULTS, ids=[f"{f}-{i}" for i, (f, _, _) in enumerate(FAULTS)]
)
def test_a_planted_fault_fails_and_is_located(faulty, family, change, module):
    verdict, found = parted(*faulty(family, change))
    assert not verdict.passed, verdict.note
    assert found is not None
    assert found.module == module
