"""From float64 to a tensor's dtype, rounded once; and how far a stored value is from exact.

ml_dtypes, like torch, converts float64 to bfloat16 by way of float32, which rounds twice. Rounding
the first step to odd makes the second one exact. Source: Boldo and Melquiond, "Emulation of a FMA
and correctly rounded sums: proved algorithms using rounding to odd", IEEE Transactions on
Computers 57(4), 2008. Numpy's own conversions to float32 and float16 round once.
"""

import ml_dtypes
import numpy as np

from lora_export.errors import InputError
from lora_export.records import Array

# safetensors' name -> numpy's dtype
DTYPES = {
    "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}  # fmt: skip
# safetensors' name -> (bits of the fraction, exponent of the smallest normal number)
_FORMATS = {"F64": (52, -1022), "F32": (23, -126), "BF16": (7, -126), "F16": (10, -14)}


def rounded(exact: Array, dtype: str) -> Array:
    """Return float64 `exact` in `dtype`, rounded once, to nearest, ties to even.

    What is too large for `dtype` becomes infinite.
    """
    assert exact.dtype == np.float64
    with np.errstate(over="ignore"):
        wide = _round_to_odd(exact) if dtype == "BF16" else exact
        return wide.astype(DTYPES[dtype])


def round_once(exact: Array, dtype: str) -> Array:
    """Return float64 `exact` in `dtype`, rounded once, to nearest, ties to even.

    Raises:
        InputError: `exact` is not finite, or overflows `dtype`.
    """
    result = rounded(exact, dtype)
    if bad := int((~np.isfinite(result)).sum()):
        raise not_finite(bad, result.size, dtype)
    return result


def not_finite(count: int, size: int, dtype: str) -> InputError:
    """Return the error that says how many of `size` merged weights do not fit in `dtype`."""
    return InputError(f"{count} of {size} merged weights are not finite in {dtype}")


def _round_to_odd(exact: Array) -> Array:
    """Return `exact` as float32: itself where representable, else the neighbour with an odd bit."""
    near = exact.astype(np.float32)
    bits = near.view(np.int32)
    back = near.astype(np.float64)
    # Bits of a float order its magnitude, so one less is the neighbour towards zero.
    towards = np.where(np.abs(back) > np.abs(exact), np.int32(-1), np.int32(1))
    inexact_and_even = (back != exact) & (bits % 2 == 0)
    return np.where(inexact_and_even, bits + towards, bits).view(np.float32)


def ulp(exact: Array, dtype: str) -> Array:
    """Return the distance between neighbouring numbers of `dtype` at each float64 value."""
    fraction_bits, least = _FORMATS[dtype]
    _, exponent = np.frexp(np.abs(exact))
    power = np.where(exact == 0, least, np.maximum(exponent - 1, least))
    spacing: Array = np.ldexp(1.0, power - fraction_bits)
    return spacing
