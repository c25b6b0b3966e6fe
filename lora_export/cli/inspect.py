"""The command `inspect`."""

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_export.cli import _shared

if TYPE_CHECKING:
    from lora_export.records import Adapter


@click.command("inspect", short_help="What is in an adapter; would it merge.")
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("--base", help="Base model: also say whether the adapter fits it.")
@_shared.mismatch_option
@_shared.json_option
def command(adapter: Path, base: str | None, allow_base_mismatch: bool, as_json: bool) -> None:
    """Show what an adapter holds, and with --base whether it would merge.

    \b
    lora-export inspect sst2.safetensors
    lora-export inspect sst2.safetensors --base sentence-transformers/all-MiniLM-L6-v2
    """
    from lora_export.adapter import read_adapter

    found = read_adapter(adapter)
    facts = _facts(found)
    if base:
        from lora_export import stages

        job = stages.open_job(adapter, base, allow_base_mismatch=allow_base_mismatch)
        facts["fits"] = base
        facts["base notes"] = "; ".join(job.plan.notes)
    modules = [
        {"module": path, "rank": m.rank, "alpha": m.alpha, "scale": m.scale, "zero": m.is_zero}
        for path, m in found.modules.items()
    ]
    if as_json:
        click.echo(json.dumps({"schema": 1, "ok": True, **facts, "modules": modules}, default=str))
        return
    _shared.print_table(("", ""), [(name, value) for name, value in facts.items() if value])
    _shared.print_table(
        ("module", "rank", "alpha", "scale", ""),
        [
            (m["module"], m["rank"], f"{m['alpha']:g}", f"{m['scale']:g}", "zero" * bool(m["zero"]))
            for m in modules
        ],
    )


def _facts(found: "Adapter") -> dict[str, Any]:
    mark = found.base.fingerprint
    ranks = Counter(pair.rank for pair in found.modules.values())
    return {
        "format": found.format,
        "variant": found.variant,
        "task": found.task_type,
        "base": found.base.id,
        "revision": found.base.revision,
        "architecture": found.base.architecture,
        "fingerprint": mark and dataclasses.asdict(mark),
        "labels": list(found.labels),
        "low-rank modules": len(found.modules),
        "ranks": {str(rank): count for rank, count in sorted(ranks.items())},
        "parameters": sum(pair.a.size + pair.b.size for pair in found.modules.values()),
        "tensors stored whole": {n: list(v.shape) for n, v in found.replaced.items()},
        "untrained modules": [p for p, pair in found.modules.items() if pair.is_zero],
        "training": dict(found.training),
        "sha256": found.sha256,
        "notes": list(found.notes),
    }
