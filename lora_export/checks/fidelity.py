"""Does an artifact in reduced precision still decide as the reference does?

Eight bits cannot be held to a rounding error of 24; what counts is what a user sees: decisions,
their probabilities, and the direction of embeddings; and `accuracy`, where there are labels.
"""

import numpy as np

from lora_export import checks
from lora_export.compare import (
    deciding,
    distance,
    divergence,
    drift,
    options,
    probabilities,
    turn,
    valid,
)
from lora_export.records import PRESENT, REFERENCE, Array, Artifact, Evidence, Status, Verdict

SCOPES = (checks.TRIAL, checks.EXPORT, checks.QUICK, checks.RUN, checks.REPLAY)
MOST_FLIPS = 0.005  # share of decisions; half a point of accuracy at worst
MOST_DIVERGENCE = 0.01  # nats, mean over the decisions
MOST_TURN = 0.01  # of an embedding: one minus its cosine with the reference's
MOST_DRIFT = 0.0025  # of values, relative to their variance: a twentieth of their spread
# Two classes whose probabilities lie closer than this are a toss of a coin to the reference too.
COIN = 0.1


def applies(evidence: Evidence) -> bool:
    """Return whether any artifact is in reduced precision."""
    return any(artifact.is_reduced for artifact in evidence.artifacts)


def judge(evidence: Evidence) -> list[Verdict]:
    """Fail on decisions lost, on probabilities that drift, and on embeddings that turn."""
    reduced = [artifact for artifact in evidence.artifacts if artifact.is_reduced]
    found = [verdict for artifact in reduced for verdict in _judge(artifact, evidence)]
    return found or [checks.not_run("fidelity", "artifacts", "none is in reduced precision")]


def _judge(artifact: Artifact, evidence: Evidence) -> list[Verdict]:
    name = artifact.format
    if not {REFERENCE, name} <= evidence.recordings.keys():
        return [checks.not_run("fidelity", name, "a recording is missing")]
    reference, other = evidence.recordings[REFERENCE], evidence.recordings[name]
    if defect := distance(reference, other, evidence).defect:
        return [Verdict("fidelity", name, Status.FAIL, None, None, "", 0, defect)]
    real = [index for index, batch in enumerate(evidence.batches) if batch.source != "grid"]
    found: list[Verdict] = []
    outputs = sorted(reference.outputs[0])
    if chosen := [output for output in outputs if output in deciding(reference.outputs[0])]:
        found += _decisions(name, chosen, real, evidence)
    else:
        for output in outputs:
            if not output.startswith(f"{PRESENT}."):
                judge = _values if "logits" in output else _turn
                found.append(judge(name, output, real, evidence))
    return found


def _decisions(name: str, outputs: list[str], real: list[int], evidence: Evidence) -> list[Verdict]:
    flips, coins, compared, diverged = 0, 0, 0, 0.0
    for index in real:
        for output in outputs:
            p, q = (_probabilities(name_of, index, output, evidence) for name_of in _both(name))
            differs = p.argmax(-1) != q.argmax(-1)
            margins = np.diff(np.sort(p, axis=-1)[..., -2:], axis=-1)[..., 0]
            flips += int((differs & ~(margins <= COIN)).sum())
            coins += int((differs & (margins <= COIN)).sum())
            compared += differs.size
            diverged += float(divergence(p, q).sum())
    note = f"{flips} of {compared} decisions differ"
    note += f"; {coins} more where the reference tosses a coin" if coins else ""
    share, mean = (flips / compared, diverged / compared) if compared else (np.nan, np.nan)
    return [
        _within("fidelity", f"{name}, decisions", share, MOST_FLIPS, "share", compared, note),
        _within(
            "fidelity", f"{name}, probabilities", mean, MOST_DIVERGENCE, "nats", compared,
            "mean Kullback-Leibler divergence from the reference",
        ),
    ]  # fmt: skip


def _values(name: str, output: str, real: list[int], evidence: Evidence) -> Verdict:
    """Judge a value per text, such as a score: its direction is a sign, and says nothing."""
    rows = [
        np.concatenate([evidence.recordings[of].outputs[i][output].ravel() for i in real])
        for of in _both(name)
    ]
    note = "mean square of the deviation, of the variance of the reference's values"
    mean = drift(*rows).mean()
    return _within("fidelity", f"{name}, {output}", mean, MOST_DRIFT, "share", rows[0].size, note)


def _turn(name: str, output: str, real: list[int], evidence: Evidence) -> Verdict:
    worst, compared = 0.0, 0
    for index in real:
        batch = evidence.batches[index]
        rows = [
            valid(evidence.recordings[of].outputs[index][output], batch, evidence, output)
            for of in _both(name)
        ]
        turned = turn(*rows).ravel()
        compared += len(turned)
        worst = float(np.max([worst, *turned]))  # NaN stays, and fails
    note = "one minus the least cosine with the reference"
    return _within("fidelity", f"{name}, {output}", worst, MOST_TURN, "", compared, note)


def _both(name: str) -> tuple[str, str]:
    return REFERENCE, name


def _probabilities(name: str, index: int, output: str, evidence: Evidence) -> Array:
    """Return the softmax of what one runner answered, float64, (decisions, options)."""
    array = evidence.recordings[name].outputs[index][output]
    return probabilities(options(array, evidence.batches[index], evidence, output))


def _within(
    check: str, subject: str, measured: float, limit: float, unit: str, compared: int, note: str
) -> Verdict:
    good = compared > 0 and measured <= limit
    status = Status.PASS if good else Status.FAIL
    return Verdict(check, subject, status, float(measured), limit, unit, compared, note)
