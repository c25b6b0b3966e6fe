"""KaSA: W without its r smallest singular parts, + s B diag(d) A. Source: arXiv:2412.06071, 3.2."""

from typing import Any

from lora_export.variants import linalg_of


def base(weight: Any, scale: float, rank: int) -> Any:
    """Return `weight` (out, in) without its `rank` smallest singular parts."""
    u, s, v = linalg_of(weight).svd(weight, full_matrices=False)
    kept = max(s.shape[-1] - rank, 0)
    return (u[..., :kept] * s[..., None, :kept]) @ v[..., :kept, :]
