"""Runtimes, one file each. A runner maps named arrays to named arrays.

A runner is any object with two attributes and a method:

    name: str                              "onnx"
    precision: str                         what it really computes in: "float32"
    run(inputs) -> dict[str, Array]
    settings: dict[str, Any]               optional: how its runtime was set, for the certificate;
                                           without, it has torch's number of threads

It takes the number of threads when it is made, and keeps to it. That of an artifact is opened by

    open_runner(path, threads) -> Runner   raises `ExportFailed` where the file is not what it was
"""

from collections.abc import Mapping
from typing import Protocol

from lora_export.records import Array

WITHOUT_TORCH = ("onnx", "openvino")  # formats whose runners import neither torch nor a model


class Runner(Protocol):
    """What every runtime offers."""

    name: str
    precision: str

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the named outputs for named inputs."""
        ...
