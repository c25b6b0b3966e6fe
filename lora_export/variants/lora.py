"""LoRA: W + (alpha / rank) B A. Source: arXiv:2106.09685, section 4.1."""

from typing import Any


def scaling(alpha: float, rank: int) -> float:
    """Return alpha / rank."""
    return alpha / rank


def base(weight: Any, scale: float, rank: int) -> Any:
    """Return weight as it is: training began with the base itself."""
    return weight


def magnitude(weight: Any) -> None:
    """Return None: plain LoRA learns no magnitude."""


def gain(direction: Any, magnitude: Any) -> Any:
    """Return 1: no row is scaled."""
    return 1.0


def merged(weight: Any, delta: Any, magnitude: Any = None) -> Any:
    """Return weight + delta."""
    return weight + delta
