"""The command `tune`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_export import registry
from lora_export.cli import _shared
from lora_export.errors import CheckFailed

if TYPE_CHECKING:
    from lora_export.tuning import Tuning


@click.command("tune", short_help="Try formats, precisions and threads; write the fastest proven.")
@_shared.model_option
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("tuned"),
    show_default=True,
    help="Directory to write: the artifact, tokenizer/, tuning.json, certificate.json.",
)
@click.option(
    "--time-budget",
    type=click.FloatRange(0, min_open=True),
    default=120.0,
    show_default=True,
    help="Seconds for trying, loading the model apart. What has begun is finished.",
)
@click.option(
    "--batch", type=click.IntRange(1), default=1, show_default=True, help="Of the timed inputs."
)
@click.option(
    "--length", type=click.IntRange(1), default=128, show_default=True, help="Of the timed inputs."
)
@click.option(
    "--threads",
    type=click.IntRange(1),
    multiple=True,
    help="Threads; may be given more than once. Default: one, and all cores.",
)
@_shared.data_option
@click.option(
    "--precision",
    "precisions",
    multiple=True,
    type=click.Choice(registry.PRECISIONS),
    help="Precision that may be chosen; may be given more than once. Default: those that gain "
    "something on this processor.",
)
@click.option(
    "--format",
    "formats",
    multiple=True,
    type=click.Choice(registry.names(registry.EXPORTERS)),
    help="Artifact format; may be given more than once. Default: all that can run here.",
)
@_shared.cache_option
@_shared.seed_option
@_shared.overwrite_option
@_shared.json_option
@_shared.quiet_option
@click.pass_context
def command(ctx: click.Context, /, as_json: bool, quiet: bool, **options: Any) -> None:
    """Try a merged model in every sensible form on this machine, and write the fastest proven one.

    Each form is a format, a precision and a number of threads. It is exported, judged as `export`
    does, and timed in turn with eager torch in fp32. Exits with 5 where no form is proven.

    \b
    lora-export tune --model merged --out tuned
    lora-export tune --batch 8 --length 64 --precision fp32 --time-budget 300
    """
    with _shared.progress(quiet=quiet) as say:
        say("loading torch and transformers")
        from lora_export import tuning

        found = tuning.tune(**options, command=_shared.invoked(), say=say)
    if as_json:
        click.echo(json.dumps(found.facts(), indent=2, ensure_ascii=False))
    else:
        _print(found, options["out"])
    ctx.exit(0 if found.ok else CheckFailed.exit_code)


def _print(found: "Tuning", out: Path) -> None:
    rows = []
    for row in found.rows:
        marks = ["chosen"] if row.configuration == found.chosen else []
        marks += ["front"] if row.configuration in found.front else []
        cells: tuple[str, ...] = ("-",) * 6
        if f := row.figures:
            cells = (
                f"{f.ratio:.3f} [{f.low:.3f}, {f.high:.3f}]",
                f"{f.median_ms:.2f}",
                f"{f.eager_ms:.2f}",
                f"{f.size_bytes / 1e6:.1f}",
                f"{f.memory_bytes / 1e6:.1f}",
                f"{f.deviation:.3g}",
            )
        rows.append((row.configuration, *cells, row.judgement, ", ".join(marks)))
    head = ("configuration", "x eager, 95 % interval", "ms", "eager ms", "MB", "memory MB")
    _shared.print_table((*head, "deviation", "verdicts", ""), rows)
    told = found.settings
    click.echo(
        f"\nbatch {told['batch']}, length {told['length']}; eager: torch in fp32, threads "
        f"{told['eager_threads']}; ms: median; memory: what a fresh process grows by; deviation: "
        "from float64, in noise floors"
    )
    click.echo(f"order: {told['order']}")
    for title, group in (("skipped", found.skipped), ("not tried", found.not_tried)):
        for left in group:
            click.echo(f"{title}: {left.what}: {left.reason}")
    if near := ", ".join(map(str, found.perhaps_as_fast)):
        click.echo(f"note: the interval of the chosen one overlaps those of: {near}")
    best = [row.figures for row in found.rows if row.configuration == found.chosen]
    if any(f is not None and f.high >= 1 for f in best):
        click.echo("note: eager torch may be as fast as the chosen one")
    claim = f"proven: {found.chosen}" if found.ok else "NOT PROVEN: no configuration is chosen"
    click.echo(f"{claim}; {out}")
