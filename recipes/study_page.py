"""What a study says in plain words, section by section.

Every figure in a sentence is computed from what the study found; a sentence without data behind it
is not said.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from study_plots import Plot, one_of_each_method
from study_results import (
    SCORES,
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
from study_tables import Table

WITHIN = 0.015  # of full fine-tuning's accuracy: what the study asks of LoRA
MOST_SHARE = 0.015  # of the parameters that LoRA may train
BEST = 0.895  # accuracy that the best LoRA run is to reach, in the preset full
LORA = "lora-8"  # the setting that is held against full fine-tuning
FAMILY = ("lora", "rslora", "dora", "qlora")


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
        section("How good", how_good(study)),
        section("How they learn", how_they_learn(study), "learning"),
        section("How small", how_small(study), "parameters"),
        section("What a training step costs", what_it_costs(study), "cost"),
        section("What merging does", what_merging_does(study), "latency"),
        section("A model that writes", writing(study), "generation"),
        section("All settings", all_settings(tables), tables=tables),
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
    lora, full = study.group("sst2", LORA), study.whole("sst2")
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
    yield from other_lengths(study, lora, full)
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


def other_lengths(study: Study, lora: Group, full: Group) -> Iterator[str]:
    """Compare both methods where several seeds were trained for longer, or for less."""
    for steps, groups in study.budgets().items():
        first = {group.first.method: group for group in one_of_each_method(groups)}
        ours, theirs = first.get(lora.first.method), first.get(full.first.method)
        if steps == lora.steps or ours is None or theirs is None:
            continue
        gap = ours.gap(theirs, "accuracy")
        if gap is None or gap.is_single:
            continue
        told = [
            f"{SCORES['sst2'][0].shown(found).text(2, ' %')} ({seeds(group)})"
            for group in (ours, theirs)
            if (found := group.estimate("accuracy"))
        ]
        yield (
            f"After {steps:,} steps instead of {lora.steps:,}, {ours.label} is right on "
            f"{told[0]}, {theirs.label} on {told[1]}; the difference is "
            f"{(gap * 100).text(2, ' points')}."
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
    for group in filter(None, (study.group("sst2", LORA), study.whole("sst2"))):
        line = [study.curves.get(run.id, {}).get("accuracy", []) for run in group.runs]
        if all(line):
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
    state, file = lora.state / full.state, lora.file / full.file
    yield (
        "The optimizer AdamW keeps two 4-byte numbers for every trained parameter and a 4-byte "
        f"counter for every tensor. For {LORA} that makes {size(lora.state.predicted)}; measured "
        f"were {size(lora.state.measured)}. For full fine-tuning it makes "
        f"{size(full.state.predicted)}; measured were {size(full.state.measured)}. The ratio is "
        f"{significant(state.predicted)} predicted, {significant(state.measured)} measured."
    )
    yield (
        f"What has to be kept is 4 bytes for each trained parameter: {size(lora.file.predicted)} "
        f"for {LORA} ({size(lora.file.measured)} on disk, the rest is a description), "
        f"{size(full.file.predicted)} for the full model ({size(full.file.measured)} on disk, with "
        "its configuration and tokenizer). The ratio is "
        f"{significant(file.predicted)} predicted, {significant(file.measured)} measured."
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
    groups = study.groups("causal_lm")
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
    for group in groups:
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
    lora, full = study.group("causal_lm", f"answers-{LORA}"), study.whole("causal_lm")
    if lora and full:
        gaps = []
        for score, _ in lora.scores():
            if gap := lora.gap(full, score.name):
                unit = " points" if score.unit else ""
                gaps.append(f"{score.name} {(gap * score.factor).text(score.digits, unit)}")
        if gaps:
            yield f"LoRA minus full fine-tuning (Welch, where there are seeds): {'; '.join(gaps)}."


def all_settings(tables: Sequence[Table]) -> Iterator[str]:
    """Explain the tables."""
    if tables:
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
