"""What the runs of a study found, read from its small files, and the statistics of it."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Score:
    """A metric of answers, and how it is shown."""

    name: str
    digits: int
    unit: str = ""
    task: str = ""  # of those that are learned together, the one that it is measured on

    @property
    def subject(self) -> str:
        """What it is measured on, as `metrics.jsonl` says it."""
        return ", ".join(filter(None, ("dev", self.task)))

    @property
    def label(self) -> str:
        """What it is called in tables."""
        return f"{self.name} ({self.task})" if self.task else self.name

    @property
    def factor(self) -> int:
        """From the share that is measured to what is shown."""
        return 100 if self.unit else 1

    def shown(self, found: "Estimate") -> "Estimate":
        """Return what is shown of a measured one; no share is below 0 or above 1."""
        if self.unit and not found.is_single:
            low, high = max(0.0, found.low), min(1.0, found.high)
            found = replace(found, low=low, high=high)
        return found * self.factor


SCORES = {
    "sst2": (
        Score("accuracy", 2, " %"),
        Score("F1", 2, " %"),
        Score("Matthews correlation", 3),
    ),
    "causal_lm": (
        Score("perplexity", 3),
        Score("exact match", 2, " %", "verdict"),
        Score("BLEU", 2, task="description"),
        Score("ROUGE-L", 2, " %", "description"),
        Score("exact match", 2, " %", "description"),
    ),
}
ACCURACY = SCORES["sst2"][0]
METHODS = ("full", "lora", "rslora", "dora", "qlora", "bitfit", "head")  # the order of all lists
WHOLE = {"sst2": "full", "causal_lm": "answers-full"}  # full fine-tuning, by recipe


# ---------------------------------------------------------------- statistics


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval; of a single value there is no interval."""

    value: float
    low: float
    high: float
    count: int
    note: str = ""  # said after it

    @property
    def is_single(self) -> bool:
        """Whether there is no interval."""
        return math.isnan(self.low)

    def __mul__(self, factor: float) -> "Estimate":
        low, high = self.low * factor, self.high * factor
        return replace(self, value=self.value * factor, low=low, high=high)

    def text(self, digits: int, unit: str = "", single: str = " (single run)") -> str:
        """Return the value with its interval, or with why it has none."""
        shown = f"{number(self.value, digits)}{unit}"
        if self.is_single:
            spread = "" if self.note else single
        elif self.low == self.high:
            spread = f" (all {self.count} seeds alike)"
        else:
            spread = f" [{number(self.low, digits)}, {number(self.high, digits)}]"
        return f"{shown}{spread}{f' ({self.note})' if self.note else ''}"


def mean_interval(values: Sequence[float]) -> Estimate:
    """Return the mean of independent values and Student's t interval of it."""
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return Estimate(mean, math.nan, math.nan, count)
    if not np.ptp(values):
        return Estimate(mean, mean, mean, count)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, count - 1) * stats.sem(values)
    return Estimate(mean, float(mean - half), float(mean + half), count)


def difference(ours: Sequence[float], theirs: Sequence[float]) -> Estimate:
    """Return the difference of two means, `ours` minus `theirs`, and Welch's interval of it."""
    mean, count = float(np.mean(ours) - np.mean(theirs)), min(len(ours), len(theirs))
    if count < 2:
        return Estimate(mean, math.nan, math.nan, count)
    if not np.ptp(ours) and not np.ptp(theirs):
        return Estimate(mean, mean, mean, count)
    parts = np.array([np.var(values, ddof=1) / len(values) for values in (ours, theirs)])
    degrees = parts.sum() ** 2 / (parts**2 / [len(ours) - 1, len(theirs) - 1]).sum()
    half = stats.t.ppf((1 + CONFIDENCE) / 2, degrees) * math.sqrt(parts.sum())
    return Estimate(mean, float(mean - half), float(mean + half), count)


def binomial(share: float, count: int) -> tuple[float, float]:
    """Return Wilson's interval of a share of `count` answers that were right."""
    found = stats.binomtest(round(share * count), count)
    low, high = found.proportion_ci(CONFIDENCE, method="wilson")
    return float(low), float(high)


# ---------------------------------------------------------------- what was found


@dataclass(frozen=True)
class Run:
    """One line of study.jsonl."""

    id: str
    setting: str
    recipe: str
    method: str
    words: str
    seed: int
    state: str
    why: str = ""
    tried: str = ""
    measurements: Sequence[Mapping[str, Any]] = ()
    verdicts: Sequence[Mapping[str, Any]] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """How many steps of training it took."""
        return max(int(one["step"]) for one in self.measurements if "step" in one)

    def get(self, name: str, subject: str | None = None) -> float | None:
        """Return the value of the first measurement of this name."""
        return next(
            (
                float(one["value"])
                for one in self.measurements
                if one["name"] == name and subject in (None, one["subject"])
            ),
            None,
        )


@dataclass(frozen=True)
class Amount:
    """As a formula predicts it, and as it was measured: bytes, or the ratio of two."""

    predicted: float
    measured: float

    def __truediv__(self, whole: "Amount") -> "Amount":
        return Amount(self.predicted / whole.predicted, self.measured / whole.measured)


@dataclass(frozen=True)
class Group:
    """The finished runs of one setting, which differ in their seeds."""

    id: str
    runs: tuple[Run, ...]

    @property
    def first(self) -> Run:
        """A run of it, for what all of them share."""
        return self.runs[0]

    @property
    def steps(self) -> int:
        """How many steps of training each of its runs took."""
        return self.first.steps

    @property
    def arguments(self) -> str:
        """What its recipe was given; of an option that was given twice, what counts."""
        parts = re.split(r"\s+(?=--)", self.first.words)
        return " ".join({part.split()[0]: part for part in parts if part}.values())

    def values(self, score: Score) -> list[float]:
        """Return the final values of a metric, one for each seed."""
        found = (run.get(score.name, score.subject) for run in self.runs)
        return [value for value in found if value is not None]

    def estimate(self, score: Score) -> Estimate | None:
        """Return the mean of a metric over the seeds, where there is one."""
        values = self.values(score)
        return replace(mean_interval(values), note=self.missing(score)) if values else None

    def missing(self, score: Score) -> str:
        """Say for how many seeds there is a metric, where it is not all of them."""
        count = len(self.values(score))
        return "" if count == len(self.runs) else f"{count} of {len(self.runs)} seeds"

    def gap(self, other: "Group", score: Score) -> Estimate | None:
        """Return the difference of a metric to another setting's, where both have it."""
        ours, theirs = self.values(score), other.values(score)
        if not ours or not theirs:
            return None
        told = ((group.id, group.missing(score)) for group in (self, other))
        note = ", ".join(f"{name}: {missing}" for name, missing in told if missing)
        return replace(difference(ours, theirs), note=note)

    def samples(self, score: Score) -> int:
        """Return on how many things a metric rests."""
        asked = (score.name, score.subject)
        measured = (one for run in self.runs for one in run.measurements)
        return next(int(m["samples"]) for m in measured if (m["name"], m["subject"]) == asked)

    def scores(self) -> Iterator[tuple[Score, Estimate]]:
        """Yield each metric of the answers that there is, as it is measured."""
        for score in SCORES[self.first.recipe]:
            if found := self.estimate(score):
                yield score, found

    @cached_property
    def parameters(self) -> float:
        """How many it trains."""
        return self.first.get("trainable parameters") or math.nan

    @property
    def share(self) -> float:
        """Of all parameters."""
        return self.parameters / (self.first.get("parameters") or math.nan)

    @property
    def state(self) -> Amount:
        """Of AdamW: two float32 numbers for each parameter, and a step count for each tensor."""
        predicted = 8 * self.parameters + 4 * (self.first.get("stored tensors") or math.nan)
        return Amount(predicted, self.first.get("optimizer state") or math.nan)

    @property
    def file(self) -> Amount:
        """What has to be kept: a float32 number for each parameter that was trained."""
        return Amount(4 * self.parameters, self.first.get("checkpoint size") or math.nan)


@dataclass(frozen=True)
class Study:
    """All that is known."""

    about: Mapping[str, Any]
    runs: tuple[Run, ...]
    curves: Mapping[str, Mapping[str, list[list[float]]]] = field(default_factory=dict)

    def groups(self, recipe: str) -> list[Group]:
        """Return the settings of a recipe that have finished runs, in the order of the matrix."""
        found: dict[str, list[Run]] = {}
        for run in self.runs:
            if run.recipe == recipe and run.state == "finished":
                found.setdefault(run.setting, []).append(run)
        return [Group(name, tuple(runs)) for name, runs in found.items()]

    def budgets(self) -> dict[int, list[Group]]:
        """Return the settings on sentences, by their number of steps: these can be compared."""
        found: dict[int, list[Group]] = {}
        for group in self.groups("sst2"):
            found.setdefault(group.steps, []).append(group)
        return found

    def group(self, recipe: str, setting: str) -> Group | None:
        """Return one setting, where it has finished runs."""
        return next((group for group in self.groups(recipe) if group.id == setting), None)

    def whole(self, recipe: str) -> Group | None:
        """Return full fine-tuning, which a recipe's other settings are held against."""
        return self.group(recipe, WHOLE[recipe])

    @property
    def proof(self) -> Run | None:
        """The run that merged, exported and compared an adapter."""
        return next((r for r in self.runs if r.recipe == "proof" and r.state == "finished"), None)

    def cost(self, name: str) -> dict[str, float]:
        """Return a measurement of the costs of a step by method, in the order of `METHODS`."""
        found = {
            run.method if run.get("trainable tensors") else one["subject"]: float(one["value"])
            for run in self.runs
            if run.recipe == "cost"
            for one in run.measurements
            if one["name"] == name
        }
        return {method: found[method] for method in METHODS if method in found}


def read(out: Path) -> Study:
    """Return what the small files in `out` hold."""
    lines = (out / "study.jsonl").read_text("utf-8").splitlines()
    curves = out / "curves.json"
    return Study(
        json.loads((out / "about.json").read_text("utf-8")),
        tuple(Run(**json.loads(line)) for line in lines),
        json.loads(curves.read_text("utf-8")) if curves.is_file() else {},
    )


# ---------------------------------------------------------------- numbers in words


def number(value: float, digits: int) -> str:
    """Return a number with thousands and a true minus sign."""
    return f"{value:,.{digits}f}".replace("-", "\N{MINUS SIGN}")


def size(value: float) -> str:
    """Return a number of bytes in words."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= factor:
            return (
                f"{value / factor:.3g} {unit}"
                if value < 999.5 * factor
                else f"{value / factor:,.0f} {unit}"
            )
    return f"{value:.0f} B"


def percent(value: float, digits: int = 1) -> str:
    """Return a share in percent."""
    return f"{number(100 * value, digits)} %"


def significant(value: float) -> str:
    """Return a number with three significant digits, and no exponent."""
    return np.format_float_positional(value, 3, fractional=False, trim="-")


def share(group: Group) -> str:
    """Return the share of the parameters that a setting trains, in percent."""
    return f"{significant(100 * group.share)} %"


def seeds(group: Group) -> str:
    """Return how many runs a figure is from."""
    return f"{len(group.runs)} seeds" if len(group.runs) > 1 else "1 seed"
