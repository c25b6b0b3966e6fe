"""Does each artifact's own graph, evaluated in float64, say what the merged model computes?

A runtime's rounding is not in it, so that this sees what hides below the tolerance of `parity`: the
epsilon of a normalisation, an approximated activation, one constant that is wrong.
"""

from dataclasses import replace

from lora_export import checks
from lora_export.compare import distance, noise_floor, parted
from lora_export.records import REFERENCE, UNMERGED, Evidence, GraphAnswer, Recording, Verdict

SCOPES = (checks.EXPORT, checks.QUICK, checks.RUN)
# The limit, in what computing in float32 costs the model on the same inputs. The constants of a
# file are rounded to float32, once each; the model rounds every result of every step. In 40
# architectures, rightly exported, it was half of this at most (Gemma), and mostly a tenth.
MULTIPLE = 1.0


def applies(evidence: Evidence) -> bool:
    """Return whether a graph was evaluated; int8, OpenVINO and others have none in float64."""
    return bool(evidence.graphs)


def judge(evidence: Evidence) -> list[Verdict]:
    """Pass where a graph lies nearer to the model in float64 than that lies in float32."""
    artifacts = dict.fromkeys(answer.artifact for answer in evidence.graphs)
    return [_judged(name, evidence) for name in artifacts] or [
        checks.not_run("graph", "artifacts", "no graph was evaluated")
    ]


def _judged(artifact: str, evidence: Evidence) -> Verdict:
    answers = [answer for answer in evidence.graphs if answer.artifact == artifact]
    for answer in answers:
        if answer.error or not 0 <= answer.batch < len(evidence.batches):
            return checks.not_run("graph", artifact, answer.error or "a batch is missing")
    where = parted(one for one in evidence.modules_compared if one.artifact == artifact)
    names = sorted({name for answer in answers for name in answer.expected})
    if not names:
        return checks.not_run("graph", artifact, "the model has no answers")
    judged = [_output(artifact, name, answers, evidence) for name in names]
    worst = max(judged, key=lambda v: (not v.passed, (v.measured or 0) / (v.limit or 1)))
    if where is None or worst.passed:
        return worst
    note = f"{worst.note}; parts at {where.module or where.kind}"
    return replace(worst, note=note, where=(where.module,))


def _output(artifact: str, name: str, answers: list[GraphAnswer], evidence: Evidence) -> Verdict:
    expected, found, rounded = (
        Recording(artifact, "float64", tuple(getattr(answer, side) for answer in answers))
        for side in ("expected", "found", "rounded")
    )
    asked = replace(
        evidence,
        batches=tuple(evidence.batches[answer.batch] for answer in answers),
        recordings={REFERENCE: expected, UNMERGED: rounded},
        floor=UNMERGED,
    )
    floor = noise_floor(asked, name)
    apart = distance(expected, found, asked, name)
    defect = floor.defect or apart.defect
    note = defect or (
        f"{apart.largest / floor.largest:.2g} times what float32 costs the model "
        f"({floor.largest:.2e}), largest at {asked.batches[apart.batch].note}"
    )
    return checks.within("graph", artifact, apart, MULTIPLE * floor.largest, defect, note)
