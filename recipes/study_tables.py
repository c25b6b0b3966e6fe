"""The settings of a study in rows: a table for people, and one in plain numbers."""

import csv
import io
from dataclasses import dataclass
from typing import Any

from study_results import SCORES, WHOLE, Group, Study, number, share, significant, size


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
    full = study.group(recipe, WHOLE[recipe])
    rows = []
    for group in study.groups(recipe):
        known = dict(group.scores())
        scores = [
            score.shown(known[score]).text(score.digits) if score in known else ""
            for score in SCORES[recipe]
        ]
        rows.append(
            (
                group.label,
                group.first.words,
                f"{group.steps:,}",
                str(group.first.settings.get("batch_size", "")),
                str(group.first.settings.get("matmul_precision", "")),
                str(len(group.runs)),
                *scores,
                number(group.parameters, 0),
                share(group),
                size(group.state_bytes),
                ratios(group.state_predicted, group.state_bytes, full, "state"),
                size(group.file_bytes),
                ratios(group.file_predicted, group.file_bytes, full, "file"),
            )
        )
    columns = (
        "setting",
        "arguments",
        "steps",
        "batch",
        "products",
        "seeds",
        *(score.name + (", %" if score.unit else "") for score in SCORES[recipe]),
        "trained parameters",
        "of all",
        "optimizer state",
        "to full: predicted, measured",
        "kept file",
        "to full: predicted, measured",
    )
    return Table(columns, tuple(rows))


def ratios(predicted: float, measured: float, full: Group | None, kind: str) -> str:
    """Return two ratios to full fine-tuning."""
    if full is None:
        return ""
    wholes = getattr(full, f"{kind}_predicted"), getattr(full, f"{kind}_bytes")
    pair = predicted / wholes[0], measured / wholes[1]
    return ", ".join(map(significant, pair))


def csv_table(study: Study) -> str:
    """Return one row for each setting of every recipe, in plain numbers; bytes are bytes."""
    scores = [score.name for recipe in SCORES.values() for score in recipe]
    columns = ["recipe", "setting", "method", "arguments", "steps"]
    columns += ["batch size", "matmul precision", "seeds"]
    columns += [f"{name}{end}" for name in scores for end in ("", " low", " high", " seeds")]
    columns += ["trainable parameters", "share"]
    for what in ("optimizer state", "checkpoint"):
        columns += [f"{what} {end}" for end in (
            "bytes", "bytes predicted", "ratio to full", "ratio to full predicted",
        )]  # fmt: skip
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for recipe in SCORES:
        full = study.group(recipe, WHOLE[recipe])
        for group in study.groups(recipe):
            row: dict[str, Any] = {
                "recipe": recipe,
                "setting": group.id,
                "method": group.first.method,
                "arguments": group.first.words,
                "steps": group.steps,
                "batch size": group.first.settings.get("batch_size", ""),
                "matmul precision": group.first.settings.get("matmul_precision", ""),
                "seeds": len(group.runs),
                "trainable parameters": int(group.parameters),
                "share": group.share,
            }
            for score, found in group.scores():
                row |= {score.name: found.value, f"{score.name} seeds": found.count}
                if not found.is_single:
                    row |= {f"{score.name} low": found.low, f"{score.name} high": found.high}
            for what, kind in (("optimizer state", "state"), ("checkpoint", "file")):
                for end, attribute in (("", "bytes"), (" predicted", "predicted")):
                    value = getattr(group, f"{kind}_{attribute}")
                    row[f"{what} bytes{end}"] = value
                    if full is not None:
                        whole = getattr(full, f"{kind}_{attribute}")
                        row[f"{what} ratio to full{end}"] = value / whole
            writer.writerow(row)
    return file.getvalue()
