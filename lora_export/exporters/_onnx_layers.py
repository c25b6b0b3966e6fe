"""The linear layers and embeddings of an ONNX graph: what narrow weights are made for."""

import onnx_ir as ir

from lora_export.exporters._onnx_graph import Model, Node, Value, layer_of, untransposed
from lora_export.records import Array

# Fewer outputs than this, those of a classifier, cost nothing and decide the answer.
LEAST_FEATURES = 16
_FLOAT = ir.DataType.FLOAT


def linears(model: Model) -> dict[str, list[Node]]:
    """Return the products of each linear layer by the path of its module, in their order."""
    found: dict[str, list[Node]] = {}
    for node in model.graph:
        if _is_linear(node):
            found.setdefault(layer_of(node), []).append(node)
    return found


def embeddings(model: Model) -> list[Node]:
    """Return the look-ups in a table of weights that nothing else uses: a head may be tied."""
    return [node for node in model.graph if _is_embedding(node)]


def matrix(node: Node) -> Array:
    """Return the matrix that a linear layer multiplies by, (features in, features out)."""
    value, turned = _weight(node)
    array: Array = value.const_value.numpy()
    return array.T if turned else array


def features(node: Node) -> tuple[int, int]:
    """Return the shape of `matrix(node)`, without reading it."""
    value, turned = _weight(node)
    first, second = value.shape.numpy()
    return (second, first) if turned else (first, second)


def _weight(node: Node) -> tuple[Value, bool]:
    value, turned = untransposed(node.inputs[1])
    return value, turned != bool(node.attributes.get_int("transB", 0))


def _is_linear(node: Node) -> bool:
    """Whether `node` is a product with a constant matrix of enough columns, and perhaps a sum."""
    if node.op_type not in ("Gemm", "MatMul"):
        return False
    if node.inputs[0].const_value is not None:
        return False
    weight, _ = untransposed(node.inputs[1])
    parts = (weight, *(value for value in node.inputs[2:] if value is not None))
    if any(part.const_value is None or part.dtype != _FLOAT for part in parts):
        return False
    plain = node.op_type == "MatMul" or (
        not node.attributes.get_int("transA", 0)
        and node.attributes.get_float("alpha", 1.0) == node.attributes.get_float("beta", 1.0) == 1.0
    )
    return plain and len(weight.shape) == 2 and features(node)[1] >= LEAST_FEATURES


def _is_embedding(node: Node) -> bool:
    table = node.inputs[0] if node.op_type == "Gather" else None
    return (
        table is not None
        and table.const_value is not None
        and table.dtype == _FLOAT
        and len(table.shape) == 2
        and node.attributes.get_int("axis", 0) == 0
        and len(table.uses()) == 1
    )
