"""Does the adapter do anything? An adapter that moves nothing would pass every comparison."""

from lora_export import checks
from lora_export.compare import distance, noise_floor, tolerance
from lora_export.records import IDLE, REFERENCE, Evidence, Status, Verdict

SCOPES = (checks.QUICK, checks.RUN)


def judge(evidence: Evidence) -> list[Verdict]:
    """Pass where switching the low-rank updates off moves an output by more than the tolerance.

    Below it, the comparisons could not tell an artifact with the adapter from one without.
    """
    recordings = evidence.recordings
    if not {REFERENCE, IDLE, evidence.floor} <= recordings.keys():
        return [checks.not_run("effect", "adapter", "no recording with the updates switched off")]
    floor = noise_floor(evidence)
    moved = distance(recordings[REFERENCE], recordings[IDLE], evidence)
    limit = tolerance(evidence)
    good = not (floor.defect or moved.defect) and moved.largest > limit
    note = (
        floor.defect
        or moved.defect
        or (
            f"the adapter moves an output by up to {moved.largest:.3g}, "
            f"{moved.largest / floor.largest:.3g} times the noise floor"
        )
    )
    status = Status.PASS if good else Status.FAIL
    return [
        Verdict(
            "effect", "adapter", status, moved.largest, limit, "more than", moved.compared, note
        )
    ]
