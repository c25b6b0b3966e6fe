"""Try the sensible ways to run a merged model on this machine, and write the best proven one.

Each is exported, opened, judged as `export` judges it, and timed in pairs with eager torch. What is
not proven is never chosen, however fast; what cannot or could not be tried is listed with a reason.
"""

import dataclasses
import shutil
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_export import (
    checks,
    environment,
    exporters,
    footprint,
    inputs,
    publishing,
    stages,
    storage,
    timing,
)
from lora_export.candidates import (
    ORDER_REASON,
    Configuration,
    Figures,
    LeftOut,
    Row,
    as_fast,
    candidates,
    fastest,
    front,
)
from lora_export.codec import to_json
from lora_export.compare import distance, median_interval, noise_floor, ratios
from lora_export.errors import InputError, first_line, listed
from lora_export.judging import Say, certify, digests_now, silent, write_certificate
from lora_export.records import (
    MERGED,
    REFERENCE,
    Artifact,
    Certificate,
    Evidence,
    FileDigest,
    Form,
    Measurement,
)
from lora_export.report.json import strict

TUNING = "tuning.json"
SCHEMA = 1
TRIALS = "trials"  # a folder for each file, while they are tried
# Of the time budget, the most that the rounds of one configuration may take, once there are enough
# of them for an interval: so the first few leave time for the others.
TIMED_SHARE = 1 / 12


@dataclass(frozen=True)
class Tuning:
    """What was tried, what was not, and what was chosen."""

    rows: tuple[Row, ...]  # in the order of trying
    front: tuple[Configuration, ...]  # of latency, size, memory and deviation, among the proven
    chosen: Configuration | None
    perhaps_as_fast: tuple[Configuration, ...]  # their intervals overlap that of the chosen one
    skipped: tuple[LeftOut, ...]  # cannot run here, or is no gain here
    not_tried: tuple[LeftOut, ...]
    settings: Mapping[str, Any]
    certificate: Certificate | None  # of the chosen one

    @property
    def ok(self) -> bool:
        """Whether the chosen configuration is proven, by its files as they were written."""
        return self.certificate is not None and self.certificate.ok

    def facts(self) -> dict[str, Any]:
        """Return all of it as JSON's types; the certificate stands in a file of its own."""
        known = dataclasses.replace(self, certificate=None)
        found: dict[str, Any] = strict(to_json(known, {}))
        del found["certificate"]
        for row, told in zip(self.rows, found["rows"], strict=True):
            told["proven"] = row.is_proven
        return {"schema": SCHEMA, "ok": self.ok, **found}


@dataclass(frozen=True)
class _Bench:
    """What all configurations are held against."""

    subject: stages.Subject
    evidence: Evidence  # batches, and the recordings of the reference and of the merged model
    shape: tuple[int, int]  # batch and length of the latency
    eager_threads: int
    seed: int
    most_seconds: float  # of timing
    trials: Path

    def folder(self, file: tuple[str, str]) -> Path:
        """The folder of one file and its tokenizer."""
        return self.trials / "-".join(file)


def tune(
    model: str | Path = "merged",
    *,
    out: str | Path = "tuned",
    time_budget: float = 120.0,
    batch: int = 1,
    length: int = 128,
    threads: Sequence[int] = (),
    data: str | Path | None = None,
    formats: Sequence[str] = (),
    precisions: Sequence[str] = (),
    overwrite: bool = False,
    seed: int = 0,
    cache: bool = True,
    command: str = "lora_export.tune",
    say: Say = silent,
) -> Tuning:
    """Try the configurations of a merged model; write the fastest proven one to `out`.

    Args:
        model: Directory of a merged model.
        out: Directory to write: the artifact, tokenizer/, tuning.json, certificate.json, report.md;
            only tuning.json where nothing is proven.
        time_budget: Seconds for trying. What has begun is finished, and the first always begins.
        batch: Of the inputs that are timed.
        length: Of the inputs that are timed; at most the model's longest.
        threads: Numbers of threads to try; none are one and all cores.
        data: Sentences to compare on (see `inputs.read_texts`); None takes the shipped set.
        formats: Artifact formats; none are all of them.
        precisions: Precisions; none are those that gain something on this processor.
        overwrite: Replace an existing `out`.
        seed: Of the generated inputs and of the order of timing.
        cache: Whether the artifacts of a model that generates take and give its cache.
        command: What to record as the command that was run.
        say: Called with each stage and each configuration as it begins.

    Raises:
        InputError: there is nothing to try, or what is given is wrong; nothing is written then.
    """
    source, out = Path(model), Path(out)
    given = [Path(data)] if data is not None else []
    publishing.check_output(out, overwrite=overwrite, directory=True, inputs=[source, *given])
    wanted, skipped = _candidates(formats, precisions, threads)
    texts, labels = inputs.read_texts(given[0] if given else None)
    say("loading the model")
    subject = stages.load_subject(source, cache=cache)
    with timing.all_threads(), publishing.staged(out, overwrite=overwrite) as path:
        path.mkdir()
        batches = stages.batches_of(subject, texts, labels, seed)
        say(f"evaluating the model in float64 on {inputs.summary(batches)}")
        bench = _Bench(
            subject,
            evidence=stages.merged_evidence(subject, batches),
            shape=(batch, min(length, subject.signature.max_length)),
            eager_threads=max(one.threads for one in wanted),
            seed=seed,
            most_seconds=time_budget * TIMED_SHARE,
            trials=path / TRIALS,
        )
        rows, not_tried, evidence = _try_all(bench, wanted, time_budget, say)
        settings = {
            "seed": seed,
            "inputs": inputs.summary(batches),
            "batch": batch,
            "length": bench.shape[1],
            "eager_threads": bench.eager_threads,
            "time_budget_s": time_budget,
            "order": ORDER_REASON,
        }
        chosen, certificate = fastest(rows), None
        if chosen is not None and evidence is not None:
            say(f"writing {chosen.configuration}")
            digests = (*storage.digest_tree(source), *map(storage.digest, inputs.files(given)))
            told = {**settings, **dataclasses.asdict(chosen.configuration)}
            certificate = _publish(bench, chosen, evidence, path, command, digests, told)
        shutil.rmtree(bench.trials, ignore_errors=True)
        tuning = Tuning(
            rows,
            tuple(row.configuration for row in front(rows)),
            chosen.configuration if chosen else None,
            tuple(row.configuration for row in as_fast(rows, chosen)) if chosen else (),
            skipped,
            not_tried,
            {"command": command, **settings, **environment.describe(bench.eager_threads)},
            certificate,
        )
        storage.write_json(path / TUNING, tuning.facts())
        return tuning


def _candidates(
    formats: Sequence[str], precisions: Sequence[str], threads: Sequence[int]
) -> tuple[tuple[Configuration, ...], tuple[LeftOut, ...]]:
    names = formats or exporters.names()
    wanted, skipped = candidates(
        {name: exporters.load(name).PRECISIONS for name in names},
        set(threads) or {1, environment.cores()},
        tuple(dict.fromkeys(precisions)),
        exporters.lacking,
        environment.instruction_sets(),
    )
    if not wanted:
        why = [f"{left.what}: {left.reason}" for left in skipped]
        raise InputError(listed("there is nothing to try", why))
    return wanted, skipped


def _try_all(
    bench: _Bench, wanted: Sequence[Configuration], time_budget: float, say: Say
) -> tuple[tuple[Row, ...], tuple[LeftOut, ...], Evidence | None]:
    """Return the rows, what was not tried, and the evidence of the fastest proven row.

    Files that nobody needs any more are removed on the way.
    """
    begun = time.monotonic()
    rows: list[Row] = []
    not_tried: list[LeftOut] = []
    artifacts: dict[tuple[str, str], Artifact] = {}
    best: tuple[Row, Evidence] | None = None
    unproven: set[tuple[str, str]] = set()
    for place, one in enumerate(wanted):
        if rows and time.monotonic() - begun > time_budget:
            not_tried.append(LeftOut(str(one), f"the budget of {time_budget:g} s was spent"))
            continue
        if one.file in unproven:
            not_tried.append(LeftOut(str(one), "the same file is not proven with more threads"))
            continue
        say(f"trying {one}")
        row, evidence = _try(bench, one, artifacts)
        rows.append(row)
        if not row.is_proven:
            unproven.add(one.file)
        elif evidence is not None and fastest(rows) == row:
            best = row, evidence
        needed = {later.file for later in wanted[place + 1 :]} - unproven
        needed |= {best[0].configuration.file} if best else set()
        _remove(bench, {one.file, *artifacts} - needed)
    return tuple(rows), tuple(not_tried), best[1] if best else None


def _remove(bench: _Bench, files: Iterable[tuple[str, str]]) -> None:
    for file in files:
        shutil.rmtree(bench.folder(file), ignore_errors=True)


def _try(
    bench: _Bench, one: Configuration, artifacts: dict[tuple[str, str], Artifact]
) -> tuple[Row, Evidence | None]:
    """Export (where `artifacts` has no such file yet), judge and measure one configuration."""
    folder, subject = bench.folder(one.file), bench.subject
    try:
        if one.file not in artifacts:
            folder.mkdir(parents=True)
            artifacts[one.file] = stages.export_stage(
                one.format, subject, folder, form=Form(one.precision)
            )
        artifact = artifacts[one.file]
        opened = stages.open_runners({one.format: artifact}, folder, one.threads)[one.format]
        runner = timing.OnThreads(opened, one.threads)
        evidence = stages.with_artifact(bench.evidence, artifact, runner, folder)
        verdicts = checks.judge(evidence, checks.TRIAL)
        timed = timing.measure_shape(
            {MERGED: timing.OnThreads(subject.runner(MERGED), bench.eager_threads), "it": runner},
            subject.signature,
            bench.shape,
            threads=one.threads,
            seed=bench.seed,
            against=MERGED,
            most_seconds=bench.most_seconds,
        )
        arrays = inputs.made(subject.signature, *bench.shape, "right", bench.seed)
        path = folder / artifact.files[0].name
        memory = footprint.grown_bytes(one.format, path, one.threads, arrays)
    except OSError:
        raise  # a full disk is no fault of the configuration
    except Exception as error:  # runtimes and compilers raise as it comes; the others go on
        return Row(one, None, fault=f"{type(error).__name__}: {first_line(error)}"), None
    ratio, low, high = median_interval(paired := ratios(timed, "it", MERGED))
    figures = Figures(
        ratio=ratio,
        size_bytes=sum(file.size_bytes for file in artifact.files),
        memory_bytes=memory,
        deviation=_deviation(evidence, one.format),
        low=low,
        high=high,
        pairs=len(paired),
        median_ms=statistics.median(timed.samples_ms["it"]),
        eager_ms=statistics.median(timed.samples_ms[MERGED]),
    )
    samples = {MERGED: timed.samples_ms[MERGED], one.format: timed.samples_ms["it"]}
    cost = Measurement("memory of a fresh process", one.format, memory / 1e6, "MB", 1)
    timings = (dataclasses.replace(timed, samples_ms=samples),)
    complete = dataclasses.replace(evidence, timings=timings, measured=(cost,))
    return Row(one, figures, verdicts), complete


def _deviation(evidence: Evidence, name: str) -> float:
    """Return the largest distance from the reference, each output in units of its noise floor."""
    reference, other = evidence.recordings[REFERENCE], evidence.recordings[name]
    return max(
        distance(reference, other, evidence, output).largest / noise_floor(evidence, output).largest
        for output in reference.outputs[0]
    )


def _publish(
    bench: _Bench,
    chosen: Row,
    evidence: Evidence,
    path: Path,
    command: str,
    given: Sequence[FileDigest],
    settings: Mapping[str, Any],
) -> Certificate:
    """Move the files of the chosen configuration to `path`, and certify them as they are there."""
    for entry in bench.folder(chosen.configuration.file).iterdir():
        entry.rename(path / entry.name)
    moved = dataclasses.replace(evidence, files_now=digests_now(evidence.files, path))
    threads = chosen.configuration.threads
    certificate = certify(moved, checks.TRIAL, command, given, settings, threads)
    write_certificate(certificate, path, moved)
    return certificate
