"""Where an artifact has the tensors of the merged model that it was made from."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lora_export import exporters, inputs, matching, resolving
from lora_export.calling import Interface
from lora_export.matching import Wanted
from lora_export.records import Array, Artifact, Placement
from lora_export.storage import Checkpoint, TensorInfo
from lora_export.torch_rounding import as_array


def placements_of(
    model: nn.Module, interface: Interface, folder: Path, artifact: Artifact, path: Path
) -> tuple[Placement, ...]:
    """Return where the artifact at `path` has each tensor of the merged model in `folder`.

    Args:
        model: The merged model, loaded from `folder`.
        interface: How it is called: what none of its outputs depends on may be left out.
        folder: Of the merged files.
        artifact: What was written.
        path: Its first file.

    Raises:
        InputError: what reads such an artifact is not installed, or it is for another machine.
        ExportFailed: the artifact cannot be read.
    """
    return matching.placements(
        artifact.format,
        artifact.precision,
        partial(exporters.load(artifact.format).tensors, path),
        wanted(model, folder),
        partial(used, model, interface),
    )


def wanted(model: nn.Module, folder: Path) -> list[Wanted]:
    """Return the floating-point tensors of `model`, as the merged files in `folder` have them.

    One that transformers puts together as it loads them, or takes from another, is the model's own.
    """
    checkpoint = Checkpoint.open(folder)
    architecture = resolving.architecture(model, checkpoint, {})
    stored = {
        link.tensor: checkpoint.tensors[link.stored]
        for link in architecture.links
        if link.is_whole and not link.swapped and link.tensor not in architecture.unfollowed
    }
    found = []
    for path, value in model.state_dict().items():
        shape, info = tuple(value.shape), stored.get(path)
        if not value.is_floating_point() or not value.numel():
            continue
        if info is None or info.shape != shape:
            found.append(Wanted(path, path, shape, partial(as_array, value)))
        else:
            dtype = as_array(value.new_empty(0)).dtype
            found.append(Wanted(info.name, path, shape, partial(_as_loaded, info, dtype)))
    return found


def _as_loaded(info: TensorInfo, dtype: np.dtype[Any]) -> Array:
    return matching.rounded(info.stored(), dtype)


def used(model: nn.Module, interface: Interface, paths: Iterable[str]) -> set[str]:
    """Return those tensors of `model` that its outputs depend on, as autograd tells."""
    known = model.state_dict(keep_vars=True)
    chosen = {path: known[path] for path in paths}
    example = inputs.example(interface.signature)
    given = [torch.from_numpy(example[spec.name]) for spec in interface.signature.inputs]
    fixed = [value for value in chosen.values() if not value.requires_grad]
    try:
        with torch.enable_grad():
            for value in fixed:
                value.requires_grad_(True)
            answer = interface.bind(model)(*given)
            outputs = answer if isinstance(answer, tuple) else (answer,)
            total: Any = sum(value.double().sum() for value in outputs)
            if not total.requires_grad:
                return set()
            slopes = torch.autograd.grad(total, list(chosen.values()), allow_unused=True)
    finally:
        for value in fixed:
            value.requires_grad_(False)
    return {path for path, slope in zip(chosen, slopes, strict=True) if slope is not None}
