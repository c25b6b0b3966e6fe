"""The command `verify`."""

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from lora_export.cli import _shared

_ALWAYS = {"merged", "as_json", "quiet"}  # what goes without an adapter


@click.command(
    "verify", short_help="Hold files against their digests, or a merge against its adapter."
)
@click.argument("merged", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--adapter",
    type=click.Path(path_type=Path),
    help="Derive the merge in DIR again, from this adapter file or directory.",
)
@_shared.base_option
@_shared.dtype_option
@_shared.merge_options
@_shared.json_option
@_shared.quiet_option
@click.pass_context
def command(
    ctx: click.Context,
    /,
    merged: Path,
    adapter: Path | None,
    base: str | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Hold the files of a run or of a merged model against the digests written down beside them.

    With --adapter, derive every merged weight again from base and adapter; options are then those
    that the merge was made with, where none are given here. Nothing is written.

    \b
    lora-export verify run
    lora-export verify merged --adapter sst2.safetensors
    """
    with _shared.progress(quiet=quiet) as say:
        if adapter is None:
            _refuse_others(ctx)
            from lora_export import judging

            certificate = judging.verify_files(merged, command=_shared.invoked(), say=say)
        else:
            from lora_export import merged_files, opening

            given = opening.Options(**options).stated()
            certificate = merged_files.verify_merged(
                merged, adapter, base=base, command=_shared.invoked(), say=say, **given
            )
    ctx.exit(_shared.finish(certificate, as_json=as_json, written=merged))


def _refuse_others(ctx: click.Context) -> None:
    """Refuse the options that were given and are of use with --adapter only."""
    given = [
        option.opts[0]
        for option in ctx.command.params
        if option.name is not None
        and option.name not in _ALWAYS
        and ctx.get_parameter_source(option.name) is not ParameterSource.DEFAULT
    ]
    if given:
        raise click.UsageError(f"{', '.join(given)} is of use with --adapter only.")
