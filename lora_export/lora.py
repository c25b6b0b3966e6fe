"""Linear layers with a low-rank update: `LoraLinear`, and `LoraConv1D` for GPT-2's `Conv1D`.

A layer owns both sides of its equation: `forward`, and the merged weight that replaces it.
No PEFT. Source of the method: arXiv:2106.09685.
"""

import abc
import math
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_export import variants
from lora_export.config import LoraConfig
from lora_export.errors import InputError
from lora_export.torch_rounding import round_once

M = TypeVar("M", bound=nn.Module)


class LoraLayer(nn.Module, abc.ABC):
    """A frozen linear map with a trainable low-rank update. Abstract; see `LoraLinear`.

    Attributes:
        weight, bias: those of the base layer, under the base's names, frozen. A base's state dict
            therefore still fits the model after injection.
        lora_A: (rank, in), Kaiming-uniform (a=sqrt(5)) or normal with deviation 1 / rank.
        lora_B: (out, rank), zero at the start, so that a fresh layer computes what its base does.

    A fresh pair has the base's dtype. An attached adapter keeps its own where that is wider.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, config: LoraConfig) -> None:
        super().__init__()
        self.rank, self.alpha, self.variant = config.rank, float(config.alpha), config.variant
        self.scale: float = variants.scaling(config.variant, self.alpha, self.rank)
        self.dropout = nn.Dropout(config.dropout)
        self.active = True
        self._base_weight: Tensor | None = None  # the exact bits, while merged
        self.register_parameter("weight", weight)  # type: ignore[arg-type]
        self.register_parameter("bias", bias)  # type: ignore[arg-type]
        self.requires_grad_(False)
        out_features, in_features = self._transpose(weight).shape
        self.in_features, self.out_features = int(in_features), int(out_features)
        self.lora_A = nn.Parameter(weight.new_empty(self.rank, self.in_features))
        self.lora_B = nn.Parameter(weight.new_zeros(self.out_features, self.rank))
        if config.init == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / self.rank)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        have_called(self)

    @abc.abstractmethod
    def _transpose(self, matrix: Tensor) -> Tensor:
        """Turn the base's layout into (out, in), or back."""

    @abc.abstractmethod
    def plain(self) -> nn.Module:
        """Return a layer of the base's class that holds the present weight and bias, uncopied."""

    def forward(self, x: Tensor) -> Tensor:
        """Return W x + b + scale * B(A(dropout(x))): (..., in) to (..., out)."""
        result = functional.linear(x, self._transpose(self.weight), self.bias)
        if self.is_merged or not self.active:
            return result
        inner = functional.linear(self.dropout(x).to(self.lora_A.dtype), self.lora_A)
        update = functional.linear(inner, self.lora_B) * self.scale
        return result + update.to(result.dtype)

    @property
    def is_merged(self) -> bool:
        """Whether `weight` holds the merged weight at present."""
        return self._base_weight is not None

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """Return the merged weight in the base's layout and dtype: float64, then rounded once.

        Raises:
            InputError: a value is not finite.
        """
        if self.is_merged:
            return self.weight.detach()
        delta = self.scale * (self.lora_B.double() @ self.lora_A.double())
        exact = variants.merged(self.variant, self._transpose(self.weight).double(), delta)
        return self._transpose(round_once(exact, self.weight.dtype)).contiguous()

    def merge(self) -> None:
        """Put the merged weight in place; the base's bits are kept for `unmerge`."""
        if self.is_merged:
            raise InputError("this layer is merged already; merging twice would add twice")
        merged, self._base_weight = self.merged_weight(), self.weight.detach().clone()
        self.weight.data = merged

    def unmerge(self) -> None:
        """Put back the exact bits that the base had before `merge`."""
        if self._base_weight is None:
            raise InputError("this layer is not merged")
        self.weight.data, self._base_weight = self._base_weight, None

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._base_weight is not None:  # follow .to(device) and .double()
            self._base_weight = fn(self._base_weight)
        return self

    def extra_repr(self) -> str:
        """Return what `print(model)` shows of this layer."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, rank={self.rank}, alpha={self.alpha:g}, "
            f"variant={self.variant}"
        )


class LoraLinear(LoraLayer):
    """`torch.nn.Linear` with a low-rank update: y = W x + b + scale * B(A(dropout(x)))."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        variant: str = "lora",
        init: str = "kaiming",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        linear = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        config = LoraConfig(rank, alpha, dropout, variant=variant, init=init)
        super().__init__(linear.weight, linear.bias, config)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        rank: int = 8,
        alpha: float = 16.0,
        *,
        dropout: float = 0.0,
        variant: str = "lora",
        init: str = "kaiming",
    ) -> Self:
        """Return a layer over the weight and bias of `linear`, which are shared and frozen.

        Device, dtype and training mode are those of `linear`.
        """
        config = LoraConfig(rank, alpha, dropout, variant=variant, init=init)
        return cls.over(linear, config)

    @classmethod
    def over(cls, linear: nn.Linear, config: LoraConfig) -> Self:
        """Return a layer over `linear` with the rank, alpha, dropout and variant of `config`."""
        layer = cls.__new__(cls)
        LoraLayer.__init__(layer, linear.weight, linear.bias, config)
        return layer.train(linear.training)

    def _transpose(self, matrix: Tensor) -> Tensor:
        return matrix

    def plain(self) -> nn.Linear:
        """Return an `nn.Linear` that holds the present weight and bias, uncopied."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, "meta")
        return _filled(linear, self)


class LoraConv1D(LoraLayer):
    """`transformers.pytorch_utils.Conv1D` (weight (in, out), as in GPT-2) with the same update."""

    @classmethod
    def over(cls, conv: nn.Module, config: LoraConfig) -> Self:
        """Return a layer over `conv`, whose weight and bias are shared and frozen."""
        layer = cls.__new__(cls)
        LoraLayer.__init__(layer, conv.weight, conv.bias, config)  # type: ignore[arg-type]
        return layer.train(conv.training)

    def _transpose(self, matrix: Tensor) -> Tensor:
        return matrix.T

    def plain(self) -> nn.Module:
        """Return a `Conv1D` that holds the present weight and bias, uncopied."""
        from transformers.pytorch_utils import Conv1D  # loaded already: the base is one

        with torch.device("meta"):
            conv = Conv1D(self.out_features, self.in_features)
        return _filled(conv, self)


def _filled(plain: M, layer: LoraLayer) -> M:
    plain.register_parameter("weight", layer.weight)  # type: ignore[arg-type]
    plain.register_parameter("bias", layer.bias)  # type: ignore[arg-type]
    return plain.train(layer.training)


def have_called(module: nn.Module) -> None:
    """Keep `torch.nn.TransformerEncoderLayer` from reading the weight of `module` uncalled.

    In eval mode it computes with nothing but the weights of its layers, unless one has a hook.
    """
    module.register_forward_pre_hook(_nothing)


def _nothing(module: nn.Module, inputs: Any) -> None:
    """Change nothing: that there is a hook is all that counts."""


def layer_class(module: nn.Module) -> type[LoraLinear] | type[LoraConv1D] | None:
    """Return the class that adapts `module`, or None where it is no plain linear map.

    Subclasses of `nn.Linear` are left alone: their owners (`nn.MultiheadAttention`, quantisers)
    read the weight without calling the layer, and an update there would be skipped silently.
    """
    kind = type(module)
    if kind is nn.Linear:
        return LoraLinear
    if kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils":
        return LoraConv1D
    return None


def shape_of(module: nn.Module | None) -> tuple[int, int] | None:
    """Return (out, in) of a linear map, adapted already or not, or None where it is none."""
    if isinstance(module, LoraLayer):
        return module.out_features, module.in_features
    kind = layer_class(module) if module is not None else None
    if module is None or kind is None:
        return None
    rows, columns = module.get_parameter("weight").shape
    return (rows, columns) if kind is LoraLinear else (columns, rows)
