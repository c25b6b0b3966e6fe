"""From float64 to the base's dtype, rounded once; and how far a stored value is from exact.

Torch converts float64 to bfloat16 and float16 by way of float32, which rounds twice. Rounding the
first step to odd makes the second one exact. Source: Boldo and Melquiond, "Emulation of a FMA and
correctly rounded sums: proved algorithms using rounding to odd", IEEE Transactions on Computers
57(4), 2008.
"""

import numpy as np
import torch

from lora_export.errors import InputError
from lora_export.records import Array

# safetensors' name -> torch's
TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip
# safetensors' name -> (bits of the fraction, exponent of the smallest normal number)
_FORMATS = {"F64": (52, -1022), "F32": (23, -126), "BF16": (7, -126), "F16": (10, -14)}


def round_once(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return float64 `exact` in `dtype`, rounded once, to nearest, ties to even.

    Raises:
        InputError: `exact` is not finite, or overflows `dtype`.
    """
    assert exact.dtype == torch.float64
    narrow = dtype in (torch.float16, torch.bfloat16)
    result = (_round_to_odd(exact) if narrow else exact).to(dtype)
    if bad := int((~torch.isfinite(result)).sum()):
        raise InputError(f"{bad} of {result.numel()} merged weights are not finite in {dtype}")
    return result


def _round_to_odd(exact: torch.Tensor) -> torch.Tensor:
    """Return `exact` as float32: itself where representable, else the neighbour with an odd bit."""
    near = exact.to(torch.float32)
    bits = near.view(torch.int32)
    # Bits of a float order its magnitude, so one less is the neighbour towards zero.
    towards = torch.where(near.double().abs() > exact.abs(), -1, 1).to(torch.int32)
    inexact_and_even = (near.double() != exact) & (bits % 2 == 0)
    return torch.where(inexact_and_even, bits + towards, bits).view(torch.float32)


def ulp(exact: Array, dtype: str) -> Array:
    """Return the distance between neighbouring numbers of `dtype` at each float64 value."""
    fraction_bits, least = _FORMATS[dtype]
    _, exponent = np.frexp(np.abs(exact))
    power = np.where(exact == 0, least, np.maximum(exponent - 1, least))
    spacing: Array = np.ldexp(1.0, power - fraction_bits)
    return spacing
