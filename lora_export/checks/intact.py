"""Are the files on disk the ones that were measured?"""

from lora_export import checks
from lora_export.errors import listed
from lora_export.records import Evidence, Verdict

SCOPES = (checks.TRIAL, checks.EXPORT, checks.QUICK, checks.RUN, checks.VERIFY, checks.REPLAY)


def judge(evidence: Evidence) -> list[Verdict]:
    """Fail on a file that is missing, new or of another digest than when it was recorded."""
    if not evidence.files:
        return [checks.not_run("intact", "files", "no file was recorded")]
    then = {file.name: file.digest for file in evidence.files}
    # An artifact carries its own digests, of the moment when it was exported.
    exported = {file.name: file.digest for a in evidence.artifacts for file in a.files}
    now = {file.name: file.digest for file in evidence.files_now}
    changed = {name for name in then.keys() | now.keys() if then.get(name) != now.get(name)}
    changed |= {name for name, digest in exported.items() if then.get(name) != digest}
    how = {name: "new" if name not in then else "missing" for name in then.keys() ^ now.keys()}
    faults = [f"{name} ({how[name]})" if name in how else name for name in changed]
    note = listed("changed since", faults) if changed else "every file has its recorded digest"
    return [checks.counted("intact", "files", len(changed), len(then), "changed", note, changed)]
