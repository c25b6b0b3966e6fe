# The signature of _kernel.c, whose compiled module is absent where no compiler was.
from typing import Any

import numpy.typing as npt

def merge(
    dtype: str,
    weight: npt.NDArray[Any],
    out: npt.NDArray[Any],
    stride: int,
    first: int,
    rows: int,
    cols: int,
    rank: int,
    left: npt.NDArray[Any],
    right: npt.NDArray[Any],
    slack: npt.NDArray[Any],
    exact_left: npt.NDArray[Any],
    exact_right: npt.NDArray[Any],
    scale: float,
    undecided: npt.NDArray[Any],
    /,
) -> int: ...
