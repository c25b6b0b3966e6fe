"""What the merge did to the files, observed from the files: evidence for the checks.

The arithmetic is numpy in float64, written apart from the code that merges.
"""

import numpy as np

from lora_export import variants
from lora_export.plan import BIAS, COPY, MERGE, PLACE, ROWS, MergePlan, Part, Step
from lora_export.records import (
    CONV,
    EXPERTS,
    LINEAR,
    Account,
    Adapter,
    Array,
    Factors,
    WeightAudit,
    is_float,
)
from lora_export.rounding import ulp
from lora_export.storage import Checkpoint, TensorInfo, dtype_name

_NOISE = 2.0**-48  # of float64 sums of a few hundred products, in units of the largest weight
_NOISE_OF_SVD = 2.0**-38


def account(
    plan: MergePlan, adapter: Adapter, checkpoint: Checkpoint, merged: Checkpoint
) -> Account:
    """Return where every tensor of adapter and base went, as found in the written files."""
    copies = plan.of(COPY)
    damaged = {
        step.source or ""
        for step in copies
        if step.name not in merged.tensors or not _is_copy(step, checkpoint, merged)
    }
    written = [step for step in plan.steps if step.name in merged.tensors]
    done = {module for step in written for module in step.modules}
    placed = {
        step.placed or ""
        for step in written
        if step.operation == PLACE
        and (step.parts or _holds(merged.tensors[step.name], adapter.replaced[str(step.placed)]))
    }
    twins = _twins(adapter, placed)
    planned = {step.name for step in plan.steps}
    changed = {step.source or "" for step in written if step.operation == MERGE}
    base_names = {step.source for step in plan.steps} | plan.dropped.keys()
    updates = (adapter.modules.keys() | adapter.rows.keys()) - plan.ignored.keys()
    return Account(
        adapter_merged=tuple(sorted(done)),
        adapter_placed=tuple(sorted(placed | twins)),
        adapter_left=tuple(sorted((updates - done) | (adapter.replaced.keys() - placed - twins))),
        base_changed=tuple(sorted(changed)),
        base_identical=tuple(sorted({s.source or "" for s in copies} - damaged)),
        base_dropped=dict(plan.dropped),
        base_damaged=tuple(sorted(damaged | (checkpoint.tensors.keys() - base_names))),
        unexplained=tuple(sorted(merged.tensors.keys() - planned)),
    )


def _twins(adapter: Adapter, placed: set[str]) -> set[str]:
    """Return the adapter's own tensors that equal a placed one: both sides of a tie."""
    return {
        name
        for name, value in adapter.replaced.items()
        if name not in placed
        and any(
            adapter.replaced[other].shape == value.shape
            and bool((adapter.replaced[other] == value).all())
            for other in placed
        )
    }


def _is_copy(step: Step, checkpoint: Checkpoint, merged: Checkpoint) -> bool:
    """Whether the written tensor is the base's, or its value rounded once to the asked dtype."""
    source, written = checkpoint.tensors[str(step.source)], merged.tensors[step.name]
    if written.dtype != step.dtype:
        return False
    if source.dtype == written.dtype:  # bit for bit, whatever the dtype
        return source.shape == written.shape and source.read() == written.read()
    return _holds(written, source.array())


def _holds(info: TensorInfo, value: Array) -> bool:
    """Whether the tensor on disk is `value`, rounded once to the dtype on disk."""
    if info.shape != value.shape:
        return False
    if not is_float(value):
        return bool((info.array() == value).all())
    exact = value.astype(np.float64)
    error = np.abs(info.array().astype(np.float64) - exact)
    return bool((error <= 0.5 * ulp(exact, info.dtype)).all())


def weights(
    plan: MergePlan, adapter: Adapter, checkpoint: Checkpoint, merged: Checkpoint
) -> tuple[WeightAudit, ...]:
    """Return the audit of every merged tensor against its formula in float64."""
    return tuple(
        _audit(step, plan, adapter, checkpoint, merged) for step in plan.steps if step.parts
    )


def _audit(
    step: Step, plan: MergePlan, adapter: Adapter, checkpoint: Checkpoint, merged: Checkpoint
) -> WeightAudit:
    if step.source is not None:
        base = checkpoint.tensors[step.source].array().astype(np.float64)
        kept = checkpoint.tensors[step.source].dtype
    else:
        own = adapter.replaced[str(step.placed)]
        base, kept = own.astype(np.float64), dtype_name(own)
    exact = base.copy()
    for part in step.parts:
        _apply(part, exact, base, plan, adapter, kept)
    update = exact - base
    info = merged.tensors.get(step.name)
    if info is None or (info.shape, info.dtype) != (step.shape, step.dtype):
        return WeightAudit(step.name, exact.size, exact.size, float("inf"), exact.size, 1.0)
    stored = info.array().astype(np.float64)
    spacing = ulp(exact, info.dtype)
    error = np.abs(stored - exact) / spacing
    # Half an ulp is the most that one rounding can cost. The slack is float64's own error, which
    # the order of summation changes, and a decomposition much more.
    noise = _NOISE_OF_SVD if variants.changes_base(plan.variant) else _NOISE
    slack = noise * max(np.abs(base).max(initial=0), np.abs(exact).max(initial=0)) / spacing
    misrounded = ~(error <= 0.5 * (1 + 1e-6) + slack)
    unmoved = (stored == base) & (np.abs(update) > 0.5 * (1 + 1e-6) * spacing)
    size = float(np.linalg.norm(update))
    return WeightAudit(
        tensor=step.name,
        elements=int(stored.size),
        misrounded=int(misrounded.sum()),
        largest_ulp=float(error.max()) if np.isfinite(error).all() else float("inf"),
        unmoved=int(unmoved.sum()),
        lost_share=float(np.linalg.norm(stored - exact)) / size if size else 0.0,
    )


def _apply(
    part: Part, exact: Array, base: Array, plan: MergePlan, adapter: Adapter, kept: str
) -> None:
    """Write what `part` makes of `base` into `exact`, both float64."""
    if part.what == ROWS:
        rows = adapter.rows[part.module]
        for index, row in zip(rows.indices, rows.values, strict=True):
            exact[index] = row.astype(np.float64)
        return
    pair = adapter.modules[part.module]
    if part.what == BIAS:
        assert pair.bias is not None
        exact += pair.scale * pair.bias.astype(np.float64)
        return
    experts = pair.a.shape[0] if pair.kind == EXPERTS else 1
    shape = base.shape if base.ndim == 3 and pair.kind != CONV else (1, len(base), -1)
    old, new = base.reshape(shape), exact.reshape(shape)  # views: both are contiguous
    for expert in range(*(part.experts or (0, experts))):
        target: tuple[int | slice, ...] = (expert if shape[0] != 1 else 0,)
        if part.box is not None:
            (first, _), rows_of, columns = part.box
            offset = expert - (part.experts[0] if part.experts else 0)
            target = (first + offset, slice(*rows_of), slice(*columns))
        weight = old[target].T if part.transposed else old[target]
        merged = _formula(weight, pair, expert, part, plan.variant.split("+"), kept)
        new[target] = merged.T if part.transposed else merged


def _formula(
    weight: Array, pair: Factors, expert: int, part: Part, names: list[str], kept: str
) -> Array:
    """Return the merged weight (out, in) by the formulas of the papers."""
    a = pair.a[expert] if pair.kind == EXPERTS else pair.a.reshape(pair.rank, -1)
    b = pair.b[expert] if pair.kind == EXPERTS else pair.b.reshape(-1, pair.rank)
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    if pair.diagonal is not None:
        wide_a = pair.diagonal.astype(np.float64)[:, None] * wide_a
    delta = pair.scale * np.matmul(wide_b, wide_a)
    delta = delta[slice(*(part.outs or (None,))), slice(*(part.ins or (None,)))]
    if pair.kind == LINEAR and {"pissa", "kasa", "olora"} & set(names):
        weight = _rounded(_before_training(weight, pair, names), kept)
    if pair.magnitude is None:
        plain: Array = weight + delta
        return plain
    total = weight + delta
    length = np.linalg.norm(total, axis=1)
    magnitude = pair.magnitude.astype(np.float64)[slice(*(part.outs or (None,)))]
    with np.errstate(divide="ignore", invalid="ignore"):
        factor = np.where(length > 0, magnitude / length, 0.0)
    scaled: Array = factor[:, None] * total
    return scaled


def _before_training(weight: Array, pair: Factors, names: list[str]) -> Array:
    """Return the weight that training began with: the base's, less what its method took out."""
    if "olora" in names:
        q, r = np.linalg.qr(weight)
        residual: Array = weight - pair.scale * np.matmul(q[:, : pair.rank], r[: pair.rank])
        return residual
    u, s, v = np.linalg.svd(weight, full_matrices=False)
    if "pissa" in names:
        s = np.where(np.arange(len(s)) < pair.rank, 0.0, s)
    else:  # KaSA drops the smallest
        s = np.where(np.arange(len(s)) < len(s) - pair.rank, s, 0.0)
    kept: Array = np.matmul(u * s, v)
    return kept


def _rounded(value: Array, dtype: str) -> Array:
    """Return `value` rounded to the nearest number of `dtype`, ties to even, still as float64."""
    if dtype == "F64":
        return value
    spacing = ulp(value, dtype)
    nearest: Array = np.rint(value / spacing) * spacing
    return nearest
