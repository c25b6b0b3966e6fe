"""What the merge did to the files, observed from the files: evidence for the checks.

The arithmetic is numpy in float64, written apart from the code that merges.
"""

import numpy as np

from lora_export.plan import COPY, MERGE, MergePlan, Step
from lora_export.records import Account, Adapter, Array, WeightAudit
from lora_export.rounding import ulp
from lora_export.storage import Checkpoint, TensorInfo


def account(
    plan: MergePlan, adapter: Adapter, checkpoint: Checkpoint, merged: Checkpoint
) -> Account:
    """Return where every tensor of adapter and base went, as found in the written files."""
    copies = {step.name: step for step in plan.of(COPY)}
    damaged = {
        step.source or ""
        for step in copies.values()
        if step.name not in merged.tensors or not _is_copy(step, checkpoint, merged)
    }
    done = {step.module for step in plan.of(MERGE) if step.name in merged.tensors}
    placed = {
        name
        for name, value in adapter.replaced.items()
        if name in merged.tensors and _holds(merged.tensors[name], value)
    }
    planned = {step.name for step in plan.steps}
    changed = {step.source or "" for step in plan.of(MERGE) if step.module in done}
    base_names = {step.source for step in plan.steps} | plan.dropped.keys()
    return Account(
        adapter_merged=tuple(sorted(map(str, done))),
        adapter_placed=tuple(sorted(placed)),
        adapter_left=tuple(
            sorted((adapter.modules.keys() - done) | (adapter.replaced.keys() - placed))
        ),
        base_changed=tuple(sorted(changed)),
        base_identical=tuple(sorted({s.source or "" for s in copies.values()} - damaged)),
        base_dropped=dict(plan.dropped),
        base_damaged=tuple(sorted(damaged | (checkpoint.tensors.keys() - base_names))),
        unexplained=tuple(sorted(merged.tensors.keys() - planned)),
    )


def _is_copy(step: Step, checkpoint: Checkpoint, merged: Checkpoint) -> bool:
    """Whether the written tensor is the base's, or its value rounded once to the asked dtype."""
    source, written = checkpoint.tensors[str(step.source)], merged.tensors[step.name]
    if source.dtype == written.dtype:  # bit for bit, whatever the dtype
        return source.shape == written.shape and source.read() == written.read()
    return _holds(written, source.array())


def _holds(info: TensorInfo, value: Array) -> bool:
    """Whether the tensor on disk is `value`, rounded once to the dtype on disk."""
    exact = value.astype(np.float64)
    error = np.abs(info.array().astype(np.float64) - exact)
    return info.shape == value.shape and bool((error <= 0.5 * ulp(exact, info.dtype)).all())


def weights(
    plan: MergePlan, adapter: Adapter, checkpoint: Checkpoint, merged: Checkpoint
) -> tuple[WeightAudit, ...]:
    """Return the audit of every merged tensor against W0 + s B A in float64."""
    return tuple(_audit(step, adapter, checkpoint, merged) for step in plan.of(MERGE))


def _audit(step: Step, adapter: Adapter, checkpoint: Checkpoint, merged: Checkpoint) -> WeightAudit:
    pair = adapter.modules[str(step.module)]
    base = checkpoint.tensors[str(step.source)].array().astype(np.float64)
    update = pair.scale * np.matmul(pair.b.astype(np.float64), pair.a.astype(np.float64))
    update = update.T if step.transposed else update
    exact = base + update
    info = merged.tensors[step.name]
    stored = info.array().astype(np.float64)
    spacing = ulp(exact, info.dtype)
    error = np.abs(stored - exact) / spacing
    # Half an ulp is the most that one rounding can cost; the slack is float64's own error, which
    # the order of summation changes.
    misrounded = ~(error <= 0.5 * (1 + 1e-6))
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
