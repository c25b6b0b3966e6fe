"""The command `merge`."""

from pathlib import Path
from typing import Any

import click

from lora_export.cli import _shared


@click.command("merge", short_help="Merge an adapter into plain weights.")
@_shared.adapter_option
@_shared.base_option
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("merged"),
    show_default=True,
    help="Directory to write.",
)
@_shared.dtype_option
@click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")
@_shared.merge_options
@_shared.overwrite_option
@_shared.json_option
@_shared.quiet_option
@click.pass_context
def command(
    ctx: click.Context,
    /,
    adapter: Path,
    base: str | None,
    out: Path,
    dry_run: bool,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Merge an adapter into its base: a directory that plain transformers loads.

    \b
    lora-export merge --adapter sst2.safetensors
    lora-export merge --adapter adapter_dir --base ./llama --out merged --dtype bfloat16
    """
    with _shared.progress(quiet=quiet) as say:
        say("loading torch")
        from lora_export import opening, pipeline

        if dry_run:
            say("planning")
            job = opening.open_job(adapter, base, opening.Options(**options))
        else:
            certificate = pipeline.merge_files(
                adapter,
                base=base,
                out=out,
                overwrite=overwrite,
                command=_shared.invoked(),
                say=say,
                **options,
            )
    if dry_run:
        _shared.print_plan(job, as_json=as_json)
    else:
        ctx.exit(_shared.finish(certificate, as_json=as_json, written=out))
