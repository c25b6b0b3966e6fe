"""TorchScript by tracing: one file that torch alone runs, without transformers or model code.

TorchScript is deprecated in torch (since 2.11) and still supported; its successor is torch.export.
"""

import json
import warnings
from pathlib import Path

import torch

from lora_export import models
from lora_export.errors import ExportFailed, first_line
from lora_export.exporters import Contents, Request
from lora_export.exporters._torchscript_double import TorchScriptInDouble
from lora_export.records import TensorSpec
from lora_export.runners.torchscript import SIGNATURE_FILE, TorchScriptRunner

SUFFIX = ".pt"
PRECISIONS = ("fp32", "fp16", "bf16")
ABOUT_FILE = "lora_export.json"  # inside the archive: labels and provenance


def export(request: Request) -> None:
    """Trace the model on the example and write it.

    A trace keeps whatever the example did not vary; that batch, length and padding really are free
    is for the parity check to prove, on other shapes than this one.

    Raises:
        ExportFailed: torch cannot trace the model.
    """
    signature, path = request.signature, request.path
    model = models.in_precision(request.model, request.form.precision)
    names = {
        "inputs": [spec.name for spec in signature.inputs],
        "outputs": [spec.name for spec in signature.outputs],
    }
    tensors = tuple(torch.from_numpy(request.example[name]) for name in names["inputs"])
    extra = {
        SIGNATURE_FILE: json.dumps(names),
        ABOUT_FILE: json.dumps(dict(request.about), sort_keys=True),
    }
    traced_path = path.with_name(f"traced-{path.name}")
    try:
        with warnings.catch_warnings(), torch.inference_mode():
            # Tracing touches every attribute of a model, deprecated ones too, and warns of each
            # shape that it reads; what matters of that shows in the parity check.
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(model, tensors, check_trace=False)
            torch.jit.save(traced, str(traced_path), _extra_files=extra)
        _without_source_paths(traced_path, path)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ExportFailed(f"TorchScript: {first_line(error)}") from error
    finally:
        traced_path.unlink(missing_ok=True)


def inspect(path: Path) -> Contents:
    """Return the interface and the names that the archive at `path` declares."""
    extra = {ABOUT_FILE: "{}", SIGNATURE_FILE: "{}"}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            module = torch.jit.load(str(path), map_location="cpu", _extra_files=extra)
    except (RuntimeError, ValueError) as error:
        raise ExportFailed(f"{path.name} is no TorchScript file: {error}") from error
    schema = module.forward.schema
    arguments = [argument.name for argument in schema.arguments if argument.name != "self"]
    said = json.loads(extra[SIGNATURE_FILE])
    returns = said.get("outputs", [])
    by_argument = {TensorSpec(name, "", ()).argument: name for name in said.get("inputs", [])}
    operators = {node.kind() for node in module.inlined_graph.nodes()}
    return Contents(
        # A trace declares neither dtypes nor axes.
        inputs=tuple(TensorSpec(by_argument.get(name, name), "", ()) for name in arguments),
        outputs=tuple(TensorSpec(name, "", ()) for name in returns),
        names=(*module.state_dict(), *operators, *(n for n, _ in module.named_modules())),
        facts={"torch": torch.__version__, "metadata": json.loads(extra[ABOUT_FILE])},
    )


def open_runner(path: Path, threads: int) -> TorchScriptRunner:
    """Return a runner for the file at `path`.

    `threads` is not used: torch has one setting for all that runs in it, and the caller has set it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return TorchScriptRunner(path)


def in_double(path: Path) -> TorchScriptInDouble:
    """Return the module at `path` in float64; raises `ExportFailed` where torch cannot load it."""
    try:
        runner = open_runner(path, 1)
    except (RuntimeError, ValueError) as error:
        raise ExportFailed(f"{path.name} is no TorchScript file: {first_line(error)}") from error
    return TorchScriptInDouble(runner.module, runner.inputs, runner.outputs)


def _without_source_paths(traced: Path, path: Path) -> None:
    """Copy the archive without its debug records, which name source files of this machine."""
    reader = torch._C.PyTorchFileReader(str(traced))
    writer = torch._C.PyTorchFileWriter(str(path))
    written_by_the_writer = ("version", ".data/serialization_id")
    for record in reader.get_all_records():
        if not record.endswith(".debug_pkl") and record not in written_by_the_writer:
            data = reader.get_record(record)
            writer.write_record(record, data, len(data))
    writer.write_end_of_file()
