"""Hold a merged model and its artifacts against the unmerged model: everything the checks ask for.

What is held against what never depends on the side that is under proof: inputs, their names and the
tokenizer are those of the unmerged model, built from base and adapter alone.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from lora_export import (
    checks,
    claims,
    diagnosing,
    exporters,
    fusing,
    inputs,
    loading,
    localising,
    models,
    observing,
    placing,
    registry,
    stages,
    timing,
)
from lora_export.calling import interface_of
from lora_export.checks import graph, parity
from lora_export.errors import InputError, LoraExportError, first_line
from lora_export.judging import Say, silent
from lora_export.merged_files import audit
from lora_export.opening import Job
from lora_export.recording import record
from lora_export.records import (
    MERGED,
    REFERENCE,
    UNMERGED,
    Account,
    Alone,
    Artifact,
    Batch,
    Evidence,
    Fusion,
    ModuleOutput,
    Policy,
    Recording,
    Repeat,
    Signature,
    WeightAudit,
    Written,
)
from lora_export.runners import Runner
from lora_export.stages import Subject


@dataclass(frozen=True)
class Asked:
    """What the models are held against each other on, how thoroughly, and by which limits."""

    texts: Sequence[str]
    labels: Sequence[int] = ()
    seed: int = 0
    quick: bool = False  # fewer inputs; nothing timed, exported again or written
    policy: Policy = field(default_factory=Policy)

    @property
    def scope(self) -> str:
        """Which checks are asked."""
        return checks.QUICK if self.quick else checks.RUN

    @property
    def stated(self) -> dict[str, Any]:
        """What differs from the usual, for the certificate."""
        usual = Policy()
        limits = {k: v for k, v in vars(self.policy).items() if v != getattr(usual, k)}
        return {"seed": self.seed, **({"quick": True} if self.quick else {}), **limits}


@dataclass(frozen=True)
class Truth:
    """The unmerged model, and what it answers: what everything else is held against."""

    job: Job
    subject: Subject  # in its own precision, with the tokenizer that it was trained with
    asked: Asked
    batches: tuple[Batch, ...]
    recordings: Mapping[str, Recording]  # of the reference, the unmerged model, and without updates
    alone: tuple[Alone, ...]  # of the reference
    written: tuple[Written, ...]


@dataclass(frozen=True)
class Made:
    """What is to be proven: a merged model, and artifacts of it by format."""

    folder: Path  # of the merged model
    account: Account
    weights: tuple[WeightAudit, ...]
    artifacts: Mapping[str, Artifact]
    places: Mapping[str, Path]  # where each artifact lies
    model: nn.Module | None = None  # the merged model, where it is loaded already


def truth_of(job: Job, unmerged: nn.Module, asked: Asked, *, cache: bool = True) -> Truth:
    """Return what the unmerged model answers, in float64 and in its own precision.

    Raises:
        InputError: the model has no tokenizer, or does not run.
    """
    folder = job.source if job.own_tokenizer else job.base
    tokens = models.processor(folder, unmerged)
    interface = interface_of(unmerged, tokens, cache=cache, folder=job.base)
    subject = Subject(job.base, unmerged, tokens, interface)
    batches = stages.batches_of(subject, asked.texts, asked.labels, asked.seed)
    if asked.quick:
        batches = inputs.fewer(batches)
    recordings = stages.record_truth(subject, batches)
    raised = [one.errors or [""] * len(batches) for one in recordings.values()]
    errors = ["".join(said) for said in zip(*raised, strict=True)]
    if any(e for e, batch in zip(errors, batches, strict=True) if batch.source != "grid"):
        raise InputError(f"the unmerged model does not run: {max(errors)}")
    # What it refuses itself is no shape to hold others to.
    kept = [place for place, error in enumerate(errors) if not error]
    batches = tuple(batches[place] for place in kept)
    reference = subject.runner(REFERENCE, stages.exact(unmerged))
    return Truth(
        job,
        subject,
        asked,
        batches,
        {
            name: replace(one, outputs=tuple(one.outputs[place] for place in kept), errors=())
            for name, one in recordings.items()
        },
        *_observed(reference, subject.signature, batches, asked.scope),
    )


def _observed(
    runner: Runner, signature: Signature, batches: tuple[Batch, ...], scope: str
) -> tuple[tuple[Alone, ...], tuple[Written, ...]]:
    found = observe_runner(Evidence(signature=signature, batches=batches), runner, scope)
    return found.alone, found.written


def made_of(
    job: Job, merged: Path, places: Mapping[str, Path], precision: str = registry.FULL
) -> Made:
    """Return what lies in `merged` and at `places`, every merged weight derived again.

    Raises:
        InputError: an artifact is in another precision: none chooses its own limits.
        ExportFailed: an artifact is no file of its format.
    """
    found = {name: stages.described(name, place) for name, place in places.items()}
    for name, artifact in found.items():
        if artifact.precision != precision:
            raise InputError(
                f"{places[name].name} is in {artifact.precision}, as it says; to prove it as that, "
                f"pass --precision {artifact.precision}"
            )
    return Made(merged, *audit(job, merged), found, places)


def observe(truth: Truth, made: Made, *, threads: int, say: Say = silent) -> Evidence:
    """Return the evidence on what was made, files and their digests left to the caller.

    Nothing is judged. What does not load or run is evidence too; only an artifact that cannot be
    opened at all is an error.

    Raises:
        ExportFailed: an artifact cannot be opened.
    """
    say(f"comparing on {inputs.summary(truth.batches)}")
    runners: dict[str, Runner] = {
        name: stages.open_runner(name, place, threads) for name, place in made.places.items()
    }
    subject, fault = _merged_subject(truth, made)
    timed: dict[str, Runner] = {UNMERGED: truth.subject.runner(UNMERGED)}
    recordings = {**truth.recordings, MERGED: _silence(MERGED, fault, truth.batches)}
    judged = ({} if subject is None else {MERGED: subject.runner(MERGED)}) | runners
    recordings |= {name: record(runner, truth.batches) for name, runner in judged.items()}
    sound = {name: runner for name, runner in judged.items() if not recordings[name].errors}
    signature = truth.subject.signature
    evidence = Evidence(
        account=made.account,
        weights=made.weights,
        modules=None if subject is None else loading.modules_of(subject.model),
        signature=signature,
        artifacts=tuple(made.artifacts.values()),
        batches=truth.batches,
        recordings=recordings,
        policy=truth.asked.policy,
        runtimes=stages.settings_of((timed | judged).values(), threads),
        claims=claims.of_merged(truth.job, made.folder),
        alone=truth.alone,
        written=truth.written,
    )
    for runner in sound.values():
        evidence = observe_runner(evidence, runner, truth.asked.scope)
    if subject is not None and MERGED in sound:  # or it is no model to look for
        for name, artifact in made.artifacts.items():
            place = made.places[name]
            evidence = look_inside(evidence, subject, artifact, place, truth.asked.scope, say)
    replies = tuple(
        reply
        for name, artifact in made.artifacts.items()
        if artifact.takes_text and name in sound
        for reply in stages.replies(truth.subject, runners[name], truth.batches)
    )
    evidence = replace(evidence, replies=replies)
    if "latency" not in checks.asked_by(truth.asked.scope):
        return evidence
    say("timing")
    asked = truth.asked
    timings = timing.measure(
        timed | sound, signature, threads=threads, seed=asked.seed, limit=asked.policy.slowest
    )
    return replace(evidence, timings=timings)


def observe_runner(evidence: Evidence, runner: Runner, scope: str) -> Evidence:
    """Return `evidence` with rows that were passed alone, and what was written, as `scope` asks."""
    signature, batches = evidence.signature, evidence.batches
    assert signature is not None
    wanted = checks.asked_by(scope)
    alone = observing.alone(runner, batches, signature) if "batch_invariant" in wanted else ()
    texts: tuple[Written, ...] = ()
    if "generation" in wanted and signature.has_cache:
        ways = (True,) if runner.name == REFERENCE else (True, False)
        with contextlib.suppress(Exception):  # runtimes raise as it comes; no text is no pass
            texts = tuple(observing.written(runner, signature, batches, cached=way) for way in ways)
    return replace(evidence, alone=evidence.alone + alone, written=evidence.written + texts)


def look_inside(
    evidence: Evidence,
    subject: Subject,
    artifact: Artifact,
    place: Path,
    scope: str,
    say: Say = silent,
) -> Evidence:
    """Return `evidence` with what stands inside the artifact at `place`, as `scope` asks.

    `subject` is the merged model that it was made from.

    Raises:
        ExportFailed: the artifact cannot be read.
    """
    wanted, folder = checks.asked_by(scope), place.parent
    say(f"looking into {artifact.format}")
    placements = placing.placements_of(
        subject.model, subject.interface, subject.folder, artifact, place
    )
    said = claims.of_artifact(artifact, stages.about(subject), subject.folder, folder)
    answers = diagnosing.graph_answers(subject, artifact, place, evidence.batches)
    outputs: tuple[ModuleOutput, ...] = ()
    # It costs as much again, so a quick look goes module by module only where there is a fault.
    if answers and (
        scope == checks.RUN or not _agrees(replace(evidence, graphs=answers), artifact)
    ):
        batch = evidence.batches[diagnosing.worst(answers, evidence)]
        with contextlib.suppress(Exception):  # it names the place, and decides nothing
            outputs = localising.module_outputs(subject, artifact, place, batch)
    fusions: tuple[Fusion, ...] = ()
    repeats: tuple[Repeat, ...] = ()
    form = exporters.form_of(artifact)
    if form is not None and "fusions" in wanted:
        fusions = fusing.fusions(subject, artifact, folder, form)
    if form is not None and "reproducible" in wanted:
        say(f"exporting {artifact.format} once more")
        repeats = (observing.repeat(subject, artifact, folder, form),)
    return replace(
        evidence,
        placements=evidence.placements + placements,
        claims=evidence.claims + said,
        graphs=evidence.graphs + answers,
        modules_compared=evidence.modules_compared + outputs,
        fusions=evidence.fusions + fusions,
        repeats=evidence.repeats + repeats,
    )


def _agrees(evidence: Evidence, artifact: Artifact) -> bool:
    """Return whether an artifact computes what it should, as its graph and as it runs."""
    found = (*graph.judge(evidence), *parity.judge(evidence))
    return all(verdict.passed for verdict in found if verdict.subject == artifact.format)


def _merged_subject(truth: Truth, made: Made) -> tuple[Subject | None, str]:
    """Return the merged model, called as the unmerged one is; or why it cannot be loaded."""
    model = made.model
    if model is None:
        try:
            model = loading.load_merged(made.folder, altered=True).requires_grad_(False)
        except LoraExportError as error:
            return None, first_line(error).replace(str(made.folder), made.folder.name)
    return replace(truth.subject, folder=made.folder, model=model), ""


def _silence(name: str, why: str, batches: Sequence[Batch]) -> Recording:
    return Recording(name, "", tuple({} for _ in batches), tuple(why for _ in batches))
