"""DoRA: m (W + s B A) / ||W + s B A||, norms over rows. Source: arXiv:2402.09353, equation 5."""

from typing import Any


def merged(weight: Any, delta: Any, magnitude: Any = None) -> Any:
    """Return the rows of weight + delta, each scaled to the length that `magnitude` (out,) says.

    A row of zeros has no direction and stays zero. (PEFT divides by its length, which is NaN.)
    """
    assert magnitude is not None
    direction = weight + delta
    length = (direction * direction).sum(-1) ** 0.5
    factor = magnitude / (length + (length == 0))
    return direction * factor[..., None]
