"""Small steps on an ONNX graph that the rewrites of this folder are made of."""

import ast
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass

from lora_export.records import Array

# onnx_ir says of nearly every part of a node that it may be missing; what is looked at here is
# looked for first.
SCOPES = "pkg.torch.onnx.name_scopes"  # of a node: the modules it lies in, and its own name
Node: TypeAlias = Any
Value: TypeAlias = Any
Graph: TypeAlias = Any
Model: TypeAlias = Any


def producer(node: Node, op_type: str, index: int, by: str) -> Node | None:
    """Return the `by` node that makes input `index` of `node`, if `node` is an `op_type`."""
    if node.op_type != op_type or node.inputs[index] is None:
        return None
    producer = node.inputs[index].producer()
    return producer if producer is not None and producer.op_type == by else None


def untransposed(value: Value) -> tuple[Value, bool]:
    """Return the value that `value` is the transpose of, and whether it is one; else itself."""
    node = value.producer()
    turned = node is not None and node.op_type == "Transpose"
    return (node.inputs[0] if turned else value), turned


def constant(value: Value | None) -> Array | None:
    """Return the array that `value` always is, or None where it is computed."""
    return None if value is None or value.const_value is None else value.const_value.numpy()


def constants(model: Model) -> Iterator[tuple[str, Array]]:
    """Yield name and array of every constant tensor of `model`: of inner graphs and functions too.

    An attribute that is a tensor has the name of the value that its node makes. Tensors of text are
    left out.
    """
    for graph in (model.graph, *model.functions.values()):
        yield from _constants_of(graph)
        for inner in graph.subgraphs():
            yield from _constants_of(inner)


def _constants_of(graph: Graph) -> Iterator[tuple[str, Array]]:
    initializers = getattr(graph, "initializers", {})  # a function has none
    held = [(value.name, value.const_value) for value in initializers.values()]
    held += [
        (node.outputs[0].name, attribute.value)
        for node in graph
        for attribute in node.attributes.values()
        if attribute.type == ir.AttributeType.TENSOR
    ]
    for name, tensor in held:
        if tensor is not None and tensor.dtype != ir.DataType.STRING:
            yield name, tensor.numpy()


def initializer(graph: Graph, name: str, array: Array) -> Value:
    """Return the initializer that is `array`, made if there is none: `name`, where that is free."""
    while name in graph.initializers:
        known = graph.initializers[name].const_value.numpy()
        if known.dtype == array.dtype and np.array_equal(known, array):
            return graph.initializers[name]
        name += "_"  # a weight that is used as it is, and transposed
    graph.register_initializer(ir.val(name, const_value=ir.tensor(array, name=name)))
    return graph.initializers[name]


def insert(
    graph: Graph,
    before: Node,
    op_type: str,
    inputs: Iterable[Value | None],
    attributes: Mapping[str, Any] | None = None,
    *,
    domain: str = "",
    **more: Any,
) -> Value:
    """Put a new node before another, whose place in the model it tells; return its output."""
    node = ir.node(op_type, list(inputs), attributes={**(attributes or {}), **more}, domain=domain)
    for key, value in before.metadata_props.items():
        node.metadata_props[key] = value
    graph.insert_before(before, node)
    return node.outputs[0]


def replace(
    graph: Graph, node: Node, op_type: str, inputs: Iterable[Value], **attributes: Any
) -> None:
    """Put a node in the place of `node`, whose output keeps its name, type and shape."""
    take_place(graph, node, insert(graph, node, op_type, inputs, **attributes))


def take_place(graph: Graph, node: Node, new: Value) -> None:
    """Put `new` in the place of the output of `node`, and remove that."""
    old = node.outputs[0]
    new.shape, new.type = old.shape, old.type
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    old.name, new.name = None, old.name
    graph.remove(node, safe=True)


def tidy(model: Model) -> None:
    """Join what is computed twice, and remove what nobody uses."""
    CommonSubexpressionEliminationPass()(model)
    RemoveUnusedNodesPass()(model)


def layer_of(node: Node) -> str:
    """Return the path of the module that `node` was exported from, as the exporter noted it."""
    scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "['']"))
    return str(scopes[-2] if len(scopes) > 1 else scopes[-1]).removeprefix("model.")
