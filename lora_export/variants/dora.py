"""DoRA: m (W + s B A) / ||W + s B A||, norms over rows. Source: arXiv:2402.09353, equation 5."""

from typing import Any


def magnitude(weight: Any) -> Any:
    """Return the lengths of the rows, (out,): training begins where the base is."""
    return (weight * weight).sum(-1) ** 0.5


def gain(direction: Any, magnitude: Any) -> Any:
    """Return what scales each row of `direction` to the length that `magnitude` (out,) says.

    A row of zeros has no direction and stays zero. (PEFT divides by its length, which is NaN.)
    """
    length = (direction * direction).sum(-1) ** 0.5
    return magnitude / (length + (length == 0))


def merged(weight: Any, delta: Any, magnitude: Any = None) -> Any:
    """Return the rows of weight + delta, each scaled to the length that `magnitude` (out,) says."""
    assert magnitude is not None
    direction = weight + delta
    return direction * gain(direction, magnitude)[..., None]
