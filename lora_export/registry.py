"""A folder is a registry: the name of a file is the name of what it provides.

Names are listed without importing anything; files that begin with an underscore are private.
"""

import functools
import importlib
import importlib.util
from pathlib import Path
from typing import Any

from lora_export.errors import InputError

EXPORTERS = "lora_export.exporters"  # listed by the command line, which loads none of them
DEFAULT_EXPORTERS = ("onnx", "torchscript")  # what a run makes where nothing else is asked for
# Of artifacts; each exporter says which it has.
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4")
FULL = PRECISIONS[0]
CALIBRATED = ("int8", "int4")  # those for which an exporter needs inputs to choose by
PRECISION = "lora_export.precision"  # in the metadata of an artifact, as JSON
Entry = Any  # a module; what it must provide is said by the folder's own docstring


@functools.cache
def names(package: str) -> tuple[str, ...]:
    """Return the sorted names of the entries in `package`."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    found = {
        file.stem
        for folder in spec.submodule_search_locations
        for file in Path(folder).glob("*.py")
        if not file.stem.startswith("_")
    }
    return tuple(sorted(found))


def load(package: str, name: str) -> Entry:
    """Import and return the entry `name` of `package`.

    Raises:
        InputError: there is no such entry; the message lists those there are.
    """
    if name not in names(package):
        kind = package.rsplit(".", 1)[-1]
        raise InputError(f"{name!r} is not one of the {kind}: {', '.join(names(package))}")
    return importlib.import_module(f"{package}.{name}")
