"""Is what ships a plain model: the architecture's own modules, and no trace of LoRA?"""

from lora_export import checks
from lora_export.errors import listed
from lora_export.records import Artifact, Evidence, Modules, Repeat, Verdict

SCOPES = (checks.MERGE, checks.TRIAL, checks.EXPORT, checks.QUICK, checks.RUN, checks.VERIFY)


def judge(evidence: Evidence) -> list[Verdict]:
    """Fail where the module tree differs from the architecture's, or a name mentions LoRA.

    And where the operators of an artifact are not those of a plain export, where there is one.
    """
    if evidence.modules is None:
        return [checks.not_run("plain", "merged", "no module tree was recorded")]
    found = [_merged(evidence.modules), *map(_artifact, evidence.artifacts)]
    return [*found, *(_operators(repeat) for repeat in evidence.repeats if repeat.operators)]


def _merged(modules: Modules) -> Verdict:
    differing = {
        path or "(root)"
        for path in modules.expected.keys() | modules.found.keys()
        if modules.expected.get(path) != modules.found.get(path)
    } | set(modules.lora_names)
    note = listed("differs", differing) if differing else modules.claim
    return checks.counted(
        "plain", "merged", len(differing), len(modules.found), "modules", note, differing
    )


def _artifact(artifact: Artifact) -> Verdict:
    names = artifact.lora_names
    note = listed("names", names) if names else "no operator, module or tensor is named after LoRA"
    files = len(artifact.files)
    return checks.counted("plain", artifact.format, len(names), files, "LoRA names", note, names)


def _operators(repeat: Repeat) -> Verdict:
    """Judge the operators of an artifact by those of the plain model, exported a second time."""
    found, expected = repeat.operators, repeat.operators_again
    wrong = [
        f"{found.get(kind, 0)} {kind}, expected {expected.get(kind, 0)}"
        for kind in sorted(found.keys() | expected.keys())
        if found.get(kind, 0) != expected.get(kind, 0)
    ]
    note = listed("operators", wrong) if wrong else "the operators are those of a plain export"
    subject = f"{repeat.artifact}, operators"
    return checks.counted(
        "plain", subject, len(wrong), sum(found.values()), "kinds that differ", note, wrong
    )
