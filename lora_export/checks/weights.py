"""Are the tensors inside each artifact those of the merged model, bit for bit?"""

from lora_export import checks, matching
from lora_export.errors import listed
from lora_export.records import Artifact, Evidence, Placement, Verdict

SCOPES = (checks.EXPORT, checks.QUICK, checks.RUN)


def judge(evidence: Evidence) -> list[Verdict]:
    """Fail on a tensor that is not in an artifact, or of which a bit differs there."""
    found = [_judge(artifact, evidence) for artifact in evidence.artifacts]
    return found or [checks.not_run("weights", "artifacts", "no artifact was recorded")]


def _judge(artifact: Artifact, evidence: Evidence) -> Verdict:
    mine = [p for p in evidence.placements if p.artifact == artifact.format]
    placements = [p for p in mine if p.how != matching.UNKNOWN]
    if not placements:
        return checks.not_run("weights", artifact.format, "nobody looked at the tensors inside")
    faults = [p for p in placements if p.differing or not p.found]
    good = [p for p in placements if p not in faults]
    rounded = sum(p.how == matching.IN_BYTES for p in good)
    moved = sum(p.how not in (matching.AS_IT_IS, matching.IN_BYTES) for p in good)
    note = f"{len(good) - rounded} of {len(placements)} tensors are there bit for bit"
    note += f", {moved} of them in another form" if moved else ""
    note += f"; {rounded} in eight bits, within half a step" if rounded else ""
    unknown = len(mine) - len(placements)
    note += f"; {unknown} more are in integers, which `fidelity` judges" if unknown else ""
    note += listed("; at fault", map(_fault, faults)) if faults else ""
    return checks.counted(
        "weights",
        artifact.format,
        len(faults),
        sum(p.elements > 0 for p in placements),
        "tensors",
        note,
        (p.tensor for p in faults),
    )


def _fault(placement: Placement) -> str:
    if not placement.found:
        return f"{placement.tensor} is not there"
    return (
        f"{placement.tensor}: {placement.differing:,} of {placement.elements:,} elements differ, "
        f"by up to {placement.largest:.3g}, in {', '.join(placement.found)} ({placement.how})"
    )
