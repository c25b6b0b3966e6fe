"""Is every merged weight the float64 value rounded once, and did every weight move that should?"""

from lora_export import checks
from lora_export.errors import listed
from lora_export.records import Evidence, Verdict, WeightAudit

SCOPES = (checks.MERGE, checks.QUICK, checks.RUN, checks.VERIFY)
_FEW = 0.01  # of the elements: they are wrong, not the update
_SAME = 1e-3  # of an update: two that differ by less are one, rounded


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
    wrong = [audit for audit in audits if audit.misrounded]
    note = f"worst {worst.largest_ulp:.3f} ulp, in {worst.tensor}{sampled}"
    if wrong:
        note = listed(f"{note}; in {len(wrong)} of {len(audits)} tensors", map(_found, wrong))
    misrounded = checks.counted(
        "exact",
        "merged weights",
        sum(audit.misrounded for audit in audits),
        elements,
        "misrounded",
        note,
        [audit.tensor for audit in wrong],
    )
    lost = max(audits, key=lambda audit: audit.lost_share)
    unmoved = checks.counted(
        "exact",
        "weights that move",
        sum(audit.unmoved for audit in audits),
        elements,
        "stood still",
        f"at most {lost.lost_share:.2e} of an update lost in rounding, in {lost.tensor}{sampled}",
        [audit.tensor for audit in audits if audit.unmoved],
    )
    return [misrounded, unmoved]


def _found(audit: WeightAudit) -> str:
    """Return in words what a wrong tensor holds instead of its update."""
    if audit.misrounded <= _FEW * audit.elements:
        what = f"{audit.misrounded:,} of {audit.elements:,} elements"
    elif abs(audit.applied) <= _SAME:
        what = "something else than its update" if audit.strange else "its update is missing"
    elif audit.strange <= _SAME:
        what = f"{audit.applied:.4g} times its update"
    else:
        what = f"{audit.applied:.2g} times its update, and {audit.strange:.0%} of something else"
    return f"{audit.tensor} ({what})"
