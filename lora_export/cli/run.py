"""The command `run`."""

from pathlib import Path
from typing import Any

import click

from lora_export import registry
from lora_export.cli import _shared


@click.command("run", short_help="All of it: merge, export, compare, time, certify.")
@_shared.adapter_option
@_shared.base_option
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("run"),
    show_default=True,
    help="Directory to write: merged/, the artifacts, certificate.json, report.md.",
)
@_shared.data_option
@click.option(
    "--format",
    "formats",
    multiple=True,
    type=click.Choice(registry.names(registry.EXPORTERS)),
    default=registry.DEFAULT_EXPORTERS,
    show_default=True,
    help="Artifact format; may be given more than once.",
)
@_shared.cache_option
@_shared.seed_option
@_shared.limit_options
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
    data: Path | None,
    formats: tuple[str, ...],
    cache: bool,
    seed: int,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Merge, export, compare and time an adapter, and write a certificate.

    \b
    lora-export run --adapter sst2.safetensors
    lora-export run --adapter sst2.safetensors --data dev.tsv --out proof
    """
    with _shared.progress(quiet=quiet) as say:
        say("loading torch and transformers")
        from lora_export import judging, pipeline

        certificate = pipeline.run(
            adapter,
            base=base,
            out=out,
            data=data,
            formats=formats,
            overwrite=overwrite,
            cache=cache,
            seed=seed,
            policy=_shared.policy(options),
            command=_shared.invoked(),
            say=say,
            **options,
        )
    ctx.exit(_shared.finish(certificate, as_json=as_json, written=out / judging.CERTIFICATE))
