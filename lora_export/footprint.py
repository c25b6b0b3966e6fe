"""The memory of an artifact that is open: what a fresh process grows by, opening it for one answer.

In the process that exported it the figure would say nothing: the model lies there several times,
and the allocator keeps what was freed. The libraries of the runtime are not in the figure: they are
loaded before, because the exporters' own imports come along with them.
"""

import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lora_export import exporters
from lora_export.environment import resident_memory
from lora_export.errors import ExportFailed
from lora_export.records import Array

MOST_SECONDS = 600.0  # a process that has not answered by then never will


def grown_bytes(name: str, path: Path, threads: int, arrays: Mapping[str, Array]) -> int:
    """Return by how much a fresh process grows that opens the file and answers `arrays` once.

    Raises:
        ExportFailed: the file cannot be opened there, or gives no answer.
    """
    with tempfile.TemporaryDirectory(prefix="lora_export-") as folder:
        given = Path(folder) / "inputs.npz"
        np.savez(given, **dict(arrays))  # type: ignore[arg-type]
        words = [sys.executable, "-m", __name__, name, str(path), str(threads), str(given)]
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=MOST_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise ExportFailed(f"a fresh process gave no answer in {MOST_SECONDS:g} s") from error
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ExportFailed(f"a fresh process cannot run it: {said}")
    return int(json.loads(lines[-1])["grown_bytes"])


def main(name: str, path: str, threads: str, given: str) -> None:
    """Open the file, answer once, and print by how many bytes this process grew."""
    import torch

    torch.set_num_threads(int(threads))
    exporter = exporters.load(name)
    exporters.lacking(name)  # loads the runtime, where that is done late
    with np.load(given) as stored:
        arrays = dict(stored)
    gc.collect()
    before = resident_memory()
    runner = exporter.open_runner(Path(path), int(threads))
    runner.run(arrays)
    sys.stdout.write(json.dumps({"grown_bytes": max(0, resident_memory() - before)}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
