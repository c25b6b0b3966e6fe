"""OpenVINO files, run by OpenVINO on the CPU."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_export.errors import ExportFailed, InputError, first_line
from lora_export.records import Array

EXTRA = "pip install 'lora-export[openvino]'"
_PRECISIONS = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}


class OpenvinoRunner:
    """Runs a graph in one stream, hinted to be quick to answer, on `threads` threads.

    The precision is float32 unless another is asked for: left alone, OpenVINO takes bfloat16 where
    the processor has it, and says nothing. Threads are not pinned, so that they do not take a
    neighbour's core.
    """

    name = "openvino"

    def __init__(self, path: Path, threads: int, precision: str = "f32") -> None:
        options = {
            "INFERENCE_PRECISION_HINT": precision,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            "INFERENCE_NUM_THREADS": str(threads),
            "ENABLE_CPU_PINNING": "NO",
        }
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


def package() -> Any:
    """Return the module of OpenVINO; raises `InputError` where it is not installed."""
    try:
        import openvino
    except ImportError as error:
        raise InputError(f"OpenVINO is not installed; {EXTRA}") from error
    return openvino
