"""A TorchScript file, run by torch alone."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch

from lora_export.errors import ExportFailed, first_line
from lora_export.records import Array
from lora_export.runners._torch import answers, precision_of

SIGNATURE_FILE = "signature.json"  # inside the archive; written by the exporter


class TorchScriptRunner:
    """Runs a traced module; the names of its inputs and outputs lie in the archive."""

    name = "torchscript"

    def __init__(self, path: Path) -> None:
        extra = {SIGNATURE_FILE: ""}
        self.module = torch.jit.load(str(path), map_location="cpu", _extra_files=extra)
        names = json.loads(extra[SIGNATURE_FILE])
        self.inputs, self.outputs = names["inputs"], names["outputs"]
        self.precision = precision_of(self.module)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the named outputs for named inputs."""
        return answers(self.module, inputs, self.inputs, self.outputs)


def open_runner(path: Path, threads: int) -> TorchScriptRunner:
    """Return a runner for the file at `path`.

    `threads` is not used: torch has one setting for all that runs in it, and the caller has set it.

    Raises:
        ExportFailed: torch cannot open it, or lora-export did not write it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return TorchScriptRunner(path)
    except (RuntimeError, ValueError) as error:
        raise ExportFailed(f"{path.name} is no TorchScript file: {first_line(error)}") from error
