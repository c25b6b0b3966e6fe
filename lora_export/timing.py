"""Latency as interleaved pairs: every runner once a round, in shuffled order."""

import contextlib
import random
import time
from collections.abc import Iterator, Mapping

import numpy as np
import torch

from lora_export.compare import median_interval, ratios
from lora_export.environment import cores
from lora_export.inputs import TIMED, made
from lora_export.records import UNMERGED, Array, Signature, Timing
from lora_export.runners import Runner

WARM_UP = 5
LEAST_ROUNDS, MOST_ROUNDS = 30, 200
# More rounds are taken until the interval of every ratio is at most this wide to either side.
HALF_WIDTH = 0.02
MOST_SECONDS = 25.0  # for one shape, once the least rounds are done


@contextlib.contextmanager
def all_threads() -> Iterator[int]:
    """Let torch use every core of this process within the block; give their number."""
    before, count = torch.get_num_threads(), cores()
    torch.set_num_threads(count)
    try:
        yield count
    finally:
        torch.set_num_threads(before)


def measure(
    runners: Mapping[str, Runner], signature: Signature, *, threads: int, seed: int, limit: float
) -> tuple[Timing, ...]:
    """Return the samples of all `runners` at each shape of `inputs.TIMED`, in milliseconds.

    Where there is a cache, also those of the next token, with the others in the cache. Rounds are
    taken until every ratio is known well, or known to lie on one side of `limit`.
    """
    shapes = []
    for batch, longest in TIMED:
        length = min(longest, signature.max_length)
        shapes += [(batch, length, 0)]
        if signature.has_cache:  # the source of an encoder-decoder is all in the cache by then
            new = 0 if signature.has_target else 1
            shapes += [(batch, new, length - new)]
    return tuple(
        _measure(runners, signature, *shape, threads, seed, limit=limit) for shape in shapes
    )


def measure_shape(
    runners: Mapping[str, Runner],
    signature: Signature,
    shape: tuple[int, int],
    *,
    threads: int,
    seed: int,
    against: str,
    most_seconds: float,
) -> Timing:
    """Return the samples of all `runners` at one (batch, length), nothing in the cache.

    Rounds are taken until every ratio to the runner `against` is known well, or `most_seconds` are
    spent.
    """
    batch, length = shape
    return _measure(runners, signature, batch, length, 0, threads, seed, against, most_seconds)


class OnThreads:
    """A runner in a process where others take another number of threads: torch has one setting."""

    def __init__(self, runner: Runner, threads: int) -> None:
        self.name, self.precision = runner.name, runner.precision
        self.runner, self.threads = runner, threads

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the named outputs for named inputs."""
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        return self.runner.run(inputs)


def _measure(
    runners: Mapping[str, Runner],
    signature: Signature,
    batch: int,
    length: int,
    past: int,
    threads: int,
    seed: int,
    against: str = UNMERGED,
    most_seconds: float | None = None,
    limit: float | None = None,
) -> Timing:
    arrays = made(signature, batch, length, "right", seed, past=past, target_past=past)
    longest = MOST_SECONDS if most_seconds is None else most_seconds
    samples: dict[str, list[float]] = {name: [] for name in runners}
    for runner in runners.values():
        for _ in range(WARM_UP):
            runner.run(arrays)
    dice, order = random.Random(seed), list(runners)
    start = time.monotonic()
    while True:
        dice.shuffle(order)
        for name in order:
            begin = time.perf_counter_ns()
            runners[name].run(arrays)
            samples[name].append((time.perf_counter_ns() - begin) / 1e6)
        rounds = len(samples[against])
        if rounds < LEAST_ROUNDS or rounds % 10:
            continue
        timing = Timing(batch, length, threads, {n: tuple(s) for n, s in samples.items()}, past)
        late = time.monotonic() - start > longest or rounds >= MOST_ROUNDS
        others = (name for name in runners if name != against)
        if late or all(_is_known(timing, name, against, limit) for name in others):
            return timing


def _is_known(timing: Timing, runner: str, against: str, limit: float | None) -> bool:
    """Return whether the interval of a ratio is narrow, or lies on one side of `limit`."""
    _, low, high = median_interval(ratios(timing, runner, against))
    decided = limit is not None and (high <= limit or low > limit)
    return bool(np.isfinite(high)) and (decided or (high - low) / 2 <= HALF_WIDTH)
