"""Is what ships a plain model: the architecture's own modules, and no trace of LoRA?"""

from lora_export import checks
from lora_export.errors import listed
from lora_export.records import Artifact, Evidence, Modules, Verdict

SCOPES = (checks.MERGE, checks.TRIAL, checks.EXPORT, checks.QUICK, checks.RUN, checks.VERIFY)


def judge(evidence: Evidence) -> list[Verdict]:
    """Fail where the module tree differs from the architecture's, or a name mentions LoRA."""
    if evidence.modules is None:
        return [checks.not_run("plain", "merged", "no module tree was recorded")]
    return [_merged(evidence.modules), *map(_artifact, evidence.artifacts)]


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
