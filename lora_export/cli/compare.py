"""The command `compare`."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_export.cli import _shared
from lora_export.errors import CheckFailed

if TYPE_CHECKING:
    from lora_export.comparing import Change, Comparison
    from lora_export.records import Verdict


@click.command("compare", short_help="What changed between two certificates.")
@click.argument("before", type=click.Path(path_type=Path))
@click.argument("after", type=click.Path(path_type=Path))
@_shared.json_option
@click.pass_context
def command(ctx: click.Context, /, before: Path, after: Path, as_json: bool) -> None:
    """Show what changed between two certificates, or two directories that hold one.

    Exits with 5 when a verdict got worse or is gone, or a new one is no pass.

    \b
    lora-export compare old/certificate.json run
    """
    from lora_export import certificates, comparing

    found = comparing.compare(certificates.read(before), certificates.read(after))
    if as_json:
        click.echo(json.dumps(_facts(found), ensure_ascii=False, allow_nan=False))
    else:
        _print(found)
    ctx.exit(0 if found.ok else CheckFailed.exit_code)


def _facts(found: "Comparison") -> dict[str, Any]:
    """Return the comparison as JSON's types, with ratios and with what is worse."""
    from lora_export.codec import to_json
    from lora_export.report.json import strict

    facts: dict[str, Any] = {"schema": 1, "ok": found.ok}
    for part, changes in vars(found).items():
        facts[part] = [
            {**to_json(change, {}), "ratio": change.ratio, "worse": change.worse}
            for change in changes
        ]
    result: dict[str, Any] = strict(facts)
    return result


def _print(found: "Comparison") -> None:
    verdicts = [
        (
            change.name,
            *_both(change, _verdict),
            _ratio(change),
            ", ".join(change.after.where if change.after is not None else ()),
            "worse" * change.worse,
        )
        for change in found.verdicts
    ]
    _print_rows(("verdict", "before", "after", "ratio", "where", ""), verdicts)
    measured = [
        (change.name, *_both(change, lambda m: f"{m.value:.4g} {m.unit}"), _ratio(change))
        for change in found.measurements
    ]
    _print_rows(("measurement", "before", "after", "ratio"), measured)
    for title, facts in (("setting", found.settings), ("environment", found.environment)):
        _print_rows((title, "before", "after"), [(c.name, *_both(c, str)) for c in facts])
    for title, files in (("input", found.inputs), ("output", found.outputs)):
        digests = [(c.name, *_both(c, lambda file: file.digest)) for c in files]
        _print_rows((title, "before", "after"), digests)
    if not any(vars(found).values()):
        click.echo("nothing changed")
    worse = sum(change.worse for change in found.verdicts)
    click.echo("no verdict got worse" if found.ok else f"WORSE: {worse} verdict(s)")


def _print_rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if rows:
        _shared.print_table(head, rows)


def _both(change: "Change[Any]", shown: Callable[[Any], str]) -> list[str]:
    """Return both sides of `change` as text, a dash where one is absent."""
    return ["-" if side is None else shown(side) for side in (change.before, change.after)]


def _verdict(verdict: "Verdict") -> str:
    """Return status, measured and limit of `verdict` in one cell."""
    if verdict.measured is None:
        return str(verdict.status)
    limit = "" if verdict.limit is None else f" of {verdict.limit:.4g}"
    return f"{verdict.status}, {verdict.measured:.4g}{limit} {verdict.unit}".strip()


def _ratio(change: "Change[Any]") -> str:
    return "-" if change.ratio is None else f"{change.ratio:.3g}"
