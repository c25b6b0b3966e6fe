"""A directory written by PEFT: adapter_config.json and adapter_model.safetensors."""

import dataclasses
import hashlib
from pathlib import Path

from lora_export import peft_names, publishing, storage
from lora_export.errors import InputError
from lora_export.records import Adapter

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def detect(path: Path) -> bool:
    """Return whether `path` is a directory with PEFT's config file."""
    return (path / CONFIG).is_file()


def read(path: Path) -> Adapter:
    """Return the adapter in the directory at `path`.

    Raises:
        InputError: a file is missing or damaged, or holds what cannot be merged exactly.
    """
    config = storage.read_json(path / CONFIG)
    weights = path / WEIGHTS
    if not weights.is_file() and (path / "adapter_model.bin").is_file():
        raise InputError(f"{path} holds a pickle (adapter_model.bin); save it as safetensors first")
    infos, _ = storage.read_header(weights)
    adapter = peft_names.read(infos, config, str(path))
    notes = []
    biases = [name for name in adapter.replaced if name.endswith(".bias")]
    if config.get("bias", "none") != "none" and not biases:
        notes.append(f"the config says bias={config['bias']!r}, but the file holds no bias")
    return dataclasses.replace(adapter, format="peft", sha256=_digest(path), notes=tuple(notes))


def _digest(path: Path) -> str:
    """Return one digest over both files: alpha stands in the config alone."""
    texts = [storage.sha256(path / name) for name in (CONFIG, WEIGHTS)]
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def write(adapter: Adapter, path: Path) -> None:
    """Write `adapter` as a directory that PEFT loads with no missing and no unexpected key.

    Raises:
        InputError: `path` exists.
    """
    publishing.refuse_existing(path, overwrite=False)
    path.mkdir()
    config = peft_names.config_of(adapter)
    if not adapter.replaced and adapter.task_type in peft_names.WITH_HEADS:
        config["task_type"] = None  # PEFT would look for the head in the file
    storage.write_json(path / CONFIG, config)
    tensors = peft_names.tensors_of(adapter)
    storage.write_safetensors(
        path / WEIGHTS,
        [storage.NewTensor.of(name, value) for name, value in tensors.items()],
        {"format": "pt"},
    )
