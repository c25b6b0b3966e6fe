"""The settings of a study in rows: a table for people, and one in plain numbers."""

import csv
import io
from dataclasses import dataclass
from typing import Any

from study_results import SCORES, Amount, Group, Study, number, share, significant, size

SINGLE = "\N{DAGGER}"  # behind what a single run found


@dataclass(frozen=True)
class Table:
    """Columns and rows, for people."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def tables(study: Study) -> list[Table]:
    """Return a table for each recipe that has finished runs."""
    return [table_of(study, recipe) for recipe in SCORES if study.groups(recipe)]


def table_of(study: Study, recipe: str) -> Table:
    """Return a row for each setting; ratios are to full fine-tuning, predicted and measured."""
    rows = [row_of(group, study.whole(recipe)) for group in study.groups(recipe)]
    return Table(
        tuple(column for column, _ in rows[0]),
        tuple(tuple(cell for _, cell in row) for row in rows),
    )


def row_of(group: Group, full: Group | None) -> list[tuple[str, str]]:
    """Return each column with what stands in it."""
    known = dict(group.scores())
    scores = [
        (
            score.label + (", %" if score.unit else ""),
            score.shown(known[score]).text(score.digits, single=f" {SINGLE}")
            if score in known
            else "",
        )
        for score in SCORES[group.first.recipe]
    ]
    to_full = "to full: predicted, measured"
    return [
        ("setting", group.id),
        ("arguments", group.arguments),
        ("steps", f"{group.steps:,}"),
        ("batch", str(group.first.settings.get("batch_size", ""))),
        ("seeds", str(len(group.runs))),
        *scores,
        ("trained parameters", number(group.parameters, 0)),
        ("of all", share(group)),
        ("optimizer state", size(group.state.measured)),
        (to_full, ratios(group.state / full.state) if full else ""),
        ("kept file", size(group.file.measured)),
        (to_full, ratios(group.file / full.file) if full else ""),
    ]


def ratios(found: Amount) -> str:
    """Return a ratio to full fine-tuning, predicted and measured."""
    return f"{significant(found.predicted)}, {significant(found.measured)}"


def csv_table(study: Study) -> str:
    """Return one row for each setting of every recipe, in plain numbers; bytes are bytes."""
    scores = [score.label for recipe in SCORES.values() for score in recipe]
    columns = ["recipe", "setting", "method", "arguments", "steps"]
    columns += ["batch size", "matmul precision", "seeds"]
    columns += [f"{name}{end}" for name in scores for end in ("", " low", " high", " seeds")]
    columns += ["trainable parameters", "share"]
    for what in ("optimizer state", "checkpoint"):
        for name in (f"{what} bytes", f"{what} ratio to full"):
            columns += [name, f"{name} predicted"]
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for recipe in SCORES:
        full = study.whole(recipe)
        for group in study.groups(recipe):
            row: dict[str, Any] = {
                "recipe": recipe,
                "setting": group.id,
                "method": group.first.method,
                "arguments": group.arguments,
                "steps": group.steps,
                "batch size": group.first.settings.get("batch_size", ""),
                "matmul precision": group.first.settings.get("matmul_precision", ""),
                "seeds": len(group.runs),
                "trainable parameters": int(group.parameters),
                "share": group.share,
            }
            for score, found in group.scores():
                row |= {score.label: found.value, f"{score.label} seeds": found.count}
                if not found.is_single:
                    row |= {f"{score.label} low": found.low, f"{score.label} high": found.high}
            amounts = {"optimizer state bytes": group.state, "checkpoint bytes": group.file}
            if full is not None:
                amounts["optimizer state ratio to full"] = group.state / full.state
                amounts["checkpoint ratio to full"] = group.file / full.file
            for name, amount in amounts.items():
                row |= {name: amount.measured, f"{name} predicted": amount.predicted}
            writer.writerow(row)
    return file.getvalue()
