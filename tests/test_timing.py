import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from hand_made import signature

from lora_export import inputs, timing
from lora_export.records import UNMERGED


class Clock:
    """Time that passes only where a runner says so."""

    def __init__(self):
        self.ns = 0

    def perf_counter_ns(self):
        return self.ns

    def monotonic(self):
        return self.ns / 1e9


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    fake = SimpleNamespace(perf_counter_ns=made.perf_counter_ns, monotonic=made.monotonic)
    monkeypatch.setattr(timing, "time", fake)
    return made


class Fake:
    """A runner that takes the given milliseconds, in turn, and writes down when it was called."""

    precision = "float32"

    def __init__(self, name, clock, calls, took_ms):
        self.name, self.clock, self.calls = name, clock, calls
        self.took_ms = itertools.cycle(took_ms)
        self.shapes = set()

    def run(self, arrays):
        self.calls.append(self.name)
        self.shapes.add(arrays["input_ids"].shape)
        self.clock.ns += int(next(self.took_ms) * 1e6)
        return {}


def _runners(clock, **took_ms):
    calls = []
    return {name: Fake(name, clock, calls, ms) for name, ms in took_ms.items()}, calls


def _measure(runners, seed=0):
    return timing._measure(runners, signature(), 2, 8, 0, 3, seed)


STEADY = {UNMERGED: [8.0], "merged": [8.0], "onnx": [4.0]}


def test_every_runner_is_called_equally_often(clock):
    runners, calls = _runners(clock, **STEADY)
    found = _measure(runners)
    rounds = len(found.samples_ms[UNMERGED])
    assert {name: calls.count(name) for name in runners} == dict.fromkeys(
        runners, timing.WARM_UP + rounds
    )


def test_every_runner_has_as_many_samples(clock):
    runners, _ = _runners(clock, **STEADY)
    found = _measure(runners)
    assert {len(samples) for samples in found.samples_ms.values()} == {timing.LEAST_ROUNDS}


def test_the_warm_up_is_not_in_the_samples(clock):
    first_slow = [1000.0] * timing.WARM_UP + [8.0] * timing.LEAST_ROUNDS
    runners, _ = _runners(clock, **STEADY | {UNMERGED: first_slow})
    assert set(_measure(runners).samples_ms[UNMERGED]) == {8.0}


def test_every_runner_runs_once_a_round(clock):
    runners, calls = _runners(clock, **STEADY)
    _measure(runners)
    timed = calls[timing.WARM_UP * len(runners) :]
    rounds = [timed[i : i + len(runners)] for i in range(0, len(timed), len(runners))]
    assert all(sorted(once) == sorted(runners) for once in rounds)


def test_the_order_within_a_round_is_shuffled(clock):
    runners, calls = _runners(clock, **STEADY)
    _measure(runners)
    timed = calls[timing.WARM_UP * len(runners) :]
    orders = {tuple(timed[i : i + 3]) for i in range(0, len(timed), 3)}
    assert len(orders) == 6


def test_the_same_seed_gives_the_same_order(clock):
    first, second, other = (_runners(clock, **STEADY) for _ in range(3))
    for (runners, _), seed in ((first, 1), (second, 1), (other, 2)):
        _measure(runners, seed)
    assert first[1] == second[1]
    assert first[1] != other[1]


def test_samples_pair_up_by_position(clock):
    # Both slow down in the same rounds, so that only pairs of one round have the ratio of a half.
    rounds = [*range(1, timing.LEAST_ROUNDS + 1)]
    own = [1.0] * timing.WARM_UP + [8.0 * i for i in rounds]
    runners, _ = _runners(clock, **{UNMERGED: own, "onnx": [ms / 2 for ms in own]})
    samples = _measure(runners).samples_ms
    assert samples[UNMERGED] == tuple(8.0 * i for i in rounds)
    assert np.divide(samples["onnx"], samples[UNMERGED]).tolist() == [0.5] * len(rounds)


def test_a_steady_ratio_needs_only_the_least_rounds(clock):
    runners, _ = _runners(clock, **STEADY)
    assert len(_measure(runners).samples_ms[UNMERGED]) == timing.LEAST_ROUNDS


def test_a_ratio_that_wavers_is_measured_until_the_most_rounds(clock):
    runners, _ = _runners(clock, **{UNMERGED: [8.0], "onnx": [1.0, 20.0]})
    assert len(_measure(runners).samples_ms[UNMERGED]) == timing.MOST_ROUNDS


@pytest.mark.parametrize(
    ("ratio", "rounds"), [(1.03, timing.LEAST_ROUNDS), (1.06, timing.MOST_ROUNDS)]
)
def test_measuring_ends_once_the_interval_reaches_two_hundredths_to_either_side(
    clock, ratio, rounds
):
    # Half of the rounds have a ratio of 1, so the interval reaches from there to the other half.
    runners, _ = _runners(clock, **{UNMERGED: [8.0], "onnx": [8.0, 8.0 * ratio]})
    assert len(_measure(runners).samples_ms[UNMERGED]) == rounds


@pytest.mark.parametrize(
    ("limit", "rounds"), [(1.1, timing.LEAST_ROUNDS), (1.04, timing.MOST_ROUNDS)]
)
def test_measuring_ends_once_the_interval_lies_on_one_side_of_the_limit(clock, limit, rounds):
    runners, _ = _runners(clock, **{UNMERGED: [8.0], "onnx": [8.0, 8.0 * 1.06]})
    found = timing._measure(runners, signature(), 2, 8, 0, 3, 0, limit=limit)
    assert len(found.samples_ms[UNMERGED]) == rounds


def test_one_candidate_that_wavers_keeps_all_of_them_going(clock):
    runners, _ = _runners(clock, **STEADY | {"onnx": [1.0, 20.0]})
    lengths = {len(samples) for samples in _measure(runners).samples_ms.values()}
    assert lengths == {timing.MOST_ROUNDS}


def test_a_slow_machine_still_gets_the_least_rounds(clock):
    slow = timing.MOST_SECONDS * 1e3
    runners, _ = _runners(clock, **{UNMERGED: [slow], "onnx": [slow / 8, slow]})
    assert len(_measure(runners).samples_ms[UNMERGED]) == timing.LEAST_ROUNDS


def test_a_timing_says_what_it_was_taken_on(clock):
    runners, _ = _runners(clock, **STEADY)
    found = _measure(runners)
    assert (found.batch, found.sequence, found.threads) == (2, 8, 3)
    assert {shape for runner in runners.values() for shape in runner.shapes} == {(2, 8)}


def test_every_shape_of_the_list_is_timed(clock):
    runners, _ = _runners(clock, **STEADY)
    found = timing.measure(runners, signature(), threads=2, seed=0, limit=1.1)
    assert [(t.batch, t.sequence) for t in found] == list(inputs.TIMED)
    assert all(t.samples_ms.keys() == runners.keys() for t in found)


def test_no_shape_is_longer_than_the_model_accepts(clock):
    runners, _ = _runners(clock, **STEADY)
    found = timing.measure(runners, signature(max_length=5), threads=2, seed=0, limit=1.1)
    assert {t.sequence for t in found} == {5}
