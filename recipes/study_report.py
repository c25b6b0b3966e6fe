"""What `study.py` found, as a table, plots and a page in plain words; all of it from small files.

`write(OUT)` reads about.json, study.jsonl and curves.json, and writes table.md, table.csv, the
plots (*.svg), README.md and index.html beside them. Every figure in a sentence is computed here
from those files; a sentence without data behind it is not written.
"""

import base64
import csv
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib import style
from matplotlib.figure import Figure
from scipy import stats

CONFIDENCE = 0.95
WITHIN = 0.015  # of full fine-tuning's accuracy: what the study asks of LoRA
MOST_SHARE = 0.015  # of the parameters that LoRA may train
BEST = 0.895  # accuracy that the best LoRA run is to reach, in the preset full
LORA, FULL = "lora-8", "full"  # the settings that are compared, on sentences
FAMILY = ("lora", "rslora", "dora", "qlora")
COLOURS = {  # told apart by colour-blind people as well (Okabe and Ito)
    "lora": "#0072B2",
    "full": "#D55E00",
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


@dataclass(frozen=True)
class Score:
    """A metric of answers, and how it is shown."""

    name: str
    digits: int
    unit: str = ""

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
        Score("BLEU", 2),
        Score("ROUGE-L", 2, " %"),
        Score("exact match", 2, " %"),
    ),
}
WHOLE = {"sst2": FULL, "causal_lm": "answers-full"}  # what the others are held against


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

    def text(self, digits: int, unit: str = "") -> str:
        """Return the value with its interval, or with why it has none."""
        shown = f"{number(self.value, digits)}{unit}"
        if self.is_single:
            spread = "" if self.note else " (single run)"
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
        return max(int(one["step"]) for one in self.first.measurements if "step" in one)

    @property
    def label(self) -> str:
        """What it is called in plots and tables."""
        return self.id.removeprefix("answers-")

    def values(self, name: str) -> list[float]:
        """Return the final values of a metric, one for each seed."""
        found = (run.get(name, "dev") for run in self.runs)
        return [value for value in found if value is not None]

    def estimate(self, name: str) -> Estimate | None:
        """Return the mean of a metric over the seeds, where there is one."""
        values = self.values(name)
        return replace(mean_interval(values), note=self.missing(name)) if values else None

    def missing(self, name: str) -> str:
        """Say for how many seeds there is a metric, where it is not all of them."""
        count = len(self.values(name))
        return "" if count == len(self.runs) else f"{count} of {len(self.runs)} seeds"

    def gap(self, other: "Group", name: str) -> Estimate | None:
        """Return the difference of a metric to another setting's, where both have it."""
        ours, theirs = self.values(name), other.values(name)
        if not ours or not theirs:
            return None
        told = ((group.label, group.missing(name)) for group in (self, other))
        note = ", ".join(f"{label}: {missing}" for label, missing in told if missing)
        return replace(difference(ours, theirs), note=note)

    def samples(self, name: str) -> int:
        """Return on how many things a metric rests."""
        return next(int(m["samples"]) for m in self.first_with(name) if m["name"] == name)

    def first_with(self, name: str) -> Sequence[Mapping[str, Any]]:
        """Return the measurements of the first run that has a metric."""
        return next(run.measurements for run in self.runs if run.get(name, "dev") is not None)

    def scores(self) -> Iterator[tuple[Score, Estimate]]:
        """Yield each metric of the answers that there is, as it is measured."""
        for score in SCORES[self.first.recipe]:
            if found := self.estimate(score.name):
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
    def state_bytes(self) -> float:
        """Of the optimizer, measured."""
        return self.first.get("optimizer state") or math.nan

    @property
    def state_predicted(self) -> float:
        """Of AdamW: two float32 numbers for each parameter, and a step count for each tensor."""
        return 8 * self.parameters + 4 * (self.first.get("stored tensors") or math.nan)

    @property
    def file_bytes(self) -> float:
        """Of what has to be kept, measured."""
        return self.first.get("checkpoint size") or math.nan

    @property
    def file_predicted(self) -> float:
        """A float32 number for each parameter that was trained."""
        return 4 * self.parameters


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

    @property
    def proof(self) -> Run | None:
        """The run that merged, exported and compared an adapter."""
        return next((r for r in self.runs if r.recipe == "proof" and r.state == "finished"), None)

    def cost(self, name: str) -> dict[str, float]:
        """Return a measurement of the costs of a step by method."""
        return {
            run.method if run.get("trainable tensors") else one["subject"]: float(one["value"])
            for run in self.runs
            if run.recipe == "cost"
            for one in run.measurements
            if one["name"] == name
        }


def read(out: Path) -> Study:
    """Return what the small files in `out` hold."""
    lines = (out / "study.jsonl").read_text("utf-8").splitlines()
    curves = out / "curves.json"
    return Study(
        json.loads((out / "about.json").read_text("utf-8")),
        tuple(Run(**json.loads(line)) for line in lines),
        json.loads(curves.read_text("utf-8")) if curves.is_file() else {},
    )


def write(out: Path) -> None:
    """Write table, plots and pages into `out`, from the small files there."""
    study = read(out)
    with style.context(["default", STYLE]):
        plots = {plot.name: plot for plot in plots_of(study)}
    for old in out.glob("*.svg"):
        if PLOTS.fullmatch(old.stem):
            old.unlink()
    for plot in plots.values():
        (out / f"{plot.name}.svg").write_text(plot.svg, "utf-8")
    sections = sections_of(study, plots)
    (out / "table.csv").write_text(csv_table(study), "utf-8")
    (out / "table.md").write_text("\n\n".join(markdown(t) for t in tables(study)) + "\n", "utf-8")
    (out / "README.md").write_text(markdown_page(sections), "utf-8")
    (out / "index.html").write_text(html_page(sections), "utf-8")


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


# ---------------------------------------------------------------- tables


@dataclass(frozen=True)
class Table:
    """Columns and rows, for people."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def tables(study: Study) -> list[Table]:
    """Return a table for each recipe that has finished runs."""
    return [table_of(study, recipe) for recipe in SCORES if study.groups(recipe)]


def table_of(study: Study, recipe: str) -> Table:
    """Return a row for each setting; ratios are to full fine-tuning, predicted and measured."""
    full = study.group(recipe, WHOLE[recipe])
    rows = []
    for group in study.groups(recipe):
        known = dict(group.scores())
        scores = [
            score.shown(known[score]).text(score.digits) if score in known else ""
            for score in SCORES[recipe]
        ]
        rows.append(
            (
                group.label,
                group.first.words,
                f"{group.steps:,}",
                str(group.first.settings.get("batch_size", "")),
                str(group.first.settings.get("matmul_precision", "")),
                str(len(group.runs)),
                *scores,
                number(group.parameters, 0),
                share(group),
                size(group.state_bytes),
                ratios(group.state_predicted, group.state_bytes, full, "state"),
                size(group.file_bytes),
                ratios(group.file_predicted, group.file_bytes, full, "file"),
            )
        )
    columns = (
        "setting",
        "arguments",
        "steps",
        "batch",
        "products",
        "seeds",
        *(score.name + (", %" if score.unit else "") for score in SCORES[recipe]),
        "trained parameters",
        "of all",
        "optimizer state",
        "to full: predicted, measured",
        "kept file",
        "to full: predicted, measured",
    )
    return Table(columns, tuple(rows))


def ratios(predicted: float, measured: float, full: Group | None, kind: str) -> str:
    """Return two ratios to full fine-tuning."""
    if full is None:
        return ""
    wholes = getattr(full, f"{kind}_predicted"), getattr(full, f"{kind}_bytes")
    pair = predicted / wholes[0], measured / wholes[1]
    return ", ".join(map(significant, pair))


def csv_table(study: Study) -> str:
    """Return one row for each setting of every recipe, in plain numbers; bytes are bytes."""
    scores = [score.name for recipe in SCORES.values() for score in recipe]
    columns = ["recipe", "setting", "method", "arguments", "steps"]
    columns += ["batch size", "matmul precision", "seeds"]
    columns += [f"{name}{end}" for name in scores for end in ("", " low", " high", " seeds")]
    columns += ["trainable parameters", "share"]
    for what in ("optimizer state", "checkpoint"):
        columns += [f"{what} {end}" for end in (
            "bytes", "bytes predicted", "ratio to full", "ratio to full predicted",
        )]  # fmt: skip
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for recipe in SCORES:
        full = study.group(recipe, WHOLE[recipe])
        for group in study.groups(recipe):
            row: dict[str, Any] = {
                "recipe": recipe,
                "setting": group.id,
                "method": group.first.method,
                "arguments": group.first.words,
                "steps": group.steps,
                "batch size": group.first.settings.get("batch_size", ""),
                "matmul precision": group.first.settings.get("matmul_precision", ""),
                "seeds": len(group.runs),
                "trainable parameters": int(group.parameters),
                "share": group.share,
            }
            for score, found in group.scores():
                row |= {score.name: found.value, f"{score.name} seeds": found.count}
                if not found.is_single:
                    row |= {f"{score.name} low": found.low, f"{score.name} high": found.high}
            for what, kind in (("optimizer state", "state"), ("checkpoint", "file")):
                for end, attribute in (("", "bytes"), (" predicted", "predicted")):
                    value = getattr(group, f"{kind}_{attribute}")
                    row[f"{what} bytes{end}"] = value
                    if full is not None:
                        whole = getattr(full, f"{kind}_{attribute}")
                        row[f"{what} ratio to full{end}"] = value / whole
            writer.writerow(row)
    return file.getvalue()


# ---------------------------------------------------------------- plots


@dataclass(frozen=True)
class Plot:
    """One plot; the description says in words what it shows."""

    name: str
    description: str
    svg: str


def plots_of(study: Study) -> Iterator[Plot]:
    """Draw what there is data for."""
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
    text = "Memory and time of a training step, by method"
    figures.append(("cost", text, costs(study)))
    text = "Latency of the unmerged, the merged and the exported model"
    figures.append(("latency", text, latencies(study)))
    text = "Perplexity and ROUGE-L over the steps of training"
    figures.append(("generation", text, generation(study)))
    for name, text, figure in figures:
        if figure is not None:
            file = io.StringIO()
            figure.savefig(file, format="svg", metadata={"Date": None})
            yield Plot(name, text, file.getvalue())


def learning(study: Study, groups: Sequence[Group]) -> Figure | None:
    """Draw the curves of one setting of each method."""
    panels = (("loss", "training loss, nats", 1), ("accuracy", "accuracy on dev, %", 100))
    return curves(study, one_of_each_method(groups), panels)


def one_of_each_method(groups: Sequence[Group]) -> list[Group]:
    """Return the first setting of each method: more lines of a colour nobody tells apart."""
    first: dict[str, Group] = {}
    for group in groups:
        first.setdefault(group.first.method, group)
    return [*first.values()]


def generation(study: Study) -> Figure | None:
    """Draw the curves of the settings that learn to answer."""
    panels = (("perplexity", "perplexity on dev", 1), ("ROUGE-L", "ROUGE-L on dev, %", 100))
    return curves(study, study.groups("causal_lm"), panels)


def curves(
    study: Study, groups: Sequence[Group], panels: Sequence[tuple[str, str, float]]
) -> Figure | None:
    """Draw means over the seeds as lines, and the range of the seeds as bands."""
    known = [g for g in groups if any(run.id in study.curves for run in g.runs)]
    if not known:
        return None
    figure = Figure(figsize=(WIDTH, 5.6), layout="constrained")
    stacked = figure.subplots(len(panels), sharex=True)
    for axes, (name, label, factor) in zip(stacked, panels, strict=True):
        for group in known:
            drawn = (study.curves.get(run.id, {}).get(name, []) for run in group.runs)
            lines = [{int(step): value for step, value in points} for points in drawn if points]
            steps = sorted(set.intersection(*map(set, lines))) if lines else []
            if not steps:
                continue
            values = factor * np.array([[line[step] for step in steps] for line in lines])
            colour = COLOURS[group.first.method]
            axes.plot(steps, values.mean(0), color=colour, label=group.label, lw=1.4)
            if len(lines) > 1:
                axes.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.25)
        axes.set(ylabel=label)
    axes.set(xlabel="step")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return figure


def by_parameters(groups: Sequence[Group]) -> Figure | None:
    """Draw accuracy over trained parameters, with intervals where there are seeds."""
    if len(groups) < 2:
        return None
    figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
    axes = figure.subplots()
    drawn: dict[str, int] = {}
    for group in groups:
        found, method = group.estimate("accuracy"), group.first.method
        if found is None:
            continue
        found = SCORES["sst2"][0].shown(found)
        marker = MARKERS[drawn.setdefault(method, 0) % len(MARKERS)]
        drawn[method] += 1
        error = None if found.is_single else [[found.value - found.low], [found.high - found.value]]
        axes.errorbar(
            group.parameters, found.value, error, color=COLOURS[method], marker=marker, ls="",
            capsize=3, label=group.label, mfc="none" if found.is_single else None,
        )  # fmt: skip
    axes.set(xscale="log", xlabel="trained parameters", ylabel="accuracy on dev, %")
    axes.margins(0.1)
    figure.legend(loc="outside lower center", ncols=4)
    return figure


def costs(study: Study) -> Figure | None:
    """Draw memory and time of a step as bars."""
    memory, state = study.cost("peak memory growth"), study.cost("optimizer state")
    panels = [
        ("growth of a fresh process, MB", {k: v / MB for k, v in memory.items()}),
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
        names = [name for name in COLOURS if name in values][::-1]
        texts = [f"{values[name]:.3g}" for name in names]
        error = None
        if label.startswith("step"):
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


# ---------------------------------------------------------------- the page


@dataclass(frozen=True)
class Section:
    """A part of the page: what is said, and what is shown below it."""

    title: str
    paragraphs: Sequence[str]
    plots: Sequence[Plot] = ()
    tables: Sequence[Table] = ()
    items: Sequence[str] = ()


def sections_of(study: Study, plots: Mapping[str, Plot]) -> list[Section]:
    """Return the page, top to bottom; sections with nothing to say are left out."""

    def section(title: str, said: Iterable[str], *names: str, **more: Any) -> Section:
        shown = [plot for name, plot in plots.items() if name.startswith(names)] if names else []
        return Section(title, list(said), shown, **more)

    missing = list(not_reached(study))
    nothing = "Nothing: every planned run is finished, and every aim that applies is reached."
    sections = [
        section("LoRA against full fine-tuning", introduction(study)),
        section("How good", how_good(study)),
        section("How they learn", how_they_learn(study), "learning"),
        section("How small", how_small(study), "parameters"),
        section("What a training step costs", what_it_costs(study), "cost"),
        section("What merging does", what_merging_does(study), "latency"),
        section("A model that writes", writing(study), "generation"),
        section("All settings", all_settings(study), tables=tables(study)),
        section("Not reached, not run", () if missing else (nothing,), items=missing),
        section("How it was made", how_it_was_made(study)),
    ]
    return [s for s in sections if s.paragraphs or s.items]


def introduction(study: Study) -> Iterator[str]:
    """Say what was compared, and how to read a figure."""
    done = sum(run.state == "finished" for run in study.runs)
    yield (
        f"A trained model ({study.about['base']}) is taught to tell whether a sentence of a film "
        "review is positive or negative (the data set SST-2). Full fine-tuning changes every "
        "parameter of it. LoRA leaves them as they are and trains two thin matrices beside each "
        "weight matrix; merged into the weights afterwards, nothing of it is left to be computed."
    )
    yield (
        f"{done} of {len(study.runs)} planned runs are finished (preset {study.about['preset']}). "
        "A figure from several runs, which differ in their random seeds, is the mean, followed by "
        "the 95 % interval of that mean in brackets (Student's t over the seeds). A figure from "
        "one run is said to be single: it would differ with another seed, nobody knows by how much."
    )


def compared(study: Study) -> tuple[Group, Group, Estimate] | None:
    """Return LoRA, full fine-tuning and the difference of their accuracies."""
    lora, full = study.group("sst2", LORA), study.group("sst2", FULL)
    if lora is None or full is None or (gap := lora.gap(full, "accuracy")) is None:
        return None
    return lora, full, gap


def how_good(study: Study) -> Iterator[str]:
    """Say how accurate LoRA and full fine-tuning are, and how far apart."""
    if (found := compared(study)) is None:
        return
    lora, full, gap = found
    ours, theirs = lora.estimate("accuracy"), full.estimate("accuracy")
    if ours is None or theirs is None:
        return
    answered, accuracy = lora.samples("accuracy"), SCORES["sst2"][0]
    yield (
        f"LoRA ({LORA}) answers {accuracy.shown(ours).text(2, ' %')} of the {answered} dev "
        f"sentences rightly ({seeds(lora)}), full fine-tuning "
        f"{accuracy.shown(theirs).text(2, ' %')} ({seeds(full)})."
    )
    is_within = gap.value >= -WITHIN
    if gap.is_single:
        spread = "From single runs that says little: seeds alone can differ as much."
    elif gap.low == gap.high:
        spread = "All seeds say so alike; that is no interval."
    elif (gap.low >= -WITHIN) if is_within else (gap.high < -WITHIN):
        spread = "The whole interval says so."
    else:
        spread = "The interval reaches across that limit: more seeds could show otherwise."
    yield (
        f"LoRA minus full fine-tuning is {(gap * 100).text(2, ' points')}"
        f"{' (Welch, which takes the two for independent)' if gap.low < gap.high else ''}: "
        f"{'within' if is_within else 'not within'} {100 * WITHIN:.1f} points of full fine-tuning"
        f"{', or better' if is_within else ''}. {spread}"
    )
    yield (
        f"For that LoRA trains {number(lora.parameters, 0)} parameters, {share(lora)} "
        f"of all; full fine-tuning {number(full.parameters, 0)}."
    )
    if best := best_run(study):
        run, value, among = best
        yield (
            f"The best run of the LoRA family is {run.setting} with seed {run.seed}: "
            f"{percent(value, 2)}. It is the best of {among}, and the best of many flatters itself."
        )
    low, high = binomial(ours.value, answered)
    yield (
        f"The intervals are about seeds. That {answered} sentences stand for all others is a "
        f"second uncertainty: with as many, an accuracy of {percent(ours.value)} is known to lie "
        f"between {percent(low)} and {percent(high)} (Wilson's 95 % interval)."
    )
    told = {run.setting: run.tried for run in study.runs if run.tried}
    if told:
        yield (
            "Learning rates. "
            + "; ".join(f"{name}: {tried}" for name, tried in told.items())
            + ". "
            "Nothing is noted for other settings. Where LoRA's was chosen after a look at these "
            "sentences and full fine-tuning's was not, that favours LoRA, by an unknown amount."
        )


def best_run(study: Study) -> tuple[Run, float, int] | None:
    """Return the most accurate run of the LoRA family, its accuracy, and of how many it is."""
    runs = [r for r in study.runs if r.recipe == "sst2" and r.method in FAMILY]
    known = [(value, run) for run in runs if (value := run.get("accuracy", "dev")) is not None]
    if not known:
        return None
    value, run = max(known, key=lambda pair: pair[0])
    return run, value, len(known)


def how_they_learn(study: Study) -> Iterator[str]:
    """Explain the curves, with where they begin and end."""
    lora, full = study.group("sst2", LORA), study.group("sst2", FULL)
    if not any(run.id in study.curves for group in study.groups("sst2") for run in group.runs):
        return
    yield (
        "The loss says how surprised the model is by the right answers while it is trained: 0.69 "
        "nats is a coin's toss, 0 is certainty. Accuracy is looked at now and then on sentences "
        "that are never trained on. Lines are means over the seeds; a band spans all of them."
    )
    for steps, groups in study.budgets().items():
        drawn = ", ".join(group.label for group in one_of_each_method(groups))
        yield f"Drawn is the first setting of each method; for {steps:,} steps: {drawn}."
    for group in (lora, full):
        line = [study.curves.get(r.id, {}).get("accuracy", []) for r in group.runs] if group else []
        if group and all(line):
            first, last = (float(np.mean([points[i][1] for points in line])) for i in (0, -1))
            yield (
                f"{group.label}: {percent(first)} after {line[0][0][0]:.0f} steps, "
                f"{percent(last)} after {line[0][-1][0]:.0f}."
            )


def how_small(study: Study) -> Iterator[str]:
    """Hold the sizes against what the formulas predict."""
    if found := compared(study):
        yield from predicted_sizes(*found[:2])
    several = {n: groups for n, groups in study.budgets().items() if len(groups) > 1}
    if several:
        yield (
            "A plot shows each setting's accuracy over the number of parameters it trains; the "
            "axis is logarithmic: from one grid line to the next it is ten times as many. Only "
            "settings that were trained for as many steps are compared. A bar is the 95 % interval "
            "over the seeds; a hollow marker is a single run, which has none."
        )
    for steps, groups in several.items():
        known = [(value, group) for group in groups if (value := group.estimate("accuracy"))]
        told = [
            f"{group.label} {percent(value.value)} ({share(group)} of the parameters"
            f"{', single run' if value.is_single else ''})"
            for value, group in sorted(known, key=lambda pair: -pair[0].value)
        ]
        yield f"Accuracy after {steps:,} steps, best first: {'; '.join(told)}."


def predicted_sizes(lora: Group, full: Group) -> Iterator[str]:
    """Say what the optimizer keeps and what is kept on disk, predicted and measured."""
    yield (
        "The optimizer AdamW keeps two 4-byte numbers for every trained parameter and a 4-byte "
        f"counter for every tensor. For {LORA} that makes {size(lora.state_predicted)}; measured "
        f"were {size(lora.state_bytes)}. For full fine-tuning it makes "
        f"{size(full.state_predicted)}; measured were {size(full.state_bytes)}. The ratio is "
        f"{significant(lora.state_predicted / full.state_predicted)} predicted, "
        f"{significant(lora.state_bytes / full.state_bytes)} measured."
    )
    yield (
        f"What has to be kept is 4 bytes for each trained parameter: {size(lora.file_predicted)} "
        f"for {LORA} ({size(lora.file_bytes)} on disk, the rest is a description), "
        f"{size(full.file_predicted)} for the full model ({size(full.file_bytes)} on disk, with "
        f"its configuration and tokenizer). The ratio is "
        f"{significant(lora.file_predicted / full.file_predicted)} predicted, "
        f"{significant(lora.file_bytes / full.file_bytes)} measured."
    )


def what_it_costs(study: Study) -> Iterator[str]:
    """Say what memory and time a step takes, by method."""
    memory, times = study.cost("peak memory growth"), study.cost("step time ratio")
    shapes = {
        f"{run.settings['batch_size']} rows of {run.settings['length']} tokens"
        for run in study.runs
        if run.recipe == "cost" and run.settings
    }
    if shapes:
        text = f"Measured on batches of {' and '.join(sorted(shapes))}, made at random."
        named = {str(run.settings.get("matmul_precision", "highest")) for run in study.runs}
        trained = named - {"highest"}
        if trained:
            text += (
                " All of it is computed in float32, while the trainings above multiply their "
                f"matrices with less where the machine can (`--matmul-precision "
                f"{' and '.join(sorted(trained))}`): there a step can be faster."
            )
        yield text
    if "full" in memory:
        whole = size(memory["full"])
        others = [
            f"{name} {size(value)} ({value / memory['full']:.2f} of full fine-tuning)"
            for name, value in memory.items()
            if name != "full"
        ]
        yield (
            "Memory: by how much a fresh process grows, at its peak, while it loads the model and "
            f"takes some steps. {'; '.join([f'Full fine-tuning {whole}', *others])}. The model "
            "itself is in all of these. Saved are gradients and optimizer state of frozen "
            "parameters, and what a frozen layer need not keep for its own gradient. Each is one "
            "process, measured once."
        )
    if len(times) > 1:
        low, high = (study.cost(f"step time ratio, {end}") for end in ("low", "high"))
        others = [
            f"{name} {value:.2f} [{low[name]:.2f}, {high[name]:.2f}]"
            for name, value in times.items()
            if name != "full"
        ]
        yield (
            "Time: a step as a ratio to one of full fine-tuning, in the same process, in turns and "
            f"shuffled order (median, 95 % bootstrap interval): {'; '.join(others)}. Seconds of "
            "different runs are not compared anywhere on this page: other work on the machine "
            "meets them unequally."
        )


def what_merging_does(study: Study) -> Iterator[str]:
    """Say what merging and exporting do to latency and to the answers."""
    proof = study.proof
    if proof is None:
        return
    yield (
        "The adapter of the first LoRA run was merged into the model's weights, and the merged "
        "model exported. Until then every adapted layer computes its two thin matrices as well."
    )
    told = [v for v in proof.verdicts if v["check"] == "latency" and v["measured"] is not None]
    if told:
        yield (
            "Latency, as a multiple of the unmerged model's: "
            + "; ".join(f"{v['subject']}: {v['measured']:.2f} ({v['status']})" for v in told)
            + ". The bars show the medians in milliseconds."
        )
    decided = [v for v in proof.verdicts if v["check"] == "decisions"]
    if decided:
        yield (
            "Answers, held against the unmerged model's: "
            + "; ".join(
                f"{v['subject']}: {', '.join(filter(None, (v['status'], v['note'])))}"
                for v in decided
            )
            + "."
        )
    accuracies = [m for m in proof.measurements if m["name"] == "accuracy"]
    if accuracies:
        shares = [f"{one['subject']} {percent(one['value'], 2)}" for one in accuracies]
        yield f"Accuracy on the dev sentences: {'; '.join(shares)} (idle: with the adapter off)."
    passed = sum(v["status"] == "pass" for v in proof.verdicts)
    bad = [
        f"{v['check']} of {v['subject']}: {v['status']}"
        for v in proof.verdicts
        if v["status"] != "pass"
    ]
    yield (
        f"{passed} of {len(proof.verdicts)} verdicts of `lora-export run` on it are a pass"
        f"{'; no pass: ' + ', '.join(bad) if bad else ''}."
    )


def writing(study: Study) -> Iterator[str]:
    """Say how LoRA and full fine-tuning compare where text is written."""
    groups = {group.id: group for group in study.groups("causal_lm")}
    if not groups:
        return
    pretrained = study.group("pretraining", "pretrained")
    made = pretrained and pretrained.first.get("parameters")
    yield (
        "A small language model"
        f"{f' ({number(made, 0)} parameters)' if made else ''} was made and pretrained here on the "
        "sentences of SST-2, then taught to follow instructions about them. Perplexity is how many "
        "tokens (words or pieces of them) it wavers between, on average, before each token of the "
        "right answer: lower is better. ROUGE-L and exact match compare what it writes with the "
        "right answer: higher is better."
    )
    counted: dict[str, list[str]] = {}
    for group in groups.values():
        scores = [
            f"{one.name} {one.shown(v).text(one.digits, one.unit)}" for one, v in group.scores()
        ]
        who = f"{group.label} ({seeds(group)}, {share(group)} of the parameters)"
        yield f"{who}: {', '.join(scores)}."
        rests = [f"{one.name} {group.samples(one.name):,}" for one, _ in group.scores()]
        counted.setdefault(", ".join(rests), []).append(group.label)
    for rests_on, labels in counted.items():
        yield (
            f"On how many these rest (tokens for perplexity, answers for the others): {rests_on} "
            f"({', '.join(labels)})."
        )
    lora, full = groups.get(f"answers-{LORA}"), groups.get(WHOLE["causal_lm"])
    if lora and full:
        gaps = []
        for score, _ in lora.scores():
            if gap := lora.gap(full, score.name):
                unit = " points" if score.unit else ""
                gaps.append(f"{score.name} {(gap * score.factor).text(score.digits, unit)}")
        if gaps:
            yield f"LoRA minus full fine-tuning (Welch, where there are seeds): {'; '.join(gaps)}."


def all_settings(study: Study) -> Iterator[str]:
    """Explain the table."""
    if tables(study):
        yield (
            "How each was trained: `arguments` are the preset's and then the setting's, of which a "
            "later one of a name counts; `batch` is the examples of a step, `products` with which "
            "precision matrices are multiplied (`highest` is float32, `medium` bfloat16 where the "
            "machine has it). `to full` is the ratio to full fine-tuning: as the formulas above "
            "predict it, and as it was measured. The same as plain numbers: `table.csv`."
        )


def not_reached(study: Study) -> Iterator[str]:
    """Say which aims are not reached, and which runs are missing."""
    if (found := compared(study)) is None:
        yield "LoRA against full fine-tuning: there are no finished runs of both"
    else:
        lora, _, gap = found
        if not gap.value >= -WITHIN:
            yield (
                f"LoRA within {100 * WITHIN:.1f} points of full fine-tuning: the difference is "
                f"{number(100 * gap.value, 2)} points"
            )
        if not lora.share <= MOST_SHARE:
            yield (
                f"at most {percent(MOST_SHARE)} of the parameters trained: {LORA} trains "
                f"{share(lora)}"
            )
    best = best_run(study)
    if study.about["preset"] == "full" and (best is None or best[1] < BEST):
        value = f"the best is at {percent(best[1], 2)}" if best else "there is none"
        yield f"a LoRA run of at least {percent(BEST)} accuracy: {value}"
    for run in study.runs:
        if run.state != "finished":
            yield f"{run.id}: {run.state}{f' ({run.why})' if run.why else ''}"


def how_it_was_made(study: Study) -> Iterator[str]:
    """Say by which command, on what, with which versions."""
    machine = study.about["machine"]
    versions = ", ".join(f"{name} {value}" for name, value in machine["packages"].items() if value)
    yield f"Command: `{study.about['command']}`"
    for further in study.about.get("further", ()):
        yield f"Further command: `{further}`"
    yield (
        f"Machine: {machine['processor']}, {machine['cores']} cores, {machine['threads']} threads "
        f"for a run, all for what is timed alone, {machine['system']}; load when it began "
        f"{machine['load_average']}."
    )
    yield f"Versions: Python {machine['python']}, {versions}."


# ---------------------------------------------------------------- two forms of the page


def markdown(table: Table) -> str:
    """Return a table in Markdown."""
    lines = [table.columns, tuple("---" for _ in table.columns), *table.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown_page(sections: Sequence[Section]) -> str:
    """Return the page in Markdown, its plots beside it."""
    blocks = []
    for index, section in enumerate(sections):
        blocks += [f"{'#' if index == 0 else '##'} {section.title}", *section.paragraphs]
        if section.items:
            blocks.append("\n".join(f"- {item}" for item in section.items))
        blocks += [f"![{plot.description}]({plot.name}.svg)" for plot in section.plots]
        blocks += [markdown(table) for table in section.tables]
    return "\n\n".join(blocks) + "\n"


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ sections[0].title }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 0 auto; padding: 1rem; \
color: #222; background: #fff }
img { width: 100%; max-width: 40rem; height: auto }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: 0.8rem; white-space: nowrap }
th, td { padding: 0.3rem 0.6rem; border-bottom: 1px solid #ddd; text-align: left }
code { overflow-wrap: anywhere }
</style>
</head>
<body>
{% for section in sections %}
<h{{ 1 if loop.first else 2 }}>{{ section.title }}</h{{ 1 if loop.first else 2 }}>
{% for paragraph in section.paragraphs %}
<p>{{ paragraph | code }}</p>
{% endfor %}
{% if section.items %}
<ul>
{% for item in section.items %}
<li>{{ item }}</li>
{% endfor %}
</ul>
{% endif %}
{% for plot in section.plots %}
<img alt="{{ plot.description }}" src="data:image/svg+xml;base64,{{ plot.svg | base64 }}">
{% endfor %}
{% for table in section.tables %}
<div class="wide"><table>
<tr>{% for cell in table.columns %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in table.rows %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% endfor %}
{% endfor %}
</body>
</html>
"""


def html_page(sections: Sequence[Section]) -> str:
    """Return the page as one HTML file: no script, nothing asked of a network."""
    surroundings = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    surroundings.filters["base64"] = lambda text: base64.b64encode(text.encode()).decode()
    surroundings.filters["code"] = code
    return surroundings.from_string(PAGE).render(sections=sections)


def code(text: str) -> Any:
    """Return a paragraph with what stands between backquotes as code."""
    from markupsafe import Markup

    parts = text.split("`")
    wrapped = [Markup("<code>{}</code>").format(p) if i % 2 else p for i, p in enumerate(parts)]
    return Markup("").join(wrapped)
