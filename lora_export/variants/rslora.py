"""Rank-stabilised LoRA: W + (alpha / sqrt(rank)) B A. Source: arXiv:2312.03732, section 3."""

import math


def scaling(alpha: float, rank: int) -> float:
    """Return alpha / sqrt(rank)."""
    return alpha / math.sqrt(rank)
