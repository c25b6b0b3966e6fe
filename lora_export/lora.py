"""Linear layers with a low-rank update: `LoraLinear`, and `LoraConv1D` for GPT-2's `Conv1D`.

`LoraLinear4bit` trains over a base that bitsandbytes holds in 4 bits (arXiv:2305.14314).

A layer owns both sides of its equation: `forward`, and the merged weight that replaces it.
No PEFT. Sources of the methods: arXiv:2106.09685, and arXiv:2402.09353 for DoRA.
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
# What a layer trains, by its name there: the field of `records.Factors` that holds it.
FACTORS = {"lora_A": "a", "lora_B": "b", "lora_magnitude_vector": "magnitude"}


class LoraLayer(nn.Module, abc.ABC):
    """A frozen linear map with a trainable low-rank update. Abstract; see `LoraLinear`.

    Attributes:
        weight, bias: those of the base layer, under the base's names, frozen. A base's state dict
            therefore still fits the model after injection.
        lora_A: (rank, in), Kaiming-uniform (a=sqrt(5)) or normal with deviation 1 / rank.
        lora_B: (out, rank), zero at the start, so that a fresh layer computes what its base does.
        lora_magnitude_vector: (out,), the lengths of the weight's rows at the start; None but in
            DoRA.

    A fresh pair has the base's dtype. An attached adapter keeps its own where that is wider.
    """

    weight: Tensor
    bias: Tensor | None
    lora_magnitude_vector: nn.Parameter | None

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
        matrix = self._matrix().detach()
        self.out_features, self.in_features = map(int, matrix.shape)
        self.lora_A = nn.Parameter(matrix.new_empty(self.rank, self.in_features))
        self.lora_B = nn.Parameter(matrix.new_zeros(self.out_features, self.rank))
        if config.init == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / self.rank)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        # In half precision squares would vanish, and the rows be off by what rounding costs.
        wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
        start = variants.magnitude(config.variant, wide)
        vector = None if start is None else nn.Parameter(start)
        self.register_parameter("lora_magnitude_vector", vector)
        have_called(self)

    @classmethod
    def over(cls, module: nn.Module, config: LoraConfig) -> Self:
        """Return a layer over `module`, whose weight and bias are shared and frozen.

        Rank, alpha, dropout and variant are those of `config`.
        """
        layer = cls.__new__(cls)
        LoraLayer.__init__(layer, module.weight, module.bias, config)  # type: ignore[arg-type]
        return layer.train(module.training)

    @abc.abstractmethod
    def _transpose(self, matrix: Tensor) -> Tensor:
        """Turn the base's layout into (out, in), or back."""

    @abc.abstractmethod
    def plain(self) -> nn.Module:
        """Return a layer of the base's class that holds the present weight and bias, uncopied."""

    def base_weight(self) -> Tensor:
        """Return the base's weight, in its own layout, as it was trained.

        Raises:
            InputError: the layer holds less than that: a quantised weight.
        """
        return self.weight.detach()

    def _matrix(self) -> Tensor:
        """Return what the layer holds of the base's weight, as (out, in)."""
        return self._transpose(self.weight)

    def _linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return W x + bias."""
        return functional.linear(x, self._matrix(), bias)

    def factors(self) -> dict[str, nn.Parameter]:
        """Return what is trained, by name: the keys of `FACTORS` that this layer has."""
        return {n: p for n in FACTORS if (p := getattr(self, n)) is not None}

    def forward(self, x: Tensor) -> Tensor:
        """Return gain * (W x + scale * B(A(dropout(x)))) + b: (..., in) to (..., out).

        gain is 1 but in DoRA, where it is m / ||W + scale * B A||. No gradient goes back through
        that norm (section 4.3 of the paper), so the sum of matrices is no part of the graph.
        """
        if self.is_merged or not self.active:
            return self._linear(x, self.bias)
        inner = functional.linear(self.dropout(x).to(self.lora_A.dtype), self.lora_A)
        update = functional.linear(inner, self.lora_B) * self.scale
        if self.lora_magnitude_vector is None:
            result = self._linear(x, self.bias)
            return result + update.to(result.dtype)
        result = self._linear(x, None)
        total, gain = result + update, self._gain()
        if result.is_nested:  # torch's encoder nests padded rows; nothing is broadcast over those
            return functional.linear(total, torch.diag(gain), self.bias).to(result.dtype)
        scaled = total * gain
        return (scaled if self.bias is None else scaled + self.bias).to(result.dtype)

    def _gain(self) -> Tensor:
        """Return the factor of each row, (out,), in float32 or wider whatever autocast says."""
        wide = torch.promote_types(self.lora_A.dtype, torch.float32)
        weight, a, b = (t.detach().to(wide) for t in (self._matrix(), self.lora_A, self.lora_B))
        with torch.autocast(weight.device.type, enabled=False):
            direction = torch.addmm(weight, b, a, alpha=self.scale)
        found: Tensor = variants.gain(self.variant, direction, self.lora_magnitude_vector)
        return found

    @property
    def is_merged(self) -> bool:
        """Whether `weight` holds the merged weight at present."""
        return self._base_weight is not None

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """Return the merged weight in the base's layout and dtype: float64, then rounded once.

        Raises:
            InputError: a value is not finite, or the base is quantised.
        """
        if self.is_merged:
            return self.weight.detach()
        delta = self.scale * (self.lora_B.double() @ self.lora_A.double())
        learned = self.lora_magnitude_vector
        magnitude = None if learned is None else learned.double()
        base = self.base_weight()
        exact = variants.merged(self.variant, self._transpose(base).double(), delta, magnitude)
        return self._transpose(round_once(exact, base.dtype)).contiguous()

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

    def _transpose(self, matrix: Tensor) -> Tensor:
        return matrix

    def plain(self) -> nn.Linear:
        """Return an `nn.Linear` that holds the present weight and bias, uncopied."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, "meta")
        return _filled(linear, self)


class LoraConv1D(LoraLayer):
    """`transformers.pytorch_utils.Conv1D` (weight (in, out), as in GPT-2) with the same update."""

    def _transpose(self, matrix: Tensor) -> Tensor:
        return matrix.T

    def plain(self) -> nn.Module:
        """Return a `Conv1D` that holds the present weight and bias, uncopied."""
        from transformers.pytorch_utils import Conv1D  # loaded already: the base is one

        with torch.device("meta"):
            conv = Conv1D(self.out_features, self.in_features)
        return _filled(conv, self)


class LoraLinear4bit(LoraLayer):
    """`bitsandbytes.nn.Linear4bit` with the same update; the base stays packed in 4 bits.

    A fresh pair has the dtype that was quantised. Such a layer is trained and not merged.
    """

    weight: Any  # with the `quant_state` of bitsandbytes
    _packed: tuple[Any]  # the base itself; in a tuple, so that it is no part of the layer

    @classmethod
    def over(cls, module: nn.Module, config: LoraConfig) -> Self:
        """Return a layer over `module`, whose packed weight and bias are shared and frozen."""
        module.state_dict()  # undoes how bitsandbytes packs it anew to evaluate on some processors
        layer = super().over(module, config)
        layer._packed = (module,)
        return layer

    def base_weight(self) -> Tensor:
        """Raise `InputError`: what was trained is not here."""
        raise InputError(
            "the base is held in 4 bits, which an adapter is neither merged into nor described by; "
            "take the adapter by extract, attach it to the base in full precision, and go on there"
        )

    def _transpose(self, matrix: Tensor) -> Tensor:
        return matrix

    def _matrix(self) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit  # loaded already: the base is its

        found: Tensor = dequantize_4bit(self.weight.detach(), self.weight.quant_state)
        return found

    def _linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        from bitsandbytes import matmul_4bit

        wide = x.to(self._packed[0].compute_dtype or x.dtype)
        shift = None if bias is None else bias.to(wide.dtype)
        found: Tensor = matmul_4bit(wide, self.weight, self.weight.quant_state, bias=shift)
        return found.to(x.dtype)

    def plain(self) -> nn.Module:
        """Return the base itself, with the present weight and bias."""
        plain: nn.Module = self._packed[0]
        return _filled(plain, self)


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


# The class that adapts a module of the class with this name, which need not be installed.
_LAYERS: dict[str, type[LoraLayer]] = {
    "torch.nn.modules.linear.Linear": LoraLinear,
    "transformers.pytorch_utils.Conv1D": LoraConv1D,
    "bitsandbytes.nn.modules.Linear4bit": LoraLinear4bit,
}


def layer_class(module: nn.Module) -> type[LoraLayer] | None:
    """Return the class that adapts `module`, or None where it is no plain linear map.

    Other subclasses of `nn.Linear` are left alone: their owners (`nn.MultiheadAttention`,
    quantisers) read the weight without calling the layer, and an update there would be skipped
    silently.
    """
    kind = type(module)
    return _LAYERS.get(f"{kind.__module__}.{kind.__name__}")


def shape_of(module: nn.Module | None) -> tuple[int, int] | None:
    """Return (out, in) of a linear map, adapted already or not, or None where it is none."""
    if isinstance(module, LoraLayer):
        return module.out_features, module.in_features
    kind = layer_class(module) if module is not None else None
    if module is None or kind is None:
        return None
    if kind is LoraConv1D:
        columns, rows = module.get_parameter("weight").shape
        return rows, columns
    return module.out_features, module.in_features  # type: ignore[return-value]
