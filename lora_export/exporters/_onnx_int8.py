"""Eight-bit weights in an ONNX graph, in the form that onnxruntime runs fastest on a CPU."""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from lora_export.compare import divergence, probabilities, turn
from lora_export.environment import cores
from lora_export.exporters._onnx_graph import (
    Graph,
    Model,
    Node,
    Value,
    initializer,
    insert,
    layer_of,
    replace,
    tidy,
    untransposed,
)
from lora_export.records import PRESENT, Array
from lora_export.runners.onnx import OnnxRunner

# Mean loss on the calibration inputs that is good enough: a tenth of what `checks.fidelity` allows,
# because those inputs are few.
TARGET = 0.001
# Fewer outputs than this, those of a classifier, cost nothing and decide the answer.
LEAST_FEATURES = 16
_FLOAT = ir.DataType.FLOAT


def choose(model: Model, runs: Sequence[Mapping[str, Array]]) -> tuple[str, ...]:
    """Return the layers to keep in float32, the fewest of the most sensitive that suffice.

    A layer is as sensitive as the answers are when it alone is int8. The answers to `runs`, inputs
    of real texts or pictures, are compared with those of the float32 graph.
    """
    reference = _answers(model, runs)

    def loss(kept: Collection[str]) -> float:
        trial = ir.from_proto(ir.to_proto(model))
        quantise(trial, kept)
        return _loss(reference, _answers(trial, runs))

    if not runs or loss(()) <= TARGET:
        return ()
    layers = linears(model)
    ranked = sorted(layers, key=lambda layer: -loss([other for other in layers if other != layer]))
    for count in range(1, len(ranked)):
        if loss(ranked[:count]) <= TARGET:
            return tuple(ranked[:count])
    return tuple(ranked)


def _answers(model: Model, runs: Sequence[Mapping[str, Array]]) -> list[dict[str, Array]]:
    runner = OnnxRunner(ir.to_proto(model).SerializeToString(), cores())
    return [runner.run(run) for run in runs]


def _loss(reference: list[dict[str, Array]], found: list[dict[str, Array]]) -> float:
    """Return the mean divergence of probabilities, in nats; of embeddings, their mean turn."""
    losses = []
    for expected, answer in zip(reference, found, strict=True):
        for name, array in expected.items():
            if name.startswith(f"{PRESENT}."):
                continue
            if "logits" in name:
                loss = divergence(probabilities(array), probabilities(answer[name]))
            else:
                loss = turn(array, answer[name])
            losses.append(loss.mean())
    return float(np.mean(losses))


def linears(model: Model) -> tuple[str, ...]:
    """Return the paths of the linear layers that `quantise` would make int8, in their order."""
    return tuple(dict.fromkeys(layer_of(node) for node in model.graph if _is_linear(node)))


def quantise(model: Model, kept: Collection[str] = ()) -> None:
    """Make the weights of the linear layers int8 per output feature, their inputs uint8 per call.

    Standard operations only: DynamicQuantizeLinear (one for all layers that share an input),
    MatMulInteger with signed weights, Cast, Mul, Add; onnxruntime joins them into
    DynamicQuantizeMatMul and MatMulIntegerToFloat when it loads the file. Unsigned weights would
    miss the fast kernels. Embeddings become int8 per row, which saves size and no time; one that is
    tied to the head stays as it is.

    Args:
        model: Changed in place.
        kept: Paths of layers that stay in float32.
    """
    inputs: dict[Value, Sequence[Value]] = {}
    for node in list(model.graph):
        if _is_linear(node) and layer_of(node) not in kept:
            _quantise_linear(model.graph, node, inputs)
        elif _is_embedding(node):
            _quantise_embedding(model.graph, node)
    tidy(model)


def _is_linear(node: Node) -> bool:
    """Whether `node` is a product with a constant matrix of enough columns, and perhaps a sum."""
    if node.op_type not in ("Gemm", "MatMul"):
        return False
    matrix, _ = untransposed(node.inputs[1])
    parts = (matrix, *(value for value in node.inputs[2:] if value is not None))
    if any(part.const_value is None or part.dtype != _FLOAT for part in parts):
        return False
    plain = node.op_type == "MatMul" or (
        not node.attributes.get_int("transA", 0)
        and node.attributes.get_float("alpha", 1.0) == node.attributes.get_float("beta", 1.0) == 1.0
    )
    return plain and len(matrix.shape) == 2 and _matrix(node).shape[1] >= LEAST_FEATURES


def _matrix(node: Node) -> Array:
    """Return the matrix that `node` multiplies by, (features in, features out)."""
    value, turned = untransposed(node.inputs[1])
    array: Array = value.const_value.numpy()
    return array.T if turned != bool(node.attributes.get_int("transB", 0)) else array


def _is_embedding(node: Node) -> bool:
    table = node.inputs[0] if node.op_type == "Gather" else None
    return (
        table is not None
        and table.const_value is not None
        and table.dtype == _FLOAT
        and len(table.shape) == 2
        and node.attributes.get_int("axis", 0) == 0
        and len(table.uses()) == 1  # a tied one is also the weight of the head
    )


def _quantise_linear(graph: Graph, node: Node, inputs: dict[Value, Sequence[Value]]) -> None:
    x, weight, *bias = node.inputs
    if x not in inputs:
        dynamic = ir.node("DynamicQuantizeLinear", [x], num_outputs=3)
        graph.insert_before(node, dynamic)
        inputs[x] = dynamic.outputs
    values, scale, zero = inputs[x]
    integers, scales = _symmetric(_matrix(node), axis=0)
    weights = initializer(graph, f"{weight.name}_int8", integers)
    weight_scales = initializer(graph, f"{weight.name}_scale", scales.reshape(-1))
    product = insert(graph, node, "MatMulInteger", [values, weights, zero])
    product = insert(graph, node, "Cast", [product], to=int(_FLOAT))
    both = insert(graph, node, "Mul", [scale, weight_scales])
    if bias and bias[0] is not None:
        product = insert(graph, node, "Mul", [product, both])
        replace(graph, node, "Add", [product, bias[0]])
    else:
        replace(graph, node, "Mul", [product, both])


def _quantise_embedding(graph: Graph, node: Node) -> None:
    table, ids = node.inputs
    integers, scales = _symmetric(table.const_value.numpy(), axis=1)
    rows = insert(graph, node, "Gather", [initializer(graph, f"{table.name}_int8", integers), ids])
    rows = insert(graph, node, "Cast", [rows], to=int(_FLOAT))
    scale = insert(graph, node, "Gather", [initializer(graph, f"{table.name}_scale", scales), ids])
    replace(graph, node, "Mul", [rows, scale])


def _symmetric(matrix: Array, axis: int) -> tuple[Array, Array]:
    """Return int8 values and float32 scales, one per slice along `axis`, which is kept as 1."""
    largest = np.abs(matrix).max(axis=axis, keepdims=True)
    scales = np.maximum(largest, np.finfo(np.float32).tiny) / np.float32(127)
    return np.ascontiguousarray(np.rint(matrix / scales).astype(np.int8)), scales.astype(np.float32)
