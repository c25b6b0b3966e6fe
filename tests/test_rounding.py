"""Rounding once, by numpy and by torch, against exact rational arithmetic."""

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_export import rounding, torch_rounding
from lora_export.errors import InputError
from lora_export.rounding import ulp

# dtype -> bits of the fraction, exponent of the smallest normal number, largest number
FORMATS = {
    "BF16": (7, -126, (2 - 2.0**-7) * 2.0**127),
    "F16": (10, -14, 65504.0),
    "F32": (23, -126, (2 - 2.0**-23) * 2.0**127),
}
DTYPES = pytest.mark.parametrize("dtype", FORMATS, ids=str)
TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


def by_numpy(values, dtype):
    return rounding.round_once(np.array(values), dtype).astype(np.float64)


def by_torch(values, dtype):
    values = torch.tensor(values, dtype=torch.float64)
    return torch_rounding.round_once(values, TORCH[dtype]).double().numpy()


BOTH = pytest.mark.parametrize("round_once", [by_numpy, by_torch])
# Within reach of one rounding in float32, then another: just off the middle of two neighbours.
DOUBLY_ROUNDED = {"BF16": 1 + 2**-8 + 2**-40, "F16": 1 + 2**-11 + 2**-40}


def _nearest(value, dtype):
    """Round in exact rational arithmetic, to nearest, ties to even."""
    bits, least, _ = FORMATS[dtype]
    exponent = max(math.frexp(value)[1] - 1, least)
    step = Fraction(2) ** (exponent - bits)
    return float(round(Fraction(value) / step) * step)


@st.composite
def near_ties(draw, dtype):
    """Numbers at, just below and just above the middle of two neighbours, subnormals included."""
    bits, least, _ = FORMATS[dtype]
    significand = draw(st.integers(0, 2 ** (bits + 1) - 1))
    exponent = draw(st.integers(least, 14) if dtype == "F16" else st.integers(least, 100))
    tie = math.ldexp(significand + 0.5, exponent - bits)
    off = draw(st.sampled_from([-1, 0, 1])) * math.ldexp(1, draw(st.integers(-60, -30)))
    return draw(st.sampled_from([-1, 1])) * (tie + tie * off)


@BOTH
@DTYPES
@given(data=st.data())
@settings(deadline=None, max_examples=150)
def test_numbers_near_a_tie_are_rounded_correctly(round_once, dtype, data):
    value = data.draw(near_ties(dtype))
    assert round_once([value], dtype) == _nearest(value, dtype)


@BOTH
@DTYPES
@given(data=st.data())
@settings(deadline=None, max_examples=100)
def test_any_number_in_range_is_rounded_correctly(round_once, dtype, data):
    largest = FORMATS[dtype][2]
    value = data.draw(st.floats(-largest, largest))
    assert round_once([value], dtype) == _nearest(value, dtype)


def test_the_cast_of_ml_dtypes_rounds_twice():
    value = DOUBLY_ROUNDED["BF16"]
    assert float(np.float64(value).astype(ml_dtypes.bfloat16)) == 1.0 != _nearest(value, "BF16")


@pytest.mark.parametrize(("dtype", "value"), DOUBLY_ROUNDED.items(), ids=str)
def test_torchs_own_cast_rounds_twice(dtype, value):
    naive = torch.tensor(value, dtype=torch.float64).to(TORCH[dtype]).item()
    assert naive == 1.0 != _nearest(value, dtype)


def test_no_gradient_goes_back_through_torchs_rounding():
    value = torch.tensor([1.5], dtype=torch.float64, requires_grad=True)
    assert not torch_rounding.round_once(value, torch.float32).requires_grad


@BOTH
@pytest.mark.parametrize(("dtype", "value"), DOUBLY_ROUNDED.items(), ids=str)
def test_what_two_roundings_get_wrong_one_gets_right(round_once, dtype, value):
    assert round_once([value], dtype) == _nearest(value, dtype)
    assert round_once([-value], dtype) == -_nearest(value, dtype)


@BOTH
@DTYPES
def test_a_tie_goes_to_the_even_neighbour(round_once, dtype):
    half = 2.0 ** -(FORMATS[dtype][0] + 1)
    assert round_once([1 + half], dtype) == 1
    assert round_once([1 + 3 * half], dtype) == 1 + 4 * half


@BOTH
@DTYPES
def test_zero_keeps_its_sign(round_once, dtype):
    values = round_once([0.0, -0.0], dtype)
    assert np.signbit(values).tolist() == [False, True]
    assert (values == 0).all()


@BOTH
@DTYPES
def test_what_is_below_half_the_smallest_number_becomes_zero(round_once, dtype):
    bits, least, _ = FORMATS[dtype]
    smallest = 2.0 ** (least - bits)
    assert round_once([smallest * 0.499], dtype) == 0
    assert round_once([smallest * 0.501], dtype) == smallest
    assert round_once([-1e-300], dtype) == 0


@BOTH
@DTYPES
def test_the_largest_number_is_kept(round_once, dtype):
    assert round_once([FORMATS[dtype][2]], dtype) == FORMATS[dtype][2]


@BOTH
@DTYPES
def test_an_overflow_is_refused_with_its_count(round_once, dtype):
    beyond = FORMATS[dtype][2] * (1 + 2**-7)
    values = [1.0, beyond, -beyond]
    with pytest.raises(InputError, match="2 of 3 merged weights are not finite"):
        round_once(values, dtype)


@BOTH
@DTYPES
def test_nan_is_refused(round_once, dtype):
    with pytest.raises(InputError, match="1 of 2 merged weights are not finite"):
        round_once([1.0, math.nan], dtype)


@BOTH
def test_float64_is_returned_as_it_is(round_once):
    values = [1 + 2**-52, -1e-310]
    np.testing.assert_array_equal(round_once(values, "F64"), values)


@BOTH
def test_the_shape_is_kept(round_once):
    assert round_once(np.zeros((2, 0, 3)), "BF16").shape == (2, 0, 3)


@DTYPES
def test_what_is_too_large_is_infinite_where_the_caller_counts(dtype):
    beyond = FORMATS[dtype][2] * (1 + 2**-7)
    found = rounding.rounded(np.array([1.0, beyond, -beyond]), dtype)
    assert found.astype(np.float64).tolist() == [1.0, math.inf, -math.inf]
    assert found.dtype == rounding.DTYPES[dtype]


@pytest.mark.parametrize(
    ("name", "kind"), [("F64", np.float64), ("F32", np.float32), ("F16", np.float16)]
)
def test_the_ulp_is_numpys_spacing(name, kind):
    values = np.array([1, 1.5, 2, -3.75, 1024, 6e-5, 6e-8, 1e-7, 0.1], kind)
    np.testing.assert_array_equal(ulp(values.astype(np.float64), name), np.abs(np.spacing(values)))


def test_the_ulp_of_bfloat16_is_two_to_the_sixteen_of_float32s():
    values = np.array([1.0, 3.0, 0.01, 1e-39])
    np.testing.assert_array_equal(ulp(values, "BF16"), 2**16 * ulp(values, "F32"))


@pytest.mark.parametrize(
    ("name", "smallest"), [("F64", 2.0**-1074), ("F32", 2.0**-149), ("F16", 2.0**-24)]
)
def test_the_ulp_of_zero_is_the_smallest_number(name, smallest):
    assert ulp(np.array([0.0]), name)[0] == smallest
