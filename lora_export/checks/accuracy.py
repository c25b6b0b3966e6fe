"""How much of the reference's accuracy is lost, on sentences that have labels?"""

from lora_export import checks
from lora_export.compare import hits, mean_interval, share_interval
from lora_export.records import MERGED, REFERENCE, Array, Evidence, Status, Verdict

CHECK = "accuracy"
SCOPES = (checks.TRIAL, checks.EXPORT, checks.QUICK, checks.RUN, checks.REPLAY)


def applies(evidence: Evidence) -> bool:
    """Return whether sentences have labels, and the model chooses one for each."""
    reference = evidence.recordings.get(REFERENCE)
    labelled = any(batch.labels for batch in evidence.batches)
    return labelled and (reference is None or hits(reference, evidence) is not None)


def judge(evidence: Evidence) -> list[Verdict]:
    """Fail where more accuracy is lost than the policy allows, in whatever precision."""
    known, artifacts = evidence.recordings, [a.format for a in evidence.artifacts]
    wanted = [name for name in (MERGED, *artifacts) if name != MERGED or name in known]
    found = []
    for name in wanted:
        expected, right = (
            hits(known[of], evidence) if of in known else None for of in (REFERENCE, name)
        )
        if expected is None or right is None:
            found.append(checks.not_run(CHECK, name, "no answers to sentences with labels"))
        else:
            found.append(_judge(name, expected, right, evidence))
    return found or [checks.not_run(CHECK, "labels", "nothing answered sentences with labels")]


def _judge(name: str, expected: Array, right: Array, evidence: Evidence) -> Verdict:
    allowed = evidence.policy.allowed_loss
    loss, low, high = mean_interval(expected.astype(int) - right.astype(int))
    note = (
        f"accuracy {_share(right)}, the reference's {_share(expected)}; loss {loss:.4f} "
        f"[{low:.4f}, {high:.4f}], 95 % intervals; an allowed loss of {max(loss, 0):.4f} would pass"
    )
    status = Status.PASS if loss <= allowed else Status.FAIL
    texts = [text for batch in evidence.batches if batch.labels for text in batch.texts]
    lost = [
        repr(text[:40]) for text, a, b in zip(texts, expected, right, strict=True) if a and not b
    ]
    where = tuple(sorted(lost)) if status is Status.FAIL else ()
    return Verdict(CHECK, name, status, loss, allowed, "share", len(right), note, where)


def _share(right: Array) -> str:
    low, high = share_interval(int(right.sum()), len(right))
    return f"{right.mean():.4f} [{low:.4f}, {high:.4f}]"
