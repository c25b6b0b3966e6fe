"""Does each exported artifact compute what the reference computes, at every shape?"""

from lora_export import checks
from lora_export.records import Evidence, Verdict

SCOPES = (checks.TRIAL, checks.EXPORT, checks.QUICK, checks.RUN, checks.REPLAY)


def applies(evidence: Evidence) -> bool:
    """Return whether there is an artifact in full precision; `fidelity` judges the others."""
    return not evidence.artifacts or not all(a.is_reduced for a in evidence.artifacts)


def judge(evidence: Evidence) -> list[Verdict]:
    """Pass where an artifact stays within the tolerance of the float64 reference."""
    found = [
        checks.within_tolerance("parity", artifact.format, evidence)
        for artifact in evidence.artifacts
        if not artifact.is_reduced
    ]
    return found or [checks.not_run("parity", "artifacts", "no artifact was recorded")]
