"""Where an artifact parts from its model: its own graph in float64, value by value.

A runtime's rounding hides small faults, so it is left out: the graph that stands in the file is
evaluated in float64 and held against the merged model in float64. What is left is the rounding of
the constants in the file.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from lora_export import exporters, inputs, localising, registry, stages, timing
from lora_export.checks import graph, parity
from lora_export.codec import to_json
from lora_export.compare import parted, valid
from lora_export.errors import ExportFailed, InputError, first_line, listed
from lora_export.judging import silent
from lora_export.localising import OUTPUT, largest, module_outputs
from lora_export.records import (
    REFERENCE,
    Array,
    Artifact,
    Batch,
    Evidence,
    GraphAnswer,
    ModuleOutput,
    Recording,
    Signature,
    Verdict,
)
from lora_export.report.json import strict
from lora_export.runners import Runner
from lora_export.stages import Subject

# A graph is evaluated on so many batches of so many tokens at most; a picture counts as 64.
MOST_BATCHES, MOST_TOKENS = 6, 64
MOST_BYTES = 2 * 10**9  # that the weights may take in float64
TINY = float(np.finfo(np.float32).tiny)


def graph_answers(
    subject: Subject, artifact: Artifact, path: Path, batches: Sequence[Batch]
) -> tuple[GraphAnswer, ...]:
    """Return what the graph of `artifact` at `path` answers in float64, and what the model does.

    It is asked a few small ones of `batches`. There is one answer with an error where it cannot be
    evaluated; none where the artifact is in less than single precision, its format has no
    evaluation in float64, or its weights take more than `MOST_BYTES` then.
    """
    evaluation = getattr(exporters.load(artifact.format), "in_double", None)
    weight = 2 * sum(file.size_bytes for file in artifact.files)
    if evaluation is None or artifact.is_reduced or weight > MOST_BYTES:
        return ()
    reference, own = (subject.runner(REFERENCE, each) for each in localising.in_both(subject))
    try:
        inside = evaluation(path)
        return tuple(
            GraphAnswer(
                artifact.format,
                place,
                expected=reference.run(batches[place].arrays),
                found=_chosen(inside.run(batches[place].arrays), subject.signature),
                rounded=own.run(batches[place].arrays),
            )
            for place in _telling(batches)
        )
    except ExportFailed as error:
        return (GraphAnswer(artifact.format, 0, {}, {}, first_line(error)),)


def _chosen(outputs: Mapping[str, Array], signature: Signature) -> dict[str, Array]:
    """Return those outputs that the signature has."""
    return {spec.name: outputs[spec.name] for spec in signature.outputs if spec.name in outputs}


def _telling(batches: Sequence[Batch]) -> list[int]:
    """Return the places of the largest batches up to `MOST_TOKENS`, else of the smallest.

    Of the grid these are one without padding, and one with padding of every kind.
    """
    sizes = {}
    for place, batch in enumerate(batches):
        rows = len(next(iter(batch.arrays.values())))
        sizes[place] = batch.mask.size if "attention_mask" in batch.arrays else 64 * rows
    small = [place for place, size in sizes.items() if size <= MOST_TOKENS]
    found = sorted(small, key=lambda place: sizes[place])[-MOST_BATCHES:]
    return sorted(found) or sorted(sizes, key=lambda place: sizes[place])[:1]


@dataclass(frozen=True)
class Diagnosis:
    """Whether an artifact parts from its model, and where."""

    sentence: str
    verdicts: tuple[Verdict, ...]  # of the checks `graph` and `parity`, as far as they apply
    outputs: tuple[ModuleOutput, ...] = ()  # by module, on the batch that differs most
    module: ModuleOutput | None = None  # at which the graph parts
    level: str = ""  # of the runtime's rewriting, from which on it computes something else

    @property
    def ok(self) -> bool:
        """Whether nothing parts, of what could be compared."""
        return bool(self.verdicts) and all(verdict.passed for verdict in self.verdicts)

    def facts(self) -> dict[str, Any]:
        """Return what the command prints as JSON; an error that is no number is null."""
        content = {field.name: getattr(self, field.name) for field in fields(self)}
        return {"schema": 1, "ok": self.ok, **strict(to_json(content, {}))}


def diagnose(
    artifact: str | Path,
    *,
    model: str | Path = "merged",
    name: str | None = None,
    data: str | Path | None = None,
    seed: int = 0,
    cache: bool = True,
    say: Callable[[str], None] = silent,
) -> Diagnosis:
    """Return where the file `artifact` parts from the merged model in the folder `model`.

    Args:
        artifact: File of an artifact, which another tool may have written.
        model: Directory of a merged model.
        name: Artifact format; None takes that of the suffix.
        data: Sentences to compare on (see `inputs.read_texts`); None takes the shipped set.
        seed: Of the generated inputs.
        cache: Whether the artifact of a model that generates takes and gives its cache.
        say: Called with the name of each stage as it begins.

    Raises:
        InputError: no such file or format; or it is in less than single precision, or has none of
            the model's outputs.
        ExportFailed: the artifact cannot be opened, or does not run.
    """
    path = Path(artifact)
    if not path.exists():
        raise InputError(f"no such file: {path}")
    texts, labels = inputs.read_texts(Path(data) if data is not None else None)
    found = exporters.describe(name or exporters.format_of(path), path)
    said = found.facts.get("metadata", {}).get(registry.PRECISION, json.dumps(registry.FULL))
    if said != json.dumps(registry.FULL):
        raise InputError(f"{path.name} is in {said}, which rounds on purpose: there is no limit")
    say("loading the model")
    subject = stages.load_subject(Path(model), cache=cache)
    batches = stages.batches_of(subject, texts, labels, seed)
    say(f"comparing on {inputs.summary(batches)}")
    with timing.all_threads() as threads:
        return located(subject, found, path, batches, threads)


def located(
    subject: Subject, artifact: Artifact, path: Path, batches: Sequence[Batch], threads: int = 1
) -> Diagnosis:
    """Return where the artifact at `path` parts from the merged model.

    First its graph is evaluated in float64: where it differs, a module is at fault (see
    `compare.parted`). Where it does not and its runtime's answers do, the runtime is, from some
    level of its rewriting on. A file of other tools may take fewer inputs and give fewer outputs
    than the model.

    Raises:
        InputError: artifact and model have no output in common.
        ExportFailed: the artifact cannot be opened, or does not run.
    """
    subject = _in_common(subject, artifact)
    batches = tuple(batches)
    answers = graph_answers(subject, artifact, path, batches)
    evidence = replace(
        stages.merged_evidence(subject, batches), artifacts=(artifact,), graphs=answers
    )
    runner = exporters.load(artifact.format).open_runner(path, threads)
    evidence = _with(evidence, runner, artifact)
    verdicts = tuple(
        found
        for check in (graph, parity)
        if check.applies(evidence)
        for found in check.judge(evidence)
    )
    wrong = {verdict.check: verdict for verdict in verdicts if not verdict.passed}
    found = Diagnosis("nothing parts: " + "; ".join(v.note for v in verdicts), verdicts)
    if answers and not answers[0].error:
        batch = batches[worst(answers, evidence)]
        outputs = module_outputs(subject, artifact, path, batch)
        found = replace(found, outputs=outputs)
        if "graph" in wrong:
            at = parted(outputs)
            return replace(found, sentence=_said(at, batch), module=at)
    if "parity" in wrong:
        level = _first_wrong_level(evidence, artifact, path, threads) if answers else ""
        sentence = _of_runtime(answers, level, wrong["parity"])
        return replace(found, sentence=sentence, level=level)
    return replace(found, sentence=wrong["graph"].note) if wrong else found


def _in_common(subject: Subject, artifact: Artifact) -> Subject:
    """Return `subject` with the outputs that `artifact` gives as well."""
    own, given = subject.signature.outputs, {spec.name for spec in artifact.outputs}
    both = tuple(spec for spec in own if spec.name in given)
    if not both:
        raise InputError(listed("the file has none of the model's outputs", (s.name for s in own)))
    signature = replace(subject.signature, outputs=both)
    return replace(subject, interface=replace(subject.interface, signature=signature))


def _with(evidence: Evidence, runner: Runner, artifact: Artifact) -> Evidence:
    """Return `evidence` with what `runner` answers to the inputs that the artifact takes."""
    assert evidence.signature is not None
    names, found = {spec.name for spec in artifact.inputs}, []
    for batch in evidence.batches:
        try:
            answer = runner.run(
                {n: a for n, a in batch.arrays.items() if artifact.takes_text or n in names}
            )
        except Exception as error:  # every runtime has its own
            why = f"it does not run on {batch.note}: {first_line(error)}"
            raise ExportFailed(why) from error
        found.append(_chosen(answer, evidence.signature))
    recording = Recording(artifact.format, runner.precision, tuple(found))
    return replace(evidence, recordings={**evidence.recordings, artifact.format: recording})


def _first_wrong_level(evidence: Evidence, artifact: Artifact, path: Path, threads: int) -> str:
    if artifact.takes_text:  # its runner opens the parts of the file, each when it is asked for
        return ""
    levels = getattr(exporters.load(artifact.format), "levels", lambda *_: ())
    for level, runner in levels(path, threads):
        if not all(v.passed for v in parity.judge(_with(evidence, runner, artifact))):
            return str(level)
    return ""


def worst(answers: Sequence[GraphAnswer], evidence: Evidence) -> int:
    """Return the place of the batch on which a graph differs most: where to look for the module."""

    def apart(answer: GraphAnswer) -> float:
        batch, found = evidence.batches[answer.batch], [0.0]
        for name, wanted in answer.expected.items():
            if name not in answer.found or answer.found[name].shape != wanted.shape:
                return math.inf
            off, noise = (
                largest(valid(side[name] - wanted, batch, evidence, name))
                for side in (answer.found, answer.rounded)
            )
            found.append(off / max(noise, TINY))
        return max(found)

    return max(answers, key=apart).batch


def _said(at: ModuleOutput | None, batch: Batch) -> str:
    if at is None:
        return f"the graph differs on some inputs, and on {batch.note} every module agrees"
    if at.kind == OUTPUT:
        return f"parts after the last module: the output {at.module} differs on {batch.note}"
    return (
        f"parts at {at.module} ({at.kind}): {at.error:.2e} off on {batch.note}, "
        f"{at.error / at.limit:.3g} times what rounding explains; all that it is computed from "
        "agrees"
    )


def _of_runtime(answers: Sequence[GraphAnswer], level: str, verdict: Verdict) -> str:
    if not answers:
        return f"{verdict.subject} is {verdict.note}; its graph is not evaluated in float64"
    told = f"the graph agrees in float64, and its runtime is {verdict.note}"
    return f"{told}; it parts from the graph at {level}" if level else told
