"""An ONNX graph in float64: what onnx's own reference would round, or refuse."""

import math

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from lora_export.errors import ExportFailed
from lora_export.exporters import _onnx_double
from lora_export.exporters import onnx as exporter

FLOAT, INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64


def graph_of(*nodes, outputs=("y",), initializers=(), **inputs):
    """A graph of `nodes`, in float64; of each input the type."""
    graph = helper.make_graph(
        list(nodes),
        "made",
        [helper.make_tensor_value_info(name, kind, None) for name, kind in inputs.items()],
        [helper.make_tensor_value_info(name, FLOAT, None) for name in outputs],
        list(initializers),
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return _onnx_double.OnnxInDouble(model)


def test_erf_is_that_of_float64():
    x = np.array([-2.0, 0.1, 0.7])
    found = graph_of(helper.make_node("Erf", ["x"], ["y"]), x=FLOAT).run({"x": x})["y"]
    assert found == pytest.approx([math.erf(v) for v in x], rel=1e-15)


def test_gelu_is_that_of_float64():
    x = np.array([-2.0, 0.1, 0.7])
    found = graph_of(helper.make_node("Gelu", ["x"], ["y"]), x=FLOAT).run({"x": x})["y"]
    assert found == pytest.approx([v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in x], rel=1e-14)


@pytest.mark.parametrize(
    "node",
    [
        helper.make_node("Cast", ["x"], ["y"], to=FLOAT),
        helper.make_node("Constant", [], ["y"], value_float=0.1),
        helper.make_node("Constant", [], ["y"], value_floats=[0.1, 0.2]),
        helper.make_node("Constant", [], ["y"], value=numpy_helper.from_array(np.float32([1]))),
        helper.make_node("ConstantOfShape", ["n"], ["y"]),
        helper.make_node("EyeLike", ["e"], ["y"], dtype=FLOAT),
        helper.make_node("If", ["b"], ["y"], **{
            branch: helper.make_graph(
                [helper.make_node("Constant", [], ["z"], value_float=0.1)],
                branch, [], [helper.make_tensor_value_info("z", FLOAT, None)])
            for branch in ("then_branch", "else_branch")
        }),
    ],
    ids=lambda node: node.op_type,
)  # fmt: skip
def test_whatever_makes_float32_makes_float64(node):
    arrays = {
        "x": np.float32([0.1]),
        "n": np.array([2]),
        "e": np.zeros((2, 2), np.int64),
        "b": np.array(True),
    }
    kinds = {"x": FLOAT, "n": INT64, "e": INT64, "b": onnx.TensorProto.BOOL}
    assert graph_of(node, **kinds).run(arrays)["y"].dtype == np.float64


def test_a_number_that_float32_takes_for_whole_becomes_that_integer():
    nodes = [
        helper.make_node("Cast", ["x"], ["i"], to=INT64),
        helper.make_node("Cast", ["i"], ["y"], to=FLOAT),
    ]
    x = np.array([2 - 1e-7, -3 + 1e-7, 2.999, 1e-9, -0.7])
    assert graph_of(*nodes, x=FLOAT).run({"x": x})["y"].tolist() == [2, -3, 2, 0, 0]


def test_elements_are_gathered_where_another_axis_has_fewer_places():
    x = np.arange(12.0).reshape(3, 4)
    places = np.array([[3, 0], [1, -1]])
    node = helper.make_node("GatherElements", ["x", "i"], ["y"], axis=1)
    found = graph_of(node, x=FLOAT, i=INT64).run({"x": x, "i": places})["y"]
    assert found.tolist() == [[3, 0], [5, 7]]


def test_values_are_the_floats_that_are_computed_and_no_weight_or_input():
    nodes = [
        helper.make_node("Add", ["x", "w"], ["sum"]),
        helper.make_node("Shape", ["sum"], ["size"]),
        helper.make_node("Neg", ["sum"], ["y"]),
    ]
    weight = numpy_helper.from_array(np.float32([1]), "w")
    graph = graph_of(*nodes, initializers=[weight], x=FLOAT)
    found = graph.values({"x": np.float32([2]), "unused": np.zeros(1)})
    assert {name: value.tolist() for name, value in found.items()} == {"sum": [3], "y": [-3]}


def test_an_input_that_is_not_given_is_named():
    graph = graph_of(helper.make_node("Neg", ["x"], ["y"]), x=FLOAT)
    with pytest.raises(ExportFailed, match="the graph asks for x"):
        graph.run({})


def test_what_cannot_be_computed_is_an_error_of_the_export():
    graph = graph_of(helper.make_node("MatMul", ["x", "x"], ["y"]), x=FLOAT)
    with pytest.raises(ExportFailed, match="cannot be evaluated"):
        graph.run({"x": np.zeros((2, 3), np.float32)})


def test_a_file_that_is_no_graph_is_refused(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"nonsense")
    with pytest.raises(ExportFailed, match="is no ONNX file"):
        exporter.in_double(path)
