"""Adapter file formats, one file each. The file's name is the format's name.

A format is a module with two functions, and a third where we also write it:

    detect(path) -> bool                   whether `path` looks like this format; never raises
    read(path, reading) -> Adapter         raises `InputError` with every fault in the file;
                                           `reading` is a `records.Reading`: what the caller says
    write(adapter, path) -> None           optional
    TAKES_ALPHA                            optional: `reading.alpha` is looked at

At most one format may recognise a path.
"""

from pathlib import Path

from lora_export import registry, storage
from lora_export.errors import InputError


def names() -> tuple[str, ...]:
    """Return the known formats: the files of this folder."""
    return registry.names(__name__)


def load(name: str) -> registry.Entry:
    """Return the module of the format `name`; raises `InputError` for an unknown one."""
    return registry.load(__name__, name)


def keys(path: Path) -> frozenset[str]:
    """Return the names of the tensors in the safetensors file at `path`; empty where it is none."""
    try:
        return frozenset(storage.read_header(path)[0]) if path.is_file() else frozenset()
    except InputError:
        return frozenset()
