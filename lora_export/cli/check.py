"""The command `check`: the gate for CI."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_export import registry
from lora_export.cli import _shared

if TYPE_CHECKING:
    from lora_export.records import Certificate


@click.command("check", short_help="The CI gate: prove a merge and its artifacts; judge, exit.")
@click.option(
    "--run",
    "folder",
    type=click.Path(path_type=Path),
    default=Path("run"),
    show_default=True,
    help="Directory that `run` wrote.",
)
@click.option(
    "--adapter",
    type=click.Path(path_type=Path),
    help="Derive and run everything again, from this adapter and its base.",
)
@_shared.base_option
@click.option(
    "--merged", type=click.Path(path_type=Path), help="Merged model. Default: that of the run."
)
@click.option(
    "--artifact",
    "artifacts",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Exported file; may be given more than once. Default: those of the run.",
)
@click.option(
    "--replay",
    is_flag=True,
    help="Run the artifacts again, on the inputs and against the answers that were saved: on "
    "another machine, in another runtime, without torch, base and adapter.",
)
@click.option(
    "--from-evidence",
    is_flag=True,
    help="Judge what was recorded, and the files as they are. So it is without --adapter and "
    "--replay.",
)
@click.option(
    "--quick",
    is_flag=True,
    help="Fewer inputs; no timing, no second export, no generation.",
)
@click.option(
    "--precision",
    type=click.Choice(registry.PRECISIONS),
    default=registry.FULL,
    show_default=True,
    help="Of the artifacts, which decides by which limits they are judged.",
)
@_shared.merge_options
@_shared.limit_options
@_shared.data_option
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Directory to write certificate, report and evidence to. Default: none; a run that is "
    "judged from its evidence gets its own anew.",
)
@_shared.cache_option
@_shared.seed_option
@_shared.overwrite_option
@_shared.json_option
@_shared.quiet_option
@click.pass_context
def command(
    ctx: click.Context,
    /,
    folder: Path,
    adapter: Path | None,
    replay: bool,
    from_evidence: bool,
    out: Path | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Prove a merged model and its artifacts, whoever made them, and exit with the verdict.

    Exits with 0 when every verdict passes, with 5 when one does not. With --adapter everything is
    derived, run and compared again; with --replay what runs without torch; else the evidence that
    `run` saved is judged again, and its files are held against their digests.

    \b
    lora-export check --run run
    lora-export check --run run --adapter sst2.safetensors
    lora-export check --adapter sst2.safetensors --merged merged --artifact model.onnx --quick
    lora-export check --run run --replay
    """
    ways = [bool(adapter), replay, from_evidence]
    if sum(ways) > 1:
        raise click.UsageError("--adapter, --replay and --from-evidence exclude each other")
    given = [name for name in options if _is_given(ctx, name)]
    if adapter is None and given:
        name = {"artifacts": "artifact"}.get(given[0], given[0]).replace("_", "-")
        raise click.UsageError(f"--{name} is of use with --adapter only")
    with _shared.progress(quiet=quiet) as say:
        certificate: Certificate
        if adapter is not None:
            say("loading torch and transformers")
            from lora_export import pipeline

            certificate = pipeline.check_files(
                adapter,
                folder=folder,
                out=out,
                overwrite=overwrite,
                policy=_shared.policy(options),
                command=_shared.invoked(),
                say=say,
                **options,
            )
        elif replay:
            from lora_export import replaying

            certificate = replaying.replay(
                folder, out=out, overwrite=overwrite, command=_shared.invoked(), say=say
            )
        else:
            from lora_export import judging

            if out is not None:
                raise click.UsageError("--out is of use with --adapter and --replay")
            certificate = judging.check_run(folder, say=say)
    ctx.exit(_shared.finish(certificate, as_json=as_json, written=out or folder))


def _is_given(ctx: click.Context, name: str) -> bool:
    return ctx.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT
