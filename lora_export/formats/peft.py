"""A directory written by PEFT: adapter_config.json beside adapter_model.safetensors or .bin."""

import dataclasses
from pathlib import Path

from lora_export import peft_names, peft_writing, pickles, publishing, storage
from lora_export.errors import InputError
from lora_export.records import Adapter, Reading

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"


def detect(path: Path) -> bool:
    """Return whether `path` is a directory with PEFT's files, or the tensors in one."""
    folder = _folder(path)
    if (folder / "adapters.safetensors").is_file() and not (folder / WEIGHTS).is_file():
        return False  # mlx-lm calls its config the same
    return (folder / CONFIG).is_file()


def read(path: Path, reading: Reading | None = None) -> Adapter:
    """Return the adapter in the directory at `path`.

    Raises:
        InputError: a file is missing or damaged, or holds what cannot be merged exactly.
    """
    folder = _folder(path)
    if not (folder / CONFIG).is_file():
        raise InputError(f"{folder} has no {CONFIG}, so nothing says alpha and the variant")
    config = storage.read_json(folder / CONFIG)
    weights, notes = folder / WEIGHTS, []
    if weights.is_file():
        if (folder / PICKLE).is_file():
            notes.append(f"{PICKLE} lies beside {WEIGHTS} and was not read, as in PEFT")
        adapter = peft_names.read(storage.read_header(weights)[0], config, str(path), reading)
    elif (folder / PICKLE).is_file():
        weights = folder / PICKLE
        adapter = peft_names.read(pickles.read(weights), config, str(path), reading)
    else:
        raise InputError(f"{folder} holds a config and no weights: neither {WEIGHTS} nor {PICKLE}")
    return dataclasses.replace(
        adapter,
        format="peft",
        sha256=storage.sha256_of(folder / CONFIG, weights),
        notes=(*notes, *adapter.notes),
    )


def _folder(path: Path) -> Path:
    return path.parent if path.name in (WEIGHTS, PICKLE, CONFIG) else path


def write(adapter: Adapter, path: Path) -> None:
    """Write `adapter` as a directory that PEFT loads with no missing and no unexpected key.

    Raises:
        InputError: `path` exists.
    """
    publishing.refuse_existing(path, overwrite=False)
    path.mkdir()
    config = peft_writing.config_of(adapter)
    if not adapter.replaced and adapter.task_type in peft_writing.WITH_HEADS:
        config["task_type"] = None  # PEFT would look for the head in the file
    storage.write_json(path / CONFIG, config)
    tensors = peft_writing.tensors_of(adapter)
    storage.write_safetensors(
        path / WEIGHTS,
        [storage.NewTensor.of(name, value) for name, value in tensors.items()],
        {"format": "pt"},
    )
