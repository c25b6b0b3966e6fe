"""Does the merged model compute what the unmerged one computes?"""

from lora_export import checks
from lora_export.records import MERGED, Evidence, Verdict

SCOPES = (checks.QUICK, checks.RUN)


def judge(evidence: Evidence) -> list[Verdict]:
    """Pass where the merged model stays within the tolerance of the float64 reference."""
    return [checks.within_tolerance("equivalence", MERGED, evidence)]
