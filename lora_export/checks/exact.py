"""Is every merged weight the float64 value rounded once, and did every weight move that should?"""

from lora_export import checks
from lora_export.records import Evidence, Verdict

SCOPES = (checks.MERGE, checks.RUN, checks.VERIFY)


def judge(evidence: Evidence) -> list[Verdict]:
    """Fail on an element that is no nearest neighbour of the float64 value, or that stood still."""
    audits = evidence.weights
    if not audits:
        return [checks.not_run("exact", "merged weights", "no merged weight was audited")]
    elements = sum(audit.elements for audit in audits)
    of = sum(audit.of for audit in audits)
    sampled = (
        f"; derived {elements:,} of {of:,} elements; `lora-export verify` derives all"
        if elements < of
        else ""
    )
    worst = max(audits, key=lambda audit: (audit.misrounded, audit.largest_ulp))
    misrounded = checks.counted(
        "exact",
        "merged weights",
        sum(audit.misrounded for audit in audits),
        elements,
        "misrounded",
        f"worst {worst.largest_ulp:.3f} ulp, in {worst.tensor}{sampled}",
    )
    lost = max(audits, key=lambda audit: audit.lost_share)
    unmoved = checks.counted(
        "exact",
        "weights that move",
        sum(audit.unmoved for audit in audits),
        elements,
        "stood still",
        f"at most {lost.lost_share:.2e} of an update lost in rounding, in {lost.tensor}{sampled}",
    )
    return [misrounded, unmoved]
