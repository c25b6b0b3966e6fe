"""The form of a graph that onnxruntime runs fastest on a CPU, at equal precision.

Every step is a rewrite of what the exporter wrote into operations that compute the same; that they
do is not taken on trust, but judged with the file like everything else.
"""

from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from lora_export.exporters._onnx_graph import (
    Graph,
    Model,
    Node,
    Value,
    constant,
    initializer,
    insert,
    producer,
    replace,
    tidy,
    untransposed,
)

_FLOAT = ir.DataType.FLOAT
# Operations that work on each element, or each last axis, on its own: any leading shape will do.
_UNARY = frozenset({"Gelu", "Relu", "Tanh", "Erf", "Sigmoid", "Identity", "Cast"})
_LEAST = np.float32(np.finfo(np.float32).min)


class _Linear(NamedTuple):
    product: Node
    x: Value
    weight: Value
    bias: Value
    transposed: bool  # the weight is (features out, features in)


def optimise(model: Model) -> dict[str, int]:
    """Rewrite `model` for speed at equal precision; return the number of rewrites of each kind.

    * Masks become finite and the `IsNaN`/`Where` after every softmax goes: six passes over the
      scores saved. (A row with every position masked attends to all of them equally, as in
      transformers' eager attention, where torch's SDPA gives zeros.)
    * Masks keep one row per sequence: a comparison that always holds would make one per query.
    * Keys are transposed once, in one step.
    * `MatMul` + `Add` become `Gemm` on (tokens, features), and the tensors between them stay two-
      dimensional: the bias costs no pass of its own, and onnxruntime no longer finds its
      SkipLayerNormalization (8 times slower than Add + LayerNormalization on the CPU) nor BiasGelu
      (1.6 times slower than Gelu).
    * Declared shapes of inner values go: onnxruntime plans its memory worse with them than with
      those that it infers (4 % of the time at float32, 10 % at int8).
    """
    done = {
        "nan_guards": _drop_nan_guards(model),
        "masks": _narrow_masks(model.graph),
        "key_transposes": _join_key_transposes(model.graph),
        "linears": _flatten_linears(model),
    }
    tidy(model)
    _forget_shapes(model)
    return done


def _drop_nan_guards(model: Model) -> int:
    """Softmax -> IsNaN -> Where(nan, 0, softmax) becomes Softmax, under masks made finite."""
    found = []
    for node in model.graph:
        guard = node.inputs[0].producer() if node.op_type == "Where" and node.inputs[0] else None
        if guard is None or guard.op_type != "IsNaN" or guard.inputs[0] is not node.inputs[2]:
            continue
        if node.outputs[0].is_graph_output():
            continue
        softmax = node.inputs[2].producer()
        if softmax is not None and softmax.op_type == "Softmax" and _finite_mask(model, softmax):
            found.append(node)
    for node in found:
        node.outputs[0].replace_all_uses_with(node.inputs[2])
    return len(found)


def _finite_mask(model: Model, softmax: Node) -> bool:
    """Make -inf in the mask that `softmax` gets finite; return whether its scores are now so."""
    add = softmax.inputs[0].producer()
    if add is None or add.op_type != "Add":
        return False
    for value in add.inputs:
        where = value.producer()
        if where is None or where.op_type != "Where":
            continue
        keep, drop = (constant(v) for v in where.inputs[1:])
        if keep is None or drop is None or drop.size != 1 or not np.all(np.isfinite(keep)):
            continue
        if drop.item() == -np.inf:
            least = initializer(
                model.graph, f"{where.inputs[2].name}_finite", np.full_like(drop, _LEAST)
            )
            where.replace_input_with(2, least)
            return True
        return bool(np.isfinite(drop))
    return False


def _narrow_masks(graph: Graph) -> int:
    """Take `position >= 0`, always true, out of masks that are added to scores.

    It holds one row per query, by which the mask of a batch grows from (batch, 1, 1, keys) to
    (batch, 1, queries, keys). The scores have all their axes themselves, so the sum is the same.
    """
    found = []
    for node in graph:
        if node.op_type != "And":
            continue
        for i in (0, 1):
            if _always_true(node.inputs[i]) and all(
                use.node.op_type == "Where" and use.idx == 0 and _only_added(use.node)
                for use in node.outputs[0].uses()
            ):
                found.append((node, node.inputs[1 - i]))
                break
    for node, rest in found:
        for use in list(node.outputs[0].uses()):
            use.node.outputs[0].shape = None  # it was as wide as the comparison
        node.outputs[0].replace_all_uses_with(rest)
    return len(found)


def _always_true(value: Value) -> bool:
    known, node = constant(value), value.producer()
    if known is not None:
        return known.dtype == np.bool_ and bool(known.all())
    if node is None:
        return False
    if node.op_type == "And":
        return all(_always_true(v) for v in node.inputs)
    if node.op_type != "GreaterOrEqual":
        return False
    least, start = constant(node.inputs[1]), node.inputs[0].producer()
    while start is not None and start.op_type in ("Unsqueeze", "Slice", "Add"):
        if start.op_type == "Add":
            more = constant(start.inputs[1])
            if more is None or np.any(more < 0):
                return False
        start = start.inputs[0].producer()
    if start is None or start.op_type != "Range" or least is None or least.size != 1:
        return False
    first, step = constant(start.inputs[0]), constant(start.inputs[2])
    return first is not None and step is not None and bool(first >= least.item() and step > 0)


def _only_added(where: Node) -> bool:
    """Return whether `where` gives a constant or another, only to be added to something wider."""
    if any(v.const_value is None or v.const_value.size != 1 for v in where.inputs[1:]):
        return False
    for use in where.outputs[0].uses():
        other = use.node.inputs[1 - use.idx] if use.node.op_type == "Add" else None
        product = other.producer() if other is not None else None
        if product is None or product.op_type not in ("MatMul", "Mul", "Div"):
            return False
    return bool(where.outputs[0].uses())


def _join_key_transposes(graph: Graph) -> int:
    """Keys laid out per head and then turned through a 3-d reshape become one Transpose."""
    found = []
    for node in graph:
        middle = producer(node, "Reshape", 0, "Transpose")
        first = middle and producer(middle, "Transpose", 0, "Reshape")
        if not middle or not first or list(middle.attributes["perm"].as_ints()) != [0, 2, 1]:
            continue
        source = first.inputs[0]
        inner, outer = (_axes_of(n.inputs[1], source) for n in (first, node))
        heads: Node = source.producer()
        turned = heads is not None and heads.op_type == "Transpose"
        if not turned or list(heads.attributes["perm"].as_ints()) != [0, 2, 1, 3]:
            continue
        if inner == [None, 2, 3] and outer == [0, 1, 3, 2]:
            found.append((node, heads.inputs[0]))
    for node, source in found:
        replace(graph, node, "Transpose", [source], perm=[0, 2, 3, 1])
    return len(found)


def _axes_of(shape: Value, source: Value) -> list[int | None] | None:
    """Return which axes of the 4-d `source` the parts of `shape` are, None for -1, if they are."""
    concat = shape.producer()
    if concat is None or concat.op_type != "Concat":
        return None
    axes: list[int | None] = []
    for part in concat.inputs:
        fixed, slice_ = constant(part), part.producer()
        if fixed is not None and fixed.tolist() == [-1]:
            axes.append(None)
            continue
        of = slice_ and producer(slice_, "Slice", 0, "Shape")
        if not of or of.inputs[0] is not source or of.attributes.get_int("start", 0) != 0:
            return None
        bounds = [v for v in map(constant, slice_.inputs[1:]) if v is not None]
        if len(bounds) != 2 or len(slice_.inputs) != 3:
            return None
        axes += range(4)[bounds[0].item() : bounds[1].item()]
    return axes


def _flatten_linears(model: Model) -> int:
    """MatMul + Add of constants becomes Gemm; what lies between works on (tokens, features)."""
    graph = model.graph
    flat: dict[Value, Value] = {}  # value -> the same numbers as (tokens, features)
    root: dict[Value, Value] = {}  # value -> a value of the original graph with its tokens
    full: dict[Value, Value] = {}  # value -> itself again, made from its flat twin
    linears = 0

    def flattened(value: Value, features: int, before: Node) -> Value:
        if value not in flat:
            shape = initializer(graph, f"flat_{features}", np.array([-1, features], np.int64))
            flat[value] = insert(graph, before, "Reshape", [value, shape])
            root[value] = value
        return flat[value]

    def restored(value: Value, before: Node) -> Value:
        """Return `value` in its full shape: the shape of its root but for the last axis."""
        if value not in full:
            lead = insert(graph, before, "Shape", [root[value]], start=0, end=-1)
            last = initializer(
                graph, f"last_{value.shape[-1]}", np.array([value.shape[-1]], np.int64)
            )
            shape = insert(graph, before, "Concat", [lead, last], axis=0)
            full[value] = insert(graph, before, "Reshape", [flat[value], shape], allowzero=1)
        return full[value]

    replaced: set[Value] = set()  # values whose only producer is their flat twin now
    parts = {node: linear for node in graph if (linear := _linear_parts(node))}
    products = {linear.product for linear in parts.values()}
    for node in list(graph):
        if node in products:
            continue
        if node in parts:
            _, x, weight, bias, transposed = parts[node]
            out = node.outputs[0]
            tokens = flattened(x, weight.shape[1 if transposed else 0], node)
            turned = {"transB": 1} if transposed else {}
            flat[out] = insert(graph, node, "Gemm", [tokens, weight, bias], turned)
            root[out] = root[x]
            replaced.add(out)
            linears += 1
        elif _works_flat(node, replaced, flat):
            out = node.outputs[0]
            inputs = [v if v is None or v not in flat else flat[v] for v in node.inputs]
            attributes = dict(node.attributes)
            if node.op_type == "LayerNormalization":
                attributes["axis"] = ir.AttrInt64("axis", -1)
            flat[out] = insert(graph, node, node.op_type, inputs, attributes)
            root[out] = next(root[v] for v in node.inputs if v in flat)
            replaced.add(out)
        else:
            for i, value in enumerate(node.inputs):
                if value in replaced:
                    direct = node.op_type == "Reshape" and i == 0 and _needs_no_zero(node)
                    node.replace_input_with(i, flat[value] if direct else restored(value, node))
    return linears


def _linear_parts(node: Node) -> _Linear | None:
    """Return the parts of x @ constant matrix + constant vector if `node` is the addition."""
    if node.op_type != "Add" or node.outputs[0].is_graph_output():
        return None
    for i in (0, 1):
        product = producer(node, "Add", i, "MatMul")
        bias = node.inputs[1 - i]
        if product is None or len(product.outputs[0].uses()) != 1 or bias.const_value is None:
            continue
        x, weight = product.inputs
        weight, transposed = untransposed(weight)
        if weight.const_value is None or len(weight.shape) != 2 or weight.dtype != _FLOAT:
            continue
        features = weight.shape[0 if transposed else 1]
        if list(bias.shape) == [features] and x.shape is not None and len(x.shape) > 2:
            return _Linear(product, x, weight, bias, transposed)
    return None


def _works_flat(node: Node, replaced: set[Value], flat: dict[Value, Value]) -> bool:
    """Return whether `node` gives the same numbers on (tokens, features)."""
    if len(node.outputs) != 1 or not any(v in replaced for v in node.inputs):
        return False
    if node.outputs[0].is_graph_output():
        return False
    first = node.inputs[0]
    if node.op_type in _UNARY:
        return True
    if node.op_type == "LayerNormalization":
        axis = node.attributes.get_int("axis", -1)
        return first in flat and axis in (-1, len(first.shape or ()) - 1)
    if node.op_type in ("Add", "Mul"):
        a, b = node.inputs
        if a in flat and b in flat:
            return a.shape is not None and a.shape == b.shape
        other = b if a in flat else a
        return other.const_value is not None and len(other.shape) <= 1
    return False


def _needs_no_zero(reshape: Node) -> bool:
    """Return whether the target shape of `reshape` never means "as in the input"."""
    if reshape.attributes.get_int("allowzero", 0) == 1:
        return True
    target = constant(reshape.inputs[1])
    return target is not None and bool(np.all(target != 0))


def _forget_shapes(model: Model) -> None:
    """Take the shapes and types of inner values out of `model`."""
    for node in model.graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = value.type = None
