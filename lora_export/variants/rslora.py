"""Rank-stabilised LoRA: W + (alpha / sqrt(rank)) B A. Source: arXiv:2312.03732, section 3."""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # scales are read without loading torch
    from torch import Tensor


def scaling(alpha: float, rank: int) -> float:
    """Return alpha / sqrt(rank)."""
    return alpha / math.sqrt(rank)


def merged(weight: "Tensor", delta: "Tensor") -> "Tensor":
    """Return weight + delta, both (out, in), float64."""
    return weight + delta
