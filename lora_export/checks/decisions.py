"""Does each candidate decide as the reference does on real sentences?"""

from collections.abc import Mapping

import numpy as np

from lora_export import checks
from lora_export.compare import deciding, distance, noise_floor, options
from lora_export.records import MERGED, REFERENCE, Evidence, Verdict

SCOPES = (checks.TRIAL, checks.EXPORT, checks.QUICK, checks.RUN, checks.REPLAY)
MOST_SHOWN = 3


def applies(evidence: Evidence) -> bool:
    """Return whether there is anything to decide: a regression has a single output."""
    reference = evidence.recordings.get(REFERENCE)
    return not reference or not reference.outputs or any(map(deciding, reference.outputs))


def judge(evidence: Evidence) -> list[Verdict]:
    """Fail on a decision that differs, unless the reference's margin lies below the noise floor."""
    wanted = [artifact.format for artifact in evidence.artifacts if not artifact.is_reduced]
    if MERGED in evidence.recordings:
        wanted.insert(0, MERGED)
    texts = [index for index, batch in enumerate(evidence.batches) if batch.source != "grid"]
    missing = {REFERENCE, evidence.floor, *wanted} - evidence.recordings.keys()
    if not wanted or not texts or missing:
        return [checks.not_run("decisions", "labels", "no recording on sentences")]
    if not applies(evidence):
        return [checks.not_run("decisions", "labels", "a single output decides nothing")]
    floor = noise_floor(evidence)
    if floor.defect:
        return [checks.not_run("decisions", "labels", floor.defect)]
    outputs = {output for out in evidence.recordings[REFERENCE].outputs for output in out}
    floors = {output: noise_floor(evidence, output).largest for output in outputs}
    return [_judge(name, texts, floors, evidence) for name in wanted]


def _judge(name: str, texts: list[int], floors: Mapping[str, float], evidence: Evidence) -> Verdict:
    compared, flips, excused, shown = 0, 0, 0, []
    reference, other = evidence.recordings[REFERENCE], evidence.recordings[name]
    if defect := distance(reference, other, evidence).defect:
        return checks.counted("decisions", name, 1, 0, "flips", defect)
    for index in texts:
        batch = evidence.batches[index]
        for output in deciding(reference.outputs[index]):
            expected, found = (
                options(recording.outputs[index][output], batch, evidence, output)
                for recording in (reference, other)
            )
            margins = np.diff(np.sort(expected, axis=-1)[..., -2:], axis=-1)[..., 0]
            differs = expected.argmax(-1) != found.argmax(-1)
            # A close call excuses a flip, never an answer that is no number.
            broken = np.isnan(found).any(-1) | (found == np.inf).any(-1)
            counts = broken | (differs & ~(margins <= floors[output]))
            compared += differs.size
            flips += int(counts.sum())
            excused += int((differs & ~counts).sum())
            if counts.shape == (len(batch.texts),):
                shown += [
                    f"{batch.texts[row]!r} (margin {margins[row]:.1e})"
                    for row in np.flatnonzero(counts)
                ]
    note = f"{compared - flips - excused} of {compared} decisions agree"
    if excused:
        note += f"; {excused} excused, the margin lies below the noise floor"
    if shown:
        note += "; differs: " + ", ".join(shown[:MOST_SHOWN])
    return checks.counted("decisions", name, flips, compared, "flips", note, shown)
