"""From evidence to certificate, and again later from the files of a run. No torch, no model."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_export import checks, codec, environment, measurements, publishing, report, storage
from lora_export.errors import InputError, listed
from lora_export.records import Certificate, Evidence, FileDigest, Verdict

CERTIFICATE, REPORT, EVIDENCE = "certificate.json", "report.md", "evidence"
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
        settings=settings,
    )


def digests_now(files: Sequence[FileDigest], folder: Path) -> tuple[FileDigest, ...]:
    """Return the digests of those of `files` that are still in `folder`."""
    return tuple(
        storage.digest(folder / file.name, file.name)
        for file in files
        if (folder / file.name).is_file()
    )


def write_certificate(certificate: Certificate, folder: Path) -> None:
    """Write certificate.json and report.md to `folder`."""
    for name, kind in ((CERTIFICATE, "json"), (REPORT, "markdown")):
        with publishing.staged(folder / name, overwrite=True) as file:
            file.write_text(report.render(kind, certificate), "utf-8")


def _held_against(
    verdicts: Sequence[Verdict],
    found: Sequence[FileDigest],
    told: set[tuple[str, str]],
    recorded: Sequence[FileDigest],
) -> list[Verdict]:
    """Return what only the old certificate can tell: other evidence, a verdict that is gone."""
    lost = told - {(v.check, v.subject) for v in verdicts} - {("intact", "evidence")}
    faults = [checks.not_run(*claim, "its evidence is gone") for claim in sorted(lost)]
    if changed := {file.name for file in set(found) ^ set(recorded)}:
        note = listed("changed since", changed)
        faults.append(
            checks.counted("intact", "evidence", len(changed), len(found), "changed", note)
        )
    return faults


def publish_evidence(evidence: Evidence, certificate: Certificate, folder: Path) -> Certificate:
    """Write the evidence and the certificate over it to `folder`; return the certificate."""
    (folder / EVIDENCE).mkdir()
    codec.save(evidence, folder / EVIDENCE, EVIDENCE)
    digests = tuple(storage.digest(file) for file in sorted((folder / EVIDENCE).iterdir()))
    complete = dataclasses.replace(certificate, evidence=digests)
    write_certificate(complete, folder)
    return complete


def files_in(folder: Path) -> tuple[FileDigest, ...]:
    """Return the files of the run in `folder` as they are now, but for what is said about them."""
    ours = (CERTIFICATE, REPORT)
    return tuple(
        file
        for file in storage.digest_tree(folder)
        if file.name not in ours and not file.name.startswith(f"{EVIDENCE}/")
    )


def outputs_of(folder: Path) -> tuple[FileDigest, ...]:
    """Return the files of the run in `folder` as its certificate has them; none without one."""
    if not (folder / CERTIFICATE).is_file():
        return ()
    told = storage.read_json(folder / CERTIFICATE).get("outputs", [])
    found: tuple[FileDigest, ...] = codec.from_json(tuple[FileDigest, ...], told, {})
    return found


def evidence_of(folder: Path) -> Evidence:
    """Return the evidence that the run in `folder` saved.

    Raises:
        InputError: there is none, or it is damaged.
    """
    if not folder.is_dir():
        raise InputError(f"no run in {folder}: run `lora-export run` first, or pass --run")
    found: Evidence = codec.load(Evidence, folder / EVIDENCE, EVIDENCE)
    return found


def check_run(folder: str | Path, *, say: Say = silent) -> Certificate:
    """Judge the run in `folder` again, from its evidence and from the files as they are now.

    No model is loaded. The certificate and the report are written anew.

    Raises:
        InputError: there is no evidence in `folder`, or it is damaged.
    """
    folder = Path(folder)
    say("judging recorded evidence")
    evidence = evidence_of(folder)
    evidence = dataclasses.replace(evidence, files_now=files_in(folder))
    old = storage.read_json(folder / CERTIFICATE)
    try:
        given = codec.from_json(tuple[FileDigest, ...], old["inputs"], {})
        command, settings = str(old["command"]), dict(old["settings"])
        surroundings = dict(old["environment"])
        recorded = codec.from_json(tuple[FileDigest, ...], old["evidence"], {})
        told = {(str(v["check"]), str(v["subject"])) for v in old["verdicts"]}
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder / CERTIFICATE} is damaged: {error}") from error
    fresh = certify(evidence, checks.RUN, command, given, settings, 1)
    found = tuple(storage.digest(file) for file in sorted((folder / EVIDENCE).iterdir()))
    verdicts = (*fresh.verdicts, *_held_against(fresh.verdicts, found, told, recorded))
    certificate = dataclasses.replace(
        fresh, verdicts=verdicts, environment=surroundings, evidence=recorded
    )
    write_certificate(certificate, folder)
    return certificate
