"""A torch.export program (`.pt2`): one file that torch runs without transformers or model code."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

from lora_export import models
from lora_export.errors import ExportFailed, first_line
from lora_export.exporters import Contents, Request
from lora_export.exporters._program import as_text, captured, declared, from_text
from lora_export.exporters._pt2_double import Pt2InDouble
from lora_export.records import Array
from lora_export.runners._torch import NOTE
from lora_export.runners.pt2 import loaded
from lora_export.runners.pt2 import open_runner as open_runner
from lora_export.torch_rounding import as_array

SUFFIX = ".pt2"
PRECISIONS = ("fp32", "fp16", "bf16")


def export(request: Request) -> None:
    """Write the model, every string axis of the signature free, 0 and 1 included.

    Raises:
        ExportFailed: torch cannot export the model, or fixed an axis.
    """
    signature = request.signature
    model = models.in_precision(request.model, request.form.precision)
    program = captured("pt2", model, signature, request.example)
    note = as_text(*declared(program, signature.inputs, signature.outputs), request.about)
    try:
        # Given a path, torch would write its name into the archive.
        with request.path.open("w+b") as stream:
            torch.export.save(program, stream, extra_files={NOTE: note})
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        raise ExportFailed(f"pt2: {first_line(error)}") from error


def inspect(path: Path) -> Contents:
    """Return the interface and the names that the program at `path` has.

    Raises:
        ExportFailed: torch cannot load the file, or lora-export did not write it.
    """
    program, text = loaded(path)
    try:
        inputs, outputs, content = from_text(text)
        inputs, outputs = declared(program, inputs, outputs)
    except (ValueError, AssertionError) as error:
        raise ExportFailed(f"{path.name} is no pt2 file of lora-export: {error}") from error
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    return Contents(
        inputs=inputs,
        outputs=outputs,
        names=(*program.state_dict, *program.constants, *(node.name for node in nodes)),
        facts={
            "torch": torch.__version__,
            "nodes": len(nodes),
            "metadata": content["metadata"],
        },
        operators=Counter(str(node.target) for node in nodes),
    )


def tensors(path: Path) -> Iterator[tuple[str, Array]]:
    """Yield parameters, buffers and constants of the program at `path`.

    Raises:
        ExportFailed: torch cannot load the file, or lora-export did not write it.
    """
    program, _ = loaded(path)
    for name, value in {**program.state_dict, **program.constants}.items():
        if isinstance(value, torch.Tensor):
            yield name, as_array(value)


def in_double(path: Path) -> Pt2InDouble:
    """Return the program at `path` in float64; raises as `inspect` does."""
    program, text = loaded(path)
    inputs, outputs, _ = from_text(text)
    return Pt2InDouble(program, [s.name for s in inputs], [s.name for s in outputs])
