"""A live PyTorch model, run as it is."""

from collections.abc import Mapping

from torch import nn

from lora_export.records import Array, Signature
from lora_export.runners._torch import answers, precision_of


class EagerRunner:
    """Runs a model that maps tensors to a tuple of tensors, in the order of its signature."""

    def __init__(self, name: str, model: nn.Module, signature: Signature) -> None:
        self.name = name
        self.model = model.eval()
        self.inputs = [spec.name for spec in signature.inputs]
        self.outputs = [spec.name for spec in signature.outputs]
        self.precision = precision_of(model)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the named outputs for named inputs."""
        return answers(self.model, inputs, self.inputs, self.outputs)
