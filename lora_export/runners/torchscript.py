"""A TorchScript file, run by torch alone."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch

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
