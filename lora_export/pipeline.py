"""A run, top to bottom: open, plan, merge, export, record, time, judge, publish.

The stages (`lora_export.stages`) act and record; the checks judge afterwards, from the recordings
alone. What needs no model, `merge` and `verify`, stands in `lora_export.merged_files`.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_export import (
    certificates,
    checks,
    exporters,
    inputs,
    judging,
    merged_files,
    proving,
    publishing,
    recomputed,
    registry,
    stages,
    storage,
    timing,
)
from lora_export.companions import PROVENANCE
from lora_export.environment import peak_memory, resident_memory
from lora_export.errors import InputError, listed
from lora_export.judging import Say, certify, publish_evidence, silent
from lora_export.opening import Job, Options, open_job
from lora_export.records import (
    MERGED,
    PAST,
    REFERENCE,
    Artifact,
    Certificate,
    Evidence,
    FileDigest,
    Form,
    Measurement,
    Policy,
    Signature,
)

MERGED_FOLDER = "merged"


def run(
    adapter: str | Path,
    *,
    base: str | None = None,
    out: str | Path = "run",
    data: str | Path | None = None,
    formats: Sequence[str] = registry.DEFAULT_EXPORTERS,
    overwrite: bool = False,
    seed: int = 0,
    cache: bool = True,
    policy: Policy | None = None,
    command: str = "lora_export.run",
    say: Say = silent,
    **options: Any,
) -> Certificate:
    """Merge, export, record, time and judge; write it all to `out`, and return the certificate.

    Args:
        adapter: Adapter file or directory.
        base: Directory or hub id of the base model; None takes what the adapter names.
        out: Directory to write: merged/, the artifacts, certificate.json, report.md, evidence/.
        data: Sentences to compare on (see `inputs.read_texts`); None takes the shipped set.
        formats: Artifact formats.
        overwrite: Replace an existing `out`.
        seed: Of the generated inputs and of the order of timing.
        cache: Whether the artifacts of a model that generates take and give its cache.
        policy: Limits of the checks.
        command: What to record as the command that was run.
        say: Called with the name of each stage as it begins.
        options: Fields of `opening.Options`.

    Raises:
        InputError, AdapterMismatch, ExportFailed: nothing is left behind then.
    """
    wanted = Options(**options)
    out, source = Path(out), Path(data) if data is not None else None
    publishing.check_output(out, overwrite=overwrite, directory=True)
    asked = proving.Asked(*inputs.read_texts(source), seed, policy=policy or Policy())
    say("reading adapter and base")
    job = open_job(adapter, base, wanted)
    if all(pair.is_zero for pair in job.adapter.modules.values()):
        raise InputError(
            f"the adapter {adapter} is untrained: all {len(job.adapter.modules)} low-rank updates "
            "are zero, so there is nothing to prove"
        )
    if changed := {"tie_word_embeddings", "num_hidden_layers"} & job.settings_of_model.keys():
        raise InputError(
            f"the merge changes {', '.join(sorted(changed))} of the model, so that it cannot be "
            "compared with the unmerged one; use `lora-export merge`"
        )
    if wanted.tied == "both":
        raise InputError("--tied both is not what was trained: use `lora-export merge`")
    publishing.check_output(out, overwrite=overwrite, directory=True, inputs=job.places(source))
    with timing.all_threads() as threads, publishing.staged(out, overwrite=overwrite) as folder:
        folder.mkdir()
        truth = _truth(job, asked, cache, say)  # what cannot run unmerged is not merged either
        say("merging")
        merged = merged_files.merge_stage(job, folder / MERGED_FOLDER, f"{MERGED_FOLDER}/")
        say("loading the merged model")
        subject = stages.load_subject(folder / MERGED_FOLDER, cache=cache)
        artifacts = {}
        for name in formats:
            say(f"exporting {name}")
            artifacts[name] = stages.export_stage(name, subject, folder, say=say)
        places = {name: folder / artifact.files[0].name for name, artifact in artifacts.items()}
        made = proving.Made(
            folder / MERGED_FOLDER, merged.account, merged.weights, artifacts, places, subject.model
        )
        observed = proving.observe(truth, made, threads=threads, say=say)
        files = (*merged.files, *_own(artifacts))
        evidence = dataclasses.replace(observed, files=files, files_now=storage.digest_tree(folder))
        say("judging")
        given = job.inputs(source, merged.base)
        settings = _settings(truth, evidence)
        certificate = certify(evidence, checks.RUN, command, given, settings, threads)
        return publish_evidence(evidence, certificate, folder, say=say)


def check_files(
    adapter: str | Path,
    *,
    base: str | None = None,
    folder: str | Path = "run",
    merged: str | Path | None = None,
    artifacts: Sequence[str | Path] = (),
    out: str | Path | None = None,
    data: str | Path | None = None,
    overwrite: bool = False,
    seed: int = 0,
    cache: bool = True,
    quick: bool = False,
    precision: str = registry.FULL,
    policy: Policy | None = None,
    command: str = "lora_export.check_files",
    say: Say = silent,
    **options: Any,
) -> Certificate:
    """Prove a merged model and artifacts of it that are there already, whoever made them.

    Args:
        adapter: Adapter file or directory.
        base: Directory or hub id of the base model; None takes what the adapter names.
        folder: Directory that `run` wrote, or one that looks like it.
        merged: Directory of the merged model; None takes `folder`/merged.
        artifacts: Exported files; none takes those in `folder`.
        out: Directory to write certificate, report and evidence to; None writes nothing.
        data: Sentences to compare on (see `inputs.read_texts`); None takes the shipped set.
        overwrite: Replace an existing `out`.
        seed: Of the generated inputs and of the order of timing.
        cache: Whether the artifacts of a model that generates take and give its cache.
        quick: Look at fewer inputs, and leave out what takes long; see `checks.QUICK`.
        precision: Of the artifacts; it decides by which limits they are judged.
        policy: Limits of the checks.
        command: What to record as the command that was run.
        say: Called with the name of each stage as it begins.
        options: Fields of `opening.Options`. What the merge says about its form is taken from it;
            what decides the result has to be said here.

    Raises:
        InputError: there is nothing to check, adapter or base is missing or damaged, or the merge
            was made with other options.
        AdapterMismatch: adapter and base do not fit together.
        ExportFailed: an artifact cannot be opened.
    """
    folder, source = Path(folder), Path(data) if data is not None else None
    model = Path(merged) if merged is not None else folder / MERGED_FOLDER
    if not model.is_dir():
        raise InputError(f"no merged model in {model}; pass --merged")
    found = [path for path in exporters.artifacts_in(folder) if path.name not in judging.REPORTS]
    places = exporters.by_format([*map(Path, artifacts)] or found)
    if out is not None:
        publishing.check_output(Path(out), overwrite=overwrite, directory=True, inputs=[folder])
    texts, labels = inputs.read_texts(source)
    asked = proving.Asked(texts, labels, seed, quick, policy or Policy())
    say("reading adapter and base")
    job = open_job(adapter, base, _options(model, options))
    with timing.all_threads() as threads:
        truth = _truth(job, asked, cache, say)
        say("deriving every merged weight again")
        made = proving.made_of(job, model, places, precision)
        _refuse_other_calls(truth.subject.signature, made.artifacts)
        then = _files(model, made.artifacts)
        observed = proving.observe(truth, made, threads=threads, say=say)
        again = {name: stages.described(name, place) for name, place in places.items()}
        evidence = dataclasses.replace(observed, files=then, files_now=_files(model, again))
        if not (merged or artifacts) and (folder / judging.CERTIFICATE).is_file():
            told = dataclasses.replace(evidence, files=certificates.read(folder).outputs)
            evidence = judging.with_files_now(told, folder)
        say("judging")
        settings = _settings(truth, evidence)
        certificate = certify(evidence, asked.scope, command, job.inputs(source), settings, threads)
        if out is None:
            return certificate
        with publishing.staged(Path(out), overwrite=overwrite) as place:
            place.mkdir()
            return publish_evidence(evidence, certificate, place, say=say)


def _options(model: Path, given: Mapping[str, Any]) -> Options:
    """Return the options to derive the merged `model` again with.

    Raises:
        InputError: it says that it was made with others, which change what is right.
    """
    if not (model / PROVENANCE).is_file():
        return Options(**given)
    said = merged_files.recorded_options(model, {})
    form = {name: getattr(said, name) for name in ("dtype", "shard_size", "with_code")}
    wanted = Options(**{**form, **given})
    other = [
        f"{name} {value!r}" for name, value in vars(said).items() if getattr(wanted, name) != value
    ]
    if other:
        raise InputError(
            listed("the merge was made with options that are to be given here too", other)
        )
    return wanted


def _refuse_other_calls(signature: Signature, artifacts: Mapping[str, Artifact]) -> None:
    """Raise `InputError` where an artifact takes no cache, and is to be proven with one."""
    for artifact in artifacts.values():
        takes = any(spec.name.startswith(f"{PAST}.") for spec in artifact.inputs)
        if artifact.inputs and signature.has_cache and not takes:
            raise InputError(f"the {artifact.format} file takes no cache: pass --no-cache")


def _files(model: Path, artifacts: Mapping[str, Artifact]) -> tuple[FileDigest, ...]:
    return (*storage.digest_tree(model, prefix=f"{model.name}/"), *_own(artifacts))


def _own(artifacts: Mapping[str, Artifact]) -> tuple[FileDigest, ...]:
    """Return every file of `artifacts` once: they may share a tokenizer."""
    return tuple(dict.fromkeys(f for artifact in artifacts.values() for f in artifact.all_files))


def _truth(job: Job, asked: proving.Asked, cache: bool, say: Say) -> proving.Truth:
    say("running the unmerged model")
    return proving.truth_of(job, stages.load_unmerged(job), asked, cache=cache)


def _settings(truth: proving.Truth, evidence: Evidence) -> dict[str, Any]:
    """Return what decided the result beside the inputs."""
    settings = truth.job.settings(
        formats=[artifact.format for artifact in evidence.artifacts],
        inputs=inputs.summary(truth.batches),
        runtimes=evidence.runtimes,
        **truth.asked.stated,
    )
    kept = [a.format for a in evidence.artifacts if exporters.form_of(a) is None]
    if kept and "reproducible" in checks.asked_by(truth.asked.scope):
        settings["notes"].append(
            f"{', '.join(kept)}: not exported again, because it was written by other versions or "
            "by others, or calibrated on sentences that are not here"
        )
    if evidence.timings:
        settings["warm_up"] = timing.WARM_UP
    if count := sum(1 for _ in recomputed.updates(truth.subject.model)):
        settings["notes"].append(
            f"{count} weights of the unmerged model have no LoRA layer and are computed anew "
            "in every call: its latency is no measure of PEFT's"
        )
    return settings


def export_file(
    name: str,
    *,
    model: str | Path = MERGED_FOLDER,
    out: str | Path | None = None,
    data: str | Path | None = None,
    overwrite: bool = False,
    seed: int = 0,
    cache: bool = True,
    calibration: str | Path | None = None,
    policy: Policy | None = None,
    command: str = "lora_export.export_file",
    say: Say = silent,
    **form: Any,
) -> Certificate:
    """Export a merged model to the format `name`, and compare the file with the model in float64.

    Args:
        name: Artifact format.
        model: Directory of a merged model.
        out: File to write; None takes `model` and the suffix of the format.
        data: Sentences to compare on (see `inputs.read_texts`); None takes the shipped set.
        overwrite: Replace an existing `out`.
        seed: Of the generated inputs and of the order of timing.
        cache: Whether the artifact of a model that generates takes and gives its cache.
        calibration: Sentences to find ranges and sensitive layers on; None takes the shipped set.
        policy: Limits of the checks.
        command: What to record as the command that was run.
        say: Called with the name of each stage as it begins.
        form: Fields of `records.Form`.

    Raises:
        InputError, ExportFailed: nothing is left behind then.
    """
    source, wanted = Path(model), Form(**form)
    exporters.refuse_unknown(name, wanted)
    target = Path(out) if out is not None else Path(f"model{exporters.load(name).SUFFIX}")
    said = [Path(path) if path is not None else None for path in (data, calibration)]
    given = [path for path in said if path is not None]
    publishing.check_output(target, overwrite=overwrite, directory=False, inputs=[source, *given])
    if wanted.external_data:
        publishing.refuse_existing(
            target.with_name(target.name + publishing.COMPANION), overwrite=overwrite
        )
    (texts, labels), (examples, _) = map(inputs.read_texts, said)
    if calibration is not None and wanted.precision not in registry.CALIBRATED:
        raise InputError(f"--calibration is of no use for {wanted.precision}")
    say("loading the model")
    subject = stages.load_subject(source, cache=cache)
    with timing.all_threads() as threads, publishing.staged(target, overwrite=overwrite) as path:
        say(f"exporting {name}")
        held, before, begun = resident_memory(), peak_memory(), time.perf_counter()
        artifact = stages.export_stage(name, subject, path.parent, path.name, wanted, examples, say)
        peak = peak_memory()
        cost = [
            Measurement("export", name, time.perf_counter() - begun, "s", 1),
            Measurement("peak memory", f"{name}, model included", peak / 1e6, "MB", 1),
        ]
        if peak > max(before, held):  # or the peak is of something earlier
            above = (peak - held) / 1e6
            cost.append(Measurement("peak memory", f"{name}, above the model", above, "MB", 1))
        batches = stages.batches_of(subject, texts, labels, seed)
        say(f"comparing on {inputs.summary(batches)}")
        runner = stages.open_runners({name: artifact}, path.parent, threads)[name]
        evidence = stages.with_artifact(
            stages.merged_evidence(subject, batches),
            artifact,
            runner,
            path.parent,
            measured=tuple(cost),
            replies=stages.replies(subject, runner, batches) if wanted.text else (),
            policy=policy or Policy(),
        )
        reference = subject.runner(REFERENCE, stages.exact(subject.model))
        for one in (reference, subject.runner(MERGED), runner):
            if one.name not in evidence.recordings or not evidence.recordings[one.name].errors:
                evidence = proving.observe_runner(evidence, one, checks.EXPORT)
        evidence = proving.look_inside(evidence, subject, artifact, path, checks.EXPORT, say)
        digests = (*storage.digest_tree(source), *map(storage.digest, inputs.files(given)))
        settings: dict[str, Any] = {"seed": seed, "inputs": inputs.summary(batches), **vars(wanted)}
        settings["runtimes"] = stages.settings_of([runner], threads)
        settings["notes"] = notes = []
        if calibration is not None:
            settings["calibration"] = Path(calibration).name
        elif wanted.precision in registry.CALIBRATED and data is None and subject.tokens:
            notes.append(
                "the sentences that the artifact is judged on are those that its layers were "
                "chosen on; --data gives others"
            )
        if wanted.text:
            notes.append(
                "sentences went in as text; shapes, which no text has, as token ids behind the "
                "tokenizer of the same file"
            )
        return certify(evidence, checks.EXPORT, command, digests, settings, threads)
