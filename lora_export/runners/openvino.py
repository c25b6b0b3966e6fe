"""OpenVINO files, run by OpenVINO on the CPU."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_export import registry
from lora_export.errors import ExportFailed, InputError, first_line
from lora_export.records import Array

EXTRA = "pip install 'lora-export[openvino]'"
NOTE = "lora_export"  # in the graph: inputs, outputs, labels, provenance
_PRECISIONS = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}


class OpenvinoRunner:
    """Runs a graph in one stream, hinted to be quick to answer, on `threads` threads.

    The precision is float32 unless another is asked for: left alone, OpenVINO takes bfloat16 where
    the processor has it, and says nothing. Threads are not pinned, so that they do not take a
    neighbour's core.
    """

    name = "openvino"

    def __init__(self, path: Path, threads: int, precision: str = "f32") -> None:
        self.settings = options = {
            "INFERENCE_PRECISION_HINT": precision,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            "INFERENCE_NUM_THREADS": str(threads),
            "ENABLE_CPU_PINNING": "NO",
        }
        if threads == 1 and precision != "f32" and _ends_the_process(path, options):
            raise ExportFailed(
                f"{path.name}: OpenVINO {package().__version__} ends the process when it compiles "
                "this model for one thread in less than float32; give it two, or write fp32"
            )
        try:
            self.module = package().Core().compile_model(str(path), "CPU", options)
        except RuntimeError as error:
            raise ExportFailed(
                f"{path.name} cannot be opened by OpenVINO: {first_line(error)}"
            ) from error
        self.outputs = [port.any_name for port in self.module.outputs]
        found = self.module.get_property("INFERENCE_PRECISION_HINT")
        self.precision = _PRECISIONS[found.get_type_name()]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the named outputs for named inputs."""
        found = self.module(dict(inputs))
        return {name: found[name] for name in self.outputs}


def open_runner(path: Path, threads: int) -> OpenvinoRunner:
    """Return a runner for the files at `path`, which computes in their precision.

    Raises:
        InputError: OpenVINO is not installed.
        ExportFailed: OpenVINO cannot open them, or lora-export did not write them.
    """
    core = package().Core()
    try:
        graph = core.read_model(str(path))
        said = json.loads(graph.get_rt_info([NOTE]).astype(str))["metadata"]
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise ExportFailed(
            f"{path.name} is no OpenVINO graph of lora-export: {first_line(error)}"
        ) from error
    full = json.dumps(registry.FULL)
    return OpenvinoRunner(
        path, threads, "f32" if said.get(registry.PRECISION, full) == full else "bf16"
    )


def _ends_the_process(path: Path, options: Mapping[str, str]) -> bool:
    """Return whether OpenVINO dies of a signal when it compiles the file, tried in a process apart.

    Its kernel for gated layers (Llama's) divides by zero on one thread in bfloat16.
    """
    code = (
        "import json, sys, openvino\n"
        "openvino.Core().compile_model(sys.argv[1], 'CPU', json.loads(sys.argv[2]))\n"
    )
    command = [sys.executable, "-c", code, str(path), json.dumps(dict(options))]
    return subprocess.run(command, capture_output=True, check=False).returncode < 0


def package() -> Any:
    """Return the module of OpenVINO; raises `InputError` where it is not installed."""
    try:
        import openvino
    except ImportError as error:
        raise InputError(f"OpenVINO is not installed; {EXTRA}") from error
    return openvino
