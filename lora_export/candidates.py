"""Ways to run one model on this machine: their order, their Pareto front, the choice. No torch.

What is tried and measured stands in `lora_export.tuning`; here is what follows from it.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from lora_export.records import Verdict

ORDER_REASON = (
    "all cores before fewer; what is only written before what is compiled (aoti) or searched for "
    "sensitive layers (int8, int4), which takes the time of several others; narrow weights before "
    "wide ones, because a CPU waits for memory, but int4, which is for size, last; runtimes that "
    "rewrite the graph before those that run it operator by operator"
)
# A name that is not here, such as that of an exporter that was dropped in, comes last.
PRECISION_ORDER = ("int8", "bf16", "fp32", "fp16", "int4")
FORMAT_ORDER = ("onnx", "openvino", "aoti", "torchscript", "pt2")
SLOWLY_WRITTEN = {"aoti", "int8", "int4"}  # formats and precisions
# An x86 processor without these computes bf16 in float32, with conversions on the way.
BF16_INSTRUCTIONS = {"avx512_bf16", "amx_bf16"}


@dataclass(frozen=True, order=True)
class Configuration:
    """One way to run a model: an artifact, and the number of threads that it is given."""

    format: str
    precision: str
    threads: int

    def __str__(self) -> str:
        plural = "" if self.threads == 1 else "s"
        return f"{self.format} {self.precision}, {self.threads} thread{plural}"

    @property
    def file(self) -> tuple[str, str]:
        """What names its file: configurations that differ in threads share one."""
        return self.format, self.precision


@dataclass(frozen=True)
class LeftOut:
    """What was not tried, and why."""

    what: str  # a format, a format in a precision, or a configuration
    reason: str


@dataclass(frozen=True)
class Figures:
    """What one configuration costs. Smaller is better, in each of the first four that compare."""

    ratio: float  # of its latency to eager torch's, median over pairs
    size_bytes: int  # of the files of the artifact
    memory_bytes: int  # that a fresh process grows by, from before opening it to after one answer
    deviation: float  # largest from the float64 reference, in noise floors; infinite if not to tell
    low: float  # 95 % bootstrap interval of the ratio
    high: float
    pairs: int
    median_ms: float
    eager_ms: float  # median of eager torch in the same rounds

    @property
    def compared(self) -> tuple[float, ...]:
        """What the Pareto front is of."""
        return self.ratio, self.size_bytes, self.memory_bytes, self.deviation


@dataclass(frozen=True)
class Row:
    """A configuration that was tried: its figures and verdicts, or the fault that ended the try."""

    configuration: Configuration
    figures: Figures | None
    verdicts: tuple[Verdict, ...] = ()
    fault: str = ""

    @property
    def is_proven(self) -> bool:
        """Whether it was measured, and every verdict passes."""
        return (
            self.figures is not None
            and not self.fault
            and bool(self.verdicts)
            and all(verdict.passed for verdict in self.verdicts)
        )

    @property
    def judgement(self) -> str:
        """The verdicts in words."""
        if self.fault or self.is_proven:
            return self.fault or f"proven: {len(self.verdicts)} pass"
        bad = [f"{v.check} of {v.subject}: {v.status}" for v in self.verdicts if not v.passed]
        return "NOT PROVEN: " + ("; ".join(bad) or "there are no verdicts")


def front(rows: Iterable[Row]) -> tuple[Row, ...]:
    """Return the proven rows that no other one beats: nowhere worse, and better somewhere.

    What is not proven has no place there and beats nobody: a wrong answer is quickly given.
    """
    proven = [row for row in rows if row.is_proven]
    return tuple(row for row in proven if not any(_beats(other, row) for other in proven))


def fastest(rows: Iterable[Row]) -> Row | None:
    """Return the proven row of the smallest ratio, or None; it stands on the front.

    Of several with the same ratio it is the smallest file, then the least memory, then the least
    deviation.
    """
    proven = [row for row in rows if row.is_proven]
    return min(proven, key=lambda row: (_figures(row), row.configuration), default=None)


def as_fast(rows: Iterable[Row], chosen: Row) -> tuple[Row, ...]:
    """Return the other proven rows whose interval overlaps that of `chosen`: perhaps as fast."""
    best = chosen.figures
    return tuple(
        row
        for row in rows
        if row.is_proven and row != chosen and best and row.figures and row.figures.low <= best.high
    )


def _beats(one: Row, other: Row) -> bool:
    mine, yours = _figures(one), _figures(other)
    return mine != yours and all(a <= b for a, b in zip(mine, yours, strict=True))


def _figures(row: Row) -> tuple[float, ...]:
    return row.figures.compared if row.figures else (math.inf,)


def arranged(configurations: Iterable[Configuration]) -> tuple[Configuration, ...]:
    """Return `configurations`, those that promise most first; `ORDER_REASON` says why."""

    def place(one: Configuration) -> tuple[int, bool, int, int, Configuration]:
        precision, name = _place(PRECISION_ORDER, one.precision), _place(FORMAT_ORDER, one.format)
        return -one.threads, bool(SLOWLY_WRITTEN & {*one.file}), precision, name, one

    return tuple(sorted(set(configurations), key=place))


def _place(order: Sequence[str], name: str) -> int:
    return order.index(name) if name in order else len(order)


def candidates(
    offered: Mapping[str, Sequence[str]],
    threads: Iterable[int],
    asked: Sequence[str],
    lacking: Callable[[str], str],
    instructions: Iterable[str],
) -> tuple[tuple[Configuration, ...], tuple[LeftOut, ...]]:
    """Return what to try, in order, and what is left out with the reason.

    Args:
        offered: Precisions of every format.
        threads: Numbers of threads.
        asked: Precisions that were asked for: no others are tried, and all of these are.
        lacking: Gives what a format lacks on this machine, or nothing.
        instructions: Instruction sets of the processor, as `environment` names them.
    """
    found: list[Configuration] = []
    left: list[LeftOut] = []
    counts, known = tuple(threads), set(instructions)
    for name, precisions in offered.items():
        if reason := lacking(name):
            left.append(LeftOut(name, reason))
            continue
        for precision in asked or precisions:
            if reason := _no_use(precision, precisions, asked, known):
                left.append(LeftOut(f"{name} {precision}", reason))
            else:
                found += [Configuration(name, precision, count) for count in counts]
    return arranged(found), tuple(left)


def _no_use(
    precision: str, offered: Sequence[str], asked: Sequence[str], instructions: set[str]
) -> str:
    """Return why a precision is not tried, or nothing."""
    if precision not in offered:
        return f"is written in {', '.join(offered)}"
    if precision in asked:
        return ""
    if precision == "fp16":
        return "is no gain on a CPU, which computes it in float32; --precision fp16 tries it"
    if precision == "bf16" and "avx2" in instructions and not instructions & BF16_INSTRUCTIONS:
        return "this processor has no instructions for it; --precision bf16 tries it"
    return ""
