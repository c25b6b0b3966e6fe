"""Is what the files say of themselves so: adapter, base, config, labels, tokenizer?"""

from lora_export import checks
from lora_export.errors import listed
from lora_export.records import MERGED, Claim, Evidence, Verdict

CHECK = "provenance"
SCOPES = (checks.EXPORT, checks.QUICK, checks.RUN)


def judge(evidence: Evidence) -> list[Verdict]:
    """Fail on a claim that is not so, and name it with both sides."""
    merged = [MERGED] if evidence.account else []
    found = []
    for subject in (*merged, *(artifact.format for artifact in evidence.artifacts)):
        claims = [claim for claim in evidence.claims if claim.subject == subject]
        if claims:
            found.append(_judge(subject, claims))
        else:
            found.append(checks.not_run(CHECK, subject, "nothing was read that it says of itself"))
    return found or [checks.not_run(CHECK, "files", "no file was looked at")]


def _judge(subject: str, claims: list[Claim]) -> Verdict:
    wrong = [claim for claim in claims if claim.found != claim.expected]
    said = (f"{c.name} is {c.found[:60]}, expected {c.expected[:60]}" for c in wrong)
    note = listed("wrong", said) if wrong else f"all of {len(claims)} statements are so"
    where = [f"{subject}: {claim.name}" for claim in wrong]
    return checks.counted(CHECK, subject, len(wrong), len(claims), "wrong", note, where)
