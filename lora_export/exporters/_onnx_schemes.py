"""Ways to compute a linear layer with narrow weights, and to write them into an ONNX graph."""

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

import numpy as np
import onnx_ir as ir

from lora_export import environment
from lora_export.exporters._onnx_graph import (
    Graph,
    Model,
    Node,
    Value,
    initializer,
    insert,
    replace,
    take_place,
    tidy,
)
from lora_export.exporters._onnx_layers import embeddings, features, linears, matrix
from lora_export.records import Array

BYTE = 127  # largest weight of eight bits
# Without VNNI, processors add pairs of products of eight bits in sixteen, which overflow beyond
# this: 2 * 255 * 64 < 2 ** 15 <= 2 * 255 * 65.
SAFE_BYTE = 64
# Weights that share a scale where they have four bits.
BLOCK = 32
# Scales that are tried for a block, relative to the one at which nothing is clipped.
_CLIPS = (1.0, 0.94, 0.88, 0.82, 0.76)
_FLOAT = ir.DataType.FLOAT
MICROSOFT = "com.microsoft"  # the domain of onnxruntime's own operations


class Scheme(Protocol):
    """One way to compute a linear layer. An object serves one graph: layers may share parts."""

    def product(self, graph: Graph, node: Node) -> Value:
        """Insert what computes the output of the linear layer `node` before it; return that."""


def quantise(
    model: Model,
    scheme: Scheme,
    kept: Collection[str] = (),
    wider: Scheme | None = None,
    flags: Mapping[str, Value] | None = None,
) -> None:
    """Compute the linear layers of `model` by `scheme`.

    Embeddings become int8 per row, which saves size and no time; one that is tied to the head
    stays as it is.

    Args:
        model: Changed in place.
        scheme: A new one.
        kept: Paths of the layers that are not computed by it.
        wider: What they are computed by; None leaves them as they are.
        flags: Values that say of layers, in every call, that they are to stay as they are.
    """
    graph, tables = model.graph, embeddings(model)
    layer_of = {node: layer for layer, nodes in linears(model).items() for node in nodes}
    for node in [node for node in graph if node in layer_of]:  # in their order: they share inputs
        chosen = wider if layer_of[node] in kept else scheme
        if chosen is None:
            continue
        new = chosen.product(graph, node)
        if flags:
            old = insert(graph, node, node.op_type, node.inputs, node.attributes)
            new = insert(graph, node, "Where", [flags[layer_of[node]], old, new])
        take_place(graph, node, new)
    if any(node.domain == MICROSOFT for node in graph):
        model.opset_imports[MICROSOFT] = 1
    for node in tables:
        _quantise_embedding(model.graph, node)
    tidy(model)


class Dynamic:
    """Weights in int8 per output feature, inputs in uint8 by the range that they have in the call.

    Standard operations only: DynamicQuantizeLinear (one for all layers that share an input),
    MatMulInteger with signed weights, Cast, Mul, Add; onnxruntime joins them into
    DynamicQuantizeMatMul and MatMulIntegerToFloat when it loads the file. Unsigned weights would
    miss the fast kernels.
    """

    def __init__(self, largest: int = BYTE) -> None:
        self.largest = largest
        self.inputs: dict[Value, Sequence[Value]] = {}

    def product(self, graph: Graph, node: Node) -> Value:
        """See `Scheme`."""
        x, weight, *bias = node.inputs
        if x not in self.inputs:
            quantised = ir.node("DynamicQuantizeLinear", [x], num_outputs=3)
            graph.insert_before(node, quantised)
            self.inputs[x] = quantised.outputs
        values, scale, zero = self.inputs[x]
        integers, scales = symmetric(matrix(node), 0, self.largest)
        weights = initializer(graph, f"{weight.name}_int8", integers)
        product = insert(graph, node, "MatMulInteger", [values, weights, zero])
        product = insert(graph, node, "Cast", [product], to=int(_FLOAT))
        both = initializer(graph, f"{weight.name}_scale", scales.reshape(-1))
        both = insert(graph, node, "Mul", [scale, both])
        return _sum(graph, node, insert(graph, node, "Mul", [product, both]), bias)


class Static:
    """Weights in int8 per output feature, inputs in eight bits by ranges that are known before.

    What one input gives then does not depend on the others of its batch. Written as QuantizeLinear
    and DequantizeLinear around a plain Gemm, which runtimes read as one operation on integers. Its
    bias has 32 bits, at the scale of the products.
    """

    def __init__(
        self, ranges: Mapping[str, float], *, signed: bool = False, largest: int = BYTE
    ) -> None:
        """Take the largest magnitude of each value that is an input, by its name.

        Args:
            ranges: Of the inputs, by name.
            signed: Whether inputs are int8; else uint8, with a zero point in the middle.
                onnxruntime has fast kernels on x86 for the second, OpenVINO for the first.
            largest: Largest weight.
        """
        self.ranges, self.signed, self.largest = ranges, signed, largest

    def product(self, graph: Graph, node: Node) -> Value:
        """See `Scheme`."""
        x, weight, *bias = node.inputs
        step = np.float32(max(self.ranges[x.name], float(np.finfo(np.float32).tiny)) / BYTE)
        middle = np.array(0, np.int8) if self.signed else np.array(128, np.uint8)
        scale = initializer(graph, f"{x.name}_scale", np.array(step))
        zero = initializer(graph, f"{x.name}_zero", middle)
        values = insert(graph, node, "QuantizeLinear", [x, scale, zero])
        values = insert(graph, node, "DequantizeLinear", [values, scale, zero])
        # Where a bias is far larger than its weights, its 32 bits need the coarser scale.
        least = np.abs(bias[0].const_value.numpy()) / (step * 2**30) if any(bias) else 0
        integers, scales = symmetric(matrix(node), 0, self.largest, least)
        scales = scales.reshape(-1)
        name = weight.name
        known = [
            initializer(graph, f"{name}_int8", integers),
            initializer(graph, f"{name}_scale", scales),
            initializer(graph, f"{name}_zero", np.zeros(scales.size, np.int8)),
        ]
        weights = insert(graph, node, "DequantizeLinear", known, axis=1)
        if self.signed or not any(bias):
            return _sum(graph, node, insert(graph, node, "MatMul", [values, weights]), bias)
        steps = scales * step
        sums = np.rint(bias[0].const_value.numpy() / steps).astype(np.int32)
        known = [
            initializer(graph, f"{node.name}_bias", sums),
            initializer(graph, f"{node.name}_bias_scale", steps),
        ]
        rounded = insert(graph, node, "DequantizeLinear", known, axis=0)
        return insert(graph, node, "Gemm", [values, weights, rounded])


class Blocks:
    """Weights of four or eight bits in blocks that share a scale; inputs stay as they are.

    onnxruntime's own operation, com.microsoft MatMulNBits; with `accuracy_level` 4 it rounds inputs
    to eight bits by blocks as it multiplies. The scale of a block is the one of a few that loses
    least.
    """

    def __init__(self, bits: int = 4) -> None:
        self.bits = bits

    def product(self, graph: Graph, node: Node) -> Value:
        """See `Scheme`."""
        x, weight, *bias = node.inputs
        packed, scales = blockwise(matrix(node), self.bits)
        wide, high = features(node)
        name = f"{weight.name}_int{self.bits}"
        product = insert(
            graph,
            node,
            "MatMulNBits",
            [
                x,
                initializer(graph, name, packed),
                initializer(graph, f"{name}_scale", scales),
            ],
            {
                "K": wide,
                "N": high,
                "bits": self.bits,
                "block_size": BLOCK,
                "accuracy_level": 4,
            },
            domain=MICROSOFT,
        )
        return _sum(graph, node, product, bias)


def largest(target: str) -> int:
    """Return the largest weight of eight bits that does not overflow on a processor."""
    known = {*environment.instruction_sets(target)}
    return BYTE if known & {"avx512_vnni", "avx_vnni", "asimd"} else SAFE_BYTE


def symmetric(
    matrix: Array, axis: int, largest: int = BYTE, least: Array | float = 0
) -> tuple[Array, Array]:
    """Return int8 values and float32 scales, one per slice along `axis`, which is kept as 1.

    No scale is below `least`.
    """
    most = np.abs(matrix).max(axis=axis, keepdims=True)
    scales = np.maximum(most, np.finfo(np.float32).tiny) / np.float32(largest)
    scales = np.maximum(scales, least)
    return np.ascontiguousarray(np.rint(matrix / scales).astype(np.int8)), scales.astype(np.float32)


def blockwise(matrix: Array, bits: int) -> tuple[Array, Array]:
    """Return packed values and scales of a matrix (features in, features out) for MatMulNBits.

    Values are (out, blocks, bytes), two of four bits in a byte, the first in its lower half; scales
    are (out, blocks). A weight is `(value - 2 ** (bits - 1)) * scale`.
    """
    zero = 1 << bits - 1
    rows = np.ascontiguousarray(matrix.T, dtype=np.float32)
    rows = np.pad(rows, ((0, 0), (0, -rows.shape[1] % BLOCK)))
    blocks = rows.reshape(len(rows), -1, BLOCK)
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(-1, keepdims=True), -1)
    whole = np.where(extreme == 0, 1, extreme / -zero)  # the largest weight is the lowest value
    best = np.full(whole.shape, np.inf, np.float32)
    scales, values = whole, np.zeros_like(blocks)
    for clip in _CLIPS:
        scale = (whole * np.float32(clip)).astype(np.float32)
        found = np.clip(np.rint(blocks / scale), -zero, zero - 1)
        loss = np.square(found * scale - blocks).sum(-1, keepdims=True)
        better = loss < best
        best = np.where(better, loss, best)
        scales, values = np.where(better, scale, scales), np.where(better, found, values)
    integers: Array = (values + zero).astype(np.uint8)
    if bits == 4:
        integers = integers[..., ::2] | integers[..., 1::2] << 4
    return integers, np.ascontiguousarray(scales[..., 0], dtype=np.float32)


def _sum(graph: Graph, node: Node, product: Value, bias: Sequence[Value | None]) -> Value:
    return insert(graph, node, "Add", [product, *bias]) if any(bias) else product


def _quantise_embedding(graph: Graph, node: Node) -> None:
    table, ids = node.inputs
    integers, scales = symmetric(table.const_value.numpy(), 1)
    rows = insert(graph, node, "Gather", [initializer(graph, f"{table.name}_int8", integers), ids])
    rows = insert(graph, node, "Cast", [rows], to=int(_FLOAT))
    scale = insert(graph, node, "Gather", [initializer(graph, f"{table.name}_scale", scales), ids])
    replace(graph, node, "Mul", [rows, scale])
