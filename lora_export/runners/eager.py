"""A live PyTorch model, run as it is."""

from collections.abc import Mapping

import torch
from torch import nn

from lora_export.records import Array, Signature


class EagerRunner:
    """Runs a model that maps tensors to a tuple of tensors, in the order of its signature."""

    def __init__(self, name: str, model: nn.Module, signature: Signature) -> None:
        self.name = name
        self.model = model.eval()
        self.inputs = [spec.name for spec in signature.inputs]
        self.outputs = [spec.name for spec in signature.outputs]
        floating = next(p for p in model.parameters() if p.is_floating_point())
        self.precision = str(floating.dtype).removeprefix("torch.")

    @torch.inference_mode()
    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the named outputs for named inputs."""
        found = self.model(*[torch.from_numpy(inputs[name]) for name in self.inputs])
        values = found if isinstance(found, tuple) else (found,)
        # Numpy has no bfloat16; widening half precision is exact.
        wide = [v.float() if v.dtype in (torch.bfloat16, torch.float16) else v for v in values]
        return {name: value.numpy() for name, value in zip(self.outputs, wide, strict=True)}
