"""A certificate as Markdown, for a pull request's comment and for a CI job's summary."""

import re
from collections.abc import Iterable, Sequence

from lora_export.records import Certificate, Evidence, Status
from lora_export.report import _wording
from lora_export.report._wording import number

# GitHub takes 65,536 characters in a comment and 1 MiB in a step's summary.
MOST = 65_000
MOST_OF_A_CELL = 400
_MARKS = {Status.PASS: "pass", Status.FAIL: "**FAIL**", Status.INCONCLUSIVE: "**inconclusive**"}
# What would be formatted, and @ and # in front of a name or a number, which would be linked.
_SPECIAL = re.compile(r"[\\`*\[\]<>|~&$]|(?<![^\W_])_|_(?![^\W_])")
_LINKED = re.compile(r"([@#])(?=\w)")

# A title, columns and rows.
Section = tuple[str, Sequence[str], Sequence[Sequence[str]]]


def render(certificate: Certificate, evidence: Evidence | None = None) -> str:
    """Return the certificate: what is no pass first, then all of it, folded; at most `MOST` long.

    Rows that do not fit are counted.
    """
    head = [f"# {_wording.outcome(certificate)}", _code(certificate.command)]
    sections = _sections(certificate)
    left = MOST - len(_joined(head, [_shown(section, 0) for section in sections]))
    shown = []
    for section in sections:
        count, left = _fitting(section, left)
        shown.append(_shown(section, count))
    return _joined(head, shown)


def _joined(head: list[str], sections: list[str]) -> str:
    return "\n\n".join([*head, *sections]) + "\n"


def _sections(certificate: Certificate) -> list[Section]:
    """Return title, columns and rows of each table, the most important first."""
    bad = [
        (
            v.check,
            v.subject,
            v.status,
            number(v.measured),
            _wording.limit(v),
            number(_wording.would_pass(v)),
            ", ".join(v.where),
            v.note,
        )
        for v in _wording.failing(certificate)
    ]
    verdicts = [
        (
            v.check,
            v.subject,
            v.status,
            number(v.measured),
            _wording.limit(v),
            f"{v.compared:,}",
            v.note,
        )
        for v in certificate.verdicts
    ]
    measured = [
        (m.name, m.subject, f"{m.value:.4g} {m.unit}", f"{m.samples:,}")
        for m in certificate.measurements
    ]
    files = [
        (side, f.name, f"{f.size_bytes:,}", f.digest) for side, f in _wording.files(certificate)
    ]
    failed = ("check", "subject", "verdict", "measured", "limit", "would pass", "where", "note")
    judged = ("check", "subject", "verdict", "measured", "limit", "compared", "note")
    found: list[Section] = [
        ("", failed, bad),
        ("verdicts", judged, verdicts),
        ("measurements", ("measurement", "subject", "value", "samples"), measured),
        ("files", ("", "file", "bytes", "digest"), files),
        ("settings and environment", ("setting", "value"), _wording.facts(certificate)),
    ]
    return [section for section in found if section[2]]


def _fitting(section: Section, left: int) -> tuple[int, int]:
    """Return how many rows of `section` fit into `left` characters, and how many are left then."""
    for count, row in enumerate(section[2]):
        size = len(_row(row)) + 1
        if size > left:
            return count, left
        left -= size
    return len(section[2]), left


def _shown(section: Section, count: int) -> str:
    """Return the section with the first `count` of its rows; folded where it has a title."""
    title, head, rows = section
    text = "\n".join([_row(head), "| --- " * len(head) + "|", *map(_row, rows[:count])])
    if count < len(rows):
        text += f"\n\n{len(rows) - count} more in certificate.json"
    if not title:
        return text
    return f"<details><summary>{len(rows)} {title}</summary>\n\n{text}\n\n</details>"


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(map(_cell, cells)) + " |"


def _cell(text: str) -> str:
    """Return `text` so that nothing in it ends its cell, is formatted, or names anybody."""
    if isinstance(text, Status):
        return _MARKS.get(text, f"**{text}**")
    line = _plain(text)
    if len(line) > MOST_OF_A_CELL:
        line = f"{line[:MOST_OF_A_CELL]}… ({len(line) - MOST_OF_A_CELL:,} more characters)"
    return _LINKED.sub(r"\1&#8203;", _SPECIAL.sub(r"\\\g<0>", line))


def _code(text: str) -> str:
    """Return `text` as code, between more backticks than it holds itself."""
    line = _plain(text)[:MOST_OF_A_CELL]
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    return f"{fence} {line} {fence}" if fence != "`" else f"`{line}`"


def _plain(text: str) -> str:
    """Return `text` on one line."""
    return " ".join(text.split())
