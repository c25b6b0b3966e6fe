"""Is in the graph that is run what was to be fused or quantised? Counted, not assumed."""

from lora_export import checks
from lora_export.errors import listed
from lora_export.records import Evidence, Fusion, Verdict

CHECK = "fusions"
SCOPES = (checks.EXPORT, checks.RUN)


def applies(evidence: Evidence) -> bool:
    """Return whether anything is expected of a graph that can be looked at."""
    return bool(evidence.fusions)


def judge(evidence: Evidence) -> list[Verdict]:
    """Fail where an artifact has fewer fused operations than the model has layers for them."""
    names = dict.fromkeys(fusion.artifact for fusion in evidence.fusions)
    found = [_judge(name, [f for f in evidence.fusions if f.artifact == name]) for name in names]
    return found or [checks.not_run(CHECK, "artifacts", "nothing is expected to be fused")]


def _judge(name: str, fusions: list[Fusion]) -> Verdict:
    wrong = [fusion for fusion in fusions if not fusion.found >= fusion.expected]
    said = [f"{f.found} of {f.expected} {f.what} ({f.note or 'none'})" for f in wrong or fusions]
    note = listed("missing", said) if wrong else "fused: " + "; ".join(said)
    missing = sum(fusion.expected - fusion.found for fusion in wrong)
    compared = sum(fusion.expected for fusion in fusions)
    return checks.counted(
        CHECK, name, missing, compared, "not fused", note, (fusion.what for fusion in wrong)
    )
