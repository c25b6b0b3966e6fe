"""The two models that an ONNX file with the tokenizer inside consists of."""

from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from lora_export.records import LABEL, PROBABILITIES, TEXT, TOKENS


def front(path: Path) -> bytes:
    """Return the model up to the token ids that is in the file at `path`."""
    model = ir.load(str(path))
    model.graph.outputs[:] = [value for value in _made(model) if value.name in TOKENS]
    return _cut(model)


def back(path: Path) -> bytes:
    """Return the model from the token ids on that is in the file at `path`."""
    model = ir.load(str(path))
    graph = model.graph
    graph.inputs.clear()
    for value in [value for value in _made(model) if value.name in TOKENS]:
        given = ir.val(value.name, dtype=ir.DataType.INT64, shape=ir.Shape(["batch", "sequence"]))
        value.name = f"{TEXT}.{value.name}"
        value.replace_all_uses_with(given)
        graph.inputs.append(given)
    graph.outputs[:] = [v for v in graph.outputs if v.name not in (LABEL, PROBABILITIES)]
    return _cut(model)


def _cut(model: ir.Model) -> bytes:
    RemoveUnusedNodesPass()(model)
    found: bytes = ir.to_proto(model).SerializeToString()
    return found


def _made(model: ir.Model) -> list[ir.Value]:
    return [value for node in model.graph for value in node.outputs]
