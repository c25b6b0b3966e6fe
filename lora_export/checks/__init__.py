"""Questions, one file each, answered from recorded evidence alone: no model, no file is opened.

To add a check, add one file here with:

    SCOPES = ("run",)                      what asks it; see below
    judge(evidence) -> list[Verdict]       at least one verdict; NOT_RUN where evidence is missing
    applies(evidence) -> bool              optional: whether the question makes sense for this model

and a test in which it passes, and one in which it fails.
"""

from collections.abc import Callable, Iterable

from lora_export import registry
from lora_export.compare import distance, noise_floor, tolerance, wrong_dtype
from lora_export.records import REFERENCE, Distance, Evidence, Status, Verdict

MERGE, EXPORT, RUN, VERIFY = "merge", "export", "run", "verify"  # commands
TRIAL = "trial"  # one of many candidates, of which `tune` looks for the fastest
QUICK = "quick"  # `check --quick`: what takes seconds
REPLAY = "replay"  # `check --replay`: what the artifact and recorded answers tell


def names() -> tuple[str, ...]:
    """Return the known checks: the files of this folder."""
    return registry.names(__name__)


def asked_by(scope: str) -> set[str]:
    """Return the names of the checks that `scope` asks."""
    return {name for name in names() if scope in registry.load(__name__, name).SCOPES}


def judge(evidence: Evidence, scope: str) -> tuple[Verdict, ...]:
    """Return the verdicts of every check that belongs to `scope`, in order of their names."""
    found: list[Verdict] = []
    for name in names():
        check = registry.load(__name__, name)
        if scope in check.SCOPES and getattr(check, "applies", _always)(evidence):
            question: Callable[[Evidence], list[Verdict]] = check.judge
            verdicts = question(evidence)
            assert verdicts, f"the check {name} gave no verdict"
            found += verdicts
    return tuple(found)


def _always(evidence: Evidence) -> bool:
    return True


def not_run(check: str, subject: str, why: str) -> Verdict:
    """Return the verdict that says a check could not be made, which is not a pass."""
    return Verdict(check, subject, Status.NOT_RUN, None, None, "", 0, why)


def counted(
    check: str,
    subject: str,
    faults: int,
    compared: int,
    unit: str,
    note: str,
    where: Iterable[str] = (),
) -> Verdict:
    """Return a pass where something was compared and no fault was found, else a fail."""
    good = compared > 0 and faults == 0
    status = Status.PASS if good else Status.FAIL
    named = tuple(sorted(where))
    return Verdict(check, subject, status, float(faults), 0.0, unit, compared, note, named)


def within_tolerance(check: str, subject: str, evidence: Evidence) -> Verdict:
    """Return whether the recording named `subject` lies within the tolerance of the reference.

    The tolerance is a multiple of the noise floor: the distance of the unmerged model, in its own
    precision, from the same model in float64.
    """
    recordings = evidence.recordings
    if not {REFERENCE, evidence.floor, subject} <= recordings.keys():
        return not_run(check, subject, "a recording is missing")
    names = sorted({name for out in recordings[REFERENCE].outputs for name in out}) or [""]
    judged = [_output(check, subject, name, evidence) for name in names]
    return max(judged, key=lambda v: (not v.passed, (v.measured or 0) / (v.limit or 1)))


def _output(check: str, subject: str, name: str, evidence: Evidence) -> Verdict:
    """Judge one output by its own noise: a small one beside a large one is held to its size."""
    recordings = evidence.recordings
    floor = noise_floor(evidence, name)
    found = distance(recordings[REFERENCE], recordings[subject], evidence, name)
    limit = tolerance(evidence, name)
    defect = floor.defect or found.defect or wrong_dtype(recordings[subject], evidence)
    place = evidence.batches[found.batch].note if evidence.batches else ""
    note = defect or (
        f"{found.largest / floor.largest:.2f} times the noise floor {floor.largest:.2e}, "
        f"largest at {place}"
    )
    return within(check, subject, found, limit, defect, note, [f"{name} at {place}"])


def within(
    check: str,
    subject: str,
    found: Distance,
    limit: float,
    defect: str,
    note: str,
    where: Iterable[str] = (),
) -> Verdict:
    """Return a pass where something was compared, nothing is wrong with it, and it is near.

    `where` is what is at fault, if anything is.
    """
    good = not defect and found.compared > 0 and found.largest <= limit
    if not good and not defect:
        note += f"; a tolerance of {found.largest:.1e} would pass"
    status = Status.PASS if good else Status.FAIL
    named = () if good else tuple(where)
    return Verdict(check, subject, status, found.largest, limit, "abs", found.compared, note, named)
