"""Options and output that several commands share."""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_export import environment, registry
from lora_export.errors import CheckFailed

if TYPE_CHECKING:
    from rich.console import Console

    from lora_export.opening import Job
    from lora_export.records import Certificate, Policy

Command = Callable[..., Any]
adapter_option = click.option(
    "--adapter", required=True, type=click.Path(path_type=Path), help="Adapter file or directory."
)
base_option = click.option(
    "--base", help="Base model: a directory or a hub id. Default: what the adapter names."
)
mismatch_option = click.option(
    "--allow-base-mismatch",
    is_flag=True,
    help="Go on where the base is not the one that the adapter was trained on.",
)


def merge_options(command: Command) -> Command:
    """Add what a caller may say about an adapter and its merge: the fields of `opening.Options`."""
    for option in reversed(_MERGE_OPTIONS):
        command = option(command)
    return command


def reading_options(command: Command) -> Command:
    """Add what a caller may say about an adapter file."""
    for option in reversed(_READING_OPTIONS):
        command = option(command)
    return command


_READING_OPTIONS = (
    click.option(
        "--adapter-format",
        type=click.Choice(registry.names("lora_export.formats")),
        help="Read the adapter as this format. Default: recognised from the file.",
    ),
    click.option("--alpha", type=float, help="LoRA's alpha, where the file stores none."),
    click.option(
        "--pattern-order",
        type=click.Choice(["first", "last"]),
        help="Of several matching rank or alpha patterns, which wins. Default: stop.",
    ),
    click.option(
        "--expert-b",
        type=click.Choice(["rank-major", "expert-major"]),
        help="Order of the columns of fused experts' lora_B. Default: as PEFT does.",
    ),
)
_MERGE_OPTIONS = (
    *_READING_OPTIONS,
    click.option(
        "--tied",
        type=click.Choice(["error", "untie", "both"]),
        default="error",
        show_default=True,
        help="An update of one side of tied weights: stop, write both tensors, or move both.",
    ),
    click.option(
        "--residual-base",
        is_flag=True,
        help="The base is the residual that training began with (PiSSA, OLoRA, CorDA, ...).",
    ),
    click.option(
        "--expert-layout",
        type=click.Choice(["out-in", "in-out"]),
        help="How square fused experts are stored. Default: as their PEFT version did.",
    ),
    mismatch_option,
)
dtype_option = click.option(
    "--dtype",
    type=click.Choice(["keep", "float32", "bfloat16", "float16"]),
    default="keep",
    show_default=True,
    help="Of the merged weights.",
)
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace an existing output.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
quiet_option = click.option("--quiet", is_flag=True, help="No progress on stderr.")
data_option = click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="Sentences to compare on: a .tsv with a header (sentence, label), a folder with dev.tsv, "
    "or a text file with one a line. Default: a small set that comes with the package.",
)


def limit_options(command: Command) -> Command:
    """Add what a caller may say about the limits of the checks; see `policy`."""
    for option in reversed(_LIMIT_OPTIONS):
        command = option(command)
    return command


_LIMIT_OPTIONS = (
    click.option(
        "--tolerance",
        type=click.FloatRange(0, min_open=True),
        help="Of outputs, absolute. Default: 8 times the noise floor, which is how far the "
        "unmerged model lies from itself in float64.",
    ),
    click.option(
        "--allowed-loss",
        type=click.FloatRange(0, 1, max_open=True),
        help="Of accuracy, where --data has labels. Default: 0.005.",
    ),
    click.option(
        "--slowest",
        type=click.FloatRange(0, min_open=True),
        help="Most latency, in units of the unmerged model's. Default: 1.1.",
    ),
    click.option(
        "--strict",
        is_flag=True,
        help="3 noise floors instead of 8, no loss of accuracy, no slower than unmerged.",
    ),
)
_STRICT: dict[str, float] = {"multiple": 3.0, "allowed_loss": 0.0, "slowest": 1.0}


def policy(options: dict[str, Any]) -> "Policy":
    """Take the limits out of a command's `options`, and return them."""
    from lora_export.records import Policy

    limits = _STRICT if options.pop("strict") else {}
    given = {name: options.pop(name) for name in ("tolerance", "allowed_loss", "slowest")}
    return Policy(**limits | {name: value for name, value in given.items() if value is not None})


cache_option = click.option(
    "--cache/--no-cache",
    default=True,
    show_default=True,
    help="Of a model that writes text: whether the artifact takes and gives keys and values of "
    "earlier tokens.",
)
seed_option = click.option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Of generated inputs and order of timing.",
)
model_option = click.option(
    "--model",
    type=click.Path(path_type=Path),
    default=Path("merged"),
    show_default=True,
    help="Directory of a merged model.",
)


def invoked() -> str:
    """Return the command line as typed, folders of this machine left out."""
    return environment.invoked("lora-export")


class Progress:
    """The stages of a command on stderr: each with its duration, the present one with a bar."""

    def __init__(self, *, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            SpinnerColumn,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
        from rich.progress import Progress as Bar

        self.console = Console(stderr=True, quiet=quiet, highlight=False)
        stage = (SpinnerColumn(), TextColumn("{task.description}"))
        bytes_ = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        self.stages = Bar(*stage, console=self.console, transient=True)
        self.bytes = Bar(*stage, *bytes_, console=self.console, transient=True)
        self.shown: Any = None
        self.name, self.start = "", 0.0

    def __call__(self, stage: str) -> None:
        """Say that `stage` begins."""
        self.end()
        self.name, self.start = stage, time.monotonic()
        self._show(self.stages, None)

    def advance(self, done: int, total: int) -> None:
        """Say how many bytes of the present stage are done."""
        if self.shown is not self.bytes:
            self._show(self.bytes, total)
        if self.shown is not None:
            self.shown.update(self.task, completed=done)

    def end(self) -> None:
        """Say that the present stage is done."""
        self._hide()
        if self.name:
            self.console.print(f"[dim]{time.monotonic() - self.start:6.1f} s[/dim]  {self.name}")
        self.name = ""

    def _show(self, bar: Any, total: int | None) -> None:
        self._hide()
        if not self.console.is_terminal:
            return
        self.shown, self.task = bar, bar.add_task(self.name, total=total)
        bar.start()

    def _hide(self) -> None:
        if self.shown is not None:
            self.shown.remove_task(self.task)
            self.shown.stop()
        self.shown = None


@contextmanager
def progress(*, quiet: bool) -> Iterator[Progress]:
    """Give a `Progress`: called with a name it says that a stage begins."""
    shown = Progress(quiet=quiet)
    try:
        yield shown
        shown.end()
    finally:
        shown._hide()


def finish(certificate: "Certificate", *, as_json: bool, written: Path) -> int:
    """Print the certificate as a table or as JSON; return the exit code that its verdicts mean."""
    if as_json:
        from lora_export import report

        click.echo(report.render("json", certificate), nl=False)
    else:
        _print_tables(certificate)
        passed = sum(verdict.passed for verdict in certificate.verdicts)
        for note in certificate.settings.get("notes", ()):
            click.echo(f"note: {note}")
        claim = "proven" if certificate.ok else "NOT PROVEN"
        click.echo(f"{claim}: {passed} of {len(certificate.verdicts)} verdicts pass; {written}")
    return 0 if certificate.ok else CheckFailed.exit_code


def plan_facts(job: "Job") -> dict[str, Any]:
    """Return what a merge would do to each tensor of both sides."""
    plan = job.plan
    steps: list[dict[str, Any]] = [
        {
            "operation": step.operation,
            "tensor": step.name,
            "base": step.source,
            "adapter": [*([step.placed] if step.placed else []), *step.modules],
            "dtype": step.dtype,
            "shape": list(step.shape),
        }
        for step in plan.steps
    ]
    empty: dict[str, Any] = {"tensor": None, "base": None, "adapter": [], "dtype": "", "shape": []}
    steps += [{**empty, "operation": "drop", "base": n, "why": w} for n, w in plan.dropped.items()]
    steps += [
        {**empty, "operation": "ignore", "adapter": [name], "why": why}
        for name, why in plan.ignored.items()
    ]
    return {"plan": steps, "notes": job.settings()["notes"]}


def print_plan(job: "Job", *, as_json: bool) -> None:
    """Print what a merge would do to each tensor."""
    facts = plan_facts(job)
    if as_json:
        click.echo(json.dumps({"schema": 1, "ok": True, **facts}))
        return
    print_table(
        ("operation", "tensor", "in the base", "from the adapter", "dtype", "shape", "why"),
        [
            (
                step["operation"],
                step["tensor"] or "-",
                step["base"] or "-",
                ", ".join(step["adapter"]) or "-",
                step["dtype"],
                step["shape"] or "",
                step.get("why", ""),
            )
            for step in facts["plan"]
        ],
    )
    counts = Counter(step["operation"] for step in facts["plan"])
    click.echo(", ".join(f"{count} {name}" for name, count in counts.items()))
    for note in facts["notes"]:
        click.echo(f"note: {note}")


def print_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table on stdout."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None)
    for title in head:
        table.add_column(title, overflow="fold")  # a name that is cut short is no name
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    console().print(table)


def console() -> "Console":
    """Return stdout's console: wide where it is no terminal, so that lines are not broken."""
    from rich.console import Console

    found = Console(highlight=False)
    return found if found.is_terminal else Console(width=160, highlight=False)


def _print_tables(certificate: "Certificate") -> None:
    from rich.text import Text

    colours = {"pass": "green", "fail": "bold red"}
    print_table(
        ("check", "subject", "verdict", "measured", "limit", "note"),
        [
            (
                v.check,
                v.subject,
                Text(str(v.status), style=colours.get(str(v.status), "bold yellow")),
                "-" if v.measured is None else f"{v.measured:.4g}",
                "-" if v.limit is None else f"{v.limit:.4g} {v.unit}",
                v.note,
            )
            for v in certificate.verdicts
        ],
    )
    if certificate.measurements:
        click.echo()
        print_table(
            ("measurement", "subject", "value", "samples"),
            [
                (m.name, m.subject, f"{m.value:.4g} {m.unit}", m.samples)
                for m in certificate.measurements
            ],
        )
    click.echo()
