"""The command `merge`."""

from pathlib import Path

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
@click.option(
    "--dtype",
    type=click.Choice(["keep", "float32", "bfloat16", "float16"]),
    default="keep",
    show_default=True,
    help="Of the merged weights.",
)
@click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")
@_shared.mismatch_option
@_shared.overwrite_option
@_shared.json_option
@_shared.quiet_option
@click.pass_context
def command(
    ctx: click.Context,
    adapter: Path,
    base: str | None,
    out: Path,
    dtype: str,
    dry_run: bool,
    allow_base_mismatch: bool,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Merge an adapter into its base: a directory that plain transformers loads.

    \b
    lora-export merge --adapter sst2.safetensors
    lora-export merge --adapter adapter_dir --base ./llama --out merged --dtype bfloat16
    """
    with _shared.progress(quiet=quiet) as say:
        say("loading torch and transformers")
        from lora_export import pipeline, stages

        if dry_run:
            say("planning")
            job = stages.open_job(
                adapter, base, dtype=dtype, allow_base_mismatch=allow_base_mismatch
            )
        else:
            certificate = pipeline.merge_files(
                adapter,
                base=base,
                out=out,
                dtype=dtype,
                overwrite=overwrite,
                allow_base_mismatch=allow_base_mismatch,
                command=_shared.invoked(),
                say=say,
            )
    if dry_run:
        _shared.print_plan(job.plan, as_json=as_json)
    else:
        ctx.exit(_shared.finish(certificate, as_json=as_json, written=out))
