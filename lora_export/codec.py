"""Frozen records to JSON and back, by their type hints; arrays go to a safetensors file beside.

A field that is added to a record needs no line here. Reading checks every type, so that evidence
from an untrusted place gives an `InputError` and never a half-made record.
"""

import contextlib
import enum
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np

from lora_export import storage
from lora_export.errors import InputError
from lora_export.records import Array

T = TypeVar("T")
SCHEMA = 5
_ARRAY = "array:"


def to_json(value: Any, arrays: dict[str, Array], at: str = "") -> Any:
    """Return `value` as JSON's types; arrays are put into `arrays` under the place they hold."""
    if is_dataclass(value) and not isinstance(value, type):
        return {
            f.name: to_json(getattr(value, f.name), arrays, f"{at}/{f.name}") for f in fields(value)
        }
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, np.ndarray):
        arrays[at] = value
        return _ARRAY + at
    if isinstance(value, Mapping):
        return {str(k): to_json(v, arrays, f"{at}/{k}") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item, arrays, f"{at}/{i}") for i, item in enumerate(value)]
    return value


def from_json(hint: Any, value: Any, arrays: Mapping[str, Array], at: str = "") -> Any:
    """Return the value of type `hint` that `to_json` turned into `value`.

    Raises:
        InputError: `value` is not of that type; the message names the place.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if hint == Array:
        return _array(value, arrays, at)
    if origin in (Union, types.UnionType):
        return _one_of(inner, value, arrays, at)
    if is_dataclass(hint):
        return _record(hint, value, arrays, at)
    if origin is tuple and isinstance(value, list):
        kinds = [inner[0]] * len(value) if inner[1:] == (...,) else list(inner)
        if len(kinds) == len(value):
            pairs = enumerate(zip(kinds, value, strict=True))
            return tuple(from_json(k, v, arrays, f"{at}/{i}") for i, (k, v) in pairs)
    if origin is not None and issubclass(origin, Mapping) and isinstance(value, dict):
        return {k: from_json(inner[1], v, arrays, f"{at}/{k}") for k, v in value.items()}
    if isinstance(hint, type) and issubclass(hint, enum.Enum) and value in [e.value for e in hint]:
        return hint(value)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):
            return float(value)
    if hint in (str, int, bool, type(None)) and type(value) is hint:
        return value
    raise InputError(f"the record is damaged at {at or '/'}: {str(value)[:60]!r}")


def save(value: Any, folder: Path, name: str) -> None:
    """Write `value` to NAME.json and its arrays to NAME.safetensors, in `folder`."""
    arrays: dict[str, Array] = {}
    storage.write_json(folder / f"{name}.json", {"schema": SCHEMA, "value": to_json(value, arrays)})
    tensors = [storage.NewTensor.of(key, array) for key, array in sorted(arrays.items())]
    storage.write_safetensors(folder / f"{name}.safetensors", tensors, {})


def load(kind: type[T], folder: Path, name: str) -> T:
    """Return the `kind` that `save` wrote; raises `InputError` where it is absent or damaged."""
    content = storage.read_json(folder / f"{name}.json")
    if content.get("schema") != SCHEMA:
        raise InputError(f"{name}.json has schema {content.get('schema')}; this version: {SCHEMA}")
    infos, _ = storage.read_header(folder / f"{name}.safetensors")
    arrays = {key: info.array() for key, info in infos.items()}
    result: T = from_json(kind, content.get("value"), arrays)
    return result


def _array(value: Any, arrays: Mapping[str, Array], at: str) -> Array:
    if isinstance(value, str) and value.startswith(_ARRAY) and value[len(_ARRAY) :] in arrays:
        return arrays[value[len(_ARRAY) :]]
    raise InputError(f"the record lacks the array at {at}")


def _one_of(kinds: tuple[Any, ...], value: Any, arrays: Mapping[str, Array], at: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    possible = [kind for kind in kinds if kind is not type(None)]
    for kind in possible[:-1]:
        with contextlib.suppress(InputError):
            return from_json(kind, value, arrays, at)
    return from_json(possible[-1], value, arrays, at)  # its message, where none fits


def _record(kind: Any, value: Any, arrays: Mapping[str, Array], at: str) -> Any:
    names = {f.name for f in fields(kind)}
    if not isinstance(value, dict) or value.keys() != names:
        differing = sorted(set(value) ^ names) if isinstance(value, dict) else []
        fields_named = f", fields {', '.join(map(str, differing))}" if differing else ""
        raise InputError(
            f"the record is damaged at {at or '/'}: not a {kind.__name__}{fields_named}"
        )
    hints = get_type_hints(kind)
    found = {n: from_json(hints[n], value[n], arrays, f"{at}/{n}") for n in names}
    try:
        return kind(**found)
    except AssertionError as error:  # a record that refuses to be made: a pass over nothing
        raise InputError(f"the record is damaged at {at or '/'}: {error}") from error
