"""LoRA: W + (alpha / rank) B A. Source: arXiv:2106.09685, section 4.1."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # scales are read without loading torch
    from torch import Tensor


def scaling(alpha: float, rank: int) -> float:
    """Return alpha / rank."""
    return alpha / rank


def merged(weight: "Tensor", delta: "Tensor") -> "Tensor":
    """Return weight + delta, both (out, in), float64."""
    return weight + delta
