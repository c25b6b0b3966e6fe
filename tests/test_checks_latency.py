import dataclasses

import numpy as np
import pytest
from hand_made import evidence, timing

from lora_export.checks import latency
from lora_export.records import MERGED, UNMERGED, Status, Timing


def _judge(*timings):
    return latency.judge(evidence(artifacts=(), timings=timings))


def _only(name, *timings):
    (verdict,) = [v for v in _judge(*timings) if v.subject.startswith(name)]
    return verdict


def _of(ratios):
    """The verdict on a candidate whose paired ratios are `ratios`."""
    own = 8.0 + np.arange(len(ratios)) % 5 / 4
    samples = {UNMERGED: tuple(own), MERGED: tuple(own), "onnx": tuple(own * ratios)}
    return _only("onnx", Timing(8, 32, 2, samples))


def test_a_faster_candidate_passes():
    verdict = _of(np.full(30, 0.5))
    assert verdict.status is Status.PASS
    assert (verdict.measured, verdict.limit, verdict.compared) == (0.5, 1.10, 30)


def test_a_candidate_at_most_a_tenth_slower_passes():
    assert _of(np.full(30, 1.09)).status is Status.PASS


def test_a_candidate_slower_than_that_fails():
    assert _of(np.full(30, 1.11)).status is Status.FAIL


def test_a_few_outliers_do_not_fail_a_candidate():
    ratios = np.full(30, 0.9)
    ratios[::10] = 50.0
    assert _of(ratios).status is Status.PASS


def test_an_interval_across_the_limit_is_inconclusive():
    verdict = _of(np.tile([0.9, 1.3], 15))
    assert verdict.status is Status.INCONCLUSIVE
    assert "95 % interval [0.900, 1.300] of 30 pairs" in verdict.note
    assert "smallest visible effect 0.200" in verdict.note


def test_a_median_below_the_limit_is_not_enough_to_pass():
    verdict = _of(np.repeat([1.0, 1.3], [16, 14]))
    assert verdict.measured < verdict.limit
    assert verdict.status is Status.INCONCLUSIVE


def test_samples_are_compared_in_pairs():
    # The machine slows down tenfold half way; each round is as fast for both.
    slow = np.repeat([1.0, 10.0], 15)
    samples = {UNMERGED: tuple(8 * slow), "onnx": tuple(7 * slow)}
    verdict = _only("onnx", Timing(1, 32, 2, samples))
    assert (verdict.status, verdict.measured) == (Status.PASS, 0.875)


def test_too_few_rounds_are_not_run():
    assert _of(np.full(9, 0.5)).status is Status.NOT_RUN


def test_just_enough_rounds_are_judged():
    assert _of(np.full(10, 0.5)).status is Status.PASS


def test_a_time_that_is_no_number_does_not_pass():
    ratios = np.full(30, 0.5)
    ratios[3] = np.nan
    assert _of(ratios).status is not Status.PASS


def test_samples_without_a_partner_are_not_run():
    found = timing(onnx=0.5)
    samples = dict(found.samples_ms) | {"onnx": found.samples_ms["onnx"][:-1]}
    verdict = _only("onnx", dataclasses.replace(found, samples_ms=samples))
    assert verdict.status is Status.NOT_RUN


def test_a_candidate_alone_is_not_run():
    verdict = _only("onnx", Timing(1, 32, 2, {"onnx": (1.0,) * 30}))
    assert verdict.status is Status.NOT_RUN


@pytest.mark.parametrize("timings", [(), (timing(),)])
def test_nothing_to_compare_is_not_run(timings):
    assert [v.status for v in _judge(*timings)] == [Status.NOT_RUN]


def test_each_shape_and_each_candidate_has_its_own_verdict():
    small = timing(merged=1.0, onnx=0.5)
    large = dataclasses.replace(timing(merged=1.0, onnx=2.0), batch=8)
    assert [(v.subject, v.status) for v in _judge(small, large)] == [
        ("merged, batch 1", Status.PASS),
        ("onnx, batch 1", Status.PASS),
        ("merged, batch 8", Status.PASS),
        ("onnx, batch 8", Status.FAIL),
    ]


@pytest.mark.parametrize("timed", ["merged", "onnx"])
def test_a_candidate_that_was_never_timed_is_not_passed_over(timed):
    found = {
        v.subject: v.status for v in latency.judge(evidence(timings=(timing(**{timed: 1.0}),)))
    }
    (other,) = {"merged", "onnx"} - {timed}
    assert found == {
        f"{timed}, batch 1": Status.PASS,
        f"{other}, batch 1": Status.NOT_RUN,
    }


def test_a_candidate_that_was_not_timed_at_every_shape_is_not_passed_over():
    large = dataclasses.replace(timing(merged=1.0), batch=8)
    found = latency.judge(evidence(timings=(timing(merged=1.0, onnx=0.5), large)))
    assert not all(verdict.passed for verdict in found)
