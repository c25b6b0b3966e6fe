"""Adapters and bases on disk, a few numbers each, made by hand: numpy and JSON, no PEFT.

`KINDS` has one adapter of every kind that PEFT writes: its tensors, and the fields of its config.
"""

import json

import ml_dtypes
import numpy as np

from lora_export import storage
from lora_export.records import Factors
from lora_export.rounding import round_once

PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BF16 = np.dtype(ml_dtypes.bfloat16)
SIZE = 8
LAYER = "model.layers.0.self_attn.q_proj"
EXPERT = "model.layers.0.mlp.experts"
EMBED = "model.embed_tokens"


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
        return round_once(np.ascontiguousarray(exact), "BF16")
    return exact.astype(dtype)


# ---------------------------------------------------------------- one of every kind


def fused(count=3, out=4, width=8, rank=2, seed=0):
    """A (experts * rank, in) and B (out, rank * experts) as PEFT stores them."""
    return numbers(count * rank, width, seed=seed), numbers(out, rank * count, seed=seed + 1)


def adalora(rank=3, path=LAYER, **parts):
    made = {"lora_A": numbers(rank, 8), "lora_B": numbers(8, rank), "lora_E": numbers(rank, 1)}
    return {f"{PREFIX}{path}.{name}": value for name, value in (made | parts).items()}


EMBEDDED = (".lora_embedding_A", ".lora_embedding_B")


def _one(sides, ends=(".lora_A.weight", ".lora_B.weight"), path=LAYER, **more):
    made = keyed({path: sides}, ends=ends)
    return made | {f"{PREFIX}{path}.{name}": value for name, value in more.items()}


def _conv(*kernel):
    return numbers(2, 3, *kernel), numbers(4, 2, *(1 for _ in kernel))


TWO_PARAMETERS = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
KINDS = {
    "linear": (_one(pair()), {}),
    "alpha": (_one(pair()), {"lora_alpha": 1.5}),
    "rslora": (_one(pair()), {"use_rslora": True}),
    "patterns": (
        _one(pair()) | _one(pair(rank=3), path="a.k_proj") | _one(pair(), path="a.v_proj"),
        {"rank_pattern": {"k_proj": 3}, "alpha_pattern": {"v_proj": 7}},
    ),
    "patterns of rslora": (
        _one(pair()) | _one(pair(rank=3), path="a.k_proj"),
        {"rank_pattern": {"k_proj": 3}, "alpha_pattern": {"k_proj": 0.1}, "use_rslora": True},
    ),
    "dora": (_one(pair(), lora_magnitude_vector=numbers(8)), {"use_dora": True}),
    "rslora with dora": (
        _one(pair(), lora_magnitude_vector=numbers(8)),
        {"use_dora": True, "use_rslora": True},
    ),
    "embedding": (_one(pair(6, 20), EMBEDDED, EMBED), {}),
    "embedding with dora": (
        _one(pair(6, 20), EMBEDDED, EMBED, lora_magnitude_vector=numbers(6)),
        {"use_dora": True},
    ),
    "convolution of one axis": (_one(_conv(3)), {}),
    "convolution of two axes": (_one(_conv(3, 2)), {}),
    "convolution of three axes": (_one(_conv(1, 3, 2)), {}),
    "convolution with dora": (
        _one(_conv(3, 2), lora_magnitude_vector=numbers(1, 4, 1, 1)),
        {"use_dora": True},
    ),
    "bias of lora_B": (
        _one(pair()) | {f"{PREFIX}{LAYER}.lora_B.bias": numbers(8)},
        {"lora_bias": True},
    ),
    "kasa": (_one(pair(), lora_diag=numbers(2)), {"kasa_config": {"beta": 1}}),
    "pissa": (_one(pair()), {"init_lora_weights": "pissa"}),
    "olora": (_one(pair()), {"init_lora_weights": "olora"}),
    "experts": (keyed({EXPERT: fused()}), {"target_parameters": ["experts.down_proj"]}),
    "experts of two parameters": (
        keyed({f"{EXPERT}.base_layer": fused(), EXPERT: fused(out=8, width=4, seed=5)}),
        TWO_PARAMETERS,
    ),
    "experts of another rank": (
        keyed({EXPERT: fused(rank=3)}) | _one(pair()),
        {"target_parameters": ["experts.w"], "rank_pattern": {r".*experts\.w": 3}},
    ),
    "rows": (
        _one(pair())
        | {f"{PREFIX}{EMBED}.token_adapter.trainable_tokens_delta": numbers(2, 8)},
        {"trainable_token_indices": {"embed_tokens": [7, 3]}},
    ),
    "head": (
        _one(pair()) | {f"{PREFIX}score.weight": numbers(2, 8), f"{PREFIX}score.bias": numbers(2)},
        {"modules_to_save": ["score"], "task_type": "SEQ_CLS"},
    ),
    "integers stored whole": (_one(pair()) | {f"{PREFIX}n.count": np.array([5])}, {}),
    "replicated layers": (_one(pair()), {"layer_replication": [[0, 1], [0, 2]]}),
}  # fmt: skip
