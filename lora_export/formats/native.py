"""One self-contained safetensors file: PEFT's tensor names, everything else in the metadata.

Metadata keys, each a JSON text: `lora_export.schema` (1), `lora_export.config` (the fields of
PEFT's adapter_config.json), `lora_export.base` (id, revision, architecture, fingerprint),
`lora_export.labels` (list of names by class index), `lora_export.training` (provenance).
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_export import peft_names, peft_writing, storage
from lora_export.errors import InputError
from lora_export.records import Adapter, BaseRef, Fingerprint, Reading

SCHEMA = 1
_KEY = "lora_export."


def detect(path: Path) -> bool:
    """Return whether `path` is a file with our metadata."""
    try:
        return path.is_file() and f"{_KEY}config" in storage.read_header(path)[1]
    except InputError:
        return False


def read(path: Path, reading: Reading | None = None) -> Adapter:
    """Return the adapter in the file at `path`.

    Raises:
        InputError: the file is damaged, from a newer version, or holds what cannot be merged.
    """
    infos, metadata = storage.read_header(path)
    schema = _json(metadata, "schema", path, None)
    if schema != SCHEMA:
        raise InputError(f"{path}: adapter schema {schema!r}; this version reads {SCHEMA}")
    config = _json(metadata, "config", path, {})
    base = _json(metadata, "base", path, {})
    labels = _json(metadata, "labels", path, [])
    training = _json(metadata, "training", path, {})
    tensors = _json(metadata, "tensors", path, {})
    for name, value in (
        ("config", config),
        ("base", base),
        ("training", training),
        ("tensors", tensors),
    ):
        if not isinstance(value, dict):
            raise InputError(f"{path}: metadata {_KEY}{name} is damaged")
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise InputError(f"{path}: metadata {_KEY}labels is damaged")
    return dataclasses.replace(
        peft_names.read(infos, config, str(path), reading),
        base=dataclasses.replace(_base(base, path), tensors=_shapes(tensors, path)),
        labels=tuple(labels),
        training=training,
        format="native",
        sha256=storage.sha256(path),
    )


def write(adapter: Adapter, path: Path) -> None:
    """Write `adapter` to `path`; the same adapter gives the same bytes."""
    base = dataclasses.asdict(adapter.base)
    values = {
        "schema": SCHEMA,
        "config": peft_writing.config_of(adapter),
        "tensors": base.pop("tensors"),  # a key of its own: older versions pass over it
        "base": base,
        "labels": list(adapter.labels),
        "training": dict(adapter.training),
    }
    metadata = {"format": "pt"}
    metadata |= {_KEY + name: json.dumps(v, sort_keys=True) for name, v in values.items()}
    tensors = peft_writing.tensors_of(adapter)
    storage.write_safetensors(
        path, [storage.NewTensor.of(name, value) for name, value in tensors.items()], metadata
    )


def _json(metadata: Mapping[str, str], name: str, path: Path, default: Any) -> Any:
    try:
        return json.loads(metadata[_KEY + name]) if _KEY + name in metadata else default
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: metadata {_KEY}{name} is not JSON") from error


def _base(fields: Mapping[str, Any], path: Path) -> BaseRef:
    try:
        known = dict(fields)
        mark = known.pop("fingerprint", None)
        found = Fingerprint(**mark) if mark else None
        texts = [*known.values(), *((found.sha256, found.dtype) if found else ())]
        if not all(isinstance(text, str | None) for text in texts):
            raise TypeError("expected texts")
        return BaseRef(**known, fingerprint=found)
    except TypeError as error:
        raise InputError(f"{path}: metadata {_KEY}base is damaged: {error}") from error


def _shapes(fields: Mapping[str, Any], path: Path) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the tensors of the trained model."""
    for name, shape in fields.items():
        if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
            raise InputError(f"{path}: metadata {_KEY}tensors is damaged: {name} has no shape")
    return {name: tuple(shape) for name, shape in fields.items()}
