"""Does a second export of the same model give the same bytes?"""

from lora_export import checks, exporters
from lora_export.errors import listed
from lora_export.records import Evidence, Repeat, Verdict

CHECK = "reproducible"
SCOPES = (checks.RUN,)


def applies(evidence: Evidence) -> bool:
    """Return whether there is an artifact that could be made again."""
    return not evidence.artifacts or any(map(exporters.form_of, evidence.artifacts))


def judge(evidence: Evidence) -> list[Verdict]:
    """Fail on a file whose digest differs, and name what differs inside.

    Of artifacts that cannot be made again from the model alone nothing is said: another's, or one
    that was calibrated on sentences of its own.
    """
    repeats = {repeat.artifact: repeat for repeat in evidence.repeats}
    found = [
        _judge(repeats[artifact.format])
        if artifact.format in repeats
        else checks.not_run(CHECK, artifact.format, "was exported only once")
        for artifact in evidence.artifacts
        if artifact.format in repeats or exporters.form_of(artifact)
    ]
    return found or [checks.not_run(CHECK, "artifacts", "none was exported")]


def _judge(repeat: Repeat) -> Verdict:
    first, second = ({f.name: f.digest for f in files} for files in (repeat.first, repeat.second))
    names = first.keys() | second.keys()
    changed = {name for name in names if first.get(name) != second.get(name)}
    where = [*sorted(changed), *repeat.differing] if changed else []
    note = listed("differs", where) if changed else "a second export gives the same digests"
    return checks.counted(
        CHECK, repeat.artifact, len(changed), len(names), "files that differ", note, where
    )
