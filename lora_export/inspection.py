"""What an adapter holds, how large its updates are, and which loaders would misread it."""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_export.records import CONV, EMBEDDING, EXPERTS, Adapter, Array, Factors

if TYPE_CHECKING:  # looking at an adapter loads no torch
    from lora_export.opening import Job


def facts(adapter: Adapter) -> dict[str, Any]:
    """Return what `adapter` says of itself, by name."""
    mark = adapter.base.fingerprint
    ranks = Counter(pair.rank for pair in adapter.modules.values())
    kinds = Counter(pair.kind for pair in adapter.modules.values())
    return {
        "format": adapter.format,
        "variant": adapter.variant,
        "task": adapter.task_type,
        "base": adapter.base.id,
        "revision": adapter.base.revision,
        "architecture": adapter.base.architecture,
        "fingerprint": mark and dataclasses.asdict(mark),
        "labels": list(adapter.labels),
        "low-rank modules": len(adapter.modules),
        "kinds": dict(kinds),
        "ranks": {str(rank): count for rank, count in sorted(ranks.items())},
        "parameters": sum(pair.a.size + pair.b.size for pair in adapter.modules.values()),
        "tensors stored whole": {n: list(v.shape) for n, v in adapter.replaced.items()},
        "trained rows": {path: len(rows.indices) for path, rows in adapter.rows.items()},
        "ignored": dict(adapter.ignored),
        "untrained modules": [p for p, pair in adapter.modules.items() if pair.is_zero],
        "training": dict(adapter.training),
        "sha256": adapter.sha256,
        "notes": list(adapter.notes),
        "misread by": [
            {"loader": loader, "why": why}
            for loader, reasons in misreadings(adapter).items()
            for why in reasons
        ],
    }


def modules(adapter: Adapter, job: "Job | None" = None) -> list[dict[str, Any]]:
    """Return rank, scale and size of the update of every module.

    `delta_norm` is the Frobenius norm of s B A; `relative` its share of the base weight's norm,
    where a job says what the base is.
    """
    found = []
    for path, pair in adapter.modules.items():
        size = delta_norm(pair)
        entry = {
            "module": path,
            "kind": pair.kind,
            "rank": pair.rank,
            "alpha": pair.alpha,
            "scale": pair.scale,
            "delta_norm": size,
            "zero": pair.is_zero,
        }
        if job is not None:
            base = _base_norm(job, path)
            entry["relative"] = size / base if base else None
        found.append(entry)
    return found


def delta_norm(pair: Factors) -> float:
    """Return ||s B diag(d) A|| (Frobenius), from the small products B'B and AA' alone."""
    total = 0.0
    for a, b in zip(*pair.matrices(), strict=True):
        wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
        if pair.diagonal is not None:
            wide_b = wide_b * pair.diagonal.astype(np.float64)
        total += float(((wide_b.T @ wide_b) * (wide_a @ wide_a.T)).sum())
    return float(abs(pair.scale) * math.sqrt(max(total, 0.0)))


def _base_norm(job: "Job", path: str) -> float:
    squares = 0.0
    for step in job.plan.steps:
        if path in step.modules and step.source is not None:
            value: Array = job.checkpoint.tensors[step.source].array().astype(np.float64)
            squares += float((value * value).sum())
    return math.sqrt(squares)


# ---------------------------------------------------------------- other loaders


@dataclass(frozen=True)
class _Trap:
    """Something in an adapter that a loader reads wrongly, or not at all."""

    loaders: tuple[str, ...]
    why: str
    applies: Callable[[Adapter], bool]


def misreadings(adapter: Adapter) -> Mapping[str, list[str]]:
    """Return, by loader, what it would misread in `adapter`, and why.

    From the loaders' sources of 2026: PEFT 0.21, vLLM (vllm/lora), llama.cpp
    (convert_lora_to_gguf.py), mlx-lm. Stated for the adapter as PEFT's files hold it.
    """
    found: dict[str, list[str]] = {}
    for trap in _TRAPS:
        if trap.applies(adapter):
            for loader in trap.loaders:
                found.setdefault(loader, []).append(trap.why)
    return found


def _has(name: str) -> Callable[[Adapter], bool]:
    return lambda adapter: name in adapter.variant.split("+")


def _differ(value: Callable[[Factors], float]) -> Callable[[Adapter], bool]:
    return lambda adapter: len({value(pair) for pair in adapter.modules.values()}) > 1


def _any(test: Callable[[Factors], bool]) -> Callable[[Adapter], bool]:
    return lambda adapter: any(test(pair) for pair in adapter.modules.values())


def _noted(text: str) -> Callable[[Adapter], bool]:
    return lambda adapter: any(text in note for note in adapter.notes)


PEFT, VLLM, LLAMA, MLX = "PEFT", "vLLM", "llama.cpp", "mlx-lm"
_TRAPS = (
    _Trap(
        (LLAMA,), "takes alpha / rank as the scale, not rsLoRA's alpha / sqrt(rank)", _has("rslora")
    ),
    _Trap((VLLM,), "takes one alpha and one rank for all modules", _differ(lambda p: p.scale)),
    _Trap((LLAMA,), "takes one alpha for all modules", _differ(lambda p: p.alpha)),
    _Trap((VLLM, LLAMA), "refuses DoRA", _has("dora")),
    _Trap((VLLM, LLAMA, MLX), "does not know lora_bias", _any(lambda p: p.bias is not None)),
    _Trap(
        (VLLM, LLAMA, MLX), "refuses or leaves out tensors stored whole", lambda a: bool(a.replaced)
    ),
    _Trap((VLLM, LLAMA, MLX), "leaves out trained rows", lambda a: bool(a.rows)),
    _Trap((LLAMA,), "leaves out updates of embeddings", _any(lambda p: p.kind == EMBEDDING)),
    _Trap(
        (VLLM, LLAMA, MLX), "does not know updates of convolutions", _any(lambda p: p.kind == CONV)
    ),
    _Trap(
        (MLX,), "has other names and shapes for fused experts", _any(lambda p: p.kind == EXPERTS)
    ),
    _Trap((VLLM, LLAMA, MLX), "adds the update to the unchanged base", _has("pissa")),
    _Trap((VLLM, LLAMA, MLX), "adds the update to the unchanged base", _has("olora")),
    _Trap((VLLM, LLAMA, MLX), "does not know KaSA's diagonal and truncated base", _has("kasa")),
    _Trap((VLLM, LLAMA, MLX), "does not know AdaLoRA", _has("adalora")),
    _Trap(
        (PEFT, VLLM),
        "finds no tensor of these names, and runs the base",
        _noted("PEFT would not load"),
    ),
    _Trap(
        (PEFT,), "leaves out modules outside of target_modules", _noted("PEFT would leave them out")
    ),
    _Trap((PEFT,), "expects a config, and alpha in it", lambda a: a.format == "loralib"),
    _Trap((PEFT, VLLM, LLAMA), "reads other names", lambda a: a.format in ("mlx", "kohya")),
    _Trap(
        (MLX,), "reads adapters.safetensors with transposed factors", lambda a: a.format != "mlx"
    ),
)
