"""An ONNX file, run by onnxruntime on the CPU."""

import json
from collections.abc import Mapping
from pathlib import Path

import onnxruntime

from lora_export import registry
from lora_export.records import Array


class OnnxRunner:
    """Runs an ONNX graph; spinning is off, so that it does not steal a neighbour's core."""

    name = "onnx"

    def __init__(self, model: Path | bytes, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(
            model if isinstance(model, bytes) else str(model),
            options,
            providers=["CPUExecutionProvider"],
        )
        self.outputs = [node.name for node in self.session.get_outputs()]
        metadata = self.session.get_modelmeta().custom_metadata_map
        said = json.loads(metadata.get(registry.PRECISION, f'"{registry.FULL}"'))
        self.precision = {"fp32": "float32", "fp16": "float16"}.get(said, said)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the named outputs for named inputs."""
        values = self.session.run(self.outputs, dict(inputs))
        return dict(zip(self.outputs, values, strict=True))
