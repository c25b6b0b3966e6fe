"""Merge an adapter into its base's files, and prove it; later, prove it again. No model is built.

transformers and torch are imported only where the checkpoint's own names and shapes do not tell
how the adapter lands in it.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import threadpoolctl

from lora_export import auditing, checks, merging, publishing, storage
from lora_export.companions import PROVENANCE, is_loaded
from lora_export.environment import cores, peak_memory
from lora_export.errors import InputError
from lora_export.judging import Say, certify, silent
from lora_export.opening import Job, Options, open_job
from lora_export.records import (
    Account,
    Certificate,
    Evidence,
    FileDigest,
    Measurement,
    Modules,
    WeightAudit,
    lora_names,
)
from lora_export.storage import Checkpoint
from lora_export.streaming import Advance

FOLDER = "merged"


@dataclass(frozen=True)
class MergeRecord:
    """What a merge left behind, as found in the files, and what it cost."""

    account: Account
    weights: tuple[WeightAudit, ...]
    files: tuple[FileDigest, ...]
    base: tuple[FileDigest, ...]  # the base's shards
    seconds: Mapping[str, float]


def merge_stage(
    job: Job,
    folder: Path,
    prefix: str = "",
    *,
    most: int | None = None,
    journal: Path | None = None,
    say: Say = silent,
    advance: Advance = lambda done, total: None,
) -> MergeRecord:
    """Write the merged checkpoint to `folder`, read it back, and record what happened to it.

    `prefix` goes before the names of the files in the record, `most` to the audit (see
    `auditing.weights`), `journal` to `merging.write_merged`.
    """
    written = merging.write_merged(
        job.plan,
        job.adapter,
        job.checkpoint,
        job.settings_of_model,
        folder,
        beside=job.beside(),
        options=job.options.stated(),
        shard_bytes=job.options.shard_bytes,
        journal=journal,
        advance=advance,
    )
    say("auditing")
    begun = time.perf_counter()
    account, weights = audit(job, folder, most)
    seconds = {**written.seconds, "audit": time.perf_counter() - begun}
    files = tuple(FileDigest(prefix + f.name, f.size_bytes, f.digest) for f in written.files)
    return MergeRecord(account, weights, files, written.base, seconds)


def audit(
    job: Job, folder: Path, most: int | None = None
) -> tuple[Account, tuple[WeightAudit, ...]]:
    """Read the merged checkpoint in `folder`; return what was made of adapter and base.

    `most` is that of `auditing.weights`; None looks at every element.
    """
    written = Checkpoint.open(folder)
    with threadpoolctl.threadpool_limits(1):
        return (
            auditing.account(job.plan, job.adapter, job.checkpoint, written, most),
            auditing.weights(job.plan, job.adapter, job.checkpoint, written, most),
        )


def merged_modules(job: Job, folder: Path) -> Modules:
    """Return what the merged model in `folder` consists of, beside what it should.

    Where the plan needed no model, that is the names and shapes of its tensors.
    """
    if job.config is not None:
        from lora_export import loading

        return loading.modules_of(loading.load_merged(folder))
    found = Checkpoint.open(folder).tensors
    trained = bool(job.adapter.base.tensors)
    whose = "the model that the adapter was trained in" if trained else "the base"
    return Modules(
        expected={name: str(shape) for name, shape in job.tensors.items()},
        found={name: str(info.shape) for name, info in found.items()},
        lora_names=lora_names(found, job.tensors),
        claim=f"the tensors are those of {whose}, by name and shape",
    )


def merge_files(
    adapter: str | Path,
    *,
    base: str | None = None,
    out: str | Path = FOLDER,
    overwrite: bool = False,
    resume: bool = False,
    full_audit: bool = False,
    command: str = "lora_export.merge_files",
    say: Say = silent,
    advance: Advance = lambda done, total: None,
    **options: Any,
) -> Certificate:
    """Merge an adapter into its base as a directory of plain weights, and audit the result.

    Args:
        adapter: Adapter file or directory.
        base: Directory or hub id of the base model; None takes what the adapter names.
        out: Directory to write.
        overwrite: Replace an existing `out`.
        resume: Go on where a killed run with the same inputs and options came to.
        full_audit: Derive every element again, of a large model too.
        command: What to record as the command that was run.
        say: Called with the name of each stage as it begins.
        advance: Called with the bytes written and the bytes in all.
        options: Fields of `opening.Options`.

    Raises:
        InputError, AdapterMismatch: nothing is left behind then.
    """
    begun = time.perf_counter()
    out, wanted = Path(out), Options(**options)
    publishing.check_output(out, overwrite=overwrite, directory=True)
    say("reading adapter and base")
    job = open_job(adapter, base, wanted)
    publishing.check_output(out, overwrite=overwrite, directory=True, inputs=job.places())
    with publishing.staged(out, overwrite=overwrite, resume=resume) as folder:
        say("merging")
        merged = merge_stage(
            job,
            folder,
            most=None if full_audit else auditing.SAMPLE,
            journal=publishing.journal_of(folder),
            say=say,
            advance=advance,
        )
        evidence = Evidence(
            account=merged.account,
            weights=merged.weights,
            modules=merged_modules(job, folder),
            files=merged.files,
            measured=_costs({**merged.seconds, "merge": time.perf_counter() - begun}, merged.files),
        )
        given = job.inputs(shards=merged.base)
        return certify(evidence, checks.MERGE, command, given, job.settings(), cores())


def _costs(seconds: Mapping[str, float], files: tuple[FileDigest, ...]) -> tuple[Measurement, ...]:
    """Return what a merge cost: time of its parts and of all, speed, and memory of the process."""
    size = sum(file.size_bytes for file in files)
    return (
        *(Measurement(name, "merge", value, "s", 1) for name, value in seconds.items()),
        Measurement("throughput", "merge", size / seconds["streaming"] / 1e9, "GB/s", 1),
        Measurement("peak memory", "merge", peak_memory() / 1e6, "MB", 1),
    )


def recorded_options(folder: Path, replaced: Mapping[str, Any]) -> Options:
    """Return the options that the merge in `folder` was made with, some of them `replaced`."""
    written = storage.read_json(folder / PROVENANCE).get("options", {})
    try:
        return Options(**{**written, **replaced})
    except TypeError as error:
        raise InputError(f"{folder / PROVENANCE} is damaged: {error}") from error


def verify_merged(
    folder: str | Path,
    adapter: str | Path,
    *,
    base: str | None = None,
    command: str = "lora_export.verify_merged",
    say: Say = silent,
    **options: Any,
) -> Certificate:
    """Derive the merge of `adapter` into its base again, and hold the files in `folder` against it.

    Every element is derived, and nothing is written. The options are those that the merge was made
    with, as it wrote them down; `options` replace some of them.

    Raises:
        InputError: there is no merged model in `folder`, or adapter or base is damaged.
        AdapterMismatch: adapter and base do not fit together.
    """
    folder = Path(folder)
    if not (folder / PROVENANCE).is_file():
        raise InputError(f"{folder} was not written by `lora-export merge`")
    say("reading adapter and base")
    job = open_job(adapter, base, recorded_options(folder, options))
    say("deriving every tensor again")
    account, weights = audit(job, folder)
    say("hashing")
    recorded, now = merging.recorded_files(folder), storage.digest_tree(folder)
    names = {file.name for file in recorded}
    evidence = Evidence(
        account=account,
        weights=weights,
        modules=merged_modules(job, folder),
        files=recorded,
        files_now=tuple(file for file in now if file.name in names or is_loaded(file.name)),
    )
    return certify(evidence, checks.VERIFY, command, job.inputs(), job.settings(), cores())
