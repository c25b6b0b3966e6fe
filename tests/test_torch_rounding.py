import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_export.errors import InputError
from lora_export.torch_rounding import round_once

# dtype -> bits of the fraction, exponent of the smallest normal number, largest number
FORMATS = {
    torch.bfloat16: (7, -126, (2 - 2.0**-7) * 2.0**127),
    torch.float16: (10, -14, 65504.0),
    torch.float32: (23, -126, (2 - 2.0**-23) * 2.0**127),
}
DTYPES = pytest.mark.parametrize("dtype", FORMATS, ids=str)
# Within reach of one rounding in float32, then another: just off the middle of two neighbours.
DOUBLY_ROUNDED = {torch.bfloat16: 1 + 2**-8 + 2**-40, torch.float16: 1 + 2**-11 + 2**-40}


def _nearest(value, dtype):
    """Round in exact rational arithmetic, to nearest, ties to even."""
    bits, least, _ = FORMATS[dtype]
    exponent = max(math.frexp(value)[1] - 1, least)
    step = Fraction(2) ** (exponent - bits)
    return float(round(Fraction(value) / step) * step)


def _rounded(value, dtype):
    return round_once(torch.tensor([value], dtype=torch.float64), dtype).double().item()


@st.composite
def near_ties(draw, dtype):
    """Numbers at, just below and just above the middle of two neighbours, subnormals included."""
    bits, least, _ = FORMATS[dtype]
    significand = draw(st.integers(0, 2 ** (bits + 1) - 1))
    exponent = draw(st.integers(least, 14) if dtype == torch.float16 else st.integers(least, 100))
    tie = math.ldexp(significand + 0.5, exponent - bits)
    off = draw(st.sampled_from([-1, 0, 1])) * math.ldexp(1, draw(st.integers(-60, -30)))
    return draw(st.sampled_from([-1, 1])) * (tie + tie * off)


@DTYPES
@given(data=st.data())
@settings(deadline=None, max_examples=150)
def test_numbers_near_a_tie_are_rounded_correctly(dtype, data):
    value = data.draw(near_ties(dtype))
    assert _rounded(value, dtype) == _nearest(value, dtype)


@DTYPES
@given(data=st.data())
@settings(deadline=None, max_examples=100)
def test_any_number_in_range_is_rounded_correctly(dtype, data):
    largest = FORMATS[dtype][2]
    value = data.draw(st.floats(-largest, largest))
    assert _rounded(value, dtype) == _nearest(value, dtype)


@pytest.mark.parametrize(("dtype", "value"), DOUBLY_ROUNDED.items(), ids=str)
def test_torchs_own_cast_rounds_twice_and_round_once_does_not(dtype, value):
    naive = torch.tensor([value], dtype=torch.float64).to(dtype).double().item()
    assert naive == 1.0 != _nearest(value, dtype)
    assert _rounded(value, dtype) == _nearest(value, dtype)
    assert _rounded(-value, dtype) == -_nearest(value, dtype)


@DTYPES
def test_a_tie_goes_to_the_even_neighbour(dtype):
    half = 2.0 ** -(FORMATS[dtype][0] + 1)
    assert _rounded(1 + half, dtype) == 1
    assert _rounded(1 + 3 * half, dtype) == 1 + 4 * half


@DTYPES
def test_zero_keeps_its_sign(dtype):
    values = round_once(torch.tensor([0.0, -0.0], dtype=torch.float64), dtype)
    assert torch.signbit(values).tolist() == [False, True]
    assert values.eq(0).all()


@DTYPES
def test_what_is_below_half_the_smallest_number_becomes_zero(dtype):
    bits, least, _ = FORMATS[dtype]
    smallest = 2.0 ** (least - bits)
    assert _rounded(smallest * 0.499, dtype) == 0
    assert _rounded(smallest * 0.501, dtype) == smallest
    assert _rounded(-1e-300, dtype) == 0


@DTYPES
def test_the_largest_number_is_kept(dtype):
    assert _rounded(FORMATS[dtype][2], dtype) == FORMATS[dtype][2]


@DTYPES
def test_an_overflow_is_refused_with_its_count(dtype):
    beyond = FORMATS[dtype][2] * (1 + 2**-7)
    values = torch.tensor([1.0, beyond, -beyond], dtype=torch.float64)
    with pytest.raises(InputError, match="2 of 3 merged weights are not finite"):
        round_once(values, dtype)


@DTYPES
def test_nan_is_refused(dtype):
    with pytest.raises(InputError, match="1 of 2 merged weights are not finite"):
        round_once(torch.tensor([1.0, math.nan], dtype=torch.float64), dtype)


def test_float64_is_returned_as_it_is():
    values = torch.tensor([1 + 2**-52, -1e-310], dtype=torch.float64)
    assert torch.equal(round_once(values, torch.float64), values)


def test_the_shape_is_kept():
    assert round_once(torch.zeros(2, 0, 3, dtype=torch.float64), torch.bfloat16).shape == (2, 0, 3)


def test_no_gradient_goes_back():
    value = torch.tensor([1.5], dtype=torch.float64, requires_grad=True)
    assert not round_once(value, torch.float32).requires_grad
