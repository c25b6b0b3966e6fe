"""From evidence to certificate, and again later from the files of a run. No torch, no model."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_export import (
    certificates,
    checks,
    codec,
    companions,
    environment,
    measurements,
    merging,
    publishing,
    report,
    storage,
)
from lora_export.checks import intact
from lora_export.errors import InputError, listed
from lora_export.records import Certificate, Evidence, FileDigest, Verdict

CERTIFICATE, REPORT, EVIDENCE = certificates.NAME, "report.md", "evidence"
# What is written of a certificate: file -> report.
REPORTS = {CERTIFICATE: "json", REPORT: "markdown", "report.xml": "junit", "report.html": "html"}
Say = Callable[[str], None]


def silent(stage: str) -> None:
    """Say nothing: the default where nobody watches."""


def certify(
    evidence: Evidence,
    scope: str,
    command: str,
    given: Sequence[FileDigest],
    settings: Mapping[str, Any],
    threads: int,
) -> Certificate:
    """Return the certificate over `evidence`."""
    return Certificate(
        command=command,
        verdicts=checks.judge(evidence, scope),
        measurements=measurements.measure(evidence),
        inputs=tuple(given),
        outputs=evidence.files,
        environment=environment.describe(threads),
        settings={**settings, "scope": scope},
    )


def digests_now(files: Sequence[FileDigest], folder: Path) -> tuple[FileDigest, ...]:
    """Return the digests of those of `files` that are still in `folder`."""
    return tuple(
        storage.digest(folder / file.name, file.name)
        for file in files
        if (folder / file.name).is_file()
    )


def write_certificate(
    certificate: Certificate, folder: Path, evidence: Evidence | None = None, *, say: Say = silent
) -> None:
    """Write the certificate to `folder` as each of `REPORTS` shows it.

    A report that needs a package which is not installed is left out, and an older one is removed:
    no report may show another certificate.
    """
    for name, kind in REPORTS.items():
        try:
            text = report.render(kind, certificate, evidence)
        except InputError as error:
            say(f"{name} is left out: {error}")
            (folder / name).unlink(missing_ok=True)
            continue
        with publishing.staged(folder / name, overwrite=True) as file:
            file.write_text(text, "utf-8")


def _held_against(verdicts: Sequence[Verdict], old: Certificate) -> list[Verdict]:
    """Return the verdicts of the old certificate that are gone."""
    told = {(v.check, v.subject) for v in old.verdicts}
    lost = told - {(v.check, v.subject) for v in verdicts} - {("intact", "evidence")}
    return [checks.not_run(*claim, "its evidence is gone") for claim in sorted(lost)]


def changed_evidence(folder: Path, old: Certificate) -> list[Verdict]:
    """Return a verdict that fails where the evidence in `folder` is not that of its certificate."""
    found = [storage.digest(file) for file in sorted((folder / EVIDENCE).iterdir())]
    changed = {file.name for file in {*found} ^ {*old.evidence}}
    if not changed:
        return []
    note = listed("changed since", changed)
    return [
        checks.counted("intact", "evidence", len(changed), len(found), "changed", note, changed)
    ]


def publish_evidence(
    evidence: Evidence, certificate: Certificate, folder: Path, *, say: Say = silent
) -> Certificate:
    """Write the evidence and the certificate over it to `folder`; return the certificate."""
    (folder / EVIDENCE).mkdir()
    codec.save(evidence, folder / EVIDENCE, EVIDENCE)
    digests = tuple(storage.digest(file) for file in sorted((folder / EVIDENCE).iterdir()))
    complete = dataclasses.replace(certificate, evidence=digests)
    write_certificate(complete, folder, evidence, say=say)
    return complete


def files_in(folder: Path, recorded: Sequence[FileDigest]) -> tuple[FileDigest, ...]:
    """Return the `recorded` files in `folder` as they are now, and others that a loader would read.

    Those lie beside recorded ones; what is said about the files is none of them.
    """
    names = {file.name for file in recorded}
    folders = {Path(name).parent for name in names}
    ours = {companions.PROVENANCE, *REPORTS} - names
    return tuple(
        file
        for file in storage.digest_tree(folder)
        if file.name in names
        or (
            file.name not in ours
            and Path(file.name).parent in folders
            and companions.is_loaded(Path(file.name).name)
        )
    )


def evidence_of(folder: Path) -> Evidence | None:
    """Return the evidence of the run in `folder`; None where it keeps none.

    Raises:
        InputError: it is damaged.
    """
    return (
        codec.load(Evidence, folder / EVIDENCE, EVIDENCE) if (folder / EVIDENCE).exists() else None
    )


def saved_evidence(folder: Path) -> Evidence:
    """Return the evidence that the run in `folder` saved.

    Raises:
        InputError: there is none, or it is damaged.
    """
    if not folder.is_dir():
        raise InputError(f"no run in {folder}: run `lora-export run` first, or pass --run")
    found: Evidence = codec.load(Evidence, folder / EVIDENCE, EVIDENCE)
    return found


def with_files_now(evidence: Evidence, folder: Path) -> Evidence:
    """Return `evidence` with its files as they are now in `folder`.

    Raises:
        InputError: none of them is there.
    """
    now = files_in(folder, evidence.files)
    if evidence.files and not {f.name for f in evidence.files} & {f.name for f in now}:
        raise InputError(f"the files that were checked lie elsewhere, not in {folder}")
    return dataclasses.replace(evidence, files_now=now)


def verify_files(
    folder: str | Path, *, command: str = "lora_export.verify_files", say: Say = silent
) -> Certificate:
    """Hold the files in `folder` against the digests that were written down beside them.

    `folder` has a certificate, as a run does, or is a merged model. Nothing is derived, nothing is
    written. A file that was not recorded is a fault where a loader would read it.

    Raises:
        InputError: there is no record in `folder`, or it is damaged.
    """
    folder = Path(folder)
    if (folder / CERTIFICATE).is_file():
        record, made = CERTIFICATE, certificates.read(folder)
        kept = [dataclasses.replace(f, name=f"{EVIDENCE}/{f.name}") for f in made.evidence]
        recorded = (*made.outputs, *kept)
    elif (folder / companions.PROVENANCE).is_file():
        record, recorded = companions.PROVENANCE, merging.recorded_files(folder)
    else:
        raise InputError(f"{folder} has neither {CERTIFICATE} nor {companions.PROVENANCE}")
    say("hashing")
    now = files_in(folder, recorded)
    return Certificate(
        command=command,
        verdicts=tuple(intact.judge(Evidence(files=recorded, files_now=now))),
        measurements=(),
        inputs=(storage.digest(folder / record),),
        outputs=now,
        environment=environment.describe(1),
        settings={},
    )


def check_run(folder: str | Path, *, say: Say = silent) -> Certificate:
    """Judge the run in `folder` again, from its evidence and from the files as they are now.

    No model is loaded. The certificate and the report are written anew.

    Raises:
        InputError: there is no evidence in `folder`, or it is damaged.
    """
    folder = Path(folder)
    say("judging recorded evidence")
    evidence = with_files_now(saved_evidence(folder), folder)
    old = certificates.read(folder)
    scope = str(old.settings.get("scope", checks.RUN))
    fresh = certify(evidence, scope, old.command, old.inputs, old.settings, 1)
    lost = _held_against(fresh.verdicts, old)
    verdicts = (*fresh.verdicts, *lost, *changed_evidence(folder, old))
    certificate = dataclasses.replace(
        fresh, verdicts=verdicts, environment=old.environment, evidence=old.evidence
    )
    write_certificate(certificate, folder, evidence, say=say)
    return certificate
