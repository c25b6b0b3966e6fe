"""Equations of the LoRA family, one file each. The file's name is the variant's name.

An adapter's variant is one name or several joined by "+": `rslora+dora`. A file provides one or
more of these functions; where two provide the same one, the later name wins:

    scaling(alpha, rank) -> float            the factor s in front of B A
    base(weight, scale, rank)                what training made of the base's weight beforehand
    magnitude(weight)                        the magnitude that training begins with, or None
    gain(direction, magnitude)               the factor of each row of direction = weight + delta
    merged(weight, delta, magnitude)         the merged weight

Weights are float64, numpy arrays or torch tensors alike, of shape (out, in), or
(experts, out, in); delta = s B A has the same shape, and magnitude is (out,) or None. Embeddings
come as (dim, vocab), kernels flattened to (out, in * kernel). `merged` goes row by row. Where there
is no magnitude and no changed base, the merged weight is the sum, whatever the variant. Rounding to
the base's dtype is the caller's, once.

What has no equation of its own has no file: biases and heads are stored whole, an embedding, a
convolution or fused experts are the same equations in another layout.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from lora_export import registry
from lora_export.errors import InputError

_DEFAULT = "lora"


def names() -> tuple[str, ...]:
    """Return the known variants: the files of this folder."""
    return registry.names(__name__)


def load(name: str) -> registry.Entry:
    """Return the module of the variant `name`; raises `InputError` for an unknown one."""
    return registry.load(__name__, name)


def check(variant: str) -> None:
    """Raise `InputError` unless every name in `variant` is known."""
    if unknown := set(variant.split("+")) - set(names()):
        raise InputError(
            f"variant {variant!r}: {', '.join(sorted(unknown))} is not one of {', '.join(names())}"
        )


def scaling(variant: str, alpha: float, rank: int) -> float:
    """Return the factor s of `variant`."""
    return float(_find(variant, "scaling")(alpha, rank))


def base(variant: str, weight: Any, scale: float, rank: int) -> Any:
    """Return what training made of the base's `weight` before it began: mostly `weight` itself."""
    change = _find(variant, "base")
    return change(weight, scale, rank)


def changes_base(variant: str) -> bool:
    """Return whether training began by changing the base's weights."""
    return any(hasattr(load(name), "base") for name in variant.split("+") if name != _DEFAULT)


def magnitude(variant: str, weight: Any) -> Any:
    """Return the magnitude that training begins with, (out,), or None where there is none."""
    return _find(variant, "magnitude")(weight)


def gain(variant: str, direction: Any, magnitude: Any) -> Any:
    """Return by what each row of W + s B A is multiplied in the merged weight, (out,) or 1."""
    return _find(variant, "gain")(direction, magnitude)


def merged(variant: str, weight: Any, delta: Any, magnitude: Any = None) -> Any:
    """Return the merged weight of `variant`."""
    return _find(variant, "merged")(weight, delta, magnitude)


def linalg_of(weight: Any) -> Any:
    """Return the linear algebra of numpy or of torch, whichever `weight` belongs to."""
    if isinstance(weight, np.ndarray):
        return np.linalg
    import torch

    return torch.linalg


def _find(variant: str, function: str) -> Callable[..., Any]:
    for name in (*reversed(variant.split("+")), _DEFAULT):
        if found := getattr(load(name), function, None):
            return found  # type: ignore[no-any-return]
    raise AssertionError(function)
