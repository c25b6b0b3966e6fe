"""Adapter file formats, one file each. The file's name is the format's name.

A format is a module with two functions, and a third where we also write it:

    detect(path) -> bool                   whether `path` looks like this format; never raises
    read(path) -> Adapter                  raises `InputError` with every fault in the file
    write(adapter, path) -> None           optional
"""

from lora_export import registry


def names() -> tuple[str, ...]:
    """Return the known formats: the files of this folder."""
    return registry.names(__name__)


def load(name: str) -> registry.Entry:
    """Return the module of the format `name`; raises `InputError` for an unknown one."""
    return registry.load(__name__, name)
