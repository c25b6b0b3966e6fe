"""From a path to an `Adapter`, and from a live model to a file."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_export import formats, peft_names, publishing, storage
from lora_export.errors import InputError, listed
from lora_export.records import Adapter, all_finite

if TYPE_CHECKING:  # reading an adapter loads no torch
    from torch import nn


def read_adapter(path: str | Path, format: str | None = None) -> Adapter:
    """Return the adapter at `path`, in whichever known format it is.

    Raises:
        InputError: there is nothing at `path`, or no known format, or it is damaged.
    """
    place = Path(path).expanduser()
    if not place.exists():
        raise InputError(f"no adapter at {place}")
    adapter: Adapter = formats.load(format or _detect(place)).read(place)
    return adapter


def _detect(place: Path) -> str:
    for name in formats.names():
        if formats.load(name).detect(place):
            return name
    if place.is_file():
        storage.read_header(place)  # a damaged file says so itself
    raise InputError(
        f"{place} is in none of the known adapter formats ({', '.join(formats.names())})"
    )


def save_adapter(model: "nn.Module", path: str | Path, **about: Any) -> Adapter:
    """Write the adapter that `model` holds, and nothing else, to one safetensors file.

    Args:
        model: A model with LoRA layers.
        path: The file to write; an existing one is replaced in one step.
        about: Fields of `Adapter` to store with it: `base` (a `BaseRef`; its fingerprint is
            computed here), `labels`, `task_type`, `training`.

    Raises:
        InputError: the model has no LoRA layers, or a value is not finite.
    """
    from lora_export.injection import describe

    adapter = describe(model, **about)
    if bad := [name for name, v in peft_names.tensors_of(adapter).items() if not all_finite(v)]:
        raise InputError(listed("these tensors have values that are NaN or infinite", bad))
    with publishing.staged(Path(path), overwrite=True) as file:
        formats.load("native").write(adapter, file)
    return adapter


def load_adapter(model: "nn.Module", path: str | Path) -> Adapter:
    """Read the adapter at `path` and attach it to `model`, in place of any other; return it.

    Raises:
        InputError: the file is missing or damaged.
        AdapterMismatch: it does not fit `model`, which is then left as it was.
    """
    from lora_export.injection import attach

    adapter = read_adapter(path)
    attach(model, adapter)
    return adapter
