"""A certificate as one JSON object, for machines."""

import json

from lora_export.codec import to_json
from lora_export.records import Certificate

SCHEMA = 1


def render(certificate: Certificate) -> str:
    """Return the certificate as JSON, with `schema` and `ok` beside its fields."""
    value = {"schema": SCHEMA, "ok": certificate.ok, **to_json(certificate, {})}
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False, default=str) + "\n"
