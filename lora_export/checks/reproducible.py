"""Does a second export of the same model give the same bytes?"""

from lora_export import checks
from lora_export.errors import listed
from lora_export.records import Evidence, Repeat, Verdict

CHECK = "reproducible"
SCOPES = (checks.RUN,)


def judge(evidence: Evidence) -> list[Verdict]:
    """Fail on a file whose digest differs, and name what differs inside."""
    repeats = {repeat.artifact: repeat for repeat in evidence.repeats}
    found = [
        _judge(repeats[artifact.format])
        if artifact.format in repeats
        else checks.not_run(CHECK, artifact.format, "was exported only once")
        for artifact in evidence.artifacts
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
