"""Tensors without a config: a loralib state dict, or PEFT's tensors by themselves.

Source of the layout: microsoft/LoRA. `X.lora_A` (r, in) and `X.lora_B` (out, r); a file of PEFT's
names reads the same. No such file says alpha, so the caller does.
"""

import dataclasses
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

from lora_export import formats, peft_names, pickles, storage
from lora_export.errors import InputError
from lora_export.records import Adapter, Array, Reading
from lora_export.refusals import refused
from lora_export.storage import TensorInfo

_KEY = re.compile(r"\.lora_(embedding_)?[AB](\.|$)")
TAKES_ALPHA = True  # the caller may have to say it


def detect(path: Path) -> bool:
    """Return whether `path` is a file of tensors with LoRA's names and nothing that explains them.

    Of a PyTorch file only the container is looked at.
    """
    if not path.is_file() or (path.parent / "adapter_config.json").is_file():
        return False
    if path.suffix in pickles.SUFFIXES:
        return zipfile.is_zipfile(path)
    if any(_KEY.search(key) for key in formats.keys(path)):
        return not any(key.startswith("lora_export.") for key in storage.read_header(path)[1])
    return False


def read(path: Path, reading: Reading | None = None) -> Adapter:
    """Return the adapter in the file at `path`; tensors without LoRA's names are the trained head.

    Raises:
        InputError: the caller says no alpha, or the file is damaged.
    """
    reading = reading or Reading()
    tensors: Mapping[str, TensorInfo] | Mapping[str, Array]
    if path.suffix in pickles.SUFFIXES:
        tensors = pickles.read(path)
    else:
        tensors = storage.read_header(path)[0]
    if not any(_KEY.search(key) for key in tensors):
        raise InputError(f"{path}: no lora_A and lora_B tensors at all")
    if reading.alpha is None:
        raise InputError(refused("no-alpha", str(path)))
    config = peft_names.bare_config(tensors, reading.alpha)
    adapter = peft_names.read(tensors, config, str(path), reading)
    notes = [note for note in adapter.notes if "where PEFT writes" not in note]
    notes.append(f"the file stores no alpha; {reading.alpha:g} was given by the caller")
    return dataclasses.replace(
        adapter, format="loralib", sha256=storage.sha256(path), notes=tuple(notes)
    )
