"""Hold a merged model and its artifacts against the unmerged model: everything the checks ask for.

What is held against what never depends on the side that is under proof: inputs, their names and the
tokenizer are those of the unmerged model, built from base and adapter alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from lora_export import inputs, loading, models, placing, stages, timing
from lora_export.calling import interface_of
from lora_export.errors import InputError, LoraExportError, first_line
from lora_export.judging import Say, silent
from lora_export.merged_files import audit
from lora_export.opening import Job
from lora_export.recording import record
from lora_export.records import (
    MERGED,
    UNMERGED,
    Account,
    Artifact,
    Batch,
    Evidence,
    Placement,
    Policy,
    Recording,
    Timing,
    WeightAudit,
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
    return Truth(
        job,
        subject,
        asked,
        tuple(batches[place] for place in kept),
        {
            name: replace(one, outputs=tuple(one.outputs[place] for place in kept), errors=())
            for name, one in recordings.items()
        },
    )


def made_of(job: Job, merged: Path, places: Mapping[str, Path]) -> Made:
    """Return what lies in `merged` and at `places`, every merged weight derived again.

    Raises:
        ExportFailed: an artifact is no file of its format.
    """
    found = {name: stages.described(name, place) for name, place in places.items()}
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
    recordings = {**truth.recordings, MERGED: _silence(MERGED, fault, truth.batches)}
    if subject is not None:
        recordings[MERGED] = record(subject.runner(MERGED), truth.batches)
    recordings |= {name: record(runner, truth.batches) for name, runner in runners.items()}
    held = () if subject is None else _held(subject, made, say)
    timed: dict[str, Runner] = {UNMERGED: truth.subject.runner(UNMERGED)}
    if subject is not None:
        timed[MERGED] = subject.runner(MERGED)
    timed |= runners
    sound = {name: runner for name, runner in timed.items() if not recordings[name].errors}
    timings: tuple[Timing, ...] = ()
    if not truth.asked.quick and UNMERGED in sound:
        say("timing")
        timings = timing.measure(
            sound, truth.subject.signature, threads=threads, seed=truth.asked.seed
        )
    return Evidence(
        account=made.account,
        weights=made.weights,
        modules=None if subject is None else loading.modules_of(subject.model),
        signature=truth.subject.signature,
        artifacts=tuple(made.artifacts.values()),
        batches=truth.batches,
        recordings=recordings,
        timings=timings,
        policy=truth.asked.policy,
        placements=held,
        runtimes=stages.settings_of(timed.values(), threads),
    )


def _held(subject: Subject, made: Made, say: Say) -> tuple[Placement, ...]:
    """Return where the artifacts have the tensors of the merged model."""
    say("looking at the tensors inside")
    return tuple(
        placement
        for name, artifact in made.artifacts.items()
        for placement in placing.placements_of(
            subject.model, subject.interface, made.folder, artifact, made.places[name]
        )
    )


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
