"""OLoRA: training began with W - s Q_r R_r of the QR decomposition. Source: arXiv:2406.01775, 3."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # scales are read without loading torch
    from torch import Tensor


def base(weight: "Tensor", scale: float, rank: int) -> "Tensor":
    """Return `weight` (out, in) without scale times the first `rank` parts of its QR."""
    import torch

    q, r = torch.linalg.qr(weight)
    result: Tensor = weight - scale * (q[..., :rank] @ r[..., :rank, :])
    return result
