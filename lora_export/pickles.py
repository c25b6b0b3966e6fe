"""Old PyTorch files: a zip archive with a pickle in it. Read without running anything from it."""

import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_export import storage
from lora_export.errors import InputError
from lora_export.records import Array
from lora_export.refusals import refused

if TYPE_CHECKING:  # only reading such a file loads torch
    from torch import Tensor

SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
MOST_COPIES = 2  # tied tensors share one storage
_WRAPPED = ("state_dict", "model_state_dict", "module")  # where trainers put the tensors


def read(path: Path) -> dict[str, Array]:
    """Return the tensors in the PyTorch file at `path`; their bytes stay on disk until read.

    Raises:
        InputError: it holds anything but tensors, or tensors that are larger than the file.
    """
    import torch

    _check_archive(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a stranger's bytes: torch raises as it comes
        raise InputError(refused("pickle", str(path), type(error).__name__)) from error
    for key in _WRAPPED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise InputError(f"{path}: holds no tensors by name")
    found, size = {}, 0
    for name, value in content.items():
        if not isinstance(name, str):
            raise InputError(refused("pickle", str(path), f"a {type(name).__name__} for a name"))
        try:
            found[name] = _array(f"{path}: {name}", value)
        except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(refused("pickle", f"{path}: {name}", "no plain tensor")) from error
        size += found[name].nbytes
        if size > MOST_COPIES * path.stat().st_size:  # views of one storage, each a copy here
            raise InputError(f"{path}: its tensors take {size} bytes and more, spread out of less")
    return found


def _check_archive(path: Path) -> None:
    """Raise unless `path` is a zip archive whose members are stored as they are."""
    storage.refuse_pointer(path)
    try:
        size = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError) as error:
        raise InputError(refused("pickle", str(path), "no archive of PyTorch")) from error
    packed = [member.filename for member in members if member.compress_type != zipfile.ZIP_STORED]
    if packed or sum(member.file_size for member in members) > size:
        raise InputError(refused("pickle", str(path), "compressed"))


def _array(where: str, value: Any) -> Array:
    import torch

    from lora_export import torch_rounding

    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        raise InputError(refused("pickle", where, type(value).__name__))
    tensor: Tensor = value.detach()
    held = tensor.untyped_storage().nbytes()
    if math.prod(tensor.shape) * tensor.element_size() > held:
        raise InputError(f"{where}: {tuple(tensor.shape)} spread out of {held} bytes")
    return torch_rounding.as_array(tensor)
