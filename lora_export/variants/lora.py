"""LoRA: W + (alpha / rank) B A. Source: arXiv:2106.09685, section 4.1."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # scales are read without loading torch
    from torch import Tensor


def scaling(alpha: float, rank: int) -> float:
    """Return alpha / rank."""
    return alpha / rank


def base(weight: "Tensor", scale: float, rank: int) -> "Tensor":
    """Return weight as it is: training began with the base itself."""
    return weight


def merged(weight: "Tensor", delta: "Tensor", magnitude: "Tensor | None" = None) -> "Tensor":
    """Return weight + delta."""
    return weight + delta
