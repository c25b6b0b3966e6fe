"""PiSSA: training began with W minus its first r singular parts. Source: arXiv:2404.02948, eq. 5.

The initial pair is B0 A0 = U_r S_r V_r, whatever the scale, so the adapter's update is added to
the residual W - U_r S_r V_r. Of a float64 decomposition; PEFT's own is in float32.
"""

from typing import Any

from lora_export.variants import linalg_of


def base(weight: Any, scale: float, rank: int) -> Any:
    """Return the residual of `weight` (out, in): all but its `rank` largest singular parts."""
    u, s, v = linalg_of(weight).svd(weight, full_matrices=False)
    return weight - (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]
