"""ONNX through torch's exporter (torch.export, then onnxscript), opset 20, run by onnxruntime."""

import contextlib
import json
import logging
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch

from lora_export import registry, storage, weightless
from lora_export.errors import ExportFailed, first_line
from lora_export.exporters import (
    Contents,
    Request,
    _onnx_choose,
    _onnx_double,
    _onnx_graph,
    _onnx_speed,
    _onnx_text,
    _onnx_tokenizer,
    _onnx_translate,
)
from lora_export.exporters._onnx_graph import Model
from lora_export.exporters._program import traced
from lora_export.records import TEXT, Array, Signature, TensorSpec
from lora_export.runners import _onnx_text as parts
from lora_export.runners.onnx import DATA, LEVELS, OnnxRunner, refuse_other_data, write_as_run
from lora_export.runners.onnx import open_runner as open_runner

SUFFIX = ".onnx"
PRECISIONS = ("fp32", "fp16", "int8", "int4")
OPTIONS = {
    "external_data": PRECISIONS,
    "optimize": PRECISIONS,
    "static": ("int8",),
    "target": ("int8",),
    "text": PRECISIONS,
}
# Opset 20 with IR version 10 runs on every onnxruntime since 1.18; opset 23 needs a recent one.
OPSET = 20
# Node metadata of the exporter that carries the exporting machine's paths, and where in memory a
# function lay that it names.
_STACK_TRACE = "pkg.torch.onnx.stack_trace"
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def export(request: Request) -> None:
    """Write the model, every string axis of the signature dynamic.

    Raises:
        InputError: text is to go in, and there is no such graph of the tokenizer or the model.
        ExportFailed: torch cannot export the model; or the tokenizer in the graph is not exact.
    """
    signature, form, path = request.signature, request.form, request.path
    tokenizer = _tokenizer(request) if form.text else None
    graph = graph_of(request)
    if form.precision in registry.CALIBRATED:
        graph.metadata_props.update(_onnx_choose.narrow(graph, request, static=form.static))
    if tokenizer is not None:
        _onnx_text.compose(graph, tokenizer, signature)
    request.say("writing the graph and its weights")
    if data := _onnx_translate.save(graph, path, apart=form.external_data):
        if form.text:
            raise ExportFailed("ONNX: the model is too large for one file, as text needs it")
        _tie(path, data)
    if form.text:
        _onnx_text.prove(path, request.tokens, signature)


def graph_of(request: Request) -> Model:
    """Return the model as an ONNX graph in float32 or float16, every string axis dynamic.

    Raises:
        ExportFailed: torch cannot export the model.
    """
    signature = request.signature
    hollow = weightless.hollow(request.model, request.form.precision)
    program = traced("ONNX", hollow, signature, request.example)
    weights = dict(request.model.named_parameters(remove_duplicate=False))
    ins, outs = ([spec.name for spec in side] for side in (signature.inputs, signature.outputs))
    try:
        with _quiet():
            request.say("translating the program to ONNX")
            graph = _onnx_translate.translate(program, weights, ins, outs, OPSET)
            _clean(graph, request.about)
            _declare_axes(graph, signature)
            _allow_nothing(graph)
            if request.form.optimize:
                _onnx_speed.optimise(graph)
    except torch.onnx.errors.OnnxExporterError as error:
        raise ExportFailed(f"ONNX: {first_line(error.__cause__ or error)}") from error
    return graph


def _tokenizer(request: Request) -> Model:
    """Return the graph of the tokenizer, made before the model is: it may be none."""
    external = request.form.external_data
    _onnx_text.refuse(request.signature, request.tokens, external_data=external)
    return _onnx_tokenizer.tokenizer(request.tokens, request.signature)


def inspect(path: Path) -> Contents:
    """Return the interface, the names and the versions that the file at `path` declares.

    Raises:
        ExportFailed: onnx's checker refuses the file, or its weights lie in another that is not
            the one that was written with it.
    """
    try:
        onnx.checker.check_model(str(path))
        model = onnx.load(str(path), load_external_data=False)
    except (onnx.checker.ValidationError, OSError, ValueError) as error:
        raise ExportFailed(f"{path.name} is no valid ONNX file: {first_line(error)}") from error
    graph, said = model.graph, {entry.key: entry.value for entry in model.metadata_props}
    refuse_other_data(path, _data_names(model), said)
    return Contents(
        inputs=tuple(_spec(value) for value in graph.input),
        outputs=tuple(_spec(value) for value in graph.output),
        names=(
            *(node.name for node in graph.node),
            *(tensor.name for tensor in graph.initializer),
            *(value for node in graph.node for value in node.output),
        ),
        facts={
            "opset": next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx")),
            "ir_version": model.ir_version,
            "nodes": len(graph.node),
            "metadata": said,
        },
        operators=_operators(graph),
    )


def running(path: Path) -> Mapping[str, int]:
    """Return how often each operator is in the graph as onnxruntime runs it on this machine."""
    with tempfile.TemporaryDirectory(prefix="lora_export-") as folder:
        write_as_run(path, target := Path(folder) / "model.onnx")
        return _operators(onnx.load(str(target), load_external_data=False).graph)


def _operators(graph: onnx.GraphProto) -> Counter[str]:
    return Counter(f"{n.domain}::{n.op_type}" if n.domain else n.op_type for n in graph.node)


def tensors(path: Path) -> Iterator[tuple[str, Array]]:
    """Yield the constant tensors of the file at `path`; what lies beside it is read one by one.

    Raises:
        ExportFailed: the file, or the one with its weights, cannot be read.
    """
    try:
        yield from _onnx_graph.constants(ir.load(path))
    except Exception as error:  # protobuf and readers of data beside it raise as it comes
        raise ExportFailed(f"cannot read {path.name}: {first_line(error)}") from error


def levels(path: Path, threads: int) -> Iterator[tuple[str, OnnxRunner]]:
    """Yield a runner for each level of onnxruntime's rewriting, beginning with none at all."""
    for level in LEVELS:
        yield level, OnnxRunner(path, threads, level=level)


def in_double(path: Path) -> _onnx_double.OnnxInDouble:
    """Return the graph at `path` in float64; of one that takes text, from the token ids on.

    Raises:
        ExportFailed: onnx cannot read it, or does not know one of its operators.
    """
    try:
        model = onnx.load(str(path))
    except Exception as error:  # protobuf's own class of errors is not onnx's
        raise ExportFailed(f"{path.name} is no ONNX file: {first_line(error)}") from error
    if any(value.name == TEXT for value in model.graph.input):
        model = onnx.ModelProto.FromString(parts.back(path))
    return _onnx_double.OnnxInDouble(model)


def _data_names(model: onnx.ModelProto) -> set[str]:
    return {
        entry.value
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }


def _tie(path: Path, data: Path) -> None:
    """Have the graph at `path` say which file of weights is its own: runtimes take any."""
    model = onnx.load(str(path), load_external_data=False)
    own = {"name": data.name, "digest": storage.digest(data).digest}
    model.metadata_props.add(key=DATA, value=json.dumps(own))
    path.write_bytes(model.SerializeToString())


def _clean(model: Any, about: Mapping[str, str]) -> None:
    """Take out what names the exporting machine; put in what the user should find."""
    functions = (node for function in model.functions.values() for node in function.all_nodes())
    for node in (*model.graph.all_nodes(), *functions):
        node.metadata_props.pop(_STACK_TRACE, None)
        for key, value in node.metadata_props.items():
            node.metadata_props[key] = _ADDRESS.sub("", value)
        node.doc_string = None
    model.metadata_props.clear()
    model.metadata_props.update(about)


def _declare_axes(model: Any, signature: Signature) -> None:
    """Name the dynamic axes as the signature does: the exporter writes symbols and formulas."""
    sides = ((model.graph.inputs, signature.inputs), (model.graph.outputs, signature.outputs))
    for values, specs in sides:
        for value, spec in zip(values, specs, strict=True):
            for place, axis in enumerate(spec.axes):
                if isinstance(axis, str) and not isinstance(value.shape[place], int):
                    value.shape[place] = axis


def _allow_nothing(model: Any) -> None:
    """Take a zero in a computed shape for an axis of no tokens, not for "as in the input"."""
    for node in model.graph.all_nodes():
        if node.op_type == "Reshape" and node.inputs[1].const_value is None:
            node.attributes.add(ir.AttrInt64("allowzero", 1))


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    kind = value.type.tensor_type
    axes = tuple(d.dim_param or d.dim_value for d in kind.shape.dim)
    if kind.elem_type == onnx.TensorProto.STRING:  # numpy calls it an object
        return TensorSpec(value.name, "string", axes)
    return TensorSpec(value.name, str(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)), axes)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide what the exporter says about its own parts: absent torchvision, deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
