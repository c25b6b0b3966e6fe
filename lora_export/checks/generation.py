"""Does a model that writes text write what the reference writes, with its cache and without?

Tokens are held against each other up to the first that differs; from there on each text goes its
own way. A difference is excused where it takes no more than the tolerance of the logits.
"""

from lora_export import checks
from lora_export.compare import distance, tolerance
from lora_export.records import MERGED, REFERENCE, Evidence, Verdict, Written

CHECK = "generation"
SCOPES = (checks.EXPORT, checks.RUN)
NEEDED = (True, False)  # with the cache, and without


def applies(evidence: Evidence) -> bool:
    """Return whether the model writes text and gives its cache."""
    return evidence.signature is None or evidence.signature.has_cache


def judge(evidence: Evidence) -> list[Verdict]:
    """Fail where a token differs from the reference's, or from the one that the cache leads to.

    In reduced precision the tolerance is the artifact's own distance from the reference.
    """
    known, reduced = evidence.recordings, {a.format: a.is_reduced for a in evidence.artifacts}
    wanted = [name for name in (MERGED, *reduced) if name != MERGED or name in known]
    texts = {(entry.runner, entry.cached): entry for entry in evidence.written}
    reference = texts.get((REFERENCE, True))
    found = []
    for name in wanted:
        own = [texts[name, cached] for cached in NEEDED if (name, cached) in texts]
        answered = {REFERENCE, evidence.floor, name} <= known.keys()
        if reference is None or len(own) < len(NEEDED) or not answered:
            found.append(checks.not_run(CHECK, name, "no text was written with and without cache"))
            continue
        limit = tolerance(evidence, "logits")
        if reduced.get(name):
            limit = distance(known[REFERENCE], known[name], evidence, "logits").largest
        found.append(_judge(name, reference, own, limit))
    return found or [checks.not_run(CHECK, "texts", "nothing wrote any")]


def _judge(name: str, reference: Written, own: list[Written], limit: float) -> Verdict:
    cached, anew = own
    pairs = {
        "with cache": (reference, cached),
        "without cache": (reference, anew),
        "with cache and without": (cached, anew),
    }
    compared, excused, where = 0, 0, []
    for how, (expected, found) in pairs.items():
        if expected.tokens.shape != found.tokens.shape:
            where.append(f"{how}: {found.tokens.shape}, expected {expected.tokens.shape}")
            continue
        for row, differs in enumerate(expected.tokens != found.tokens):
            place = int(differs.argmax()) if differs.any() else differs.size
            compared += min(place + 1, differs.size)
            if place < differs.size and expected.margins[row, place] <= limit:
                excused += 1
            elif place < differs.size:
                where.append(f"{how}: text {row + 1}, token {place + 1}")
    same = [
        float((reference.tokens == text.tokens).mean())
        if text.tokens.shape == reference.tokens.shape
        else 0.0
        for text in own
    ]
    note = f"{same[0]:.0%} of the tokens are the reference's with cache, {same[1]:.0%} without"
    if excused:
        note += f"; {excused} texts part where a change of {limit:.1e} decides"
    return checks.counted(CHECK, name, len(where), compared, "texts that part", note, where)
