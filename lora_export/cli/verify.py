"""The command `verify`."""

from pathlib import Path
from typing import Any

import click

from lora_export.cli import _shared


@click.command("verify", short_help="Derive a merge again, and hold its files against that.")
@click.argument("merged", type=click.Path(path_type=Path))
@_shared.adapter_option
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
    adapter: Path,
    base: str | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Derive every merged weight again from base and adapter; nothing is written.

    Options are those that the merge was made with, where none are given here.

    \b
    lora-export verify merged --adapter sst2.safetensors
    """
    with _shared.progress(quiet=quiet) as say:
        from lora_export import merged_files, opening

        given = opening.Options(**options).stated()
        certificate = merged_files.verify_merged(
            merged, adapter, base=base, command=_shared.invoked(), say=say, **given
        )
    ctx.exit(_shared.finish(certificate, as_json=as_json, written=merged))
