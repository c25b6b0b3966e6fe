"""An ONNX file, run by onnxruntime on the CPU."""

import json
from collections.abc import Mapping
from pathlib import Path

import onnxruntime

from lora_export import registry
from lora_export.errors import ExportFailed, first_line
from lora_export.records import Array


class OnnxRunner:
    """Runs an ONNX graph; spinning is off, so that it does not steal a neighbour's core."""

    name = "onnx"

    def __init__(self, model: Path, threads: int) -> None:
        """Open the file `model`; raises `ExportFailed` where onnxruntime cannot."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(
                str(model), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's own kinds have no class in common
            raise ExportFailed(
                f"{model.name} cannot be opened by onnxruntime: {first_line(error)}"
            ) from error
        self.outputs = [node.name for node in self.session.get_outputs()]
        self.metadata = self.session.get_modelmeta().custom_metadata_map
        said = json.loads(self.metadata.get(registry.PRECISION, f'"{registry.FULL}"'))
        self.precision = {"fp32": "float32", "fp16": "float16"}.get(said, said)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the named outputs for named inputs."""
        values = self.session.run(self.outputs, dict(inputs))
        return dict(zip(self.outputs, values, strict=True))
