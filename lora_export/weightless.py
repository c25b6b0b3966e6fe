"""Models in another precision than their weights lie in, without a second copy of the weights.

A loaded model holds no weights itself: safetensors maps them from the files, and the system reads
and drops their pages as it likes. What would hold them is a conversion, half precision to float32
or anything to float64. So a model is traced from shapes alone, and its weights are converted one by
one where they are written; the reference converts each weight where it is used.
"""

import copy
from collections import UserDict

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lora_export import models


def hollow(model: nn.Module, precision: str) -> nn.Module:
    """Return `models.in_precision(model, precision)` with shapes and dtypes in place of parameters.

    Buffers are real: they are small, and most stand in no checkpoint. torch's fake tensors and not
    its meta device, which a program could not use beside them.
    """
    dtype = models.dtype_in(model, precision)
    with FakeTensorMode():
        blanks = {id(p): _fake(p, dtype) for p in model.parameters()}
    return _with_buffers_in(copy.deepcopy(model, blanks), dtype)


def in_double(model: nn.Module) -> nn.Module:
    """Return `model` in float64: what `copy.deepcopy(model).double()` answers, bit for bit.

    It shares the parameters of `model` and widens each whenever one is read, so that a call holds
    those of one layer at a time.
    """
    found = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    for module in found.modules():
        module._parameters = _Widened(module._parameters)  # type: ignore[assignment]
    return _with_buffers_in(found, torch.float64)


class _Widened(UserDict[str, nn.Parameter | None]):
    """Parameters of one module, in float64 whenever one is read."""

    def __getitem__(self, name: str) -> nn.Parameter | None:
        found = self.data[name]
        if found is None or not found.is_floating_point():
            return found
        return nn.Parameter(found.double(), requires_grad=False)


def _fake(parameter: nn.Parameter, dtype: torch.dtype | None) -> nn.Parameter:
    """Return a parameter without numbers; to be called where tensors are fake."""
    kind = dtype if dtype and parameter.is_floating_point() else parameter.dtype
    empty = torch.empty_strided(parameter.shape, parameter.stride(), dtype=kind)
    return nn.Parameter(empty, requires_grad=False)


def _with_buffers_in(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """Convert the floating buffers of `model`, as `nn.Module.to` does; return it."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if dtype and isinstance(buffer, Tensor) and buffer.is_floating_point():
                module._buffers[name] = buffer.to(dtype)
    return model
