"""The command `inspect`."""

import json
from pathlib import Path
from typing import Any

import click

from lora_export.cli import _shared


@click.command("inspect", short_help="What is in an adapter; would it merge; who misreads it.")
@click.argument("adapter", type=click.Path(path_type=Path), required=False)
@click.option("--base", help="Base model: also say whether the adapter fits it.")
@click.option("--refusals", is_flag=True, help="Print what is refused, why, and what to do.")
@_shared.merge_options
@_shared.json_option
def command(
    adapter: Path | None, base: str | None, refusals: bool, as_json: bool, **options: Any
) -> None:
    """Show what an adapter holds, and with --base whether and how it would merge.

    \b
    lora-export inspect sst2.safetensors
    lora-export inspect sst2.safetensors --base sentence-transformers/all-MiniLM-L6-v2
    lora-export inspect --refusals
    """
    if refusals:
        _print_refusals(as_json=as_json)
        return
    if adapter is None:
        raise click.UsageError("Missing argument 'ADAPTER'.")
    from lora_export import inspection
    from lora_export.adapter import read_adapter
    from lora_export.records import Reading

    names = ("alpha", "pattern_order", "expert_b")
    reading = Reading(**{name: options[name] for name in names})
    found, job = read_adapter(adapter, options["adapter_format"], reading), None
    if base:
        from lora_export import opening

        job = opening.open_job(adapter, base, opening.Options(**options))
    facts, modules = inspection.facts(found), inspection.modules(found, job)
    plan = _shared.plan_facts(job) if job is not None else {}
    if as_json:
        content = {**facts, **({"fits": base, **plan} if plan else {}), "modules": modules}
        click.echo(json.dumps({"schema": 1, "ok": True, **content}, default=str))
        return
    traps = facts.pop("misread by")
    _shared.print_table(("", ""), [(name, value) for name, value in facts.items() if value])
    _shared.print_table(
        ("module", "kind", "rank", "alpha", "scale", "norm", "of the base", ""),
        [
            (
                m["module"],
                m["kind"],
                m["rank"],
                f"{m['alpha']:g}",
                f"{m['scale']:g}",
                f"{m['delta_norm']:.3g}",
                f"{m['relative']:.2%}" if m.get("relative") is not None else "-",
                "zero" * bool(m["zero"]),
            )
            for m in modules
        ],
    )
    if traps:
        _shared.print_table(
            ("loader", "would misread it"), [(trap["loader"], trap["why"]) for trap in traps]
        )
    if job is not None:
        click.echo(f"\nmerged into {base}:")
        _shared.print_plan(job, as_json=False)


def _print_refusals(*, as_json: bool) -> None:
    from lora_export.refusals import TABLE

    if as_json:
        rows = [
            {"name": name, "case": r.case, "why": r.why, "remedy": r.remedy}
            for name, r in TABLE.items()
        ]
        click.echo(json.dumps({"schema": 1, "ok": True, "refusals": rows}))
        return
    for name, entry in TABLE.items():
        click.echo(f"{name}: {entry.case}\n    why:    {entry.why}\n    remedy: {entry.remedy}")
