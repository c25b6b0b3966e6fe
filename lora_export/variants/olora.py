"""OLoRA: training began with W - s Q_r R_r of the QR decomposition. Source: arXiv:2406.01775, 3."""

from typing import Any

from lora_export.variants import linalg_of


def base(weight: Any, scale: float, rank: int) -> Any:
    """Return `weight` (out, in) without scale times the first `rank` parts of its QR."""
    q, r = linalg_of(weight).qr(weight)
    return weight - scale * (q[..., :rank] @ r[..., :rank, :])
