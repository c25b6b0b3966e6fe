"""TorchScript by tracing: one file that torch alone runs, without transformers or model code.

TorchScript is deprecated in torch (since 2.11) and still supported; its successor is torch.export.
"""

import json
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lora_export import models
from lora_export.errors import ExportFailed, first_line
from lora_export.exporters import Contents, Request
from lora_export.exporters._torchscript_double import TorchScriptInDouble
from lora_export.records import Array, TensorSpec
from lora_export.runners.torchscript import SIGNATURE_FILE
from lora_export.runners.torchscript import open_runner as open_runner
from lora_export.torch_rounding import as_array

SUFFIX = ".pt"
PRECISIONS = ("fp32", "fp16", "bf16")
_MANGLED = "___torch_mangle_"  # in the names of classes that torch has numbered
_NUMBERED = re.compile(_MANGLED + r"(\d+)")
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
            for _ in range(2):  # the first makes all names known: in the second all have numbers
                traced = torch.jit.trace(model, tensors, check_trace=False)
            torch.jit.save(traced, str(traced_path), _extra_files=extra)
        _without_traces_of_the_process(traced_path, path)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ExportFailed(f"TorchScript: {first_line(error)}") from error
    finally:
        traced_path.unlink(missing_ok=True)


def inspect(path: Path) -> Contents:
    """Return the interface and the names that the archive at `path` declares."""
    module, extra = _loaded(path)
    schema = module.forward.schema
    arguments = [argument.name for argument in schema.arguments if argument.name != "self"]
    said = json.loads(extra[SIGNATURE_FILE])
    returns = said.get("outputs", [])
    by_argument = {TensorSpec(name, "", ()).argument: name for name in said.get("inputs", [])}
    operators = Counter(node.kind() for node in module.inlined_graph.nodes())
    return Contents(
        # A trace declares neither dtypes nor axes.
        inputs=tuple(TensorSpec(by_argument.get(name, name), "", ()) for name in arguments),
        outputs=tuple(TensorSpec(name, "", ()) for name in returns),
        names=(*module.state_dict(), *operators, *(n for n, _ in module.named_modules())),
        facts={"torch": torch.__version__, "metadata": json.loads(extra[ABOUT_FILE])},
        operators=operators,
    )


def tensors(path: Path) -> Iterator[tuple[str, Array]]:
    """Yield parameters, buffers, and the tensors that the trace holds as constants, at `path`.

    Raises:
        ExportFailed: torch cannot load the file.
    """
    module, _ = _loaded(path)
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        yield name, as_array(tensor)
    graph = module.inlined_graph  # the nodes do not keep it alive
    for node in graph.findAllNodes("prim::Constant"):
        if node.hasAttribute("value") and node.kindOf("value") == "t":
            yield node.output().debugName(), as_array(node.t("value"))


def in_double(path: Path) -> TorchScriptInDouble:
    """Return the module at `path` in float64; raises `ExportFailed` where torch cannot load it."""
    runner = open_runner(path, 1)
    return TorchScriptInDouble(runner.module, runner.inputs, runner.outputs)


def _loaded(path: Path) -> tuple[Any, dict[str, str]]:
    """Return the module in the archive at `path`, and what lora-export says beside it."""
    extra = {ABOUT_FILE: "{}", SIGNATURE_FILE: "{}"}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            module = torch.jit.load(str(path), map_location="cpu", _extra_files=extra)
    except (RuntimeError, ValueError) as error:
        raise ExportFailed(f"{path.name} is no TorchScript file: {error}") from error
    return module, extra


def _without_traces_of_the_process(traced: Path, path: Path) -> None:
    """Copy the archive without its debug records, which name source files of this machine.

    Classes are numbered through all traces of a process; in the copy they begin at 0.
    """
    reader = torch._C.PyTorchFileReader(str(traced))
    writer = torch._C.PyTorchFileWriter(str(path))
    written_by_the_writer = ("version", ".data/serialization_id")
    records = [r for r in reader.get_all_records() if not r.endswith(".debug_pkl")]
    numbers = sorted({int(number) for record in records for number in _NUMBERED.findall(record)})

    def own(found: re.Match[str]) -> str:
        return f"{_MANGLED}{numbers.index(int(found[1]))}"

    for record in records:
        if record in written_by_the_writer:
            continue
        data = reader.get_record(record)
        if record.startswith("code/") or record == "data.pkl":  # of the latter, in no counted text
            data = _NUMBERED.sub(own, data.decode("latin-1")).encode("latin-1")
        writer.write_record(_NUMBERED.sub(own, record), data, len(data))
    writer.write_end_of_file()
