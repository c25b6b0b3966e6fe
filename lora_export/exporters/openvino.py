"""OpenVINO files, NAME.xml and NAME.bin, made from our ONNX graph. Needs the extra `openvino`.

The way over ONNX keeps names and axes, asks nothing of the model that the ONNX exporter does not
ask, and OpenVINO's own converter of torch models, which reports its use to Intel, is not called.
"""

import dataclasses
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes

from lora_export import exporters, registry
from lora_export.errors import ExportFailed, InputError, first_line
from lora_export.exporters import Contents, Request, _onnx_choose, _onnx_translate
from lora_export.exporters._program import as_text, from_text
from lora_export.records import Array, TensorSpec
from lora_export.runners.openvino import NOTE, package
from lora_export.runners.openvino import open_runner as open_runner

SUFFIX = ".xml"
PRECISIONS = ("fp32", "bf16", "int8")
OPTIONS = {"optimize": PRECISIONS, "target": ("int8",)}


def require() -> None:
    """Raise `InputError` where OpenVINO is not installed."""
    package()


def export(request: Request) -> None:
    """Write the model, and the weights to NAME.bin beside it.

    In bf16 the weights are written in it, and the runner computes in it. Eight bits are always
    static; what stays in floating point is computed in bf16 where the processor has it.

    Raises:
        InputError: OpenVINO is not installed, or `path` does not end in .xml.
        ExportFailed: torch cannot export the model, or OpenVINO cannot read it.
    """
    openvino, path = package(), request.path
    if path.suffix != SUFFIX:
        raise InputError(f"OpenVINO's files are NAME.xml and NAME.bin; {path.name} is neither")
    with tempfile.TemporaryDirectory(prefix=".openvino-", dir=path.parent) as folder:
        graph = Path(folder) / "model.onnx"
        onnx = exporters.load("onnx")
        model, about = onnx.graph_of(dataclasses.replace(request, about={})), dict(request.about)
        if request.form.precision in registry.CALIBRATED:
            about |= _onnx_choose.narrow(model, request, static=True, signed=True)
        _onnx_translate.save(model, graph)
        try:
            read = openvino.Core().read_model(str(graph))
            _name_by_place(read)
            note = as_text(request.signature.inputs, request.signature.outputs, about)
            read.set_rt_info(note, [NOTE])
            openvino.save_model(read, str(path), compress_to_fp16=False)
        except RuntimeError as error:
            raise ExportFailed(f"openvino: {first_line(error)}") from error


def files(path: Path) -> tuple[Path, Path]:
    """Return the graph and its weights."""
    return path, path.with_suffix(".bin")


def inspect(path: Path) -> Contents:
    """Return the interface and the names of the graph at `path`.

    Raises:
        InputError: OpenVINO is not installed.
        ExportFailed: OpenVINO cannot read the files, or lora-export did not write them.
    """
    openvino = package()
    try:
        graph = openvino.Core().read_model(str(path))
        inputs, outputs, content = from_text(graph.get_rt_info([NOTE]).astype(str))
    except (RuntimeError, ValueError) as error:
        raise ExportFailed(
            f"{path.name} is no OpenVINO graph of lora-export: {first_line(error)}"
        ) from error
    nodes = graph.get_ordered_ops()
    axes = {spec.name: spec.axes for spec in (*inputs, *outputs)}
    return Contents(
        inputs=tuple(_spec(port, axes) for port in graph.inputs),
        outputs=tuple(_spec(port, axes) for port in graph.outputs),
        names=tuple(node.get_friendly_name() for node in nodes),
        facts={
            "openvino": openvino.__version__,
            "nodes": len(nodes),
            "metadata": content["metadata"],
        },
        operators=Counter(node.get_type_name() for node in nodes),
    )


def tensors(path: Path) -> Iterator[tuple[str, Array]]:
    """Yield the constants of the graph at `path`; their bytes stay on disk until read.

    Raises:
        InputError: OpenVINO is not installed.
        ExportFailed: OpenVINO cannot read the files.
    """
    try:
        graph = package().Core().read_model(str(path))
    except RuntimeError as error:
        raise ExportFailed(f"{path.name} is no OpenVINO graph: {first_line(error)}") from error
    for node in graph.get_ops():
        if node.get_type_name() == "Constant":
            array = node.data
            if node.get_element_type().get_type_name() == "bf16":
                array = array.view(ml_dtypes.bfloat16)
            yield node.get_friendly_name(), array


def running(path: Path) -> Mapping[str, int]:
    """Return how often each operation is in the graph as OpenVINO runs it, integers told apart."""
    graph = open_runner(path, 2).module.get_runtime_model()
    found: Counter[str] = Counter()
    for node in graph.get_ordered_ops():
        told = node.get_rt_info()
        kind, precision = (told[key].astype(str) for key in ("layerType", "runtimePrecision"))
        found[kind if "f" in precision else f"{kind} in {precision}"] += 1
    return found


def _name_by_place(graph: Any) -> None:
    """Name nodes without a name after their place; OpenVINO counts through the whole process."""
    for place, node in enumerate(graph.get_ordered_ops()):
        kind = node.get_type_name()
        if re.fullmatch(rf"{kind}_\d+", node.get_friendly_name()):
            node.set_friendly_name(f"{kind}_{place}")


def _spec(port: Any, axes: Mapping[str, tuple[str | int, ...]]) -> TensorSpec:
    """Return the port with its own fixed sizes; dynamic axes have no names there, so ours."""
    sizes = port.get_partial_shape()
    named = axes.get(port.any_name, ())
    known = named if len(named) == len(sizes) else ("?",) * len(sizes)
    return TensorSpec(
        port.any_name,
        str(port.get_element_type().to_dtype()),
        tuple(
            (axis if isinstance(axis, str) else "?") if size.is_dynamic else size.get_length()
            for size, axis in zip(sizes, known, strict=True)
        ),
    )
