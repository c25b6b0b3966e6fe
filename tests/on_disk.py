"""Adapters and bases on disk, a few numbers each, made by hand: numpy and JSON, no PEFT."""

import json

import ml_dtypes
import numpy as np
import torch

from lora_export import storage
from lora_export.records import Factors

PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BF16 = np.dtype(ml_dtypes.bfloat16)
SIZE = 8


def numbers(*shape, seed=0, dtype=np.float32):
    """Random numbers that every float dtype holds exactly: eighths, none of them zero."""
    dice = np.random.default_rng((seed, *shape))
    whole = dice.integers(1, 9, shape) * dice.choice([-1, 1], shape)
    return (whole / 8).astype(dtype)


def pair(out=SIZE, width=SIZE, rank=2, seed=0, dtype=np.float32):
    """A (rank, width) and B (out, rank)."""
    return numbers(rank, width, seed=seed, dtype=dtype), numbers(
        out, rank, seed=seed + 1, dtype=dtype
    )


def factors(out=SIZE, width=SIZE, rank=2, seed=0, alpha=4.0, **changes):
    """The same as the factors of a module."""
    a, b = pair(out, width, rank, seed)
    return Factors(a, b, alpha, changes.pop("scale", alpha / rank), **changes)


def keyed(modules, prefix=PREFIX, ends=(".lora_A.weight", ".lora_B.weight")):
    """The tensors of the pairs in `modules`, under PEFT's names."""
    tensors = {}
    for path, sides in modules.items():
        tensors |= {f"{prefix}{path}{end}": side for end, side in zip(ends, sides, strict=True)}
    return tensors


def save(file, tensors, metadata=None):
    """Write arrays of any float dtype, bfloat16 among them, as safetensors."""
    made = [storage.NewTensor.of(name, np.asarray(value)) for name, value in tensors.items()]
    storage.write_safetensors(file, made, metadata or {})
    return file


def fields(**changes):
    """The fields of a config of PEFT's."""
    return {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **changes}


def peft_folder(folder, tensors, **config):
    """Write an adapter of PEFT's; return its directory."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(fields(**config)))
    save(folder / WEIGHTS, tensors)
    return folder


def base_folder(folder, tensors, **config):
    """Write a base that consists of `tensors`; return its directory."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save(folder / storage.SINGLE, tensors)
    return folder


def bases(folder, tensors):
    """Write a checkpoint that consists of `tensors`, and open it."""
    folder.mkdir(parents=True, exist_ok=True)
    save(folder / storage.SINGLE, tensors)
    return storage.Checkpoint.open(folder)


def saved(model, folder):
    """Save a model of transformers', under the names that it has in memory; open it."""
    values = model.state_dict(keep_vars=True)
    first = {id(value): name for name, value in reversed(values.items())}  # ties are stored once
    base_folder(
        folder,
        {name: values[name].detach().numpy() for name in values if first[id(values[name])] == name},
    )
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    return storage.Checkpoint.open(folder)


def delta(pair):
    """The update of a module in float64: scale B diag(d) A."""
    a, b = (side.astype(np.float64) for side in pair.matrices())
    if pair.diagonal is not None:
        b = b * pair.diagonal.astype(np.float64)
    return pair.scale * (b @ a)


def arrays(folder):
    """The tensors of a merged model, bfloat16 among them, by name."""
    found = storage.Checkpoint.open(folder).tensors
    return {name: info.stored() for name, info in found.items()}


def rounded(exact, dtype):
    """Round float64 to another dtype, once."""
    if dtype == BF16:
        from lora_export.rounding import round_once

        kept = round_once(torch.from_numpy(np.ascontiguousarray(exact)), torch.bfloat16)
        return kept.view(torch.int16).numpy().view(BF16)
    return exact.astype(dtype)
