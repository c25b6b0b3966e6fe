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
@click.option(
    "--shard-size",
    help="Cut the weights into shards of at most this size, such as 5GB. "
    "Default: the base's shards.",
)
@click.option("--with-code", is_flag=True, help="Take Python files of the base along.")
@click.option("--resume", is_flag=True, help="Go on where a killed run of the same job came to.")
@click.option(
    "--full-audit", is_flag=True, help="Derive every element again, of a large model too."
)
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
    resume: bool,
    full_audit: bool,
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
        from lora_export import merged_files, opening

        if dry_run:
            say("planning")
            job = opening.open_job(adapter, base, opening.Options(**options))
        else:
            certificate = merged_files.merge_files(
                adapter,
                base=base,
                out=out,
                overwrite=overwrite,
                resume=resume,
                full_audit=full_audit,
                command=_shared.invoked(),
                say=say,
                advance=say.advance,
                **options,
            )
    if dry_run:
        _shared.print_plan(job, as_json=as_json)
    else:
        ctx.exit(_shared.finish(certificate, as_json=as_json, written=out))
