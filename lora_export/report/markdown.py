"""A certificate as Markdown, for people and for a CI job's summary."""

from collections.abc import Iterable, Sequence

from lora_export.records import Certificate, Status

_MARKS = {Status.PASS: "pass", Status.FAIL: "**FAIL**", Status.INCONCLUSIVE: "**inconclusive**"}


def render(certificate: Certificate) -> str:
    """Return the whole certificate: verdicts, measurements, inputs, outputs, environment."""
    passed = sum(verdict.passed for verdict in certificate.verdicts)
    total = len(certificate.verdicts)
    verdicts = [
        (
            v.check,
            v.subject,
            _MARKS.get(v.status, f"**{v.status}**"),
            number(v.measured),
            f"{number(v.limit)} {v.unit}".strip(),
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
        (side, f.name, f"{f.size_bytes:,}", f"`{f.digest}`")
        for side, group in (("in", certificate.inputs), ("out", certificate.outputs))
        for f in group
    ]
    facts = {**certificate.settings, **certificate.environment}
    heading = "proven" if certificate.ok else "NOT proven"
    parts = [
        f"# {heading}: {passed} of {total} verdicts pass",
        f"`{certificate.command}`",
        _table(("check", "subject", "verdict", "measured", "limit", "compared", "note"), verdicts),
        _table(("measurement", "subject", "value", "samples"), measured),
        _table(("", "file", "bytes", "digest"), files),
        _table(("setting", "value"), [(k, str(v)) for k, v in facts.items()]),
    ]
    return "\n\n".join(parts) + "\n"


def number(value: float | None) -> str:
    """Return `value` in at most four digits, and a dash where there is none."""
    return "-" if value is None else f"{value:.4g}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(_cell, row)) + " |" for row in cells)


def _cell(text: str) -> str:
    """Return `text` so that neither a bar nor a line break in it ends its cell."""
    return " ".join(text.splitlines()).replace("|", "\\|")
