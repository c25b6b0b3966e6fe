"""What a study says in plain words, section by section.

Every figure in a sentence is computed from what the study found; a sentence without data behind it
is not said.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from study_plots import Plot
from study_results import (
    ACCURACY,
    METHODS,
    Estimate,
    Group,
    Run,
    Study,
    binomial,
    number,
    percent,
    seeds,
    share,
    significant,
    size,
)
from study_tables import SINGLE, Table

WITHIN = 0.015  # of full fine-tuning's accuracy: what the study asks of LoRA
MOST_SHARE = 0.015  # of the parameters that LoRA may train
BEST = 0.895  # accuracy that the best LoRA run is to reach, in the preset full
LORA = "lora-8"  # the setting that is held against full fine-tuning
FAMILY = ("lora", "rslora", "dora", "qlora")
TRAINS = {
    "full": "every parameter",
    "lora": "two thin matrices beside each linear layer, and the head; the number is the rank, the "
    "width of the matrices, and with `-qv` only query and value layers get them",
    "rslora": "what LoRA does, scaled by alpha over the root of the rank, not by alpha over the "
    "rank",
    "dora": "what LoRA does, and the length of each row of a weight matrix",
    "qlora": "what LoRA does, over weights that are stored in 4 bits (NF4), on which it is "
    "measured here",
    "bitfit": "the biases and the head",
    "head": "the head alone",
}
EXPLAINED = {
    "reference": " (the unmerged model computed in float64)",
    "idle": " (with its adapter off, which is guessing)",
}


@dataclass(frozen=True)
class Section:
    """A part of the page: what is said, and what is shown below it."""

    title: str
    paragraphs: Sequence[str]
    plots: Sequence[Plot] = ()
    tables: Sequence[Table] = ()
    items: Sequence[str] = ()


def sections_of(study: Study, plots: Sequence[Plot], tables: Sequence[Table]) -> list[Section]:
    """Return the page, top to bottom; sections with nothing to say are left out."""

    def section(title: str, said: Iterable[str], *names: str, **more: Any) -> Section:
        shown = [plot for plot in plots if plot.name.startswith(names)]
        return Section(title, list(said), shown, **more)

    missing = list(not_reached(study))
    nothing = "Nothing: every planned run is finished, and every aim that applies is reached."
    sections = [
        section("LoRA against full fine-tuning", introduction(study)),
        section("In short", (), items=list(in_short(study))),
        section("What the names mean", (), items=list(names_of(study))),
        section("How good", how_good(study)),
        section("How they learn", how_they_learn(study), "learning"),
        section("How small", how_small(study), "parameters"),
        section("What a training step costs", what_it_costs(study), "cost"),
        section("What merging does", what_merging_does(study), "latency"),
        section("A model that writes", writing(study), "generation"),
        section("All settings", all_settings(study, tables), tables=tables),
        section("Not reached, not run", () if missing else (nothing,), items=missing),
        section("How it was made", how_it_was_made(study)),
    ]
    return [s for s in sections if s.paragraphs or s.items or s.plots]


def introduction(study: Study) -> Iterator[str]:
    """Say what was compared, and how to read a figure."""
    done = sum(run.state == "finished" for run in study.runs)
    yield (
        f"A trained model ({study.about['base']}) is taught to tell whether a sentence of a film "
        "review is positive or negative (the data set SST-2). Full fine-tuning changes every "
        "parameter of it. LoRA leaves them as they are and trains two thin matrices beside each "
        "weight matrix, and the head, the small new layer that gives the answer. These are the "
        "adapter; merged into the weights, it leaves a model of the same form as without LoRA."
    )
    yield (
        f"{done} of {len(study.runs)} planned runs are finished (preset {study.about['preset']}). "
        "A figure from several runs, which differ in their random seeds, is the mean, followed by "
        "the 95 % interval of that mean in brackets (Student's t over the seeds). A figure from "
        "one run is said to be single: it would differ with another seed. Dev sentences are kept "
        "aside: nothing is trained on them. A step is one batch of sentences."
    )


def in_short(study: Study) -> Iterator[str]:
    """Say the most important in a line each; the sections below have what it rests on."""
    if found := compared(study):
        lora, full, gap = found
        ours, theirs = (percent(float(np.mean(g.values(ACCURACY))), 2) for g in (lora, full))
        yield (
            f"Accuracy: LoRA {ours}, full fine-tuning {theirs}; the difference is "
            f"{(gap * 100).text(2, ' points')}."
        )
        yield (
            f"Size: LoRA trains {share(lora)} of the parameters, its adapter has "
            f"{size(lora.file.measured)}, the fully fine-tuned model {size(full.file.measured)}."
        )
    costs = [(study.cost("step time ratio"), "time"), (study.cost("peak memory growth"), "memory")]
    told = [
        f"{found['lora'] / found['full']:.2f} of the {what}"
        for found, what in costs
        if {"lora", "full"} <= found.keys()
    ]
    if told:
        yield f"Training: a step of LoRA takes {' and '.join(told)} of full fine-tuning."
    times = [
        f"{v['subject'].partition(',')[0]} {v['measured']:.2f}"
        for v in latencies_of(study)
        if v["subject"].endswith("batch 1")
    ]
    if times:
        yield f"Answering one sentence, the unmerged model's time being 1: {', '.join(times)}."


def names_of(study: Study) -> Iterator[str]:
    """Say what each method trains, and how the settings are called."""
    used = {group.first.method for group in study.groups("sst2")}
    for method in METHODS:
        if method in used:
            yield f"`{method}` trains {TRAINS[method]}."
    if len(study.budgets()) > 1:
        yield (
            "`short-`, `-long`, `-longer`: fewer or more steps of training. Such a run is no part "
            "of another: its learning rate falls to 0 by its own last step."
        )


def compared(study: Study) -> tuple[Group, Group, Estimate] | None:
    """Return LoRA, full fine-tuning and the difference of their accuracies."""
    lora, full = study.group("sst2", LORA), study.whole("sst2")
    if lora is None or full is None or (gap := lora.gap(full, ACCURACY)) is None:
        return None
    return lora, full, gap


def how_good(study: Study) -> Iterator[str]:
    """Say how accurate LoRA and full fine-tuning are, and how far apart."""
    if (found := compared(study)) is None:
        return
    lora, full, gap = found
    answered = lora.samples(ACCURACY)
    yield (
        f"LoRA ({LORA}) answers {accuracy_of(lora)} of the {answered} dev sentences rightly "
        f"({seeds(lora)}), full fine-tuning {accuracy_of(full)} ({seeds(full)})."
    )
    yield (
        f"LoRA minus full fine-tuning is {(gap * 100).text(2, ' points')}"
        f"{' (Welch, which takes the two for independent)' if gap.low < gap.high else ''}, or "
        f"{abs(gap.value) * answered:.0f} of the {answered} sentences. {meaning(gap)}"
    )
    yield (
        f"For that LoRA trains {number(lora.parameters, 0)} parameters, {share(lora)} "
        f"of all, its own counted in; full fine-tuning {number(full.parameters, 0)}."
    )
    if best := best_run(study):
        run, value, among = best
        flattered = (
            f" It is the best of {len(among)} runs, {sum(r.steps == run.steps for r in among)} of "
            "them with as many steps, and the best of several flatters itself."
        )
        yield (
            f"The best run of the LoRA family is {run.setting} with seed {run.seed}: "
            f"{percent(value, 2)}.{flattered if len(among) > 1 else ''}"
        )
    mean = float(np.mean(lora.values(ACCURACY)))
    low, high = binomial(mean, answered)
    yield (
        f"The intervals are about seeds. That {answered} sentences stand for all others is a "
        f"second uncertainty, which they do not contain: on other sentences of the kind, "
        f"{percent(mean)} could as well have been {percent(low)} or {percent(high)} (Wilson's 95 % "
        "interval)."
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


def accuracy_of(group: Group) -> str:
    """Return its mean accuracy over the seeds, in words."""
    return ACCURACY.shown(dict(group.scores())[ACCURACY]).text(ACCURACY.digits, ACCURACY.unit)


def meaning(gap: Estimate) -> str:
    """Return what a difference in accuracy, LoRA minus full fine-tuning, allows to say."""
    is_within = gap.value >= -WITHIN
    aim = f"The aim is to lose at most {100 * WITHIN:.1f} points: "
    aim += "it is reached" if is_within else "it is not reached"
    if gap.is_single:
        return f"{aim}; from single runs that says little, seeds alone can differ as much."
    if gap.low == gap.high:
        return f"{aim}, by all seeds alike; that is no interval."
    if gap.high < 0:
        sign = "The whole interval is below 0: over the seeds LoRA is behind."
    elif gap.low > 0:
        sign = "The whole interval is above 0: over the seeds LoRA is ahead."
    else:
        sign = "0 lies in the interval: seeds alone could make such a difference."
    is_sure = gap.low >= -WITHIN if is_within else gap.high < -WITHIN
    sure = "by the whole interval" if is_sure else "by the mean; the interval leaves it open"
    return f"{sign} {aim} {sure}."


def best_run(study: Study) -> tuple[Run, float, list[Run]] | None:
    """Return the most accurate run of the LoRA family, its accuracy, and all runs of the family."""
    runs = [r for r in study.runs if r.recipe == "sst2" and r.method in FAMILY]
    known = [(value, run) for run in runs if (value := run.get("accuracy", "dev")) is not None]
    if not known:
        return None
    value, run = max(known, key=lambda pair: pair[0])
    return run, value, [run for _, run in known]


def how_they_learn(study: Study) -> Iterator[str]:
    """Explain the curves, with where they begin and end."""
    if not any(run.id in study.curves for group in study.groups("sst2") for run in group.runs):
        return
    yield (
        "The loss says how surprised the model is by the right answers while it is trained: 0.69 "
        "is a coin's toss, 0 is certainty. Accuracy is looked at now and then on the dev sentences."
    )
    for group in filter(None, (study.group("sst2", LORA), study.whole("sst2"))):
        line = [study.curves.get(run.id, {}).get("accuracy", []) for run in group.runs]
        if all(line):
            first, last = (float(np.mean([points[i][1] for points in line])) for i in (0, -1))
            yield (
                f"{group.id}: {percent(first)} after {line[0][0][0]:.0f} steps, "
                f"{percent(last)} after {line[0][-1][0]:.0f}."
            )


def how_small(study: Study) -> Iterator[str]:
    """Hold the sizes against what the formulas predict."""
    if found := compared(study):
        yield from predicted_sizes(*found[:2])
    for steps, groups in study.budgets().items():
        known = [(value[0], group) for group in groups if (value := group.values(ACCURACY))]
        if len(known) < 3 or any(len(group.runs) > 1 for _, group in known):
            continue
        (worst, last), *_, (best, first) = sorted(known, key=lambda pair: pair[0])
        yield (
            f"After {steps:,} steps the {len(known)} settings lie between {percent(best)} "
            f"({first.id}) and {percent(worst)} ({last.id}). Each is a single run, with a learning "
            f"rate of its own that was not searched for: a difference of a point or two says "
            f"nothing about the method.{seed_spread(study)}"
        )


def seed_spread(study: Study) -> str:
    """Return how far the seeds of LoRA lie apart early in training, in a sentence."""
    group = study.group("sst2", LORA)
    lines = [study.curves.get(r.id, {}).get("accuracy", []) for r in group.runs] if group else []
    if len(lines) < 2 or not all(lines):
        return ""
    early = [line[0][1] for line in lines]
    return (
        f" The seeds of {LORA} alone lie {number(100 * (max(early) - min(early)), 1)} points apart "
        f"after their first {lines[0][0][0]:.0f} steps."
    )


def predicted_sizes(lora: Group, full: Group) -> Iterator[str]:
    """Say what the optimizer keeps and what is kept on disk, predicted and measured."""
    state, file = lora.state / full.state, lora.file / full.file
    yield (
        "The optimizer AdamW keeps two 4-byte numbers for every trained parameter and a 4-byte "
        f"counter for every tensor. For {LORA} that makes {size(lora.state.predicted)}, and "
        f"{size(lora.state.measured)} were measured; for full fine-tuning "
        f"{size(full.state.predicted)}, and {size(full.state.measured)} were measured. The ratio "
        f"is {significant(state.predicted)} predicted, {significant(state.measured)} measured."
    )
    yield (
        f"What has to be kept is 4 bytes for each trained parameter: {size(lora.file.predicted)} "
        f"for {LORA} ({size(lora.file.measured)} on disk, the rest is a description), "
        f"{size(full.file.predicted)} for the full model ({size(full.file.measured)} on disk, with "
        "its configuration and tokenizer). The ratio is "
        f"{significant(file.predicted)} predicted, {significant(file.measured)} measured. An "
        "adapter needs the model that it was trained over beside it: the saving counts where "
        "several share one."
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
                f"{' and '.join(sorted(trained))}`), so that their ratios can differ."
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
            "itself is in all of these. Each is one process, measured once. What is saved are "
            "gradients and optimizer state of frozen parameters, the same for every batch. Against "
            "it stands what the extra matrices keep until the backward pass, which grows with the "
            f"batch: a method can take more than full fine-tuning.{peaks(study)}"
        )
    if len(times) > 1:
        low, high = (study.cost(f"step time ratio, {end}") for end in ("low", "high"))
        others = [
            f"{name} {value:.2f} [{low[name]:.2f}, {high[name]:.2f}]"
            for name, value in times.items()
            if name != "full"
        ]
        yield (
            "Time: a step as a ratio to one of full fine-tuning beside it in the same process, in "
            f"turns and shuffled order (median, 95 % bootstrap interval): {'; '.join(others)}. "
            "What differs from process to process is not in the intervals. Seconds of different "
            "runs are not compared anywhere on this page: other work on the machine meets them "
            "unequally."
        )


def peaks(study: Study) -> str:
    """Return the peak memory of the trainings that are compared, in a sentence."""
    if (found := compared(study)) is None:
        return ""
    most = [max(r.get("peak memory") or math.nan for r in group.runs) for group in found[:2]]
    if any(map(math.isnan, most)):
        return ""
    return (
        " The trainings above, whose batches hold as much as their longest sentence asks for, had "
        f"a peak of {size(most[0])} with {LORA} and of {size(most[1])} with full fine-tuning, the "
        "whole process counted."
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
    if told := latencies_of(study):
        yield (
            "Time for a batch, the unmerged model's being 1: "
            + "; ".join(f"{v['subject']} {v['measured']:.2f} ({v['status']})" for v in told)
            + ". ONNX and TorchScript are files that run without this library; what they gain "
            "beyond the merged model they owe to the export, not to merging."
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
        shares = [
            f"{one['subject']} {percent(one['value'], 2)}{EXPLAINED.get(one['subject'], '')}"
            for one in accuracies
        ]
        yield f"Accuracy on the dev sentences: {'; '.join(shares)}."
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


def latencies_of(study: Study) -> list[Mapping[str, Any]]:
    """Return the verdicts on latency that rest on a measurement."""
    verdicts = study.proof.verdicts if study.proof else ()
    return [v for v in verdicts if v["check"] == "latency" and v["measured"] is not None]


def writing(study: Study) -> Iterator[str]:
    """Say how LoRA and full fine-tuning compare where text is written."""
    groups = study.groups("causal_lm")
    if not groups:
        return
    pretrained = study.group("pretraining", "pretrained")
    made = pretrained and pretrained.first.get("parameters")
    yield (
        "A small language model"
        f"{f' ({number(made, 0)} parameters)' if made else ''} was made and pretrained here on the "
        "sentences of SST-2, then taught to follow instructions about them. Each asks either for a "
        "verdict (good or bad; about half are right by guessing) or for a description (such as: a "
        "short and good one that speaks of the acting). Perplexity is how many tokens (words or "
        "pieces of them) it wavers between, on average, before each token of the right answer: "
        "lower is better. Exact match is the share of answers that are right word for word; BLEU "
        "and ROUGE-L say how much of the right words is there, in the right order: higher is "
        "better."
    )
    counted: dict[str, list[str]] = {}
    for group in groups:
        scores = [
            f"{one.label} {one.shown(v).text(one.digits, one.unit)}" for one, v in group.scores()
        ]
        who = f"{group.id} ({seeds(group)}, {share(group)} of the parameters)"
        yield f"{who}: {', '.join(scores)}."
        rests = [f"{one.label} {group.samples(one):,}" for one, _ in group.scores()]
        counted.setdefault(", ".join(rests), []).append(group.id)
    for rests_on, labels in counted.items():
        yield (
            f"On how many these rest (tokens for perplexity, answers for the others): {rests_on} "
            f"({', '.join(labels)})."
        )
    lora, full = study.group("causal_lm", f"answers-{LORA}"), study.whole("causal_lm")
    if lora and full:
        gaps = []
        for score, _ in lora.scores():
            if gap := lora.gap(full, score):
                unit = " points" if score.unit else ""
                gaps.append(f"{score.label} {(gap * score.factor).text(score.digits, unit)}")
        if gaps:
            yield f"LoRA minus full fine-tuning (Welch, where there are seeds): {'; '.join(gaps)}."


def all_settings(study: Study, tables: Sequence[Table]) -> Iterator[str]:
    """Explain the tables, and say what stands in none."""
    if tables:
        yield (
            f"{SINGLE} is a single run. `arguments` is what the recipe was given beside its "
            "defaults; `batch` is the examples of a step. `to full` is the ratio to full "
            "fine-tuning: as the formulas above predict it, and as it was measured. The same as "
            "plain numbers: `table.csv`."
        )
    for group in study.groups("sst2"):
        if (whole := group.first.get("accuracy", "dev, whole base")) is not None:
            yield (
                f"The adapter of {group.id} is made for the base in full precision: there seed "
                f"{group.first.seed} answers {percent(whole, 2)} rightly."
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
        yield f"Gone on with by: `{further}`"
    yield (
        f"Machine: {machine['processor']}, {machine['cores']} cores, of which a training had "
        f"{machine['threads']} and what is timed alone had all; {machine['system']}; load when it "
        f"began {machine['load_average']}."
    )
    yield f"Versions: Python {machine['python']}, {versions}."
