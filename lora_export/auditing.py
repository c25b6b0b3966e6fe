"""What the merge did to the files, observed from the files: evidence for the checks.

The arithmetic is numpy in float64, written apart from the code that merges.
"""

import math
import random

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
from lora_export.storage import DTYPE_BYTES, Checkpoint, TensorInfo, dtype_name

SAMPLE = 2**24  # elements of all tensors, up to which a merge looks at every one
_SHARE = 4  # of that is looked at where there are more
_PLACES = 4  # to look at in a large tensor
_SPAN = 2**18  # elements looked at at a time
_NOISE = 2.0**-48  # of float64 sums of a few hundred products, in units of the largest weight
_NOISE_OF_SVD = 2.0**-38


def account(
    plan: MergePlan,
    adapter: Adapter,
    checkpoint: Checkpoint,
    merged: Checkpoint,
    most: int | None = None,
) -> Account:
    """Return where every tensor of adapter and base went, as found in the written files.

    Of copied tensors that together have more than `most` elements a sample is compared, in every
    one.
    """
    copies = plan.of(COPY)
    sizes = {step.name: math.prod(step.shape) for step in copies}
    of_each = _of_each(sum(sizes.values()), len(copies), most)
    damaged = {
        step.source or ""
        for step in copies
        if step.name not in merged.tensors
        or not _is_copy(step, checkpoint, merged, _looks(step.name, sizes[step.name], 1, of_each))
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
        is_sample=of_each is not None,
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


def _is_copy(
    step: Step, checkpoint: Checkpoint, merged: Checkpoint, looks: list[tuple[int, int]]
) -> bool:
    """Whether the written tensor is the base's, or its value rounded once to the asked dtype."""
    source, written = checkpoint.tensors[str(step.source)], merged.tensors[step.name]
    if written.dtype != step.dtype or source.shape != written.shape:
        return False
    if source.dtype == written.dtype:  # bit for bit, whatever the dtype
        size = DTYPE_BYTES[source.dtype]
        return all(
            source.read(start * size, stop * size) == written.read(start * size, stop * size)
            for start, stop in looks
        )
    return all(
        _are_nearest(written.part(*look), source.part(*look), written.dtype) for look in looks
    )


def _holds(info: TensorInfo, value: Array) -> bool:
    """Whether the tensor on disk is `value`, rounded once to the dtype on disk."""
    if info.shape != value.shape:
        return False
    if not is_float(value):
        return bool((info.array() == value).all())
    return _are_nearest(info.array(), value, info.dtype)


def _are_nearest(stored: Array, value: Array, dtype: str) -> bool:
    exact = value.astype(np.float64)
    error = np.abs(stored.astype(np.float64) - exact)
    return bool((error <= 0.5 * ulp(exact, dtype)).all())


def _looks(name: str, size: int, unit: int, most: int | None) -> list[tuple[int, int]]:
    """Return the spans of a tensor of `size` elements to look at, all of them multiples of `unit`.

    Everything, or, where that is more than `most`, its beginning, its end and places between that
    depend on the name alone.
    """
    if most is None or size <= most:
        step = max(_SPAN // unit, 1) * unit
        return [(start, min(start + step, size)) for start in range(0, size, step)]
    length = max(most // _PLACES // unit, 1) * unit
    random_ = random.Random(name)
    length = min(length, size)
    starts = [random_.randrange(size // unit) * unit for _ in range(_PLACES - 2)]
    found, done = [], 0
    for start in sorted((0, *starts, size - length)):
        stop = min(start + length, size)
        if stop > done:  # no element counts twice
            found.append((max(start, done), stop))
            done = stop
    return found


def weights(
    plan: MergePlan,
    adapter: Adapter,
    checkpoint: Checkpoint,
    merged: Checkpoint,
    most: int | None = None,
) -> tuple[WeightAudit, ...]:
    """Return the audit of every merged tensor against its formula in float64.

    Of tensors that together have more than `most` elements a sample is looked at, in every one.
    """
    steps = [step for step in plan.steps if step.parts]
    of_each = _of_each(sum(math.prod(step.shape) for step in steps), len(steps), most)
    return tuple(_audit(step, plan, adapter, checkpoint, merged, of_each) for step in steps)


def _of_each(total: int, count: int, most: int | None) -> int | None:
    return None if most is None or total <= most else max(most // (_SHARE * max(count, 1)), 1)


def _audit(
    step: Step,
    plan: MergePlan,
    adapter: Adapter,
    checkpoint: Checkpoint,
    merged: Checkpoint,
    most: int | None,
) -> WeightAudit:
    size = math.prod(step.shape)
    info = merged.tensors.get(step.name)
    if info is None or (info.shape, info.dtype) != (step.shape, step.dtype):
        return WeightAudit(step.name, size, size, size, float("inf"), size, 1.0, 0.0, 1.0)
    start: TensorInfo | Array
    if step.source is not None:
        start = checkpoint.tensors[step.source]
        kept = start.dtype
    else:
        start = adapter.replaced[str(step.placed)]
        kept = dtype_name(start)
    pairs = [adapter.modules.get(part.module) for part in step.parts]
    stacked = len(step.shape) == 3 and not any(pair and pair.kind == CONV for pair in pairs)
    width = math.prod(step.shape[-1:] if stacked else step.shape[1:])
    whole = any(_is_whole(part, plan, adapter) for part in step.parts)
    looks = [(0, size)] if whole else _looks(step.name, size, width, most)
    found = []
    for look in looks:
        own = (
            start.part(*look) if isinstance(start, TensorInfo) else start.reshape(-1)[slice(*look)]
        )
        base = own.astype(np.float64).reshape(-1, width)
        exact = base.copy()
        for part in step.parts:
            _apply(part, exact, base, look[0] // width, step, plan, adapter, kept)
        found.append(_compared(info.part(*look).reshape(-1, width), exact, base, info.dtype, plan))
    elements, misrounded, largest, unmoved, lost, moved, along, found_moved = zip(
        *found, strict=True
    )
    update = math.sqrt(sum(moved))
    applied = sum(along) / sum(moved) if update else 1.0
    across = max(sum(found_moved) - applied * sum(along), 0.0) if update else 0.0
    return WeightAudit(
        tensor=step.name,
        elements=sum(elements),
        of=size,
        misrounded=sum(misrounded),
        largest_ulp=max(largest),
        unmoved=sum(unmoved),
        lost_share=math.sqrt(sum(lost)) / update if update else 0.0,
        applied=applied,
        strange=math.sqrt(across / sum(found_moved)) if sum(found_moved) else 0.0,
    )


def _compared(
    written: Array, exact: Array, base: Array, dtype: str, plan: MergePlan
) -> tuple[int, int, float, int, float, float, float, float]:
    """Return elements, misrounded ones, largest error in ulp, unmoved ones, and four sums.

    The sums are the squared norms of what rounding took away and of the update, the product of the
    update with how far the stored tensor moved, and the squared norm of the latter.
    """
    stored = written.astype(np.float64)
    update, went = exact - base, stored - base
    spacing = ulp(exact, dtype)
    error = np.abs(stored - exact) / spacing
    # Half an ulp is the most that one rounding can cost. The slack is float64's own error, which
    # the order of summation changes, and a decomposition much more.
    noise = _NOISE_OF_SVD if variants.changes_base(plan.variant) else _NOISE
    slack = noise * max(np.abs(base).max(initial=0), np.abs(exact).max(initial=0)) / spacing
    misrounded = ~(error <= 0.5 * (1 + 1e-6) + slack)
    unmoved = (stored == base) & (np.abs(update) > 0.5 * (1 + 1e-6) * spacing)
    return (
        stored.size,
        int(misrounded.sum()),
        float(error.max(initial=0)) if np.isfinite(error).all() else float("inf"),
        int(unmoved.sum()),
        float(np.square(stored - exact).sum()),
        float(np.square(update).sum()),
        float((went * update).sum()),
        float(np.square(went).sum()),
    )


def _is_whole(part: Part, plan: MergePlan, adapter: Adapter) -> bool:
    """Return whether the part's formula needs all rows at once."""
    pair = adapter.modules.get(part.module)
    if pair is None or part.what == BIAS:
        return False
    return variants.changes_base(plan.variant) or (part.transposed and pair.magnitude is not None)


def _apply(
    part: Part,
    exact: Array,
    base: Array,
    first: int,
    step: Step,
    plan: MergePlan,
    adapter: Adapter,
    kept: str,
) -> None:
    """Write what `part` makes of the rows `base`, from row `first` on, into `exact`."""
    if part.what == ROWS:
        rows = adapter.rows[part.module]
        for index, row in zip(rows.indices, rows.values, strict=True):
            if first <= index < first + len(exact):
                exact[index - first] = row.astype(np.float64)
        return
    pair = adapter.modules[part.module]
    if part.what == BIAS:
        assert pair.bias is not None
        exact[:, 0] += pair.scale * pair.bias.astype(np.float64)[first : first + len(exact)]
        return
    stacked = len(step.shape) == 3 and pair.kind != CONV
    height = step.shape[1] if stacked else step.shape[0]
    experts = pair.a.shape[0] if pair.kind == EXPERTS else 1
    for expert in range(*(part.experts or (0, experts))):
        offset = expert - (part.experts[0] if part.experts else 0)
        place, span, columns = expert if stacked else 0, (0, height), slice(None)
        if part.box is not None:
            (start, _), span, sides = part.box
            place, columns = start + offset, slice(*sides)
        top, bottom = place * height + span[0], place * height + span[1]
        low, high = max(top, first), min(bottom, first + len(exact))
        if low >= high:
            continue
        here, mine = slice(low - first, high - first), slice(low - top, high - top)
        weight = base[here, columns].T if part.transposed else base[here, columns]
        merged = _formula(weight, pair, expert, part, plan.variant.split("+"), kept, mine)
        exact[here, columns] = merged.T if part.transposed else merged


def _formula(
    weight: Array,
    pair: Factors,
    expert: int,
    part: Part,
    names: list[str],
    kept: str,
    mine: slice,
) -> Array:
    """Return the merged weight (out, in) by the formulas of the papers.

    `weight` is the stored rows `mine` of the region: some of its outputs, or, where it is stored
    transposed, of its inputs.
    """
    a = pair.a[expert] if pair.kind == EXPERTS else pair.a.reshape(pair.rank, -1)
    b = pair.b[expert] if pair.kind == EXPERTS else pair.b.reshape(-1, pair.rank)
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    if pair.diagonal is not None:
        wide_a = pair.diagonal.astype(np.float64)[:, None] * wide_a
    wide_b, wide_a = (
        wide_b[slice(*(part.outs or (None,)))],
        wide_a[:, slice(*(part.ins or (None,)))],
    )
    if part.transposed:
        wide_a = wide_a[:, mine]
    else:
        wide_b = wide_b[mine]
    delta = pair.scale * np.matmul(wide_b, wide_a)
    if pair.kind == LINEAR and {"pissa", "kasa", "olora"} & set(names):
        weight = _rounded(_before_training(weight, pair, names), kept)
    if pair.magnitude is None:
        plain: Array = weight + delta
        return plain
    total = weight + delta
    length = np.linalg.norm(total, axis=1)
    magnitude = pair.magnitude.astype(np.float64)[slice(*(part.outs or (None,)))]
    magnitude = magnitude if part.transposed else magnitude[mine]
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
