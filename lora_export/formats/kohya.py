"""kohya's sd-scripts and diffusers: `lora_down`, `lora_up` and an `.alpha` for each module.

Only updates of a text model are read. kohya writes module paths with underscores for dots; which
module is meant is decided by the base. Without `.alpha` the scale is one, as in both projects.
"""

import re
from collections import Counter
from pathlib import Path

from lora_export import formats, storage
from lora_export.errors import InputError, listed
from lora_export.records import CONV, LINEAR, Adapter, Array, Factors, Reading, all_finite, is_float
from lora_export.refusals import refused

_ENDS = {
    ".lora_down.weight": "a", ".lora_up.weight": "b", ".alpha": "alpha",
    ".lora.down.weight": "a", ".lora.up.weight": "b",
    ".lora_linear_layer.down.weight": "a", ".lora_linear_layer.up.weight": "b",
    ".lora_A.weight": "a", ".lora_B.weight": "b",
}  # fmt: skip
_FLAT = re.compile(r"(lora_te\d?|lora|lycoris)_")
_DOTTED = re.compile(r"text_encoder(_\d)?\.")
_PICTURE = re.compile(r"lora_(unet|transformer)_|unet\.|transformer\.")
DIFFUSERS = "pytorch_lora_weights.safetensors"


def detect(path: Path) -> bool:
    """Return whether `path` is a file with tensors of these names."""
    names = formats.keys(_file(path))
    old = any(".lora_down." in k or ".lora.down." in k or "lora_linear_layer" in k for k in names)
    return old or any(_DOTTED.match(key) and ".lora_A." in key for key in names)


def _file(path: Path) -> Path:
    return path / DIFFUSERS if (path / DIFFUSERS).is_file() else path


def read(path: Path, reading: Reading | None = None) -> Adapter:
    """Return the adapter in the file at `path`.

    Raises:
        InputError: it is damaged, holds updates of a picture model, or of several text models.
    """
    infos, _ = storage.read_header(_file(path))
    faults, prefixes = [], Counter[str]()
    parts: dict[str, dict[str, Array]] = {}
    for key, info in infos.items():
        end = next((end for end in _ENDS if key.endswith(end)), None)
        prefix = _FLAT.match(key) or _DOTTED.match(key)
        if _PICTURE.match(key):
            prefixes["picture"] += 1
        elif end is None:
            faults.append(refused("unknown-tensor", key))
        else:
            prefixes[prefix[0] if prefix else ""] += 1
            name = key.removesuffix(end)[len(prefix[0]) if prefix else 0 :]
            value = info.stored()
            whole = _ENDS[end] == "alpha" and value.dtype.kind in "iu"
            if not whole and not (is_float(value) and all_finite(value)):
                faults.append(f"{key}: holds values that are no finite floats")
            parts.setdefault(name, {})[_ENDS[end]] = value
    if count := prefixes.pop("picture", 0):
        faults.append(refused("diffusion", found=f"{count} of {len(infos)} tensors"))
    if len(prefixes) > 1:
        names = ", ".join(repr(prefix) for prefix in sorted(prefixes))
        faults.append(refused("several-adapters", found=f"prefixes {names}"))
    modules = {}
    for name, held in sorted(parts.items()):
        try:
            modules[name] = _factors(name, held)
        except InputError as error:
            faults.append(str(error))
    if faults or not modules:
        raise InputError(listed(f"cannot use the adapter {path}", faults or ["no tensors"]))
    without = sum("alpha" not in held for held in parts.values())
    notes = (
        [f"{without} of {len(parts)} modules store no alpha: their scale is 1"] if without else []
    )
    return Adapter(
        modules=modules,
        replaced={},
        variant="lora",
        format="kohya",
        sha256=storage.sha256(_file(path)),
        notes=tuple(notes),
        flat_names=not any("." in name for name in modules),
    )


def _factors(name: str, held: dict[str, Array]) -> Factors:
    if missing := {"a", "b"} - held.keys():
        side = {"a": "lora_down", "b": "lora_up"}[missing.pop()]
        raise InputError(f"{name}: {side} is missing")
    a, b = held["a"], held["b"]
    if a.ndim < 2 or a.ndim != b.ndim or a.shape[0] != b.shape[1] or 0 in (*a.shape, *b.shape):
        raise InputError(f"{name}: lora_down {a.shape} and lora_up {b.shape} do not form a pair")
    if set(b.shape[2:]) - {1}:
        raise InputError(refused("layer-kind", name, f"lora_up {b.shape}"))
    rank = int(a.shape[0])
    alpha = held.get("alpha")
    if alpha is not None and alpha.size != 1:
        raise InputError(f"{name}: alpha has shape {alpha.shape}; expected one number")
    value = float(rank) if alpha is None else float(alpha.reshape(-1)[0])
    return Factors(a, b, value, value / rank, CONV if a.ndim > 2 else LINEAR)
