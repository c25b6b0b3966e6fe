"""What the runtimes of torch share: calling a module by names."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from lora_export.errors import ExportFailed, first_line
from lora_export.records import Array, is_float

NOTE = "lora_export.json"  # in a .pt2 archive: names of inputs and outputs, labels, provenance


@torch.inference_mode()
def answers(
    module: Callable[..., Any],
    arrays: Mapping[str, Array],
    inputs: Iterable[str],
    outputs: Sequence[str],
) -> dict[str, Array]:
    """Return the named outputs of a module that takes `inputs`, and gives `outputs`, in order."""
    found = module(*[torch.from_numpy(arrays[name]) for name in inputs])
    values = found if isinstance(found, tuple) else (found,)
    return {name: value.numpy() for name, value in zip(outputs, values, strict=True)}


@contextlib.contextmanager
def evaluating() -> Iterator[None]:
    """Let what torch raises where it cannot evaluate a graph be `ExportFailed`."""
    try:
        yield
    except (RuntimeError, KeyError, TypeError) as error:
        raise ExportFailed(f"the graph cannot be evaluated: {first_line(error)}") from error


def in_double(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Return `arrays`, those of floats in float64."""
    return {name: a.astype(np.float64) if is_float(a) else a for name, a in arrays.items()}


def precision_of(module: nn.Module) -> str:
    """Return the name of the dtype that `module` computes in."""
    floating = next(p for p in module.parameters() if p.is_floating_point())
    return str(floating.dtype).removeprefix("torch.")
