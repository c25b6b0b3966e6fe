"""Did every tensor on both sides go where it should, and nothing else get written?"""

from lora_export import checks
from lora_export.errors import listed
from lora_export.records import Evidence, Verdict

SCOPES = (checks.MERGE, checks.QUICK, checks.RUN, checks.VERIFY)


def judge(evidence: Evidence) -> list[Verdict]:
    """Fail on an adapter tensor left over, a base tensor damaged, or an output unexplained."""
    account = evidence.account
    if account is None:
        return [checks.not_run("accounted", "adapter and base", "no account was recorded")]
    adapter = checks.counted(
        "accounted",
        "adapter tensors",
        len(account.adapter_left),
        len(account.adapter_merged) + len(account.adapter_placed) + len(account.adapter_left),
        "left over",
        listed("left over", account.adapter_left)
        if account.adapter_left
        else f"{len(account.adapter_merged)} modules merged, "
        f"{len(account.adapter_placed)} tensors placed",
        account.adapter_left,
    )
    wrong = (*account.base_damaged, *account.unexplained)
    base = checks.counted(
        "accounted",
        "base tensors",
        len(wrong),
        len(account.base_changed) + len(account.base_identical) + len(wrong),
        "unexplained",
        listed("changed without a reason", wrong)
        if wrong
        else f"{len(account.base_changed)} changed, {len(account.base_identical)} identical"
        f"{' in a sample of their bytes' * account.is_sample}, "
        f"{len(account.base_dropped)} dropped with a reason",
        wrong,
    )
    return [adapter, base]
