"""Rewrites of ONNX graphs: what they change, what they leave alone, and what int8 may cost."""

import families
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper
from onnx_made import arrays_of, counts, exported

from lora_export import inputs
from lora_export.exporters import _onnx_speed, _onnx_translate
from lora_export.runners.onnx import OnnxRunner

HIDDEN = 32


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A BERT with a head per token: as torch wrote it, and rewritten."""
    folder = tmp_path_factory.mktemp("forms")
    signature, plain = exported("bert-tokens", folder / "plain.onnx", optimize=False)
    _, fast = exported("bert-tokens", folder / "fast.onnx")
    return signature, plain, fast


# ---------------------------------------------------------------- at equal precision


def test_products_with_a_bias_become_one_operation(both):
    _, plain, fast = both
    assert counts(plain)["Gemm"] == 0
    assert counts(fast)["Gemm"] == 12  # six in each of two layers
    # Two products of activations in each layer, and the head, whose output is the graph's.
    assert counts(fast)["MatMul"] == counts(plain)["MatMul"] - 12 == 5


def test_softmax_is_not_looked_through_for_nan_any_more(both):
    _, plain, fast = both
    assert (counts(plain)["IsNaN"], counts(fast)["IsNaN"]) == (2, 0)


@pytest.mark.parametrize("padding", ["none", "right", "left", "hole", "all but one"])
def test_the_answers_stay_those_of_the_graph_that_torch_wrote(both, padding):
    signature, plain, fast = both
    arrays = inputs.made(signature, 3, 11, padding, 5)
    before, after = (OnnxRunner(path, 1).run(arrays)["logits"] for path in (plain, fast))
    attended = arrays["attention_mask"] == 1
    np.testing.assert_allclose(after[attended], before[attended], rtol=0, atol=2e-5)


def _guarded(drop, op="Where"):
    """Softmax under a mask, followed by the guard that SDPA's decomposition writes."""
    nodes = [
        helper.make_node(op, ["keep", "zero", "drop"], ["mask"])
        if op == "Where"
        else helper.make_node("Identity", ["given"], ["mask"]),
        helper.make_node("Add", ["scores", "mask"], ["masked"]),
        helper.make_node("Softmax", ["masked"], ["soft"], axis=-1),
        helper.make_node("IsNaN", ["soft"], ["bad"]),
        helper.make_node("Where", ["bad", "zero", "soft"], ["sound"]),
        helper.make_node("Neg", ["sound"], ["out"]),
    ]
    graph = helper.make_graph(
        nodes,
        "guarded",
        [
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, [2, 3]),
            helper.make_tensor_value_info("keep", TensorProto.BOOL, [2, 3]),
            helper.make_tensor_value_info("given", TensorProto.FLOAT, [2, 3]),
        ],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, [2, 3])],
        [
            onnx.numpy_helper.from_array(np.array(0, np.float32), "zero"),
            onnx.numpy_helper.from_array(np.array(drop, np.float32), "drop"),
        ],
    )
    return ir.from_proto(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    )


@pytest.mark.parametrize("drop", [-np.inf, -1e4])
def test_a_mask_of_the_graphs_own_is_made_finite_and_its_guard_goes(drop):
    model = _guarded(drop)
    assert _onnx_speed.optimise(model)["nan_guards"] == 1
    assert all(node.op_type != "IsNaN" for node in model.graph)
    values = [value.const_value.numpy() for value in model.graph.initializers.values()]
    assert all(np.isfinite(value).all() for value in values)


def test_a_guard_over_a_mask_that_comes_from_outside_stays():
    """It may hold minus infinity in a whole row, and then the guard is what makes zeros of it."""
    model = _guarded(-np.inf, op="Identity")
    assert _onnx_speed.optimise(model)["nan_guards"] == 0
    assert any(node.op_type == "IsNaN" for node in model.graph)


def test_rewriting_twice_changes_nothing_more(both):
    model = ir.load(str(both[2]))
    assert set(_onnx_speed.optimise(model).values()) == {0}


# ---------------------------------------------------------------- from torch to the file


def test_the_file_is_the_graph_weight_by_weight(both, tmp_path):
    """What is written piece by piece, as protobuf's own reader reads it."""
    model = ir.load(str(both[2]))
    _onnx_translate.save(model, tmp_path / "again.onnx")
    onnx.checker.check_model(str(tmp_path / "again.onnx"), full_check=True)
    found, expected = onnx.load(tmp_path / "again.onnx"), ir.to_proto(model)
    assert [n.SerializeToString() for n in found.graph.node] == [
        n.SerializeToString() for n in expected.graph.node
    ]
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in found.graph.initializer}
    wanted = {t.name: onnx.numpy_helper.to_array(t) for t in expected.graph.initializer}
    assert arrays.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(arrays[name], array)
    assert len(model.graph.initializers) == len(wanted)  # the graph has them back


@pytest.mark.parametrize("number", [0, 1, 127, 128, 300, 16_383, 16_384, 2**31 + 5])
def test_numbers_are_written_as_protobuf_writes_them(number):
    from google.protobuf.internal import encoder

    assert _onnx_translate._varint(number) == encoder._VarintBytes(number)


def test_weights_have_the_names_that_they_have_in_the_model(both):
    names = set(arrays_of(both[2]))
    assert "model.bert.encoder.layer.0.intermediate.dense.weight" in names  # not a small one
    model = families.build("bert-tokens")
    shapes = {f"model.{name}": tuple(p.shape) for name, p in model.named_parameters()}
    found = {name: array.shape for name, array in arrays_of(both[2]).items() if name in shapes}
    assert found == {name: shapes[name] for name in found}
    assert len(found) >= 20


def test_where_the_short_way_fails_the_long_one_is_taken(both, tmp_path, monkeypatch):
    whole, calls = torch.onnx.export, []
    optimised = torch.onnx.ONNXProgram.optimize

    def failing(*args, **options):
        calls.append("export")
        if len(calls) == 1:
            raise torch.onnx.errors.OnnxExporterError("no translation")
        return whole(*args, **options)

    def noted(program):
        calls.append("optimize")
        optimised(program)

    monkeypatch.setattr(torch.onnx, "export", failing)
    monkeypatch.setattr(torch.onnx.ONNXProgram, "optimize", noted)
    signature, path = exported("bert-tokens", tmp_path / "long.onnx")
    assert calls == ["export", "export", "optimize"]
    arrays = inputs.made(signature, 3, 11, "left", 5)
    before, after = (OnnxRunner(p, 1).run(arrays)["logits"] for p in (both[2], path))
    attended = arrays["attention_mask"] == 1
    np.testing.assert_allclose(after[attended], before[attended], rtol=0, atol=2e-5)
