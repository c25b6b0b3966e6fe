"""The command `check`: the gate for CI."""

from pathlib import Path

import click

from lora_export.cli import _shared


@click.command("check", short_help="The CI gate: judge a run again, from its files.")
@click.option(
    "--run",
    "folder",
    type=click.Path(path_type=Path),
    default=Path("run"),
    show_default=True,
    help="Directory that `run` wrote.",
)
@_shared.json_option
@_shared.quiet_option
@click.pass_context
def command(ctx: click.Context, folder: Path, as_json: bool, quiet: bool) -> None:
    """Judge a run again: its recorded evidence, and its files as they are now.

    Exits with 0 when every verdict passes, with 5 when one does not: a file was changed since, or
    the evidence does not carry the claim. Loads no model. Writes the certificate anew.

    \b
    lora-export check --run run
    """
    with _shared.progress(quiet=quiet) as say:
        from lora_export import judging

        certificate = judging.check_run(folder, say=say)
    ctx.exit(_shared.finish(certificate, as_json=as_json, written=folder / judging.CERTIFICATE))
