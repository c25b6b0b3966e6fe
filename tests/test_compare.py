import dataclasses

import numpy as np
import pytest
from hand_made import (
    LOGITS,
    MASKS,
    NOISE,
    evidence,
    moved,
    per_token,
    recording,
    recordings,
    timing,
    with_recording,
)  # fmt: skip
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lora_export import compare
from lora_export.records import REFERENCE, UNMERGED, Policy

NUMBERS = st.floats(-1e6, 1e6, allow_nan=False, width=32)
ANSWERS = st.tuples(*(hnp.arrays(np.float32, logits.shape, elements=NUMBERS) for logits in LOGITS))
PLACES = st.tuples(st.integers(0, 1), st.integers(0, 1), st.integers(0, 1))
quick = settings(deadline=None, max_examples=60)


def _between(a, b):
    return compare.distance(recording("a", a), recording("b", b), evidence())


# ---------------------------------------------------------------- distance


@quick
@given(ANSWERS, ANSWERS)
def test_a_distance_is_zero_exactly_where_the_answers_are_equal(a, b):
    equal = all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    assert (_between(a, b).largest == 0) == equal


@quick
@given(ANSWERS, ANSWERS)
def test_a_distance_is_the_same_from_either_side(a, b):
    assert _between(a, b) == _between(b, a)


@quick
@given(ANSWERS, st.floats(2.0**-10, 1e6, width=32))
def test_a_deviation_counts_the_same_in_both_directions(a, by):
    exact = [x.astype(np.float64) for x in a]
    reference = recording("a", exact, np.float64)
    up, down = (recording("b", [x + sign * by for x in exact], np.float64) for sign in (1.0, -1.0))
    assert compare.distance(reference, up, evidence()).largest == pytest.approx(by)
    assert compare.distance(reference, down, evidence()).largest == pytest.approx(by)


@quick
@given(ANSWERS, PLACES, st.sampled_from([np.nan, np.inf, -np.inf]), st.booleans())
def test_a_value_that_is_no_number_lies_infinitely_far_from_everything(a, place, bad, both):
    batch, *where = place
    broken = [x.copy() for x in a]
    broken[batch][tuple(where)] = bad
    found = _between(broken if both else a, broken)
    assert found.largest == np.inf
    assert "NaN or infinite" in found.defect


def test_the_largest_deviation_and_its_batch_are_reported():
    found = moved(evidence(recordings=recordings()), "onnx", 1, (0, 0), 0.5)
    distance = compare.distance(found.recordings[REFERENCE], found.recordings["onnx"], found)
    assert (distance.largest, distance.batch) == (0.5 + 2 * NOISE, 1)


def test_deviations_are_taken_in_float64():
    # In float32 the difference of these two would be rounded away.
    reference = recording("a", [np.full_like(x, 2.0**24) for x in LOGITS], np.float64)
    other = recording("b", [np.full_like(x, 2.0**24) + 0.25 for x in LOGITS], np.float64)
    assert compare.distance(reference, other, evidence()).largest == 0.25


def test_unsigned_answers_do_not_wrap_around():
    low, high = (recording("u", [np.full_like(x, v) for x in LOGITS], np.uint8) for v in (1, 3))
    assert compare.distance(high, low, evidence()).largest == 2
    assert compare.distance(low, high, evidence()).largest == 2


def test_every_output_of_a_model_is_compared():
    same = {"logits": np.zeros((1, 2)), "hidden": np.zeros((1, 3))}
    other = same | {"hidden": np.array([[0.0, 0.0, 1.0]])}
    batch = dataclasses.replace(evidence().batches[1], arrays={"attention_mask": np.ones((1, 3))})
    left, right = (dataclasses.replace(recording("x", []), outputs=(out,)) for out in (same, other))
    found = compare.distance(left, right, evidence(batches=(batch,)))
    assert (found.largest, found.compared) == (1.0, 5)


def test_outputs_without_elements_are_no_comparison():
    empty = recording("x", [np.zeros((0, 2)), np.zeros((0, 2))])
    found = compare.distance(empty, empty, evidence(signature=None))
    assert (found.compared, found.defect) == (0, "nothing was compared")
    told = compare.distance(empty, empty, evidence())
    assert told.compared == 0
    assert "logits has shape (0, 2), the mask asks for" in told.defect


def test_outputs_that_do_not_fit_the_mask_are_a_defect():
    found = per_token()
    longer = [np.zeros((len(mask), mask.shape[1] + 1, 2)) for mask in MASKS]
    both = recording(REFERENCE, longer), recording("onnx", longer)
    assert compare.distance(*both, found).defect


# ---------------------------------------------------------------- padding


def test_only_attended_positions_of_a_sequence_are_kept():
    found = per_token()
    output = np.arange(24).reshape(3, 4, 2)
    kept = compare.valid(output, found.batches[0], found, "logits")
    np.testing.assert_array_equal(kept[:, 0], [0, 2, 4, 6, 8, 10, 12, 16, 18])


def test_an_output_without_a_sequence_axis_is_kept_whole():
    found = evidence()
    assert compare.valid(LOGITS[0], found.batches[0], found, "logits") is LOGITS[0]


@pytest.mark.parametrize("name", ["logits", "unknown"])
def test_an_output_that_no_signature_describes_is_kept_whole(name):
    found = evidence(signature=None) if name == "logits" else per_token()
    output = np.zeros((3, 4, 2))
    assert compare.valid(output, found.batches[0], found, name) is output


# ---------------------------------------------------------------- the noise floor


def test_the_noise_floor_is_the_distance_of_the_unmerged_model():
    assert compare.noise_floor(evidence()).largest == NOISE


def test_the_noise_floor_is_at_least_one_rounding_of_the_largest_answer():
    found = with_recording(evidence(), UNMERGED, recording(UNMERGED, LOGITS))
    assert compare.noise_floor(found).largest == 3.0 * 2.0**-23


def test_the_least_noise_is_that_of_the_precision_of_the_floor():
    coarse = with_recording(evidence(), UNMERGED, recording(UNMERGED, LOGITS, np.float16))
    assert compare.noise_floor(coarse).largest == 3.0 * 2.0**-10


def test_what_is_answered_at_padded_positions_does_not_raise_the_noise_floor():
    found = per_token()
    for runner in (REFERENCE, UNMERGED):
        found = moved(found, runner, 0, (2, 3, 0), 2.0**20)
    assert compare.noise_floor(found).largest == NOISE


def test_a_floor_that_cannot_be_measured_says_why():
    found = compare.noise_floor(moved(evidence(), UNMERGED, 0, (0, 0), np.nan))
    assert "NaN" in found.defect


# ---------------------------------------------------------------- ratios and their interval


def test_ratios_are_taken_round_by_round():
    found = timing(rounds=7, onnx=0.5)
    np.testing.assert_array_equal(compare.ratios(found, "onnx"), np.full(7, 0.5))


def test_ratios_can_be_taken_against_another_runner():
    found = timing(rounds=7, onnx=0.5, merged=1.0)
    np.testing.assert_array_equal(compare.ratios(found, "merged", "onnx"), np.full(7, 2.0))


def _sample(spread, count=101):
    return 1.0 + np.random.default_rng(5).normal(0, spread, count)


def test_the_interval_covers_the_true_median_about_as_often_as_it_promises():
    covered = 0
    for seed in range(100):
        sample = np.random.default_rng(seed).normal(1.0, 0.1, 30)
        median, low, high = compare.median_interval(sample)
        assert low <= median <= high
        covered += low <= 1.0 <= high
    assert 90 <= covered <= 99


def test_the_interval_is_the_order_statistics_that_theory_gives():
    # The 95 % interval of the median of 1..101 reaches 0.98 * sqrt(101) ranks to either side.
    _, low, high = compare.median_interval(np.arange(1.0, 102.0))
    assert low == pytest.approx(51 - 9.85, abs=2)
    assert high == pytest.approx(51 + 9.85, abs=2)


def test_the_same_values_give_the_same_interval():
    assert compare.median_interval(_sample(0.1)) == compare.median_interval(_sample(0.1))


def test_noisier_values_give_a_wider_interval():
    widths = [high - low for _, low, high in map(compare.median_interval, map(_sample, (0.1, 0.4)))]
    assert widths[1] > 3 * widths[0]


def test_more_values_give_a_narrower_interval():
    few, many = (compare.median_interval(_sample(0.1, count)) for count in (20, 500))
    assert many[2] - many[1] < 0.5 * (few[2] - few[1])


def test_equal_values_give_an_interval_of_no_width():
    assert compare.median_interval(np.full(30, 0.75)) == (0.75, 0.75, 0.75)


def test_a_value_that_is_no_number_leaves_no_interval():
    values = _sample(0.1)
    values[0] = np.nan
    assert all(np.isnan(compare.median_interval(values)))


# ---------------------------------------------------------------- shares and means


@pytest.mark.parametrize(("count", "of"), [(2, 3), (0, 7), (7, 7), (870, 872), (436, 872)])
def test_the_interval_of_a_share_ends_where_the_score_test_would_reject(count, of):
    """Wilson's ends solve |found - p| = z * sqrt(p * (1 - p) / of) for p."""
    for end in compare.share_interval(count, of):
        reached = 1.959963985 * np.sqrt(end * (1 - end) / of)
        assert abs(count / of - end) == pytest.approx(reached, abs=1e-8)
    low, high = compare.share_interval(count, of)
    assert 0 <= low <= count / of <= high <= 1


def test_the_interval_of_a_mean_is_that_of_drawing_every_value_again():
    values = np.random.default_rng(0).choice([-1, 0, 1], 200, p=[0.05, 0.85, 0.1])
    mean, low, high = compare.mean_interval(values)
    drawn = np.random.default_rng(1).choice(values, (4000, 200)).mean(axis=1)
    assert mean == values.mean()
    assert [low, high] == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.006)


def test_what_never_differs_has_an_interval_of_no_width():
    assert compare.mean_interval(np.zeros(30, int)) == (0.0, 0.0, 0.0)


# ---------------------------------------------------------------- tolerance


def test_the_tolerance_is_the_policys_multiple_of_the_noise_floor():
    assert compare.tolerance(evidence(), "logits") == 8 * NOISE
    assert compare.tolerance(evidence(policy=Policy(multiple=2.0))) == 2 * NOISE
    assert compare.tolerance(evidence(policy=Policy(tolerance=0.25))) == 0.25


def test_there_is_no_tolerance_where_the_floor_is_broken():
    found = moved(evidence(), UNMERGED, 0, (0, 0), np.nan)
    assert compare.tolerance(found, "logits") == 0


# ---------------------------------------------------------------- labels


def test_a_hit_is_a_label_that_was_chosen():
    found = evidence()
    own = found.recordings[REFERENCE]
    np.testing.assert_array_equal(compare.hits(own, found), [True, True, True])
    broken = moved(found, REFERENCE, 0, (1, 0), np.inf)
    np.testing.assert_array_equal(
        compare.hits(broken.recordings[REFERENCE], broken), [True, False, True]
    )
    short = dataclasses.replace(own, outputs=own.outputs[:1])
    assert compare.hits(short, found) is None
