"""certificate.json, read back: held against the schema that comes with the package."""

import functools
import importlib.resources
import json
import math
from pathlib import Path
from typing import Any

import jsonschema

from lora_export import codec, storage
from lora_export.errors import InputError
from lora_export.records import Certificate
from lora_export.report.json import SCHEMA

NAME = "certificate.json"
_MOST_SHOWN = 160  # characters of what the validator says; the reason is at the end


@functools.cache
def schema() -> dict[str, Any]:
    """Return the JSON Schema of a certificate."""
    file = importlib.resources.files("lora_export") / "data" / "certificate.schema.json"
    found: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return found


def read(path: str | Path) -> Certificate:
    """Return the certificate in the file at `path`, or in the directory at `path`.

    Raises:
        InputError: there is none, it is of another schema, or it is damaged; the message names the
            place.
    """
    path = Path(path)
    file = path / NAME if path.is_dir() else path
    value = storage.read_json(file)
    _refuse_other_schema(file, value)
    if fault := jsonschema.exceptions.best_match(_validator().iter_errors(value)):
        place = "/".join(map(str, ("", *fault.absolute_path))) or "/"
        raise InputError(f"{file} is damaged at {place}: {fault.message[-_MOST_SHOWN:]}")
    for measurement in value["measurements"]:
        if measurement["value"] is None:  # JSON has no number for what is not finite
            measurement["value"] = math.nan
    claimed = value.pop("ok")
    del value["schema"]
    try:
        found: Certificate = codec.from_json(Certificate, value, {})
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    if claimed != found.ok:
        raise InputError(f"{file} is damaged at /ok: {claimed}, its verdicts say {found.ok}")
    return found


def _refuse_other_schema(file: Path, value: dict[str, Any]) -> None:
    number = value.get("schema")
    if number == SCHEMA:
        return
    surroundings = value.get("environment")
    packages = surroundings.get("packages") if isinstance(surroundings, dict) else None
    version = packages.get("lora-export") if isinstance(packages, dict) else None
    raise InputError(
        f"{file} has schema {number!r}, and this version of lora-export reads {SCHEMA}; "
        f"the version that wrote it reads it ({version or 'not recorded'})"
    )


@functools.cache
def _validator() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(schema())
