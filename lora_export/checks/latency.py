"""Is each candidate at most a tenth slower than the unmerged model, by paired ratios?"""

from lora_export import checks
from lora_export.compare import median_interval, ratios
from lora_export.records import MERGED, UNMERGED, Evidence, Status, Timing, Verdict

SCOPES = (checks.RUN,)
LEAST_ROUNDS = 10


def judge(evidence: Evidence) -> list[Verdict]:
    """Pass where the whole interval of the ratio lies below the limit, fail where it lies above."""
    wanted = {MERGED, *(artifact.format for artifact in evidence.artifacts)}
    if not evidence.timings:
        return [checks.not_run("latency", name, "was not timed") for name in sorted(wanted)]
    return [
        _judge(timing, runner, evidence.policy.slowest)
        for timing in evidence.timings
        for runner in sorted((wanted | timing.samples_ms.keys()) - {UNMERGED})
    ]


def _judge(timing: Timing, runner: str, limit: float) -> Verdict:
    subject = f"{runner}, batch {timing.batch}"
    subject += f", {timing.past} cached" if timing.past else ""
    samples = [timing.samples_ms.get(name, ()) for name in (runner, UNMERGED)]
    if len(samples[0]) != len(samples[1]) or len(samples[0]) < LEAST_ROUNDS:
        return checks.not_run("latency", subject, f"fewer than {LEAST_ROUNDS} paired rounds")
    median, low, high = median_interval(ratios(timing, runner))
    status = Status.INCONCLUSIVE
    if high <= limit:
        status = Status.PASS
    elif low > limit:
        status = Status.FAIL
    note = (
        f"95 % interval [{low:.3f}, {high:.3f}] of {len(samples[0])} pairs; "
        f"smallest visible effect {(high - low) / 2:.3f}"
    )
    unit = "x unmerged"
    return Verdict("latency", subject, status, median, limit, unit, len(samples[0]), note)
