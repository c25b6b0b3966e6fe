"""An AOTInductor package: machine code for one kind of processor, run by torch."""

import json
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._inductor.cpu_vec_isa import x86_isa_checker
from torch.export.pt2_archive._package import AOTICompiledModel

from lora_export.errors import ExportFailed, InputError, first_line
from lora_export.records import Array
from lora_export.runners._torch import NOTE, answers


class AotiRunner:
    """Runs compiled code: one instance of the model, on as many threads as torch is set to.

    Neither a compiler nor the model's code is needed. The code looks at no shape or dtype itself,
    so inputs are checked here.
    """

    name = "aoti"

    def __init__(self, path: Path) -> None:
        note = note_of(path)
        refuse_other_machine(path, note["target"])
        self.inputs, self.outputs = note["inputs"], [spec["name"] for spec in note["outputs"]]
        self.precision: str = note["precision"]
        # torch's own loader first compiles programs to find out what this processor can do.
        try:
            loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1)
        except RuntimeError as error:
            raise ExportFailed(f"{path.name} cannot be loaded: {first_line(error)}") from error
        self.module = AOTICompiledModel(loader)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the named outputs for named inputs.

        Raises:
            InputError: an input has another dtype or shape than the code was compiled for.
        """
        sizes: dict[str, int] = {}
        arrays = {}
        for spec in self.inputs:
            array = inputs[spec["name"]]
            fits = array.dtype == spec["dtype"] and array.ndim == len(spec["axes"])
            if not fits or any(
                size != (axis if isinstance(axis, int) else sizes.setdefault(axis, size))
                for axis, size in zip(spec["axes"], array.shape, strict=True)
            ):
                raise InputError(
                    f"{spec['name']} is {array.dtype}{list(array.shape)}, expected "
                    f"{spec['dtype']}{spec['axes']}"
                )
            arrays[spec["name"]] = np.ascontiguousarray(array)
        return answers(self.module, arrays, arrays, self.outputs)


def open_runner(path: Path, threads: int) -> AotiRunner:
    """Return a runner for the file at `path`; raises as `note_of` and `refuse_other_machine` do.

    `threads` is not used: torch has one setting for all that runs in it, and the caller has set it.
    """
    return AotiRunner(path)


def note_of(path: Path) -> dict[str, Any]:
    """Return what the exporter wrote into the package at `path` about it.

    Raises:
        ExportFailed: the file is no package, or lora-export did not write it.
    """
    try:
        archive = torch._C.PyTorchFileReader(str(path))
        found = json.loads(archive.get_record(f"extra/{NOTE}"))
    except (RuntimeError, ValueError) as error:
        raise ExportFailed(
            f"{path.name} is no AOTInductor package of lora-export: {first_line(error)}"
        ) from error
    return dict(found)


def refuse_other_machine(path: Path, target: Mapping[str, Any]) -> None:
    """Raise `InputError` where the code in `path` would stop at an unknown instruction."""
    here = {"platform": sys.platform, "machine": platform.machine()}
    faults = [f"{k} {target[k]}, not {v}" for k, v in here.items() if target[k] != v]
    if not faults and (lacking := sorted({*target["isa"]} - {*x86_isa_checker()})):
        faults = [f"a processor with {', '.join(lacking)}"]
    if faults:
        raise InputError(
            f"{path.name} was compiled for {' and '.join(faults)}; export it on this machine, or "
            "use pt2 or onnx"
        )
