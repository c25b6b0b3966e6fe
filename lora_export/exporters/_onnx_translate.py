"""From a torch.export program to an ONNX graph and file, faster and leaner than by the plain way.

torch's exporter does the translation. What is left out around it: tracing the program once more for
decompositions that no operation needs, rewrite rules that the next step does better, transposed
copies of all weights, and any copy of the weights in memory: they are read from where they lie,
converted and written one by one.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxscript.optimizer
import torch
from onnx_ir.passes import common
from torch import Tensor
from torch.export import ExportedProgram

from lora_export.exporters._onnx_graph import Model, Node, Value
from lora_export.publishing import COMPANION

# A protobuf ends at 2 GiB; above this the weights go to a second file.
LARGE = 1_500_000_000
_ATEN = torch.ops.aten


def translate(
    program: ExportedProgram,
    weights: Mapping[str, Tensor],
    inputs: Sequence[str],
    outputs: Sequence[str],
    opset: int,
) -> Model:
    """Return `program` as ONNX, its inputs and outputs so named, unoptimised but for constants.

    The program's own parameters hold no numbers; `weights` do, by the same names and perhaps in
    another dtype. The graph refers to them.

    Raises:
        torch.onnx.errors.OnnxExporterError: an operation has no translation.
    """

    def exported(*, optimize: bool) -> Model:
        result = torch.onnx.export(
            program, (), input_names=inputs, output_names=outputs, dynamo=True,
            opset_version=opset, optimize=False, verbose=False,
        )  # fmt: skip
        assert result is not None
        _attach(result.model, weights)
        if optimize:  # not before: constants are computed from the weights
            result.optimize()
        return result.model

    _simplify(program)
    if not _pure(program):
        return exported(optimize=True)
    # The exporter asks the program to decompose itself, a second trace that takes half of the time.
    program.run_decompositions = lambda *_args, **_more: program
    try:
        model = exported(optimize=False)
    except torch.onnx.errors.OnnxExporterError:  # an operation has no translation of its own
        del program.run_decompositions
        return exported(optimize=True)
    _fold(model)
    return model


def save(model: Model, path: Path, *, apart: bool = False) -> Path | None:
    """Write `model` with its weights, weight by weight: nothing is held twice.

    It is one file, or where the weights are to stand `apart` or are too many for a protobuf, two:
    they go to NAME.onnx.data, which is then returned.

    The fields are those of `ModelProto`; within the graph the weights come last, which any reader
    of protobuf accepts.
    """
    weights = list(model.graph.initializers.values())
    if apart or sum(value.const_value.nbytes for value in weights) > LARGE:
        data = path.with_name(path.name + COMPANION)
        ir.save(model, path, external_data=data.name)
        return data
    model.graph.initializers.clear()
    try:
        frame = ir.to_proto(model)
    finally:
        for value in weights:
            model.graph.register_initializer(value)
    graph = frame.graph.SerializeToString()
    frame.ClearField("graph")
    heads = [_tensor_head(value) for value in weights]
    sizes = [
        len(head) + value.const_value.nbytes for head, value in zip(heads, weights, strict=True)
    ]
    prefixes = [_key(5) + _varint(size) for size in sizes]
    total = len(graph) + sum(sizes) + sum(map(len, prefixes))
    with path.open("wb") as file:
        file.write(frame.SerializeToString() + _key(7) + _varint(total) + graph)
        for prefix, head, value in zip(prefixes, heads, weights, strict=True):
            file.write(prefix + head)
            value.const_value.tofile(file)
    return None


def _attach(model: Model, weights: Mapping[str, Tensor]) -> None:
    """Let the initializers named as `weights` be these, converted whenever they are read."""

    def lazy(weight: Tensor, blank: Any) -> ir.LazyTensor:
        dtype: torch.dtype = blank.raw.dtype
        return ir.LazyTensor(
            lambda: ir.tensor(weight.detach().to(dtype)), blank.dtype, blank.shape, name=blank.name
        )

    for name, value in model.graph.initializers.items():
        if name in weights:
            value.const_value = lazy(weights[name], value.const_value)


def _tensor_head(value: Value) -> bytes:
    """Return the bytes of a TensorProto up to its data."""
    tensor = value.const_value
    head = onnx.TensorProto(name=value.name, data_type=int(tensor.dtype), dims=tensor.shape.numpy())
    return bytes(head.SerializeToString()) + _key(9) + _varint(tensor.nbytes)


def _key(field: int) -> bytes:
    """Return protobuf's mark of a field that begins with its length."""
    return _varint(field << 3 | 2)


def _varint(number: int) -> bytes:
    low = bytearray()
    while number > 0x7F:
        low.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes((*low, number))


def _simplify(program: ExportedProgram) -> None:
    """Write casts and `&` in the one form that has an ONNX translation."""
    for node in program.graph.nodes:
        kwargs: dict[str, Any] = dict(node.kwargs)
        if node.target is _ATEN.__and__.Tensor:
            node.target = _ATEN.bitwise_and.Tensor
        elif node.target is _ATEN.to.dtype_layout and isinstance(kwargs.get("dtype"), torch.dtype):
            node.target, node.kwargs = _ATEN._to_copy.default, {"dtype": kwargs["dtype"]}
        elif node.target in (_ATEN.to.device, _ATEN.to.dtype):
            dtype = node.args[2] if node.target is _ATEN.to.device else node.args[1]
            node.target, node.args, node.kwargs = (
                _ATEN._to_copy.default,
                node.args[:1],
                {"dtype": dtype},
            )


def _pure(program: ExportedProgram) -> bool:
    """Return whether `program` neither writes to its arguments nor holds programs of its own."""
    if any(isinstance(m, torch.fx.GraphModule) for m in program.graph_module.children()):
        return False
    schemas = (getattr(node.target, "_schema", None) for node in program.graph.nodes)
    return not any(schema is not None and schema.is_mutable for schema in schemas)


def _small(node: Node) -> bool | None:
    """Leave transposed weights to the graph, so that the file holds them as the model does."""
    weight = node.inputs[0].const_value if node.op_type == "Transpose" and node.inputs[0] else None
    return False if weight is not None and weight.size > 1024 else None


def _fold(model: Model) -> None:
    """Compute what is constant, and name and store each constant once."""
    common.InlinePass()(model)
    onnxscript.optimizer.fold_constants(model, onnx_shape_inference=True, should_fold=_small)
    steps: tuple[Any, ...] = (
        common.RemoveUnusedNodesPass(), common.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(), common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(), common.OutputFixPass(), common.NameFixPass(),
    )  # fmt: skip
    for step in steps:
        step(model)
