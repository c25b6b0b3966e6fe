"""Equations of LoRA, one file each. The file's name is the variant's name.

A variant is a module with two functions:

    scaling(alpha, rank) -> float          the factor s in front of B A
    merged(weight, delta) -> Tensor        the merged weight; both arguments are float64 tensors of
                                           shape (out, in), and delta is s * B @ A

`merged` works on whole tensors in float64; rounding to the base's dtype is the caller's, once.
"""

from lora_export import registry


def names() -> tuple[str, ...]:
    """Return the known variants: the files of this folder."""
    return registry.names(__name__)


def load(name: str) -> registry.Entry:
    """Return the module of the variant `name`; raises `InputError` for an unknown one."""
    return registry.load(__name__, name)
