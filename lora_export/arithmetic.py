"""W + s B A for a block of rows, every element rounded as the float64 value is.

The float64 value of an element is defined once, in `LowRank.exact`: a sum over the rank in order.
Most elements do not need it: an approximation with a bound on its error tells how they round. Only
where that leaves two possibilities is the float64 value computed. So the result depends neither
on how the approximation was made (a compiled kernel, or numpy where that was not built) nor on
threads, blocks or the processor.

The bound on an inner product is from Higham, "Accuracy and Stability of Numerical Algorithms",
2nd edition, section 3.1; the sum of magnitudes in it is bounded by Cauchy and Schwarz.
"""

import functools
import threading
from types import ModuleType
from typing import Any

import numpy as np

from lora_export.records import Array
from lora_export.rounding import DTYPES, rounded

kernel: ModuleType | None
try:
    from lora_export import _kernel as kernel
except ImportError:  # no compiler where this was installed
    kernel = None

# dtype of the output -> one in which its rounding can mostly be told, and that one's unit roundoff
_WIDE = {
    "BF16": (np.float32, 2.0**-24),
    "F16": (np.float32, 2.0**-24),
    "F32": (np.float64, 2.0**-53),
}
# more than a rank's underflows can add up to, of factors no larger than 1
_TINY = {np.float32: 2.0**-120, np.float64: 2.0**-900}
_TERMS = 8  # of a partial sum, here as in the kernel: sums of sums lose less
_MOST_UNDECIDED = 1 / 8  # of a block; beyond that all of it is computed in float64


_own = threading.local()


def scratch(use: str, size: int, dtype: Any) -> Array:
    """Return an uninitialised array that this thread used for the same before.

    Fresh memory costs more to touch than a block costs to compute.
    """
    bytes_ = size * np.dtype(dtype).itemsize
    known = getattr(_own, use, None)
    if known is None or len(known) < bytes_:
        known = np.empty(bytes_, np.uint8)
        setattr(_own, use, known)
    return known[:bytes_].view(dtype)


class LowRank:
    """The update scale * left @ right of a region of a tensor, as the tensor is stored.

    Args:
        left: float64, (rows, rank).
        right: float64, (rank, columns).
        scale: The factor s.
        dtype: Of the merged tensor, safetensors' name.
    """

    def __init__(self, left: Array, right: Array, scale: float, dtype: str) -> None:
        # An element is the product of a row of either; so rows are what lies together.
        self.left, self.right = np.ascontiguousarray(left), np.ascontiguousarray(right.T)
        self.rank, self.scale, self.dtype = len(right), scale, dtype

    def add(self, weight: Array, out: Array, first_row: int, first: int) -> int:
        """Write the merged rows to `out`; return how many elements came out infinite or NaN.

        Args:
            weight: Rows of the base's tensor, (n, width), C-contiguous.
            out: The same rows of the merged tensor. Columns outside of the region are left alone.
            first_row: The update's row that meets the first row of `weight`.
            first: The column of `weight` that meets the update's first column.
        """
        rows, columns = len(weight), len(self.right)
        region = slice(first, first + columns)
        found = self._approximate(weight, out, first_row, first) if self.dtype in _WIDE else None
        if found is None:
            every = np.arange(rows)[:, None], np.arange(columns)
            exact = self.exact(weight[:, region], first_row, *every)
            out[:, region] = rounded(exact, self.dtype)
            return int((~np.isfinite(out[:, region])).sum())
        if not len(found):
            return 0
        i, j = np.divmod(found, columns)
        settled = rounded(self.exact(weight[i, first + j], first_row, i, j), self.dtype)
        out[i, first + j] = settled
        return len(np.unique(found[~np.isfinite(settled)]))  # the kernel lists some twice

    def exact(self, weight: Array, first_row: int, i: Array, j: Array) -> Array:
        """Return the float64 values at rows i and columns j: weight + scale * sum, in this order.

        Products of factors no wider than float32 are exact in float64, so that only the order of
        the sum matters, and it is that of the rank. An update that is zero counts as +0.
        """
        total = np.zeros(np.broadcast_shapes(i.shape, j.shape))
        with np.errstate(over="ignore", invalid="ignore"):  # counted by the caller
            for k in range(self.rank):
                total += self.left[first_row + i, k] * self.right[j, k]
            value: Array = weight.astype(np.float64) + (self.scale * total + 0.0)
        return value

    @functools.cached_property
    def _factors(self) -> tuple[Array, Array, Array]:
        """The factors in the wide dtype, the scale in the left one, and each row's error bound."""
        wide, unit = _WIDE[self.dtype]
        with np.errstate(over="ignore", invalid="ignore"):
            left, right = self.scale * self.left, self.right.T
            of_rows, of_columns = _lengths(left), _lengths(self.right).max(initial=0)
            # products and partial sums in any order, then sums of those; the rounding of both
            # factors; and what the float64 value itself is off, where that is not much less
            terms = min(self.rank, _TERMS) + -(-self.rank // _TERMS) + 2
            terms += self.rank + 2 if wide is np.float64 else 0
            bound = of_rows * of_columns * terms * unit * 1.01
            bound += _TINY[wide] * (1 + of_rows + of_columns)
            bound = np.where(np.isnan(bound), np.inf, bound)
            slack = np.nextafter(bound, np.inf, dtype=wide, casting="unsafe")
            slack[~(self.left.any(axis=1) & self.right.any())] = 0
            return (
                np.ascontiguousarray(left, wide),
                np.ascontiguousarray(right, wide),
                slack,
            )

    def _approximate(self, weight: Array, out: Array, first_row: int, first: int) -> Array | None:
        """Write rounded approximations; return the flat indices of those that may be wrong.

        None means too many.
        """
        left, right, slack = self._factors
        mine = slice(first_row, first_row + len(weight))
        left, slack, exact = left[mine], slack[mine], self.left[mine]
        rows, (rank, columns) = len(weight), right.shape
        if kernel is not None and weight.dtype == DTYPES[self.dtype] and rows and columns:
            found = scratch("undecided", max(int(rows * columns * _MOST_UNDECIDED), 64), np.int64)
            count = kernel.merge(
                self.dtype, weight.view(np.uint8), out.view(np.uint8), weight.shape[1], first,
                rows, columns, rank, left, right, slack, exact, self.right, self.scale, found,
            )  # fmt: skip
            if count >= 0:
                return found[:count] if count <= len(found) else None
        return self._by_numpy(weight, out, first, left, right, slack)

    def _by_numpy(
        self, weight: Array, out: Array, first: int, left: Array, right: Array, slack: Array
    ) -> Array | None:
        wide, unit = _WIDE[self.dtype]
        region = slice(first, first + right.shape[1])
        with np.errstate(over="ignore", invalid="ignore"):
            start = weight[:, region]
            near = start.astype(wide)
            update = np.zeros_like(near)
            for k in range(0, len(right), _TERMS):
                update += left[:, k : k + _TERMS] @ right[k : k + _TERMS]
            near += update
            error = np.abs(near) * wide(2.5 * unit) + slack[:, None]
            if start.dtype == np.float64 != wide:  # narrowed just now
                error += np.abs(start).astype(wide) * wide(2 * unit) + wide(_TINY[wide])
            dtype = DTYPES[self.dtype]
            out[:, region] = near.astype(dtype)
            low, high = (near - error).astype(dtype), (near + error).astype(dtype)
        # Rounding is monotone, twice by way of float32 too: both ends agree, so all between do.
        same = (low == high) & (np.signbit(low) == np.signbit(high)) & np.isfinite(low)
        found = np.flatnonzero(~same)
        return found if len(found) <= same.size * _MOST_UNDECIDED else None


def _lengths(rows: Array) -> Array:
    """Return the Euclidean length of each row, also where squares overflow or underflow."""
    largest = np.abs(rows).max(axis=1, initial=0)
    some = np.where(largest == 0, 1, largest)
    lengths: Array = some * np.linalg.norm(rows / some[:, None], axis=1)
    return lengths
