"""KaSA: W without its r smallest singular parts, + s B diag(d) A. Source: arXiv:2412.06071, 3.2."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # scales are read without loading torch
    from torch import Tensor


def base(weight: "Tensor", scale: float, rank: int) -> "Tensor":
    """Return `weight` (out, in) without its `rank` smallest singular parts."""
    import torch

    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    kept = max(s.shape[-1] - rank, 0)
    result: Tensor = (u[..., :kept] * s[..., None, :kept]) @ v[..., :kept, :]
    return result
