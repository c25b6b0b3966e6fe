"""PiSSA: training began with W minus its first r singular parts. Source: arXiv:2404.02948, eq. 5.

The initial pair is B0 A0 = U_r S_r V_r, whatever the scale, so the adapter's update is added to
the residual W - U_r S_r V_r. Of a float64 decomposition; PEFT's own is in float32.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # scales are read without loading torch
    from torch import Tensor


def base(weight: "Tensor", scale: float, rank: int) -> "Tensor":
    """Return the residual of `weight` (out, in): all but its `rank` largest singular parts."""
    import torch

    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    result: Tensor = weight - (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]
    return result
