"""Every merged element is the float64 value rounded once, however its block was computed.

The reference is written apart from the package: the sum in order of the rank in plain float64, and
rounding by way of whole multiples of the spacing. Both are held against exact fractions first.
"""

import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_export import arithmetic
from lora_export.arithmetic import LowRank

BF16 = np.dtype(ml_dtypes.bfloat16)
KINDS = {
    "BF16": BF16, "F16": np.dtype("<f2"), "F32": np.dtype("<f4"), "F64": np.dtype("<f8"),
}  # fmt: skip
# bits of the fraction, exponent of the smallest normal number, of the largest
FORMATS = {
    "BF16": (7, -126, 127), "F16": (10, -14, 15), "F32": (23, -126, 127), "F64": (52, -1022, 1023),
}  # fmt: skip
LARGEST = {dtype: math.ldexp(2 - 2.0**-bits, most) for dtype, (bits, _, most) in FORMATS.items()}
DTYPES = pytest.mark.parametrize("dtype", FORMATS)
NARROW = pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
RANKS = [0, 1, 2, 7, 8, 9, 33, 200]
compiled = pytest.mark.skipif(arithmetic.kernel is None, reason="the kernel was not compiled")


# ---------------------------------------------------------------- the reference


def nearest(exact, dtype):
    """Round float64 once, to nearest, ties to even; too large becomes infinite."""
    if dtype == "F64":
        return exact
    bits, least, _ = FORMATS[dtype]
    with np.errstate(all="ignore"):
        spacing = np.ldexp(1.0, np.maximum(np.frexp(exact)[1] - 1, least) - bits)
        value = np.rint(exact / spacing) * spacing
    value = np.where(np.isfinite(exact), value, exact)
    value = np.where(np.abs(value) > LARGEST[dtype], np.copysign(np.inf, exact), value)
    if dtype == "BF16":  # no cast: float32 holds each of them
        bits_ = value.astype(np.float32).view(np.uint32) >> 16
        return bits_.astype(np.uint16).view(BF16)
    return value.astype(KINDS[dtype])


def in_order(weight, left, right, scale):
    """The float64 value: the weight, plus scale times the sum in order."""
    total = np.zeros(weight.shape)
    with np.errstate(all="ignore"):
        for k in range(len(right)):
            total = total + left[:, k : k + 1] * right[k : k + 1, :]
        update = scale * total
        update[update == 0] = 0.0  # never minus zero
        return weight.astype(np.float64) + update


def fraction_nearest(value, dtype):
    """Round a fraction to nearest, ties to even, as a fraction."""
    bits, least, _ = FORMATS[dtype]
    exponent = least
    if value:
        size = abs(value)
        exponent = size.numerator.bit_length() - size.denominator.bit_length()
        exponent -= size < Fraction(2) ** exponent
    step = Fraction(2) ** (max(exponent, least) - bits)
    return round(value / step) * step


def bits_of(array):
    """The bits; every NaN counts as the same one."""
    held = array.view(f"u{array.dtype.itemsize}").copy()
    held[np.isnan(array.astype(np.float64))] = 0xFFFF
    return held


# ---------------------------------------------------------------- what is under test


@pytest.fixture(params=["compiled", "numpy"])
def either(request, monkeypatch):
    """Run a test with the compiled kernel, and without."""
    if request.param == "numpy":
        monkeypatch.setattr(arithmetic, "kernel", None)
    elif arithmetic.kernel is None:
        pytest.skip("the kernel was not compiled")


def ways():
    return (None,) if arithmetic.kernel is None else (arithmetic.kernel, None)


def merged(weight, left, right, scale, dtype, *, first=0, edges=None):
    """Merge by blocks of rows between `edges`; return the result, and the count of bad ones."""
    update = LowRank(left, right, scale, dtype)
    out = np.full(weight.shape, 7, KINDS[dtype])  # what lies outside of the region stays
    edges = edges or [0, len(weight)]
    bad = 0
    for start, stop in itertools.pairwise(edges):
        bad += update.add(weight[start:stop], out[start:stop], start, first)
    return out, bad


def check(weight, left, right, scale, dtype, *, first=0, edges=None):
    """Merge with the kernel and without; both are the reference's bytes, and its count."""
    columns = slice(first, first + right.shape[1])
    expected = np.full(weight.shape, 7, KINDS[dtype])
    inside = nearest(in_order(weight[:, columns], left, right, scale), dtype)
    expected[:, columns] = inside
    bad = int((~np.isfinite(inside.astype(np.float64))).sum())
    before = arithmetic.kernel
    try:
        for kernel in ways():
            arithmetic.kernel = kernel
            kept = weight.copy()
            found, count = merged(weight, left, right, scale, dtype, first=first, edges=edges)
            wrong = np.argwhere(bits_of(found) != bits_of(expected))
            assert not len(wrong), (
                f"{'compiled' if kernel else 'numpy'}: {len(wrong)} wrong, first {wrong[0]}: "
                f"{found[tuple(wrong[0])]} for {expected[tuple(wrong[0])]}"
            )
            assert count == bad, f"{count} bad for {bad}"
            np.testing.assert_array_equal(bits_of(kept), bits_of(weight))
    finally:
        arithmetic.kernel = before


# ---------------------------------------------------------------- is the reference right?


@DTYPES
@given(data=st.data())
@settings(deadline=None, max_examples=200)
def test_the_reference_rounds_as_fractions_do(dtype, data):
    bits, least, most = FORMATS[dtype]
    significand = data.draw(st.integers(0, 2 ** (bits + 1) - 1))
    exponent = data.draw(st.integers(least, most - 1))
    tie = math.ldexp(significand + data.draw(st.sampled_from([0, 0.5])), exponent - bits)
    value = float(
        np.nextafter(tie, data.draw(st.sampled_from([tie, math.inf, 0])))
        * data.draw(st.sampled_from([-1, 1]))
    )
    found = nearest(np.array([value]), dtype)[0]
    assert Fraction(float(found)) == fraction_nearest(Fraction(value), dtype)
    assert math.copysign(1, found) == math.copysign(1, value)


@given(st.integers(0, 10**6), st.sampled_from(RANKS))
@settings(deadline=None, max_examples=40)
def test_the_float64_value_is_what_the_formula_gives_but_for_float64s_own_error(seed, rank):
    dice = np.random.default_rng(seed)
    left, right = (dice.normal(size=s).astype(np.float32) for s in ((2, rank), (rank, 2)))
    weight, scale = dice.normal(size=(2, 2)).astype(np.float32), float(dice.normal())
    update = LowRank(left.astype(np.float64), right.astype(np.float64), scale, "BF16")
    found = update.exact(weight, 0, np.arange(2)[:, None], np.arange(2))
    np.testing.assert_array_equal(found, in_order(weight, update.left, update.right.T, scale))
    for i, j in np.ndindex(2, 2):
        terms = [Fraction(float(a)) * Fraction(float(b)) for a, b in zip(left[i], right[:, j])]  # noqa: B905
        exact = Fraction(float(weight[i, j])) + Fraction(scale) * sum(terms)
        size = abs(Fraction(scale)) * sum(map(abs, terms)) + abs(Fraction(float(weight[i, j])))
        assert abs(Fraction(found[i, j]) - exact) <= (rank + 3) * Fraction(2) ** -53 * size


# ---------------------------------------------------------------- any shape, any magnitude


def numbers_of(mode, shape, dice, dtype):
    """A base's weights, as float64 that `dtype` holds, of one character."""
    bits, least, most = FORMATS[dtype]
    normal = dice.normal(size=shape)
    if mode == "usual":
        found = normal * 0.02
    elif mode == "coarse":  # sums with coarse factors fall on ties
        found = dice.integers(-64, 65, shape) / 8
    elif mode == "any exponent":
        found = np.ldexp(normal, dice.integers(least - bits, most - 3, shape))
    elif mode == "denormal":
        found = np.ldexp(normal, least - dice.integers(0, bits + 1, shape))
    elif mode == "zeros":
        found = dice.choice([0.0, -0.0, 1.0, -1.0], shape, p=[0.4, 0.4, 0.1, 0.1])
    elif mode == "large":  # a few of them at the very end
        found = np.sign(normal) * LARGEST[dtype] * dice.choice([1, 0.999, 0.5, 0.1], shape)
    else:
        found = np.where(dice.random(shape) < 0.05, dice.choice([np.inf, -np.inf, np.nan]), normal)
    return nearest(found, dtype).astype(np.float64)


def factors_of(mode, rows, rank, columns, dice, weight):
    """Factors of an update, of one character."""
    left, right = dice.normal(size=(rows, rank)), dice.normal(size=(rank, columns))
    if mode == "usual":
        left, right = left * 0.01, right * 0.05
    elif mode == "coarse":
        left, right = np.rint(left * 4) / 64, np.rint(right * 2) / 32
    elif mode == "any exponent":
        left = np.ldexp(left, dice.integers(-60, 30, (rows, 1)))
        right = np.ldexp(right, dice.integers(-60, 30, (rank, 1)))
    elif mode == "sparse":
        left = left * (dice.random((rows, 1)) < 0.5)
        right = right * (dice.random((1, columns)) < 0.5)
    elif mode == "alternating":  # huge terms, small sums
        sign = np.where(np.arange(rank) % 2, -1, 1)
        left = np.repeat(left[:, :1], rank, axis=1) * sign * 1024 + left
        right = np.repeat(right[:1], rank, axis=0)
    elif mode == "faint":  # far below half an ulp
        left, right = left * 2.0**-40, right
    elif mode == "underflowing":  # denormal products, and factors that are denormal float32
        left, right = left * 2.0**-140, right * 2.0 ** dice.integers(-20, 20)
    elif mode == "cancelling" and rank:  # the first column holds minus the weight, nearly
        finite = np.where(np.isfinite(weight), weight, 0)
        left[:, 0], right[0] = -1 - 2.0**-23, finite[:1]
        left[:, 1:] *= 2.0**-20
    # as an adapter's file has them
    with np.errstate(over="ignore"):
        return left.astype(np.float32).astype(float), right.astype(np.float32).astype(float)


def losing_sums(rank, dtype="F32"):
    """A job whose sums in order lose every small term, and then lie on a tie, in five columns."""
    left, right = np.full((16, rank), 2.0**-26.3), np.full((rank, 64), 2.0**-26.8)
    left[:, 0], right[0] = 1, 1
    weight = np.zeros((16, 64))
    weight[:, ::15] = 0.5 ** (FORMATS[dtype][0] + 1)
    return nearest(weight, dtype), left, right


def alternating_sums(dtype):
    """A job whose terms are a thousand times their sum."""
    dice = np.random.default_rng(9)
    sign = np.where(np.arange(32) % 2, -1.0, 1.0)
    left = 1024 * sign * dice.normal(size=(64, 1)) + dice.normal(size=(64, 32))
    right = np.ones((32, 1)) * dice.normal(size=(1, 256)) + 0.1 * dice.normal(size=(32, 256))
    return nearest(dice.normal(size=(64, 256)), dtype), left, right


WEIGHTS = ["usual", "coarse", "any exponent", "denormal", "zeros", "large", "not finite"]
UPDATES = [
    "usual", "coarse", "any exponent", "sparse", "alternating", "faint", "underflowing",
    "cancelling",
]  # fmt: skip
SCALES = [1.0, 2.0, -1.0, 0.1, 1 / 3, -16 / 3, 1e-30, 2.0**-100, 1e25, 0.0]


@st.composite
def merges(draw, rows, columns):
    """Arguments of `check`."""
    m, n, rank = draw(rows), draw(columns), draw(st.sampled_from(RANKS))
    before, behind = draw(st.sampled_from([(0, 0), (0, 5), (3, 0), (17, 9)]))
    dtype = draw(st.sampled_from(["BF16", "F16", "F32", "F64"]))
    kept = draw(st.sampled_from([dtype, dtype, "BF16", "F16", "F32", "F64"]))
    dice = np.random.default_rng(draw(st.integers(0, 2**32)))
    weight = numbers_of(draw(st.sampled_from(WEIGHTS)), (m, before + n + behind), dice, kept)
    region = weight[:, before : before + n]
    left, right = factors_of(draw(st.sampled_from(UPDATES)), m, rank, n, dice, region)
    cut = sorted(draw(st.lists(st.integers(1, m), max_size=2, unique=True)))
    return {
        "weight": weight.astype(np.float32).astype(BF16) if kept == "BF16"
        else weight.astype(KINDS[kept]),
        "left": left, "right": right, "scale": draw(st.sampled_from(SCALES)), "dtype": dtype,
        "first": before, "edges": [0, *cut] if cut[-1:] == [m] else [0, *cut, m],
    }  # fmt: skip


@given(merges(st.integers(1, 70), st.integers(1, 70)))
@settings(deadline=None, max_examples=500)
def test_every_element_is_the_float64_value_rounded_once(job):
    check(**job)


@given(merges(st.integers(8, 20), st.sampled_from([511, 512, 513, 543, 545, 1056])))
@settings(deadline=None, max_examples=40)
def test_so_it_is_where_columns_come_in_panels(job):
    check(**job)


@NARROW
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("mode", WEIGHTS)
def test_every_character_of_weights_meets_every_character_of_updates(dtype, mode, update):
    dice = np.random.default_rng(len(mode) * 100 + len(update))
    weight = numbers_of(mode, (21, 77), dice, dtype)
    left, right = factors_of(update, 21, 9, 77, dice, weight)
    with np.errstate(over="ignore"):
        held = nearest(weight, dtype)
    for scale in (1.0, -1 / 3):
        check(held, left, right, scale, dtype)


@NARROW
def test_a_large_block_has_no_wrong_element(dtype):
    """Numbers as they are in models: some of half a million lie where float32 cannot decide."""
    dice = np.random.default_rng(5)
    weight = nearest(dice.normal(size=(256, 2048)) * 0.02, dtype)
    left = (dice.normal(size=(256, 16)) * 0.01).astype(np.float32).astype(float)
    right = (dice.normal(size=(16, 2048)) * 0.02).astype(np.float32).astype(float)
    check(weight, left, right, 2.0, dtype)


# ---------------------------------------------------------------- where rounding is decided


@NARROW
@pytest.mark.parametrize("power", [-52, -45, -40, -34, -30, -26, -22])
@pytest.mark.parametrize("scale", [1.0, -1 / 3, 16.0])
def test_elements_next_to_a_tie_round_to_their_side(dtype, power, scale):
    """All of them lie within a hair of the middle of two neighbours, denormal ones too."""
    bits, least, _ = FORMATS[dtype]
    dice = np.random.default_rng(abs(power))
    for exponent in (0, -3, least, least - 2, least - bits + 1):
        spacing = 2.0 ** (max(exponent, least) - bits)
        steps = 2 ** (bits - max(least - exponent, 0))  # in one binade
        weight = nearest((steps + dice.integers(0, steps, (24, 64))) * spacing, dtype)
        hair = dice.choice([-1, 0, 1], (24, 1)) * 2.0**power
        half = (dice.integers(0, steps, (24, 1)) + 0.5 + hair) * spacing
        noise = dice.normal(size=(24, 1)) * spacing * 64
        left = np.hstack([half + noise, noise, noise * 0.5]) / scale
        right = np.vstack([np.ones((1, 64)), np.full((1, 64), -0.5), np.full((1, 64), -1.0)])
        check(weight, left, right, scale, dtype)
        check(-weight, -left, right, scale, dtype)


@given(
    st.sampled_from(["BF16", "F16", "F32"]), st.integers(0, 10**6), st.sampled_from([1, 2, 8, 9])
)
@settings(deadline=None, max_examples=25)
def test_by_exact_fractions_too_an_element_is_a_nearest_neighbour(dtype, seed, rank):
    """Coarse numbers, so that float64 is exact, and ties are common."""
    dice = np.random.default_rng(seed)
    weight = nearest(dice.integers(-512, 513, (9, 33)) / 64, dtype)
    left = dice.integers(-7, 8, (9, rank)) / 2.0 ** dice.integers(4, 18, (9, 1))
    right = dice.integers(-7, 8, (rank, 33)) / 8
    found, bad = merged(weight, left, right, 0.75, dtype)
    assert not bad
    for i, j in np.ndindex(weight.shape):
        terms = (Fraction(a) * Fraction(b) for a, b in zip(left[i], right[:, j], strict=True))
        exact = Fraction(float(weight[i, j])) + Fraction(0.75) * sum(terms)
        assert Fraction(float(found[i, j])) == fraction_nearest(exact, dtype)


@NARROW
def test_what_cancels_to_nearly_nothing_is_right(dtype):
    """The result is tiny beside the terms of its sum."""
    dice = np.random.default_rng(1)
    weight = nearest(dice.normal(size=(40, 50)), dtype)
    for off in (0, 2.0**-49, 2.0**-30, 2.0**-12):
        left = np.eye(40) * (1 + off)
        check(weight, left, -weight.astype(np.float64), 1.0, dtype)
        check(weight, left * 3, -weight.astype(np.float64), 1 / 3, dtype)


@NARROW
def test_large_alternating_terms_do_not_escape_the_bound(dtype):
    dice = np.random.default_rng(2)
    for rank in (2, 8, 9, 34, 200):
        sign = np.where(np.arange(rank) % 2, -1.0, 1.0)
        for size in (2.0**4, 2.0**12, 2.0**20):
            left = size * sign * np.ones((24, rank)) + dice.normal(size=(24, rank))
            right = np.ones((rank, 1)) * dice.normal(size=(1, 48))
            weight = nearest(dice.normal(size=(24, 48)), dtype)
            check(weight, left, right, 1.0, dtype)


@NARROW
@pytest.mark.parametrize("rank", [33, 200, 1000])
def test_the_error_of_the_float64_value_itself_is_within_the_bound(either, dtype, rank):
    """Other orders of the sum do not lose what the sum in order loses, and come out above a tie."""
    job = losing_sums(rank, dtype)
    assert (in_order(*job, 1.0)[:, ::15] == 1 + 0.5 ** (FORMATS[dtype][0] + 1)).all()
    assert (merged(*job, 1.0, dtype)[0] == 1).all()


def test_two_float64_sums_on_either_side_of_a_tie_of_float32():
    """The sum differs in its last bit with the place of the scale; the tie lies between."""
    dice, scale, tie = np.random.default_rng(13), 1 / 3, 2.0**-24 + 2.0**-53
    right = dice.random(4000) + 1
    left = np.ldexp(np.rint(np.ldexp(tie / scale / right, 76)) + dice.integers(-4, 5, 4000), -76)
    ours, other = scale * (left * right), (scale * left) * right
    found = np.flatnonzero((ours > tie) != (other > tie))[:32]
    assert len(found) == 32
    weight = np.ones((32, 64), np.float32)
    check(weight, np.diag(left[found]), np.repeat(right[found, None], 64, axis=1), scale, "F32")


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_float32_does_not_hold_the_factors_and_the_bound_knows(dtype):
    """What a denormal loses is multiplied by a large number."""
    dice = np.random.default_rng(3)
    weight = nearest(dice.normal(size=(32, 64)) * 2.0**-12, dtype)
    weight[abs(weight.astype(np.float64)) < 2.0**-16] = 1  # few may be left to float64
    for small, large, scale in ((-140, 120, 1.0), (-110, 120, 2.0**-30), (-300, 280, 1.0)):
        left = dice.normal(size=(32, 4)) * 2.0**small
        right = dice.normal(size=(4, 64)) * 2.0**large
        check(weight, left, right, scale, dtype)


@NARROW
@pytest.mark.parametrize("power", [-300, -170, 160, 300])
def test_factors_whose_squares_leave_the_range_of_float64(dtype, power):
    dice = np.random.default_rng(4)
    left = dice.normal(size=(16, 3)) * 10.0**power
    right = dice.normal(size=(3, 64)) * 10.0**-power
    weight = nearest(dice.normal(size=(16, 64)), dtype)
    check(weight, left, right, 0.5, dtype)
    left[3] = 0
    check(weight, left, right, 0.5, dtype)


# ---------------------------------------------------------------- zeros, and the other end


@DTYPES
@pytest.mark.parametrize("scale", [1.0, -1.0])
def test_an_update_of_zero_makes_every_zero_positive(dtype, scale):
    """Whichever way a block is computed: minus zero plus zero is zero."""
    weight = nearest(np.tile([0.0, -0.0], (16, 32)), dtype)
    for left, right in (
        (np.zeros((16, 2)), np.ones((2, 64))), (np.ones((16, 2)), np.zeros((2, 64))),
        (np.zeros((16, 0)), np.zeros((0, 64))),
        (np.tile([1.0, -1.0], (16, 1)), np.ones((2, 64))),
    ):  # fmt: skip
        check(weight, left, right, scale, dtype)
        for kernel in ways():
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(arithmetic, "kernel", kernel)
                assert not np.signbit(merged(weight, left, right, scale, dtype)[0]).any()


@NARROW
@pytest.mark.parametrize("kept", ["F32", "F64"])
def test_a_wider_base_is_narrowed_once(dtype, kept):
    bits, least, _ = FORMATS[dtype]
    smallest, hair = 2.0 ** (least - bits), 2.0**-22 if kept == "F32" else 2.0**-40
    of_tie = np.array([0.5, 1.5, 2.5, 2**bits + 0.5]) * smallest
    values = np.concatenate(
        [of_tie, of_tie * (1 + hair), of_tie * (1 - hair), [0.0, 1e-40, 1 + 2.0**-8 + hair, 3e38]]
    )
    values = values.astype(KINDS[kept])
    if kept == "F64":
        values = np.concatenate([values, [1e-60, 1e-300, 1e60, 2.0**-1074]])
    weight = np.ones((16, 256), KINDS[kept])  # few may be left to float64
    weight[3, : len(values)], weight[9, : len(values)] = values, -values
    for left in (np.zeros((16, 1)), np.full((16, 1), 2.0**-60), np.eye(16, 1)):
        check(weight, left, np.ones((1, 256)), 1.0, dtype)


@pytest.mark.parametrize("update", [0.0, 15.9375, 15.99, 16.0, 16.01, 100.0, -1.0])
def test_float16_ends_where_it_ends(update):
    """65504 is the largest; from 65520 on, halfway to the next, it is infinite."""
    weight = np.tile(np.array([65504, -65504, 65472, 1, -1], np.float16), (8, 13))
    check(weight, np.full((8, 1), update), np.ones((1, 65)), 1.0, "F16")


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_so_do_bfloat16_and_float32(dtype):
    bits = FORMATS[dtype][0]
    most, spacing = LARGEST[dtype], 2.0 ** (127 - bits)
    weight = nearest(np.tile([most, -most, most - spacing, 1.0], (8, 16)), dtype)
    for share in (0, 0.49, 0.5, 0.51, 1, -1, -0.5):
        check(weight, np.full((8, 1), share * 2.0**60), np.full((1, 64), spacing / 2**60), 1, dtype)


@DTYPES
def test_what_is_not_finite_stays_so_and_is_counted(dtype):
    """Also under updates that would bring a large number back."""
    weight = nearest(np.ones((20, 50)), dtype)
    weight[3, 4], weight[5, 6], weight[7, 40], weight[19, 49] = np.inf, -np.inf, np.nan, np.inf
    for update in (0.0, 1.0, -100.0, 100.0, -60000.0, 60000.0):
        check(weight, np.full((20, 1), update), np.ones((1, 50)), 1.0, dtype)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@NARROW
def test_a_factor_that_is_not_finite_leaves_the_other_elements_right(dtype, value):
    """Its row or column is lost; the bound has to hold for the others all the same."""
    weight, left, right = losing_sums(200) if dtype == "F32" else alternating_sums(dtype)
    left[5] = 0
    for place in (left, right):
        kept = place[2, 3]
        place[2, 3] = value
        check(weight, left, right, 1.0, dtype)
        place[2, 3] = kept


@NARROW
def test_each_overflow_counts_once_though_tiles_overlap(either, dtype):
    weight = nearest(np.ones((9, 33)), dtype)
    weight[[1, 8, 2, 5], [1, 2, 32, 31]] = LARGEST[dtype]
    left, right = np.full((9, 1), LARGEST[dtype] / 4), np.ones((1, 33))
    assert merged(weight, left, right, 1.0, dtype)[1] == 4


# ---------------------------------------------------------------- how it is carried out


@NARROW
@pytest.mark.parametrize("share", [0.02, 0.12, 0.13, 0.5, 1.0])
def test_many_undecided_elements_are_all_settled(dtype, share):
    """Up to an eighth is listed, beyond that all of the block is computed in float64."""
    dice = np.random.default_rng(7)
    weight = nearest(1 + dice.integers(0, 64, (64, 64)) / 128, dtype)
    spacing = 2.0 ** -FORMATS[dtype][0]
    columns = np.where(np.arange(64) < share * 64, 0.5, 0.25) * spacing
    check(weight, np.ones((64, 1)), columns[None] * (1 + 2.0**-50), 1.0, dtype)


@compiled
def test_the_kernel_decides_most_elements_itself(monkeypatch):
    """Or the tests of its bound would test numpy."""
    dice = np.random.default_rng(8)
    found = []
    for dtype in ("BF16", "F16", "F32"):
        update = LowRank(dice.normal(size=(64, 16)), dice.normal(size=(16, 512)), 0.01, dtype)
        weight = nearest(dice.normal(size=(64, 512)), dtype)
        out = np.empty_like(weight)
        monkeypatch.setattr(update, "_by_numpy", None)
        found.append(len(update._approximate(weight, out, 0, 0)))
    assert found[0] == found[1] == 0  # settled in float64 by the kernel
    assert found[2] < 5


@NARROW
def test_a_bound_of_zero_makes_wrong_elements(either, dtype, monkeypatch):
    """The control: these elements are right because of the bound."""
    job = losing_sums(200) if dtype == "F32" else alternating_sums(dtype)
    expected = bits_of(nearest(in_order(*job, 1.0), dtype))
    np.testing.assert_array_equal(bits_of(merged(*job, 1.0, dtype)[0]), expected)
    with_bound = LowRank._factors.func
    without = property(lambda self: (*with_bound(self)[:2], with_bound(self)[2] * 0))
    monkeypatch.setattr(LowRank, "_factors", without)
    assert (bits_of(merged(*job, 1.0, dtype)[0]) != expected).any()


def test_regions_leave_what_lies_beside_them_alone(either):
    dice = np.random.default_rng(10)
    weight, out = np.ones((16, 100), np.float16), np.full((16, 100), 5, np.float16)
    for first, columns in ((0, 31), (31, 32), (63, 1), (66, 34)):
        update = LowRank(dice.normal(size=(16, 2)), dice.normal(size=(2, columns)), 1.0, "F16")
        update.add(weight, out, 0, first)
    untouched = (out == 5).all(axis=0)
    assert np.flatnonzero(untouched).tolist() == [64, 65]


def test_threads_share_an_update_and_nothing_else():
    """Scratch memory is each thread's own, and serves blocks of other sizes and dtypes after it."""
    dice = np.random.default_rng(11)
    jobs = []
    for n in range(40):
        rows, columns = int(dice.integers(8, 60)), int(dice.integers(1, 200))
        dtype = ["BF16", "F16", "F32"][n % 3]
        weight = nearest(dice.integers(-64, 65, (rows, columns)) / 8, dtype)  # many ties
        update = LowRank(
            dice.integers(-4, 5, (rows, 9)) / 64, dice.integers(-4, 5, (9, columns)) / 32, 0.3,
            dtype,
        )  # fmt: skip
        exact = in_order(weight, update.left, update.right.T, 0.3)
        jobs.append((update, weight, bits_of(nearest(exact, dtype))))

    def run(job):
        update, weight, expected = job
        out = np.empty_like(weight)
        update.add(weight, out, 0, 0)
        return bool((bits_of(out) == expected).all())

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, jobs * 5))


@NARROW
def test_a_process_that_flushes_denormals_gets_the_same_bytes(dtype):
    """Some libraries switch them off for all that runs in the process."""
    dice = np.random.default_rng(12)
    size = 2.0**-16 if dtype == "F16" else 1.0  # of float16, denormals are common
    weight = nearest(dice.normal(size=(16, 64)) * size, dtype)
    left, right = dice.normal(size=(16, 4)), dice.normal(size=(4, 64)) * size / 16
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush")
    try:
        check(weight, left, right, 1.0, dtype)
    finally:
        torch.set_flush_denormal(False)


# ---------------------------------------------------------------- the kernel's door


def arguments(dtype="BF16", rows=8, stride=40, first=2, columns=33, rank=3):
    """Arguments of the kernel that fit each other."""
    stored = KINDS[dtype].itemsize
    wide = np.float32 if stored == 2 else np.float64
    return {
        "dtype": dtype,
        "weight": np.zeros(rows * stride * stored, np.uint8),
        "out": np.zeros(rows * stride * stored, np.uint8),
        "stride": stride, "first": first, "rows": rows, "columns": columns, "rank": rank,
        "left": np.zeros((rows, rank), wide), "right": np.zeros((rank, columns), wide),
        "slack": np.zeros(rows, wide), "exact_left": np.zeros((rows, rank)),
        "exact_right": np.zeros((columns, rank)), "scale": 1.0,
        "undecided": np.zeros(64, np.int64),
    }  # fmt: skip


@compiled
@NARROW
def test_the_kernel_takes_buffers_that_fit(dtype):
    assert arithmetic.kernel.merge(*arguments(dtype).values()) == 0


@compiled
@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "F64"}, {"dtype": "I16"}, {"dtype": ""}, {"dtype": "F32"},
        {"rows": 9}, {"rows": 7}, {"rows": -8}, {"stride": 41}, {"stride": 39}, {"stride": -40},
        {"first": -1}, {"first": 8}, {"columns": 34}, {"columns": 32}, {"columns": -1},
        {"rank": 4}, {"rank": 2}, {"rank": -3}, {"rank": 2**62}, {"rows": 2**62},
        {"stride": 2**62}, {"first": 2**63 - 1}, {"columns": 2**63 - 1},
        *({name: np.zeros(5, np.uint8)} for name in (
            "weight", "out", "left", "right", "slack", "exact_left", "exact_right", "undecided",
        )),
    ],
    ids=lambda change: " ".join(k if np.ndim(v) else f"{k}={v}" for k, v in change.items()),
)  # fmt: skip
def test_the_kernel_refuses_buffers_that_do_not_fit(change):
    with pytest.raises(ValueError, match="the buffers do not fit the sizes"):
        arithmetic.kernel.merge(*(arguments() | change).values())


@compiled
def test_sizes_whose_product_overflows_are_refused():
    """2^32 rows of 2^31 elements of 2 bytes would be 0 bytes, and so these empty buffers fit."""
    empty = np.zeros(0, np.uint8)
    change = dict.fromkeys(("weight", "out", "left", "slack", "exact_left"), empty)
    change |= {"rows": 2**32, "stride": 2**31, "rank": 0, "right": empty, "exact_right": empty}
    change["slack"] = empty
    for rows in (2**32, 2**62):
        with pytest.raises(ValueError, match="do not fit"):
            arithmetic.kernel.merge(*(arguments() | change | {"rows": rows}).values())


@compiled
@pytest.mark.parametrize("name", ["out", "undecided"])
def test_the_kernel_writes_to_no_read_only_buffer(name):
    given_ = arguments()
    given_[name].flags.writeable = False
    with pytest.raises((BufferError, TypeError, ValueError)):
        arithmetic.kernel.merge(*given_.values())


@compiled
@pytest.mark.parametrize(("rows", "columns"), [(7, 40), (8, 31), (1, 1), (0, 40), (8, 0)])
def test_the_kernel_leaves_what_is_smaller_than_a_tile_to_numpy(rows, columns):
    sizes = {"rows": rows, "columns": columns, "stride": max(columns, 1), "first": 0}
    assert arithmetic.kernel.merge(*arguments(**sizes).values()) == -2


@compiled
def test_a_list_that_is_too_short_is_not_written_past():
    """Every element is undecided; the count says so, and memory behind the list is left alone."""
    given_ = arguments("BF16", rows=16, stride=64, first=0, columns=64)
    given_["slack"][:] = np.inf
    room = np.full(64, -1, np.int64)
    given_["undecided"] = room[:5]
    assert arithmetic.kernel.merge(*given_.values()) == 16 * 64
    assert (room[5:] == -1).all()
    given_["undecided"] = room[:0]
    assert arithmetic.kernel.merge(*given_.values()) == 16 * 64
