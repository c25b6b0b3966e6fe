"""Evidence as plots: inline SVG that takes its colours from the page, and needs no script.

The same evidence gives the same bytes.
"""

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lora_export.compare import axes_of, deciding, noise_floor, parted, valid
from lora_export.records import MERGED, REFERENCE, UNMERGED, Array, Evidence, Recording

WIDTH = 5.0  # inches of 72 pixels: what a phone shows without making the letters smaller
MOST_CLASSES = 12  # in a table of decisions
MOST_OF_A_NAME = 16  # characters, beside an axis
MOST_POINTS = 20_000
BINS = 40
# Drawn in these, which stand for nothing else, and replaced by the page's own colours: those follow
# light and dark.
_INK, _LIMIT = "#010203", "#070809"
_SERIES = ("#0a0b0c", "#0d0e0f", "#101112", "#131415", "#161718", "#191a1b")
_COLOURS = {
    _INK: "var(--ink)",
    _LIMIT: "var(--limit)",
    **{colour: f"var(--series-{i})" for i, colour in enumerate(_SERIES)},
}
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lora-export",
    "font.family": "sans-serif",
    "font.size": 10.0,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Plot:
    """One plot; the description says in words what is to be seen."""

    name: str
    title: str
    description: str
    svg: str


def plots(evidence: Evidence) -> list[Plot]:
    """Return the plots that there is evidence for."""
    with style.context(["default", _STYLE]), warnings.catch_warnings():
        # The browser has letters that matplotlib's own font lacks.
        warnings.filterwarnings("ignore", "Glyph", UserWarning)
        return [
            *_errors(evidence),
            *_differences(evidence),
            *_latencies(evidence),
            *_confusions(evidence),
        ]


# ---------------------------------------------------------------- error by layer


def _errors(evidence: Evidence) -> Iterator[Plot]:
    """Draw how far each module's output lies from the reference, by depth."""
    artifacts = dict.fromkeys(module.artifact for module in evidence.modules_compared)
    for artifact in artifacts:
        known = [m for m in evidence.modules_compared if m.artifact == artifact]
        errors = np.array([m.error if m.value and not m.excused else np.nan for m in known])
        limits = np.array([m.limit for m in known])
        positive = np.concatenate([errors, limits])
        positive = positive[np.isfinite(positive) & (positive > 0)]
        if not positive.size or np.isnan(errors).all():
            continue
        least = positive.min() / 2  # where a logarithmic scale has its zero
        figure, axes = _figure(2.6)
        depth = np.arange(len(known))
        axes.semilogy(
            depth, np.maximum(errors, least), color=_SERIES[0], marker=".", label="deviation"
        )
        axes.semilogy(depth, np.maximum(limits, least), color=_LIMIT, ls="--", label="limit")
        at = parted(known)
        if at is not None:
            axes.axvline(float(known.index(at)), color=_LIMIT, lw=0.8)
        axes.set_xlabel("module, in the order in which they run")
        axes.set_ylabel("largest deviation")
        axes.legend()
        where = (
            f"It parts from the reference at {at.module}, with {at.error:.1e}."
            if at is not None
            else "None is outside its limit."
        )
        yield _plot(
            figure,
            f"error-by-layer-{artifact}",
            f"Error by layer: {artifact}",
            f"The deviation of {int(np.isfinite(errors).sum())} of {len(known)} modules from the "
            f"reference, beside what is allowed. {where}",
        )


# ---------------------------------------------------------------- distributions


def _differences(evidence: Evidence) -> Iterator[Plot]:
    """Draw how the absolute differences from the reference are spread, with the tolerance."""
    recordings = evidence.recordings
    if not {REFERENCE, evidence.floor} <= recordings.keys():
        return
    names = list(dict.fromkeys(name for out in recordings[REFERENCE].outputs for name in out))
    chosen = [name for name in names if "logits" in name] or names[:1]
    wanted = [UNMERGED, MERGED, *(artifact.format for artifact in evidence.artifacts)]
    for output in chosen:
        floor = noise_floor(evidence, output)
        spread = {
            name: _apart(evidence, recordings[name], output)
            for name in wanted
            if name in recordings
        }
        found = {name: values for name, values in spread.items() if values.size}
        if not found:
            continue
        limit = evidence.policy.tolerance or evidence.policy.multiple * floor.largest
        figure, axes = _figure(1.2 + 0.5 * len(found))
        zeros = _ridges(axes, found, logarithmic=True)
        told = floor.defect or f"The tolerance is {limit:.1e}"
        if np.isfinite(limit):
            axes.axvline(limit, color=_LIMIT, ls="--")
            axes.annotate(
                f"tolerance {limit:.1e} ", (limit, 1), xycoords=("data", "axes fraction"),
                ha="right", va="bottom", color=_LIMIT,
            )  # fmt: skip
        axes.set_xlabel(f"|difference of {_label(output)} from float64|")
        shares = ", ".join(f"{name} at most {values.max():.1e}" for name, values in found.items())
        yield _plot(
            figure,
            f"differences-{output}",
            f"Differences of {output} from the reference",
            f"{told}; {shares}. {zeros}".strip(),
        )


def _apart(evidence: Evidence, recording: Recording, output: str) -> Array:
    """Return the finite absolute differences of one output from the reference, float64.

    Of a batch with more than `MOST_POINTS`, a sample and the largest.
    """
    reference = evidence.recordings[REFERENCE]
    found = [np.zeros(0)]
    for batch, expected, given in zip(
        evidence.batches, reference.outputs, recording.outputs, strict=False
    ):
        if output in expected and output in given and expected[output].shape == given[output].shape:
            pair = [
                valid(outputs[output], batch, evidence, output).astype(np.float64).ravel()
                for outputs in (expected, given)
            ]
            apart = np.abs(pair[1] - pair[0])
            apart = apart[np.isfinite(apart)]
            step = 1 + apart.size // MOST_POINTS
            found += [apart] if step == 1 else [apart[::step], apart.max(keepdims=True)]
    return np.concatenate(found)


def _latencies(evidence: Evidence) -> Iterator[Plot]:
    """Draw the times of every runner, one plot for each shape."""
    for timing in evidence.timings:
        finite = {
            n: np.array([t for t in ms if np.isfinite(t)]) for n, ms in timing.samples_ms.items()
        }
        samples = {name: times for name, times in finite.items() if times.size}
        if not samples:
            continue
        shape = f"batch {timing.batch}, length {timing.sequence}"
        shape += f", {timing.past} cached" if timing.past else ""
        figure, axes = _figure(1.2 + 0.5 * len(samples))
        _ridges(axes, samples, logarithmic=False)
        axes.set_xlim(left=0)
        axes.set_xlabel("milliseconds")
        medians = ", ".join(f"{name} {np.median(ms):.2f} ms" for name, ms in samples.items())
        yield _plot(
            figure,
            f"latency-{timing.batch}-{timing.sequence}-{timing.past}",
            f"Latency: {shape}",
            f"Medians, marked by a line: {medians}; {timing.threads} threads. The slowest "
            "hundredth is in the last bar.",
        )


def _ridges(axes: Axes, spread: Mapping[str, Array], *, logarithmic: bool) -> str:
    """Draw one histogram above the other, each with its median; say how many zeros are left out.

    The first is on top.
    """
    positive = {name: ms[ms > 0] if logarithmic else ms for name, ms in spread.items()}
    every = np.concatenate([*positive.values()])
    if not every.size:
        every = np.array([1e-9, 1.0])
    low, high = np.quantile(every, [0, 1 if logarithmic else 0.99])
    if logarithmic:
        edges = np.geomspace(low, high * 1.01, BINS)
        axes.set_xscale("log")
    else:
        edges = np.linspace(low, high * 1.001 + 1e-9, BINS)
    for row, values in enumerate(list(positive.values())[::-1]):
        colour = _SERIES[(len(spread) - 1 - row) % len(_SERIES)]
        if not values.size:
            continue
        counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
        heights = 0.85 * counts / counts.max()
        axes.stairs(heights + row, edges, baseline=row, fill=True, color=colour, alpha=0.45)
        axes.stairs(heights + row, edges, baseline=row, color=colour)
        median = float(np.median(values))
        axes.plot([median, median], [row, row + 0.85], color=_INK, lw=1.5, ls="-")
    axes.set_yticks(
        [row + 0.3 for row in range(len(spread))], [_label(name) for name in spread][::-1]
    )
    axes.tick_params(axis="y", length=0)
    zeros = {name: float((values == 0).mean()) for name, values in spread.items()}
    told = ", ".join(f"{share:.1%} of {name}" for name, share in zeros.items() if share)
    return f"Differences of exactly zero are not drawn: {told}." if logarithmic and told else ""


# ---------------------------------------------------------------- decisions


def _confusions(evidence: Evidence) -> Iterator[Plot]:
    """Draw, for each recording, which class was decided where another was right."""
    if REFERENCE not in evidence.recordings:
        return
    labelled = any(batch.labels for batch in evidence.batches)
    rows = "label" if labelled else "reference"
    wanted = [MERGED, *(artifact.format for artifact in evidence.artifacts)]
    for name in (name for name in wanted if name in evidence.recordings):
        counts = _decisions(evidence, evidence.recordings[name], labelled=labelled)
        if counts is None:
            continue
        labels = _class_names(evidence, len(counts))
        figure, axes = _figure(1.4 + 0.4 * len(counts), 1.6 + 0.75 * len(counts))
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        for row, column in np.ndindex(*counts.shape):
            colour = _SERIES[0] if row == column else _LIMIT
            place = (column - 0.5, row - 0.5)
            axes.add_patch(
                Rectangle(place, 1, 1, facecolor=colour, alpha=0.6 * float(shares[row, column]))
            )
            axes.text(column, row, f"{counts[row, column]:,}", ha="center", va="center")
        places = range(len(counts))
        axes.set_xticks(places, labels)
        axes.set_yticks(places, labels)
        axes.set(xlim=(-0.5, len(counts) - 0.5), ylim=(len(counts) - 0.5, -0.5))
        axes.set(xlabel=f"decision of {_label(name)}", ylabel=rows)
        agreeing, total = int(np.trace(counts)), int(counts.sum())
        yield _plot(
            figure,
            f"decisions-{name}",
            f"Decisions of {name}",
            f"{agreeing:,} of {total:,} are those of the {rows}.",
        )


def _decisions(evidence: Evidence, recording: Recording, *, labelled: bool) -> Array | None:
    """Return how often each class was decided for each right one, (classes, classes).

    None where the outputs do not choose one of a few classes for each row.
    """
    right, decided, classes = [], [], 0
    reference = evidence.recordings[REFERENCE]
    for batch, expected, given in zip(
        evidence.batches, reference.outputs, recording.outputs, strict=False
    ):
        names = deciding(expected)
        if batch.source == "grid" or not names or names[0] not in given:
            continue
        axes, shape = axes_of(evidence, names[0]), expected[names[0]].shape
        classes = shape[-1]
        if any(isinstance(axis, str) for axis in axes[-1:]) or not 2 <= classes <= MOST_CLASSES:
            return None  # a place in the text, or a word
        if given[names[0]].shape != shape:
            continue
        scores, answers = (valid(o[names[0]], batch, evidence, names[0]) for o in (expected, given))
        wanted = np.asarray(batch.labels) if labelled else scores.argmax(-1)
        if answers.ndim == 2 and wanted.shape == answers.shape[:1]:
            right.append(wanted)
            decided.append(answers.argmax(-1))
    if not right:
        return None
    counts = np.zeros((classes, classes), np.int64)
    for row, column in zip(np.concatenate(right), np.concatenate(decided), strict=True):
        if 0 <= row < classes and column < classes:
            counts[row, column] += 1
    return counts


def _class_names(evidence: Evidence, count: int) -> Sequence[str]:
    labels = evidence.signature.labels if evidence.signature else ()
    known = labels if len(labels) == count else [str(index) for index in range(count)]
    return [_label(name) for name in known]


def _label(name: str) -> str:
    """Return `name` as it fits beside an axis; a dollar sign begins no formula."""
    short = name if len(name) <= MOST_OF_A_NAME else name[: MOST_OF_A_NAME - 1] + "…"
    return short.replace("$", r"\$")


# ---------------------------------------------------------------- SVG


def _figure(height: float, width: float = WIDTH) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _plot(figure: Figure, name: str, title: str, description: str) -> Plot:
    """Return `figure` as an element of a page: named, described, and of the page's colours."""
    stream = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
    text = stream.getvalue()
    width, height = figure.get_size_inches() * 72
    body = text[text.index(">", text.index("<svg")) + 1 :]
    identity = re.sub(r"\W+", "-", name)
    body = re.sub(r'(\bid="|url\(#|xlink:href="#)', rf"\g<1>{identity}-", body)
    for colour, variable in _COLOURS.items():
        body = body.replace(colour, variable)
    head = (
        f'<svg role="img" viewBox="0 0 {width:g} {height:g}" style="max-width: {1.3 * width:g}px" '
        f'aria-labelledby="{identity}-title {identity}-description">'
        f'<title id="{identity}-title">{escape(title)}</title>'
        f'<desc id="{identity}-description">{escape(description)}</desc>'
    )
    return Plot(name, title, description, head + body.strip())
