"""What a number was measured on: versions, processor, threads, load. No path, no host name."""

import os
import platform
import resource
import shlex
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "lora-export", "torch", "transformers", "onnx", "onnxruntime", "onnxscript", "safetensors",
    "numpy", "blake3",
)  # fmt: skip
WRITERS = ("torch", "transformers", "onnx", "onnxscript", "onnx-ir", "openvino")  # of artifacts
# Instruction sets that change what a kernel computes, or how fast.
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16",
          "amx_int8", "asimd", "sve")  # fmt: skip
# Processors that an artifact can be written for, and what is taken for granted of them.
_SERVERS = ("avx2", "avx512f", "avx512_vnni")
TARGETS = {
    "native": None,  # this machine
    "generic": ("avx2",),
    "cpu-avx512": _SERVERS,
    "cpu-amx": (*_SERVERS, "avx512_bf16", "amx_bf16", "amx_int8"),
}
_STATM = Path("/proc/self/statm")


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def instruction_sets(target: str = "native") -> tuple[str, ...]:
    """Return which of the instruction sets that matter a target of `TARGETS` has."""
    known = TARGETS[target]
    if known is not None:
        return known
    _, flags = _processor()
    return tuple(flag for flag in _FLAGS if flag in flags)


def describe(threads: int) -> dict[str, Any]:
    """Return versions, processor, instruction sets, threads used and the present load."""
    model, _ = _processor()
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in PACKAGES},
        "processor": model,
        "instruction_sets": list(instruction_sets()),
        "cores": os.cpu_count(),
        "threads": threads,
        "openmp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def invoked(*program: str) -> str:
    """Return the command line that ran as `program`, folders of this machine left out."""
    return shlex.join([*program, *map(_without_folder, sys.argv[1:])])


def _without_folder(word: str) -> str:
    if Path(word).is_absolute():
        return Path(word).name
    option, is_folder, folder = word.partition("=/")  # --out=FOLDER, or name=FOLDER
    return f"{option}={Path(folder).name}" if is_folder else word


def writers() -> dict[str, str | None]:
    """Return the versions of what decides the bytes of an artifact."""
    return {name: _version(name) for name in WRITERS}


def resident_memory() -> int:
    """Return the memory of this process, in bytes; where the system does not tell, its peak."""
    if _STATM.is_file():
        return int(_STATM.read_text().split()[1]) * resource.getpagesize()
    return peak_memory()


def peak_memory() -> int:
    """Return the most memory that this process has had so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> tuple[str, set[str]]:
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor() or "unknown", set()
    lines = [line.partition(":") for line in info.read_text().splitlines() if ":" in line]
    values = {key.strip(): value.strip() for key, _, value in reversed(lines)}
    flags = values.get("flags", values.get("Features", ""))
    return values.get("model name", platform.processor() or "unknown"), set(flags.split())
