"""A TorchScript file, run by torch alone."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from lora_export.records import Array

SIGNATURE_FILE = "signature.json"  # inside the archive; written by the exporter


class TorchScriptRunner:
    """Runs a traced module; the names of its inputs and outputs lie in the archive."""

    name = "torchscript"
    precision = "float32"

    def __init__(self, path: Path) -> None:
        extra = {SIGNATURE_FILE: ""}
        self.module = torch.jit.load(str(path), map_location="cpu", _extra_files=extra)
        names = json.loads(extra[SIGNATURE_FILE])
        self.inputs, self.outputs = names["inputs"], names["outputs"]
        floating = next(p for p in self.module.parameters() if p.is_floating_point())
        self.precision = str(floating.dtype).removeprefix("torch.")

    @torch.inference_mode()
    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the named outputs for named inputs."""
        found = self.module(*[torch.from_numpy(inputs[name]) for name in self.inputs])
        values = found if isinstance(found, tuple) else (found,)
        return {name: value.numpy() for name, value in zip(self.outputs, values, strict=True)}
