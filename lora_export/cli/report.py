"""The command `report`."""

from pathlib import Path

import click

from lora_export import registry
from lora_export.cli import _shared


@click.command("report", short_help="Show the certificate of a run: Markdown, JUnit, HTML, JSON.")
@click.option(
    "--run",
    "folder",
    type=click.Path(path_type=Path),
    default=Path("run"),
    show_default=True,
    help="Directory that `run` or `tune` wrote.",
)
@click.option(
    "--format",
    "kind",
    type=click.Choice(registry.names("lora_export.report")),
    default="markdown",
    show_default=True,
    help="Of the report; html needs the extra `report`.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="File to write. Default: standard output."
)
@_shared.overwrite_option
def command(folder: Path, kind: str, out: Path | None, overwrite: bool) -> None:
    """Show the certificate of a run, and in HTML its evidence; nothing is judged anew.

    \b
    lora-export report --run run --format html --out report.html
    lora-export report --run run --format markdown >> "$GITHUB_STEP_SUMMARY"
    """
    from lora_export import certificates, judging, publishing, report

    text = report.render(kind, certificates.read(folder), judging.evidence_of(folder))
    if out is None:
        click.echo(text, nl=False)
        return
    publishing.check_output(out, overwrite=overwrite, directory=False)
    with publishing.staged(out, overwrite=overwrite) as file:
        file.write_text(text, "utf-8")
