"""A certificate as one JSON object, for machines."""

import json
import math
from typing import Any

from lora_export.codec import to_json
from lora_export.records import Certificate, Evidence

SCHEMA = 3


def render(certificate: Certificate, evidence: Evidence | None = None) -> str:
    """Return the certificate as JSON, with `schema` and `ok` beside its fields."""
    value = {"schema": SCHEMA, "ok": certificate.ok, **strict(to_json(certificate, {}))}
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False, default=str) + "\n"


def strict(value: Any) -> Any:
    """Return `value` with null for what JSON has no number for; the verdict's note says why."""
    if isinstance(value, dict):
        return {key: strict(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [strict(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
