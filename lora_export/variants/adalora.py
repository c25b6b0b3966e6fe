"""AdaLoRA: W + alpha / (r + 1e-5) B diag(E) A, r the initial rank. Source: arXiv:2303.10512.

The paper has no alpha. It is PEFT's, which adds 1e-5 to the rank and keeps the initial rank in the
denominator after singular values were pruned; so its tensors mean this and nothing else.
"""

_EPSILON = 1e-5


def scaling(alpha: float, rank: int) -> float:
    """Return alpha / (rank + 1e-5); `rank` is the initial one."""
    return (alpha if alpha > 0 else float(rank)) / (rank + _EPSILON)
