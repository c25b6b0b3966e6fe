"""The command `diagnose`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_export import registry
from lora_export.cli import _shared
from lora_export.errors import CheckFailed

if TYPE_CHECKING:
    from lora_export.diagnosing import Diagnosis

AROUND = 5  # modules that are shown before and after the one where they part


@click.command("diagnose", short_help="Find the module at which an artifact parts from its model.")
@click.argument("artifact", type=click.Path(path_type=Path))
@_shared.model_option
@click.option(
    "--format",
    "name",
    type=click.Choice(registry.names(registry.EXPORTERS)),
    help="Artifact format. Default: by the suffix.",
)
@_shared.data_option
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Draw the error by module into this .png or .svg (needs the extra `report`).",
)
@_shared.cache_option
@_shared.seed_option
@_shared.json_option
@_shared.quiet_option
@click.pass_context
def command(
    ctx: click.Context,
    /,
    artifact: Path,
    as_json: bool,
    quiet: bool,
    plot: Path | None,
    **options: Any,
) -> None:
    """Compare an artifact with a merged model, module by module, and say where they part.

    The graph in the file is evaluated in float64, so that nothing hides below the rounding of a
    runtime; what it has of each module is found by its numbers. Exits with 5 where they part.

    \b
    lora-export diagnose model.onnx --model merged
    lora-export diagnose model.pt --plot error.svg
    """
    with _shared.progress(quiet=quiet) as say:
        say("loading torch and transformers")
        from lora_export import diagnosing, plotting

        if plot is not None:
            plotting.figure_for(plot)  # what cannot be drawn is known before the work
        found = diagnosing.diagnose(artifact, **options, say=say)
        if plot is not None:
            plotting.error_by_depth(found.outputs, found.module, plot)
    if as_json:
        click.echo(json.dumps(found.facts(), indent=2, allow_nan=False))
    else:
        _print(found)
    ctx.exit(0 if found.ok else CheckFailed.exit_code)


def _print(found: "Diagnosis") -> None:
    if found.module is not None:
        place = found.outputs.index(found.module)
        first = max(0, place - AROUND)
        shown = found.outputs[first : place + AROUND + 1]
        _shared.print_table(
            ("module", "class", "error", "limit", "value inside", ""),
            [
                (
                    one.module,
                    one.kind,
                    f"{one.error:.3g}",
                    f"{one.limit:.3g}",
                    one.value or "-",
                    "parts" * (one is found.module) or "excused" * one.excused,
                )
                for one in shown
            ],
        )
        click.echo(f"\n{first} modules before and {len(found.outputs) - first - len(shown)} after")
    for verdict in found.verdicts:
        click.echo(f"{verdict.check}: {verdict.status}, {verdict.note}")
    click.echo(found.sentence)
