"""From a path to an `Adapter`, and from a live model to a file."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_export import bases, formats, peft_writing, pickles, publishing, storage
from lora_export.errors import MOST_LISTED, InputError, listed
from lora_export.records import Adapter, Reading, all_finite

if TYPE_CHECKING:  # reading an adapter loads no torch
    from torch import nn


def locate(adapter: str | Path) -> Path:
    """Return where the adapter lies: a file, a directory, or a hub's snapshot of one.

    `org/name` is a hub id where no such path exists; `org/name/folder` a folder inside.

    Raises:
        InputError: there is nothing of that name; or a directory holds several adapters.
    """
    place = Path(adapter).expanduser()
    if not _exists(place):
        place = bases.find_adapter(str(adapter))
    if place.is_dir() and not (place / "adapter_config.json").is_file():
        inside = sorted(f.parent for f in place.glob("*/adapter_config.json"))
        if len(inside) == 1 and not any(place.glob("*.safetensors")):
            return inside[0]
        if inside:
            names = ", ".join(folder.name for folder in inside[:MOST_LISTED])
            raise InputError(f"{place} holds several adapters: {names}; name one of them")
    return place


def _exists(place: Path) -> bool:
    try:
        return place.exists()
    except OSError:  # a name that is no name of a file
        return False


def read_adapter(
    path: str | Path, format: str | None = None, reading: Reading | None = None
) -> Adapter:
    """Return the adapter at `path`, in whichever known format it is.

    Args:
        path: A file, a directory, or a hub id.
        format: One of `formats.names()`; None recognises it.
        reading: What the caller knows and the file does not say.

    Raises:
        InputError: there is nothing at `path`, or no known format, or it is damaged.
    """
    place = locate(path)
    name = format or _detect(place)
    reader = formats.load(name)
    if reading is not None and reading.alpha is not None and not hasattr(reader, "TAKES_ALPHA"):
        raise InputError(f"{place}: files of the format {name} say alpha themselves; drop --alpha")
    adapter: Adapter = reader.read(place, reading)
    return adapter


def _detect(place: Path) -> str:
    for name in formats.names():
        if formats.load(name).detect(place):
            return name
    if place.is_file() and place.suffix not in pickles.SUFFIXES:
        storage.read_header(place)  # a damaged file says so itself
    if place.is_dir() and any((place / name).is_file() for name in _WEIGHTS):
        raise InputError(
            f"{place} holds weights and no adapter_config.json: pass the file itself and --alpha"
        )
    if place.is_dir() and (place / "config.json").is_file():
        raise InputError(f"{place} holds a model, and no adapter")
    raise InputError(
        f"{place} is in none of the known adapter formats ({', '.join(formats.names())})"
    )


_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "adapters.safetensors")


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
    if bad := [name for name, v in peft_writing.tensors_of(adapter).items() if not all_finite(v)]:
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
