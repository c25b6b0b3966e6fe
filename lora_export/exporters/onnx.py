"""ONNX through torch's exporter (torch.export, then onnxscript), opset 20, run by onnxruntime."""

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch

from lora_export.errors import ExportFailed, first_line
from lora_export.exporters import (
    Contents,
    Request,
    _onnx_int8,
    _onnx_speed,
    _onnx_text,
    _onnx_translate,
)
from lora_export.exporters._program import traced
from lora_export.records import Signature, TensorSpec
from lora_export.runners.onnx import OnnxRunner

SUFFIX = ".onnx"
PRECISIONS = ("fp32", "fp16", "int8")
OPTIONS = ("external_data", "optimize", "text")
# Opset 20 with IR version 10 runs on every onnxruntime since 1.18; opset 23 needs a recent one.
OPSET = 20
# A protobuf ends at 2 GiB; above this the weights go to a second file, NAME.onnx.data.
LARGE = 1_500_000_000
KEPT = "lora_export.kept_in_fp32"  # metadata of an int8 file: layers that would have cost too much
# Node metadata of the exporter that carries the exporting machine's paths.
_STACK_TRACE = "pkg.torch.onnx.stack_trace"


def export(request: Request) -> None:
    """Write the model, every string axis of the signature dynamic.

    Raises:
        InputError: text is to go in, and there is no such graph of the tokenizer or the model.
        ExportFailed: torch cannot export the model; or the tokenizer in the graph is not exact.
    """
    signature, form, path = request.signature, request.form, request.path
    tokenizer = _tokenizer(request) if form.text else None
    program = traced("ONNX", request.model, signature, request.example)
    ins, outs = ([spec.name for spec in side] for side in (signature.inputs, signature.outputs))
    try:
        with _quiet():
            graph = _onnx_translate.translate(program, ins, outs, OPSET)
            _clean(graph, request.about)
            _declare_axes(graph, signature)
            _allow_nothing(graph)
            if form.optimize:
                _onnx_speed.optimise(graph)
            if form.precision == "int8":
                kept = _onnx_int8.choose(graph, request.calibration)
                graph.metadata_props[KEPT] = json.dumps(kept)
                _onnx_int8.quantise(graph, kept)
            size = sum(v.const_value.nbytes for v in graph.graph.initializers.values())
            if tokenizer is not None:
                if size > LARGE:
                    raise ExportFailed(
                        "ONNX: the model is too large for one file, as text needs it"
                    )
                _onnx_text.compose(graph, tokenizer, signature)
            if form.external_data or size > LARGE:
                ir.save(graph, path, external_data=f"{path.name}.data")
            else:
                _onnx_translate.save(graph, path)
    except torch.onnx.errors.OnnxExporterError as error:
        raise ExportFailed(f"ONNX: {first_line(error.__cause__ or error)}") from error
    if form.text:
        _onnx_text.prove(path, request.tokens, signature)


def _tokenizer(request: Request) -> Any:
    """Return the graph of the tokenizer, made before the model is: it may be none."""
    external = request.form.external_data
    _onnx_text.refuse(request.signature, request.tokens, external_data=external)
    return _onnx_text.tokenizer(request.tokens, request.signature)


def inspect(path: Path) -> Contents:
    """Return the interface, the names and the versions that the file at `path` declares.

    Raises:
        ExportFailed: onnx's checker refuses the file.
    """
    try:
        onnx.checker.check_model(str(path))
        model = onnx.load(str(path), load_external_data=False)
    except (onnx.checker.ValidationError, OSError, ValueError) as error:
        raise ExportFailed(f"{path.name} is no valid ONNX file: {first_line(error)}") from error
    graph = model.graph
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
            "metadata": {entry.key: entry.value for entry in model.metadata_props},
        },
    )


def open_runner(path: Path, threads: int) -> OnnxRunner:
    """Return a runner for the file at `path`.

    Raises:
        InputError: the tokenizer is inside, and what runs it is not installed.
    """
    try:
        return OnnxRunner(path, threads)
    except Exception as error:  # onnxruntime's own class of errors is a plain Exception
        if _onnx_text.DOMAIN not in str(error):
            raise
    return _onnx_text.open_runner(path, threads)


def _clean(model: Any, about: Mapping[str, str]) -> None:
    """Take out what names the exporting machine; put in what the user should find."""
    for node in model.graph.all_nodes():
        node.metadata_props.pop(_STACK_TRACE, None)
        node.doc_string = None
    for function in model.functions.values():
        for node in function.all_nodes():
            node.metadata_props.pop(_STACK_TRACE, None)
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
