"""The plots of a study, drawn from what there is data for."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.figure import Figure
from study_results import ACCURACY, Group, Study, significant

COLOURS = {  # told apart by colour-blind people as well (Okabe and Ito)
    "full": "#D55E00",
    "lora": "#0072B2",
    "dora": "#009E73",
    "rslora": "#56B4E9",
    "bitfit": "#CC79A7",
    "qlora": "#E69F00",
    "head": "#555555",
}
MARKERS = "osD^vP*X"
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "study",
    "font.size": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "legend.frameon": False,
}
WIDTH = 5.0  # inches: what a phone shows without making the letters much smaller
MB = 1e6
PLOTS = re.compile(r"(learning|parameters)-\d+|cost|latency|generation")  # names of plots
FEW = 20  # points of a line, up to which each is marked
CAPTIONS = {
    "learning": "Training loss: on the sentences of each step, averaged over some steps in a row; "
    "lower is better. Runs of one seed meet the same sentences in the same order, so their lines "
    "jump together. Accuracy: on the dev sentences, and its axis does not begin at 0. "
    "Drawn is the first setting of each method; a line is the mean over its seeds, a band spans "
    "them. Where a second pass over the same sentences begins the loss falls; that is no proof of "
    "better answers, accuracy is.",
    "parameters": "Accuracy over the number of parameters that a setting trains: up is better, "
    "left is smaller, and from one grid line to the next it is ten times as many. The colour is "
    "the method, the shape tells its settings apart. A bar is the 95 % interval over the seeds; a "
    "hollow marker is a single run, which has none.",
    "cost": "Less is better everywhere. The optimizer state is a part of what a process grows by; "
    "the time of a step has its 95 % interval.",
    "latency": "Median time for one batch, for each batch size; less is better. Unmerged, each "
    "layer computes the adapter's matrices as well.",
    "generation": "Each dot is an evaluation. Perplexity: lower is better; the others: higher is "
    "better. No axis begins at 0, and on so few answers a point or two can be chance.",
}


@dataclass(frozen=True)
class Plot:
    """One plot: its title, and how to read it, where no plot of its kind has said so before."""

    name: str
    title: str
    caption: str
    svg: str


def plots_of(study: Study) -> list[Plot]:
    """Draw what there is data for."""
    with style.context(["default", STYLE]):
        figures: list[tuple[str, str, Figure | None]] = []
        for steps, groups in study.budgets().items():
            budget = f"{steps:,} steps of training"
            for name, text, figure in (
                ("learning", "Loss and accuracy over the steps", learning(study, groups)),
                ("parameters", "Accuracy against the trained parameters", by_parameters(groups)),
            ):
                figures.append((f"{name}-{steps}", f"{text}: {budget}", figure))
                if figure is not None:
                    figure.suptitle(budget, fontsize=10)
        figures += [
            ("cost", "Memory and time of a training step, by method", costs(study)),
            (
                "latency",
                "Latency of the unmerged, the merged and the exported model",
                latencies(study),
            ),
            ("generation", "What it writes, over the steps of training", generation(study)),
        ]
        captions = CAPTIONS.copy()
        return [
            Plot(name, title, captions.pop(name.partition("-")[0], ""), svg_of(figure))
            for name, title, figure in figures
            if figure
        ]


def svg_of(figure: Figure) -> str:
    """Return a figure as SVG, without the date on which it is drawn."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def learning(study: Study, groups: Sequence[Group]) -> Figure | None:
    """Draw the curves of one setting of each method."""
    panels = (("loss", "training loss", 1), ("accuracy", "accuracy on dev, %", 100))
    return curves(study, one_of_each_method(groups), panels)


def one_of_each_method(groups: Sequence[Group]) -> list[Group]:
    """Return the first setting of each method: more lines of a colour nobody tells apart."""
    first: dict[str, Group] = {}
    for group in groups:
        first.setdefault(group.first.method, group)
    return [*first.values()]


def generation(study: Study) -> Figure | None:
    """Draw the curves of the settings that learn to answer."""
    panels = (
        ("perplexity", "perplexity", 1),
        ("exact match (verdict)", "verdicts right, %", 100),
        ("ROUGE-L (description)", "ROUGE-L, descriptions, %", 100),
    )
    return curves(study, study.groups("causal_lm"), panels)


def curves(
    study: Study, groups: Sequence[Group], panels: Sequence[tuple[str, str, float]]
) -> Figure | None:
    """Draw means over the seeds as lines, and the range of the seeds as bands."""
    known = [g for g in groups if any(run.id in study.curves for run in g.runs)]
    drawn_of = {run.id: study.curves.get(run.id, {}) for group in known for run in group.runs}
    panels = [panel for panel in panels if any(panel[0] in found for found in drawn_of.values())]
    if not panels:
        return None
    figure = Figure(figsize=(WIDTH, 1.2 + 2.2 * len(panels)), layout="constrained")
    stacked = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    legend: dict[str, Any] = {}
    for axes, (name, label, factor) in zip(stacked, panels, strict=True):
        for group in known:
            drawn = (drawn_of[run.id].get(name, []) for run in group.runs)
            lines = [{int(step): value for step, value in points} for points in drawn if points]
            steps = sorted(set.intersection(*map(set, lines))) if lines else []
            if not steps:
                continue
            values = factor * np.array([[line[step] for step in steps] for line in lines])
            colour = COLOURS[group.first.method]
            marker = "o" if len(steps) < FEW else None
            (legend[group.id],) = axes.plot(
                steps, values.mean(0), color=colour, lw=1.4, marker=marker, ms=3
            )
            if len(lines) > 1:
                axes.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.25)
        axes.set(ylabel=label)
    axes.set(xlabel="step")
    figure.legend([*legend.values()], [*legend], loc="outside lower center", ncols=4)
    return figure


def by_parameters(groups: Sequence[Group]) -> Figure | None:
    """Draw accuracy over trained parameters, with intervals where there are seeds."""
    if len(groups) < 3:  # two points say no more than a sentence
        return None
    figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
    axes = figure.subplots()
    drawn: dict[str, int] = {}
    for group in groups:
        found, method = group.estimate(ACCURACY), group.first.method
        if found is None:
            continue
        found = ACCURACY.shown(found)
        marker = MARKERS[drawn.setdefault(method, 0) % len(MARKERS)]
        drawn[method] += 1
        error = None if found.is_single else [[found.value - found.low], [found.high - found.value]]
        axes.errorbar(
            group.parameters, found.value, error, color=COLOURS[method], marker=marker, ls="",
            capsize=3, label=group.id, mfc="none" if found.is_single else None,
        )  # fmt: skip
    axes.set(xscale="log", xlabel="trained parameters", ylabel="accuracy on dev, %")
    axes.margins(0.1)
    figure.legend(loc="outside lower center", ncols=4)
    return figure


def costs(study: Study) -> Figure | None:
    """Draw memory and time of a step as bars."""
    memory, state = study.cost("peak memory growth"), study.cost("optimizer state")
    panels = [
        ("growth of a process, MB", {k: v / MB for k, v in memory.items()}),
        ("optimizer state, MB", {k: v / MB for k, v in state.items()}),
        ("step time, full fine-tuning = 1", study.cost("step time ratio")),
    ]
    panels = [panel for panel in panels if panel[1]]
    if not panels:
        return None
    figure = Figure(figsize=(WIDTH, 2.1 * len(panels)), layout="constrained")
    for axes, (label, values) in zip(
        figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True
    ):
        names = list(values)[::-1]
        texts = [significant(values[name]) for name in names]
        error = None
        if label.startswith("step"):
            texts = [f"{values[name]:.2f}" for name in names]
            low, high = (study.cost(f"step time ratio, {end}") for end in ("low", "high"))
            error = [
                [values[n] - low[n] for n in names],
                [high[n] - values[n] for n in names],
            ]
        bars = axes.barh(
            names, [values[n] for n in names], color=[COLOURS[n] for n in names], xerr=error
        )
        axes.bar_label(bars, texts, padding=4)
        axes.set(xlabel=label)
        axes.margins(x=0.2)
        axes.grid(axis="y", visible=False)
    return figure


def latencies(study: Study) -> Figure | None:
    """Draw the median latency of each runner, for each batch size."""
    found: dict[str, dict[str, float]] = {}
    for one in study.proof.measurements if study.proof else ():
        if one["name"] == "latency median":
            runner, _, shape = one["subject"].partition(", ")
            found.setdefault(shape, {})[runner] = float(one["value"])
    if not found:
        return None
    figure = Figure(figsize=(WIDTH, 1.9 * len(found)), layout="constrained")
    for axes, (shape, values) in zip(
        figure.subplots(len(found), squeeze=False)[:, 0], found.items(), strict=True
    ):
        names = list(values)[::-1]
        colours = [COLOURS["head" if name == "unmerged" else "lora"] for name in names]
        bars = axes.barh(names, [values[name] for name in names], color=colours)
        axes.bar_label(bars, [f"{values[name]:.1f}" for name in names], padding=4)
        axes.set(xlabel=f"median latency, ms ({shape})")
        axes.margins(x=0.15)
        axes.grid(axis="y", visible=False)
    return figure
