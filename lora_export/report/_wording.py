"""What the reports for people say in the same words."""

import decimal
import math
from collections.abc import Sequence

from lora_export.records import Certificate, FileDigest, Status, Verdict

_UP = decimal.Context(prec=3, rounding=decimal.ROUND_CEILING)


def outcome(certificate: Certificate) -> str:
    """Return the heading: whether all is proven, and how many verdicts pass."""
    passed = sum(verdict.passed for verdict in certificate.verdicts)
    claim = "proven" if certificate.ok else "NOT proven"
    return f"{claim}: {passed} of {len(certificate.verdicts)} verdicts pass"


def verdicts(certificate: Certificate) -> tuple[Verdict, ...]:
    """Return the verdicts, or one that is no pass where there are none."""
    nothing = Verdict("certificate", "verdicts", Status.NOT_RUN, None, None, "", 0, "no verdicts")
    return certificate.verdicts or (nothing,)


def reasons(verdict: Verdict) -> list[str]:
    """Return why `verdict` is no pass, a line each: note, figures, the limit that helps, places."""
    found = [verdict.note, f"measured {number(verdict.measured)}, limit {limit(verdict)}"]
    if (enough := would_pass(verdict)) is not None:
        found.append(f"a limit of {number(enough)} would have passed")
    return [line for line in (*found, *verdict.where) if line]


def failing(certificate: Certificate) -> list[Verdict]:
    """Return the verdicts that are no pass, those that failed first."""
    bad = [verdict for verdict in certificate.verdicts if not verdict.passed]
    return sorted(bad, key=lambda verdict: verdict.status is not Status.FAIL)


def would_pass(verdict: Verdict) -> float | None:
    """Return the least limit of three digits that the verdict would have passed with.

    None where no limit helps: of faults that are counted none is allowed, and what was measured is
    no finite number above the limit.
    """
    measured, limit = verdict.measured, verdict.limit
    if verdict.status is not Status.FAIL or not measured or not limit:
        return None
    if not math.isfinite(measured) or not 0 < limit < measured:
        return None
    return float(_UP.create_decimal_from_float(measured))


def number(value: float | None) -> str:
    """Return `value` in at most four digits, and a dash where there is none."""
    return "-" if value is None else f"{value:.4g}"


def limit(verdict: Verdict) -> str:
    """Return the limit of `verdict` with its unit."""
    return f"{number(verdict.limit)} {verdict.unit}".strip()


def files(certificate: Certificate) -> list[tuple[str, FileDigest]]:
    """Return every file with the side that it stands on: in, out or evidence."""
    sides = (
        ("in", certificate.inputs), ("out", certificate.outputs), ("evidence", certificate.evidence)
    )  # fmt: skip
    return [(side, file) for side, group in sides for file in group]


def facts(certificate: Certificate) -> list[tuple[str, str]]:
    """Return settings and environment, names and values; lists and mappings on one line."""
    found = {**certificate.settings, **certificate.environment}
    return [(str(name), _line(value)) for name, value in found.items()]


def _line(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_line(inner)}" for name, inner in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(_line, value))
    return str(value)
