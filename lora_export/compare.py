"""Recordings in, distances out: the arithmetic of the checks. Pure numpy.

Comparisons are written so that NaN fails; names, shapes and finiteness come before values.
"""

from collections.abc import Iterable, Mapping
from statistics import NormalDist

import numpy as np

from lora_export.records import (
    REFERENCE,
    UNMERGED,
    Array,
    Batch,
    Distance,
    Evidence,
    ModuleOutput,
    Recording,
    TensorSpec,
    Timing,
)

BOOTSTRAP_SAMPLES = 2000
CONFIDENCE = 0.95


def distance(
    reference: Recording, other: Recording, evidence: Evidence, only: str | None = None
) -> Distance:
    """Return how far `other` lies from `reference` over all batches of `evidence`.

    Positions that the attention mask leaves out are not compared, though they too must be finite.
    A difference in batches, names, shapes or finiteness is a defect, and so is a batch that was not
    answered, or a row in which no token is attended. With `only`, the deviation is that of the
    output of this name.
    """
    worst, compared, where = 0.0, 0, 0
    if len(reference.outputs) != len(evidence.batches) or len(other.outputs) != len(
        reference.outputs
    ):
        return Distance(np.inf, 0, f"{len(other.outputs)} of {len(evidence.batches)} batches")
    for index, batch in enumerate(evidence.batches):
        expected, found = reference.outputs[index], other.outputs[index]
        raised = _raised(reference, index) or _raised(other, index)
        if defect := raised or _defect(evidence, batch, expected, found):
            return Distance(np.inf, compared, f"batch {index} ({batch.note}): {defect}", index)
        if only is not None and only not in expected:
            return Distance(np.inf, compared, f"batch {index} ({batch.note}): no output", index)
        for name in expected if only is None else (only,):
            error = np.abs(
                valid(found[name], batch, evidence, name).astype(np.float64)
                - valid(expected[name], batch, evidence, name).astype(np.float64)
            )
            compared += error.size
            if error.size and not (float(error.max()) <= worst):
                worst, where = float(error.max()), index
    return Distance(worst, compared, "" if compared else "nothing was compared", where)


def _raised(recording: Recording, index: int) -> str:
    return "".join(recording.errors[index : index + 1])


def valid(output: Array, batch: Batch, evidence: Evidence, name: str) -> Array:
    """Return `output` without its padded positions, where it has an axis of tokens."""
    attended = evidence.signature.attended(batch.arrays) if evidence.signature else {}
    axes = axes_of(evidence, name)
    for axis in attended.keys() & set(axes):
        mask = attended[axis]
        chosen: Array = np.moveaxis(output, axes.index(axis), mask.ndim - 1)[mask]
        return chosen
    return output


def options(array: Array, batch: Batch, evidence: Evidence, name: str) -> Array:
    """Return the scores to choose among, (decisions, options).

    A span's start or end chooses among the tokens of its row; padding is no option.
    """
    attended = evidence.signature.attended(batch.arrays) if evidence.signature else {}
    if "sequence" in attended and axes_of(evidence, name) == ("batch", "sequence"):
        return np.where(attended["sequence"], array, -np.inf)
    return valid(array, batch, evidence, name)


def deciding(outputs: Mapping[str, Array]) -> list[str]:
    """Return the names of the outputs that choose among several values: no state, no embedding."""
    return [name for name, array in outputs.items() if "logits" in name and array.shape[-1] > 1]


def probabilities(scores: Array) -> Array:
    """Return the softmax of `scores` over the last axis, in float64."""
    wide = scores.astype(np.float64)
    powers = np.exp(wide - wide.max(axis=-1, keepdims=True))
    found: Array = powers / powers.sum(axis=-1, keepdims=True)
    return found


def divergence(p: Array, q: Array) -> Array:
    """Return the Kullback-Leibler divergence of `q` from `p`, probabilities, in nats a row."""
    with np.errstate(divide="ignore", invalid="ignore"):
        found: Array = np.where(p > 0, p * (np.log(p) - np.log(q)), 0.0).sum(-1)
    return found


def turn(a: Array, b: Array) -> Array:
    """Return one minus the cosine of `a` and `b` over the last axis; NaN where one is zero."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        found: Array = 1 - (a * b).sum(-1) / lengths
    return found


def differing(expected: Mapping[str, Array], found: Mapping[str, Array], count: int) -> list[int]:
    """Return which of `count` rows are not in all arrays of `found` what they are in `expected`.

    Where there are no arrays, or a name or a shape differs, it is all of them.
    """
    if not expected or {n: a.shape for n, a in expected.items()} != {
        n: a.shape for n, a in found.items()
    }:
        return list(range(count))
    return [
        row
        for row in range(count)
        if any((found[name][row] != array[row]).any() for name, array in expected.items())
    ]


def drift(a: Array, b: Array) -> Array:
    """Return the squared distance of the values `b` from `a`, in units of the variance of `a`."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        found: Array = np.square(b - a) / a.var()
    return found


def axes_of(evidence: Evidence, name: str) -> tuple[str | int, ...]:
    """Return the axes of the output `name`; none where the evidence does not say."""
    return next((spec.axes for spec in _specs(evidence, name)), ())


def _specs(evidence: Evidence, name: str) -> list[TensorSpec]:
    outputs = evidence.signature.outputs if evidence.signature else ()
    return [spec for spec in outputs if spec.name == name]


def _defect(
    evidence: Evidence, batch: Batch, expected: Mapping[str, Array], found: Mapping[str, Array]
) -> str:
    mask = batch.arrays.get("attention_mask")
    if mask is not None and not mask.any(axis=-1).all():
        return "a row has no attended token, so its output is undefined"
    if expected.keys() != found.keys():
        return f"outputs {sorted(found)}, expected {sorted(expected)}"
    for name, array in found.items():
        if array.shape != expected[name].shape:
            return f"{name} has shape {array.shape}, expected {expected[name].shape}"
        if wrong := _contradicts(evidence, batch, name, array.shape):
            return f"{name} has shape {array.shape}, the mask asks for {wrong}"
        for values in (array, expected[name]):
            if bad := int(values.size - np.isfinite(values).sum()):
                return f"{name} has {bad} values that are NaN or infinite"
    return ""


def _contradicts(evidence: Evidence, batch: Batch, name: str, shape: tuple[int, ...]) -> str:
    """Return what the attention mask asks of the shape of an output, where it has another."""
    attended = evidence.signature.attended(batch.arrays) if evidence.signature else {}
    axes = axes_of(evidence, name)
    known = {axis: mask.shape[-1] for axis, mask in attended.items()}
    if "attention_mask" in batch.arrays:
        known["batch"] = len(batch.mask)
    wanted = [known.get(str(axis), -1) for axis in axes]
    if wanted and len(wanted) != len(shape):
        return f"{len(wanted)} axes"
    if any(want not in (-1, size) for want, size in zip(wanted, shape, strict=False)):
        return f"{axes} of {known}"
    return ""


def wrong_dtype(recording: Recording, evidence: Evidence) -> str:
    """Return which output has another dtype than the signature says, or nothing."""
    for outputs in recording.outputs:
        for name, array in outputs.items():
            for spec in _specs(evidence, name):
                if spec.dtype != str(array.dtype):
                    return f"{name} has dtype {array.dtype}, expected {spec.dtype}"
    return ""


def noise_floor(evidence: Evidence, only: str | None = None) -> Distance:
    """Return what the model's own precision costs: the distance of the `floor` recording.

    At least one rounding of the largest output, so that a model without measurable noise does not
    make every artifact fail.
    """
    reference, own = evidence.recordings[REFERENCE], evidence.recordings[evidence.floor]
    found = distance(reference, own, evidence, only)
    if found.defect:
        return found
    pairs = zip(evidence.batches, reference.outputs, strict=True)
    chosen = [
        (np.abs(valid(array, batch, evidence, name)).max(), own.outputs[0][name].dtype)
        for batch, outputs in pairs
        for name, array in outputs.items()
        if only in (None, name)
    ]
    if any(dtype.kind != "f" for _, dtype in chosen):
        return Distance(np.inf, 0, f"the outputs of {own.runner} are no floats")
    least = max(float(np.finfo(dtype).eps * size) for size, dtype in chosen)
    tiny = max(float(np.finfo(dtype).tiny) for _, dtype in chosen)
    return Distance(max(found.largest, least, tiny), found.compared, "", found.batch)


def tolerance(evidence: Evidence, only: str | None = None) -> float:
    """Return how far an artifact may lie from the float64 reference: absolute, of one output.

    The multiple of the noise floor that the policy states, or what it states instead. Another
    kernel, or another order of summation, sums the same products to another rounding of the same
    size as the unmerged model's own; a wrong scale, a dropped bias or a fused mask is 1e3 and more.
    Nothing is tolerated where the noise floor cannot be told.
    """
    policy = evidence.policy
    if policy.tolerance is not None:
        return policy.tolerance
    floor = noise_floor(evidence, only)
    return 0.0 if floor.defect else policy.multiple * floor.largest


def parted(outputs: Iterable[ModuleOutput]) -> ModuleOutput | None:
    """Return the module at which an artifact parts from the model; None where it does not.

    It is the first, as modules run, whose output the artifact does not have, although it has its
    input, an output of the model is computed from it, and nothing that is computed from it agrees.
    So a module that a fusion left out is passed over. Where the input differs as well, the fault
    lies between two modules: in what the module around them computes itself.
    """
    return next((found for found in outputs if not found.agrees and not found.excused), None)


def ratios(timing: Timing, runner: str, against: str = UNMERGED) -> Array:
    """Return the paired latency ratios of `runner` to `against`, one per round."""
    with np.errstate(divide="ignore", invalid="ignore"):  # a time of zero is no number to pass
        paired: Array = np.divide(timing.samples_ms[runner], timing.samples_ms[against])
    return paired


def hits(recording: Recording, evidence: Evidence) -> Array | None:
    """Return for each labelled row whether `recording` chooses its label, boolean, (rows,).

    None where no row has a label, or the model does not choose one class for each row. An answer
    that is no number is wrong.
    """
    if len(recording.outputs) != len(evidence.batches):
        return None
    found = []
    for batch, outputs in zip(evidence.batches, recording.outputs, strict=True):
        if batch.labels:
            scores = [outputs[name] for name in deciding(outputs)][:1]
            if not scores or scores[0].shape[:-1] != (len(batch.labels),):
                return None
            right = scores[0].argmax(-1) == np.asarray(batch.labels)
            found.append(right & np.isfinite(scores[0]).all(axis=-1))
    return np.concatenate(found) if found else None


def share_interval(count: int, of: int) -> tuple[float, float]:
    """Return the 95 % interval of a share of which `count` of `of` were seen.

    Source: Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", 1927,
    doi:10.1080/01621459.1927.10502953.
    """
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    share, scale = count / of, 1 + z * z / of
    half = z * np.sqrt(share * (1 - share) / of + (z / (2 * of)) ** 2) / scale
    centre = (share + z * z / (2 * of)) / scale
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


def mean_interval(values: Array, seed: int = 0) -> tuple[float, float, float]:
    """Return the mean of `values`, of which few differ, and its 95 % bootstrap interval.

    Source: as for `median_interval`. What is drawn is how often each distinct value comes.
    """
    distinct, counts = np.unique(values, return_counts=True)
    dice = np.random.default_rng(seed)
    drawn = dice.multinomial(len(values), counts / len(values), BOOTSTRAP_SAMPLES) @ distinct
    return float(values.mean()), *_middle(drawn / len(values))


def median_interval(values: Array, seed: int = 0) -> tuple[float, float, float]:
    """Return the median of `values` and its 95 % bootstrap percentile interval.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, section 13.3.
    """
    draws = np.random.default_rng(seed).choice(values, (BOOTSTRAP_SAMPLES, len(values)))
    return float(np.median(values)), *_middle(np.median(draws, axis=1))


def _middle(draws: Array) -> tuple[float, float]:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return float(low), float(high)
