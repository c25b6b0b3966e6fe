"""A directory written by mlx-lm: adapters.safetensors and adapter_config.json.

`X.lora_a` is (in, rank), `X.lora_b` (rank, out), `X.m` DoRA's magnitude (out,), and the config's
`lora_parameters.scale` is the factor in front of the product itself. Source: mlx-lm, tuner/lora.py.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from lora_export import formats, peft_names, storage
from lora_export.errors import InputError, listed
from lora_export.records import LARGEST, Adapter, Factors, Reading
from lora_export.refusals import refused

WEIGHTS, CONFIG = "adapters.safetensors", "adapter_config.json"
_SIDES = {".lora_a": ".lora_A.weight", ".lora_b": ".lora_B.weight", ".m": ".lora_magnitude_vector"}
TAKES_ALPHA = True  # the caller may have to say it


def detect(path: Path) -> bool:
    """Return whether `path` is a directory with mlx-lm's tensors, or that file of tensors."""
    if path.is_dir():
        return (path / WEIGHTS).is_file() and not (path / "adapter_model.safetensors").is_file()
    return any(key.endswith(".lora_a") for key in formats.keys(path))


def read(path: Path, reading: Reading | None = None) -> Adapter:
    """Return the adapter in the directory at `path`.

    Raises:
        InputError: a file is missing or damaged, or its scale cannot be told.
    """
    reading = reading or Reading()
    folder, weights = (path, path / WEIGHTS) if path.is_dir() else (path.parent, path)
    if not (folder / CONFIG).is_file():
        raise InputError(f"{folder} has no {CONFIG}, which says the scale")
    config = storage.read_json(folder / CONFIG)
    infos, _ = storage.read_header(weights)
    scale, notes = _scale(config, str(path), reading)
    tensors, faults = {}, []
    for key, info in infos.items():
        side = next((end for end in _SIDES if key.endswith(end)), None)
        if side is None:
            tensors[key] = info.stored()
        elif len(info.shape) > 2:
            faults.append(refused("layer-kind", key, f"{len(info.shape)} axes"))
        else:
            name = key.removesuffix(side) + _SIDES[side]
            tensors[name] = np.ascontiguousarray(info.stored().T)
    if faults:
        raise InputError(listed(f"cannot use the adapter {path}", faults))
    fields = {
        **peft_names.bare_config(tensors, 1.0),
        "base_model_name_or_path": config.get("model"),
    }
    adapter = peft_names.read(tensors, fields, str(path), reading)
    notes += [note for note in adapter.notes if "where PEFT writes" not in note]
    return dataclasses.replace(
        adapter,
        modules={name: _scaled(pair, scale) for name, pair in adapter.modules.items()},
        format="mlx",
        sha256=storage.sha256_of(folder / CONFIG, weights),
        notes=tuple(notes),
    )


def _scaled(pair: Factors, scale: float) -> Factors:
    return dataclasses.replace(pair, alpha=scale * pair.rank, scale=scale)


def _scale(config: dict[str, Any], where: str, reading: Reading) -> tuple[float, list[str]]:
    """Return the factor in front of the product, and what to note about it."""
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise InputError(f"{where}: fine_tune_type is {kind!r}; expected lora or dora")
    found = config.get("lora_parameters", config)
    values = found if isinstance(found, dict) else {}
    scale, alpha, rank = (values.get(name) for name in ("scale", "alpha", "rank"))
    if scale is None or not _is_number(scale):
        raise InputError(f"{where}: lora_parameters.scale is {scale!r}; expected a number above 0")
    if alpha is None:
        return float(scale), []
    if reading.alpha is None or not rank or not _is_number(rank):
        raise InputError(refused("mlx-alpha", where, f"scale {scale!r}, alpha {alpha!r}"))
    factor = float(scale) * reading.alpha / rank
    return factor, [
        f"scale {scale:g} times alpha / rank, as mlx-lm did before mid 2024: {factor:g}"
    ]


def _is_number(value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 < value < LARGEST  # type: ignore[operator]
