"""Does each exported artifact compute what the reference computes, at every shape?"""

from lora_export import checks
from lora_export.records import Evidence, Verdict

SCOPES = (checks.EXPORT, checks.RUN)


def judge(evidence: Evidence) -> list[Verdict]:
    """Pass where an artifact stays within the tolerance of the float64 reference."""
    found = [
        checks.within_tolerance("parity", artifact.format, evidence)
        for artifact in evidence.artifacts
    ]
    return found or [checks.not_run("parity", "artifacts", "no artifact was recorded")]
