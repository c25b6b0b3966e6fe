"""Adapters and bases that were damaged at random: each merges right, or is refused cleanly.

One number makes one mutant, from a sound adapter of some kind. Whatever merges is held against
`peft_made.reference`, in float64, of what third parties read in the damaged files; whatever does
not must end in the package's own error, soon, in little memory, with nothing written.

`FUZZ_SEEDS=17,4711` runs these seeds alone; `mutant(17, corpus, folder)` writes one.
"""

import copy
import io
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import traceback
import tracemalloc
import warnings
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import peft_made
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, load_file, save, save_file

from lora_export import merged_files
from lora_export.errors import LoraExportError

LIMIT = 10  # seconds for one mutant; a sound one takes a twentieth of one
TRACED = 3  # how much longer everything takes while memory is traced
ROOM = 300 << 20  # bytes that one mutant may add to the largest size of the process
QUICK, WHOLE, CHUNK = 300, 10_000, 500
CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
INDEX = "model.safetensors.index.json"
PREFIX = "base_model.model."

# Architecture, variant, and the file format that the adapter is rewritten in.
KINDS = (
    ("llama", "plain", "peft"), ("llama", "plain", "peft"), ("llama", "dora", "peft"),
    ("llama", "rslora-patterns", "peft"), ("gpt2", "plain", "peft"),
    ("gpt2", "lora-bias", "peft"), ("bert", "bias-all", "peft"), ("llama", "embedding", "peft"),
    ("llama", "embedding-dora", "peft"), ("vit", "conv-dora", "peft"),
    ("qwen2-moe", "experts", "peft"), ("mixtral", "experts-patterns", "peft"),
    ("llama", "trainable-tokens", "peft"), ("bert", "trainable-tokens-list", "peft"),
    ("distilbert", "modules-to-save", "peft"), ("llama", "modules-to-save", "peft"),
    ("llama", "adalora-pruned", "peft"), ("llama", "kasa", "peft"), ("llama", "bdlora", "peft"),
    ("llama", "pissa", "peft"), ("llama", "olora", "peft"), ("gemma", "tied-embedding", "peft"),
    ("gemma", "tied-modules-to-save", "peft"), ("llama", "layer-replication", "peft"),
    ("bert-headless", "modules-to-save", "peft"), ("llama", "parameter-2d", "peft"),
    ("llama", "plain", "pickle"), ("distilbert", "modules-to-save", "pickle"),
    ("llama", "embedding", "pickle"), ("llama", "plain", "mlx"), ("llama", "plain", "kohya"),
    ("llama", "plain", "loralib"), ("llama", "plain", "loralib-pt"), ("llama", "plain", "native"),
    ("distilbert", "modules-to-save", "native"), ("llama", "dora", "native"),
)  # fmt: skip
FILES = {
    "peft": WEIGHTS, "pickle": PICKLE, "mlx": "adapters.safetensors", "kohya": "lora.safetensors",
    "loralib": "lora.safetensors", "loralib-pt": "lora.pt", "native": "adapter.safetensors",
}  # fmt: skip


# ---------------------------------------------------------------- sound adapters


@dataclass
class Sound:
    """An adapter that merges, taken apart, and what it makes of its base."""

    name: str
    format: str
    base: Path
    tensors: dict[str, torch.Tensor]
    config: dict[str, Any] | None  # of its adapter_config.json
    metadata: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Mutant:
    """A sound adapter on its way to the disk, and what was done to it."""

    sound: Sound
    random: random.Random
    tensors: dict[str, Any]
    config: Any
    metadata: dict[str, Any]
    base: dict[str, bytes] | None = None  # files of a base of its own
    raw: list[Any] = field(default_factory=list)  # what to do to the bytes of the weights
    header: list[Any] = field(default_factory=list)  # what to do to the entries of their header
    text: list[Any] = field(default_factory=list)  # what to do to the bytes of the config
    reclassed: bool = False  # another class of model may be meant, which drops a head
    done: list[str] = field(default_factory=list)

    def say(self, *words: object) -> None:
        self.done.append(" ".join(" ".join(str(word).split())[:120] for word in words))


def sound(architecture: str, variant: str, format: str, folder: Path) -> Sound:
    """Make an adapter with PEFT, and rewrite it as `format` has it."""
    made = peft_made.make(architecture, variant, "float32", folder)
    config = json.loads((made.adapter / CONFIG).read_text())
    tensors = load_file(made.adapter / WEIGHTS)
    result = Sound(f"{architecture}/{variant}/{format}", format, made.base, tensors, config)
    if format == "native":
        result.metadata = {"lora_export.schema": "1", "lora_export.config": json.dumps(config)}
        result.config = None
    elif format.startswith("loralib"):
        result.tensors = {_loralib(name): value for name, value in tensors.items()}
        result.config, result.options = None, {"alpha": 6.0}
    elif format == "kohya":
        result.tensors, result.config = _kohya(tensors), None
    elif format == "mlx":
        ends = {".lora_A.weight": ".lora_a", ".lora_B.weight": ".lora_b"}
        result.tensors = {}
        for name, value in tensors.items():
            end = next(end for end in ends if name.endswith(end))
            bare = name.removeprefix(PREFIX).removesuffix(end) + ends[end]
            result.tensors[bare] = value.T.contiguous()
        parameters = {"rank": 3, "dropout": 0.0, "scale": 2.5}
        result.config = {
            "model": "org/some", "fine_tune_type": "lora", "num_layers": 2,
            "lora_parameters": parameters,
        }  # fmt: skip
    return result


def _loralib(name: str) -> str:
    return name.removeprefix(PREFIX).removesuffix(".weight")


def _kohya(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    result = {}
    for name, value in tensors.items():
        path, part = name.removeprefix(PREFIX).removesuffix(".weight").rsplit(".", 1)
        flat = f"lora_te_{path.replace('.', '_')}"
        result[f"{flat}.{ {'lora_A': 'lora_down', 'lora_B': 'lora_up'}[part] }.weight"] = value
        result[f"{flat}.alpha"] = torch.tensor(6.0)
    return result


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """All kinds, each shown to merge as it is: what is wrong later, a mutation did."""
    root = tmp_path_factory.mktemp("sound")
    found = []
    for index, kind in enumerate(KINDS):
        found.append(sound(*kind, root / str(index)))
        whole = untouched(found[-1], random.Random(0))
        fault = judged(whole, root / f"{index}-mutant")
        assert fault == "merged", (kind, fault)
    return found


# ---------------------------------------------------------------- writing


CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


def packed(mutant: Mutant) -> bytes:
    """Return the weights as a safetensors file, with the damage done to its header."""
    pairs, body = [], b""
    for name, value in mutant.tensors.items():
        data = value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        place = [len(body), len(body) + len(data)]
        entry = {"dtype": CODES[value.dtype], "shape": [*value.shape], "data_offsets": place}
        pairs.append((name, entry))
        body += data
    if mutant.metadata:
        pairs.insert(0, ("__metadata__", mutant.metadata))
    for change in mutant.header:
        pairs, body = change(pairs, body)
    inner = ",".join(f"{json.dumps(name)}:{json.dumps(entry)}" for name, entry in pairs)
    text = f"{{{inner}}}".encode()
    return len(text).to_bytes(8, "little") + text + body


def pickled(content: object) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def place(mutant: Mutant, folder: Path) -> tuple[Path, Path]:
    """Write the mutant; return the paths of the adapter and of its base."""
    kind = mutant.sound.format
    adapter, base = folder / "adapter", mutant.sound.base
    adapter.mkdir(parents=True)
    pickles = kind in ("pickle", "loralib-pt")
    data = pickled(mutant.tensors) if pickles else packed(mutant)
    for change in mutant.raw:
        data = change(data)
    (adapter / FILES[kind]).write_bytes(data)
    if mutant.config is not None:
        text = json.dumps(mutant.config).encode()
        for change in mutant.text:
            text = change(text)
        (adapter / CONFIG).write_bytes(text)
    if mutant.base is not None:
        base = folder / "base"
        base.mkdir()
        for name, content in mutant.base.items():
            (base / name).write_bytes(content)
    return (adapter if kind in ("peft", "pickle", "mlx") else adapter / FILES[kind]), base


def untouched(kind: Sound, dice: random.Random) -> Mutant:
    return Mutant(kind, dice, dict(kind.tensors), copy.deepcopy(kind.config), {**kind.metadata})


# ---------------------------------------------------------------- damage to the bytes


def _some(mutant: Mutant, values: Any) -> Any:
    """Return one of `values`; of a mapping, a key, in an order that is the same every time."""
    values = sorted(values, key=str) if isinstance(values, dict) else values
    return mutant.random.choice(list(values))


def flip_bits(mutant: Mutant) -> None:
    """In the length, in the header, or anywhere."""
    where, count = _some(mutant, ("length", "header", "body", "body")), _some(mutant, (1, 1, 2, 8))
    spots = [mutant.random.random() for _ in range(count)]
    bits = [mutant.random.randrange(8) for _ in range(count)]
    mutant.say("flip", count, "bits in the", where, spots, bits)

    def change(data: bytes) -> bytes:
        start, stop = _region(data, where)
        held = bytearray(data)
        for spot, bit in zip(spots, bits, strict=True):
            if stop > start:
                held[start + int(spot * (stop - start))] ^= 1 << bit
        return bytes(held)

    mutant.raw.append(change)


def _region(data: bytes, where: str) -> tuple[int, int]:
    header = min(8 + int.from_bytes(data[:8], "little"), len(data))
    places = {"length": (0, 8), "header": (8, header), "body": (header, len(data))}
    found = places[where]
    return found if found[1] > found[0] else (0, len(data))


def cut_bytes(mutant: Mutant) -> None:
    how, part = _some(mutant, ("end", "middle", "start", "all", "more")), mutant.random.random()
    size = _some(mutant, (1, 3, 4, 8, 64, 1000))
    mutant.say("cut", how, part, size)

    def change(data: bytes) -> bytes:
        spot = int(part * len(data))
        return {
            "end": data[:spot],
            "middle": data[:spot] + data[spot + size :],
            "start": data[size:],
            "all": b"",
            "more": data[:spot] + bytes(size) + data[spot:],
        }[how]

    mutant.raw.append(change)


def write_over(mutant: Mutant) -> None:
    word = _some(mutant, (b"\xff", b"\x00", b"{", b'"', b"9", b"-", b"\xff" * 8, b"nan", b"1e9"))
    part = mutant.random.random()
    where = _some(mutant, ("length", "header", "header", "body"))
    mutant.say("write", word, "over the", where, part)

    def change(data: bytes) -> bytes:
        start, stop = _region(data, where)
        spot = start + int(part * max(stop - start - len(word), 0))
        return data[:spot] + word + data[spot + len(word) :]

    mutant.raw.append(change)


# ---------------------------------------------------------------- damage to the header


ODD_NUMBERS = (
    -1, 0, 1, 2, 3, 5, 7, 8, 24, 2**31, 2**32, 2**53, 2**63, 2**64, 10**30, 10**400, 1.0, 0.5,
    float("nan"), float("inf"), True, False, None, "3", [], [1], {},
)  # fmt: skip
ODD_NAMES = (
    "", ".", "..", "\0", "\ud800", "\n", "a" * 100_000, "__metadata__", "lora_A", "lora_A.weight",
    "é", "../../x", "base_model.model.", ".lora_A.weight", "base_model.model.lora_A.weight",
    "base_model.model..lora_A.weight", "x" + ".y" * 5000,
)  # fmt: skip


def change_header(mutant: Mutant) -> None:
    spot, other = mutant.random.random(), mutant.random.random()
    number, number2 = _some(mutant, ODD_NUMBERS), _some(mutant, ODD_NUMBERS)
    name = _some(mutant, ODD_NAMES)
    kinds = (*CODES.values(), "U16", "U32", "U64", "F4", "I4", "f32", "", None, 3, ["F32"], "C64")
    code = _some(mutant, kinds)
    how = _some(
        mutant,
        ("dtype", "shape", "axis", "more axes", "fewer axes", "flat", "swap shape", "start", "end",
         "offsets", "swap", "duplicate", "duplicate other", "rename", "drop", "no field", "field",
         "entry", "metadata", "metadata value", "empty tensor", "reorder", "zero"),
    )  # fmt: skip
    mutant.say("header", how, number, number2, name, code, spot, other)

    def change(pairs: list[Any], body: bytes) -> tuple[list[Any], bytes]:
        held = [i for i, (n, _) in enumerate(pairs) if n != "__metadata__"]
        if not held:
            return pairs, body
        index, second = held[int(spot * len(held))], held[int(other * len(held))]
        pairs = copy.deepcopy(pairs)
        key, entry = pairs[index]
        if not isinstance(entry, dict) or "shape" not in entry:
            return pairs, body
        shape = entry["shape"]
        match how:
            case "dtype":
                entry["dtype"] = code
            case "shape":
                entry["shape"] = number
            case "axis" if shape:
                shape[int(other * len(shape))] = number
            case "more axes":
                shape.insert(int(other * (len(shape) + 1)), number)
            case "fewer axes" if shape:
                del shape[int(other * len(shape))]
            case "flat":
                entry["shape"] = [int(np.prod(shape))]
            case "swap shape":
                shape.reverse()
            case "start":
                entry["data_offsets"] = [number, entry["data_offsets"][-1]]
            case "end":
                entry["data_offsets"] = [entry["data_offsets"][0], number]
            case "offsets":
                entry["data_offsets"] = number if spot < 0.5 else [number, number2]
            case "swap":
                pairs[index], pairs[second] = (key, pairs[second][1]), (pairs[second][0], entry)
            case "duplicate":
                pairs.append((key, {**entry, "shape": shape[::-1]}))
            case "duplicate other":
                pairs.append((pairs[second][0], entry))
            case "rename":
                pairs[index] = (name, entry)
            case "drop":
                del pairs[index]
            case "no field":
                del entry[list(entry)[int(other * 3)]]
            case "field":
                entry[name] = number
            case "entry":
                pairs[index] = (key, number)
            case "metadata":
                pairs.insert(0, ("__metadata__", number))
            case "metadata value":
                pairs.insert(0, ("__metadata__", {name: number}))
            case "empty tensor":
                pairs.append(
                    (name, {"dtype": "F32", "shape": [0], "data_offsets": 2 * [len(body)]})
                )
            case "reorder":
                pairs = pairs[::-1]
            case "zero" if shape:
                shape[int(other * len(shape))] = 0
        return pairs, body

    mutant.header.append(change)


# ---------------------------------------------------------------- damage to tensors and names


def _name(mutant: Mutant) -> str:
    return _some(mutant, mutant.tensors)


def rename_tensor(mutant: Mutant) -> None:
    old, other = _name(mutant), _name(mutant)
    swaps = (
        ("lora_A", "lora_B"), ("lora_B", "lora_A"), ("lora_A", "lora_embedding_A"),
        ("lora_embedding_A", "lora_A"), ("lora_A.weight", "lora_A"), ("lora_A", "lora_C"),
        ("lora_A.weight", "lora_A.default.weight"), ("lora_B.weight", "lora_B.other.weight"),
        ("lora_B.weight", "lora_B.bias"), (PREFIX, ""), (PREFIX, 2 * PREFIX),
        (PREFIX, "module."), (PREFIX, f"{PREFIX}_orig_mod."), ("model.layers", "layers"),
        ("layers.0", "layers.1"), ("layers.1", "layers.0"), ("layers.0", "layers.7"),
        ("layer.0", "layer.1"), ("q_proj", "k_proj"), ("q_proj", "o_proj"),
        ("up_proj", "gate_proj"),
        (".weight", ".bias"), (".weight", ""), (".lora_", "."), ("lora_", "lora_magnitude_vector."),
        (".lora_A", ".base_layer.lora_A"), (".lora_", ".modules_to_save.lora_"),
        (".lora_A", ".original_module.lora_A"), ("lora_A", "lora_velora_embed"),
        ("lora_a", "lora_b"), ("lora_down", "lora_up"), ("lora_te_", "lora_te2_"),
        ("lora_te_", "lora_unet_"), ("lora_te_", "text_encoder."), (".alpha", ".beta"),
        ("classifier", "score"), ("classifier", "classifier.modules_to_save"),
        ("classifier", "classifier.modules_to_save.default"), ("lora_A", "LORA_A"),
        ("self_attn", "self.attn"), ("token_adapter.", ""), ("lora_E", "lora_diag"),
        ("lora_diag", "lora_E"), ("lora_magnitude_vector", "m"), (".weight", ".weight.weight"),
    )  # fmt: skip
    pairs = [(a, b) for a, b in swaps if a in old]
    if pairs and mutant.random.random() < 0.8:
        one, another = _some(mutant, pairs)
        several = mutant.random.random() < 0.3
        names = [name for name in mutant.tensors if one in name] if several else [old]
    else:
        one, another = old, _some(mutant, (*ODD_NAMES[:3], *ODD_NAMES[5:], other))
        names = [old]
    mutant.say("rename", one, "to", another, "in", len(names), old)
    renamed = {n: n.replace(one, another, 1) if n in names else n for n in mutant.tensors}
    mutant.tensors = {renamed[n]: value for n, value in mutant.tensors.items()}


def drop_tensors(mutant: Mutant) -> None:
    name = _name(mutant)
    path = re.split(r"\.lora_|\.token_adapter|\.alpha|\.m$", name)[0]
    whole = mutant.random.random() < 0.5
    gone = [n for n in mutant.tensors if n == name or (whole and n.startswith(path + "."))]
    if mutant.random.random() < 0.05:
        gone = list(mutant.tensors)
    mutant.say("drop", len(gone), name)
    mutant.tensors = {n: v for n, v in mutant.tensors.items() if n not in gone}


def double_tensor(mutant: Mutant) -> None:
    """Store one again under another name for the same, with the same or with another value."""
    name = _name(mutant)
    spellings = {
        PREFIX + name, name.removeprefix(PREFIX), f"module.{name}", name + ".default",
        name.replace(".weight", ".default.weight"), name.replace(".weight", ".base_layer.weight"),
        name.replace("lora_A", "base_layer.lora_A"), name.replace("lora_", "original_module.lora_"),
        name.replace("classifier.", "classifier.modules_to_save."),
        name.replace("classifier.", "classifier.original_module."),
    } - {name}  # fmt: skip
    other = _some(mutant, sorted(spellings))
    value = mutant.tensors[name]
    same = mutant.random.random() < 0.4
    mutant.say("double", name, "as", other, "same" if same else "other")
    mutant.tensors[other] = value.clone() if same else -value


def swap_tensors(mutant: Mutant) -> None:
    one, other = _name(mutant), _name(mutant)
    mutant.say("swap", one, other)
    values = mutant.tensors
    values[one], values[other] = values[other], values[one]


def add_tensor(mutant: Mutant) -> None:
    """One of the base, whole, or a name that nobody knows."""
    dice = mutant.random
    stored = load_file(mutant.sound.base / "model.safetensors")
    name = _some(mutant, stored)
    value = stored[name] + 1.0
    if dice.random() < 0.2:
        name = _some(
            mutant, (*ODD_NAMES[:3], *ODD_NAMES[5:], "classifier.weight", "lm_head.weight")
        )
    if dice.random() < 0.2:
        value = value[:-1] if dice.random() < 0.5 else torch.cat([value, value[:1]])
    if dice.random() < 0.1:
        value = value.round().to(_some(mutant, (torch.int64, torch.bool, torch.uint8)))
    if dice.random() < 0.1:
        value = value.to(_some(mutant, (torch.float64, torch.bfloat16, torch.float16)))
    prefix = _some(mutant, (PREFIX, PREFIX, ""))
    mutant.say("add", prefix + name, tuple(value.shape), value.dtype)
    mutant.tensors[prefix + name] = value


def change_dtype(mutant: Mutant) -> None:
    kind = _some(mutant, (torch.bfloat16, torch.float16, torch.float64, *CODES))
    names = [_name(mutant)] if mutant.random.random() < 0.5 else list(mutant.tensors)
    mutant.say("dtype", kind, len(names), names[0])
    for name in names:
        mutant.tensors[name] = mutant.tensors[name].to(kind)


def change_values(mutant: Mutant) -> None:
    name = _name(mutant)
    value = mutant.tensors[name].clone()
    if not value.is_floating_point() or not value.numel():
        return
    new = _some(
        mutant,
        (float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e38, 3e38, 1e-45, 1e20, -1.0, 1e4),
    )
    whole = mutant.random.random() < 0.3
    if whole:
        value.fill_(new)
    else:
        value.view(-1)[mutant.random.randrange(value.numel())] = new
    mutant.say("value", new, "in all of" if whole else "in", name)
    mutant.tensors[name] = value


def change_shape(mutant: Mutant) -> None:
    name = _name(mutant)
    value = mutant.tensors[name]
    axis = mutant.random.randrange(value.ndim) if value.ndim else 0
    how = _some(
        mutant, ("transpose", "less", "more", "nothing", "flat", "one", "number", "axis", "halve")
    )
    mutant.say("shape", how, axis, tuple(value.shape), name)
    if not value.ndim and how != "axis":
        return
    match how:
        case "transpose":
            value = value.transpose(0, -1)
        case "less":
            value = value.narrow(axis, 0, max(value.shape[axis] - 1, 0))
        case "more":
            value = torch.cat([value, value.narrow(axis, 0, min(1, value.shape[axis]))], axis)
        case "nothing":
            value = value.narrow(axis, 0, 0)
        case "flat":
            value = value.reshape(-1)
        case "one":
            value = value.narrow(axis, 0, min(1, value.shape[axis]))
        case "number":
            value = value.reshape(-1)[0] if value.numel() else value
        case "axis":
            value = value.unsqueeze(_some(mutant, (0, -1)))
        case "halve" if value.shape[axis] % 2 == 0:
            value = value.reshape(*value.shape[:axis], 2, -1, *value.shape[axis + 1 :])
    mutant.tensors[name] = value.contiguous()


def change_rank(mutant: Mutant) -> None:
    """Give one pair, or all, another rank on both sides, with or without telling the config."""
    dice = mutant.random
    pairs = [
        (a, b)
        for a in mutant.tensors
        for one, other in (("lora_A", "lora_B"), ("lora_a", "lora_b"), ("lora_down", "lora_up"))
        if one in a and (b := a.replace(one, other)) in mutant.tensors
    ]
    if not pairs:
        return
    rank, told = dice.choice((0, 1, 2, 2)), dice.random() < 0.5
    if dice.random() < 0.6:
        pairs = [dice.choice(pairs)]
    for a, b in pairs:
        # mlx-lm stores both the other way round.
        first, second = (1, 0) if "lora_a" in a else (0, 1)
        down, up = mutant.tensors[a], mutant.tensors[b]
        if down.ndim > first and up.ndim > second:
            low = min(rank, down.shape[first], up.shape[second])
            mutant.tensors[a] = down.narrow(first, 0, low).contiguous()
            mutant.tensors[b] = up.narrow(second, 0, low).contiguous()
    if told and isinstance(mutant.config, dict):
        paths = [a.removeprefix(PREFIX).split(".lora_")[0] for a, _ in pairs]
        _dict(mutant.config, "rank_pattern").update(dict.fromkeys(paths, rank))
    mutant.say("rank", rank, len(pairs), "told" if told else "untold", pairs[0][0])


def no_rows(mutant: Mutant) -> None:
    """Trained tokens: none at all, or others, in tensor and config alike."""
    for name, value in mutant.tensors.items():
        if "trainable_tokens_delta" in name and value.ndim and isinstance(mutant.config, dict):
            rows = _some(mutant, ([], [0], [0, 0], [59, 60], [1, 2], [2**40, 3], [True, False]))
            some = value[: len(rows)] if mutant.random.random() < 0.8 else value
            mutant.tensors[name] = some.contiguous()
            known = mutant.config.get("trainable_token_indices")
            mutant.config["trainable_token_indices"] = (
                dict.fromkeys(known, rows) if isinstance(known, dict) else rows
            )
            mutant.say("rows", rows, tuple(some.shape))


def _dict(config: dict[str, Any], name: str) -> dict[str, Any]:
    if not isinstance(config.get(name), dict):
        config[name] = {}
    return config[name]


# ---------------------------------------------------------------- damage to the config


def _nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


ODD_VALUES = (
    None, True, False, 0, -1, 1, 2, 3, 4, 6, 7, 0.5, -0.5, 3.0, 2.5, 1e308, 1e-320, 1e20,
    float("nan"), float("inf"), 10**18, 10**400, -(10**400), "", "x", "3", "nan", "a" * 100_000,
    "\ud800", "\0", "../..", "/", "~", "é", "true", "lora", "LORA", "ADALORA", "CAUSAL_LM",
    "SEQ_CLS", "FEATURE_EXTRACTION", "TOKEN_CLS", "QUESTION_ANS", "SEQ_2_SEQ_LM", "pissa", "PiSSA",
    "olora", "gaussian", "corda", "all-linear", "all", "lora_only", "grouped_by_expert",
    [], [[]], [None], ["x"], [0], [1, 2], [True], [""], ["\ud800"], ["q_proj"], [[0, 1]],
    [[0, 2], [0, 2]], [[1, 0]], [[0, 10**9]], [[0, 10**400]], [[0, 2]] * 3, [0] * 10_000,
    ["x"] * 10_000, {}, {"x": 1}, {"": None}, {"x": {"y": []}}, {"q_proj": 1}, {"q_proj": 5},
    {".*": 3}, {"(": 1}, {"embed_tokens": [1, 2, 3]}, {"nblocks": 0}, {"nblocks": 10**9},
    "re:(", "re:.*", "(", "[", "*", "**", "?", "\\", ".*", "(?i)Q_PROJ", "(a+)+$",
)  # fmt: skip
FIELDS = (
    "peft_type", "task_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora",
    "use_dora", "lora_bias", "bias", "target_modules", "target_parameters", "modules_to_save",
    "fan_in_fan_out", "init_lora_weights", "lora_dropout", "layer_replication", "layers_pattern",
    "layers_to_transform", "exclude_modules", "trainable_token_indices", "use_bdlora",
    "kasa_config", "enable_lora", "merge_weights", "lora_B_layout", "ensure_weight_tying",
    "auto_mapping", "base_model_name_or_path", "revision", "peft_version", "inference_mode",
    "init_r", "target_r", "loftq_config", "eva_config", "corda_config", "megatron_config",
    "alora_invocation_tokens", "arrow_config", "use_qalora", "runtime_config", "quux", "", "\ud800",
)  # fmt: skip
EXPRESSIONS = (
    ".*", ".*q_proj", "q_proj", "q_pro.", "(?i)Q_PROJ", "(?:q|k)_proj", r"layers\.0\..*", "^model",
    r"\p{L}_proj", "(?:q_projx){e<=1}", "[a-z--k]_proj", "q_proj|k_proj", "(q)_proj|\\2", "",
    r"model.layers.0.self_attn.q_proj$", "a{1,1000}{1,1000}", "(?P<x>q)_proj", "(?<=\\.)q_proj",
    "(?a)q_proj", "q_proj(?#comment)", "(?x)q_proj # )", "q_proj\n",
    "(?|q|k)_proj", "(", "[[:alpha:]]_proj",
    "q_++proj", "(?>q)_proj", "\\Xq_proj", "[q&&q]_proj", "[qx||k]_proj", "\\w_proj", ".+_proj",
)  # fmt: skip


def change_config(mutant: Mutant) -> None:
    if not isinstance(mutant.config, dict):
        return change_metadata(mutant)
    config, dice = mutant.config, mutant.random
    if mutant.sound.format == "mlx":
        return change_mlx(mutant)
    name = _some(mutant, config) if dice.random() < 0.5 else _some(mutant, FIELDS)
    if dice.random() < 0.15:
        mutant.say("config without", name)
        config.pop(name, None)
    else:
        value = _some(mutant, ODD_VALUES)
        if isinstance(config.get(name), int | float) and dice.random() < 0.4:
            value = config[name] * _some(mutant, (2, 0.5, -1, 1.0, 1e30))
        if isinstance(config.get(name), dict | list) and config[name] and dice.random() < 0.4:
            value = copy.deepcopy(config[name])
            _change_inside(mutant, value)
        mutant.say("config", name, "=", value)
        config[name] = value
    mutant.reclassed |= name in ("task_type", "auto_mapping")
    return None


def _change_inside(mutant: Mutant, value: Any) -> None:
    odd = _some(mutant, ODD_VALUES)
    if isinstance(value, dict):
        key = _some(mutant, value)
        if isinstance(value[key], dict | list) and value[key] and mutant.random.random() < 0.5:
            return _change_inside(mutant, value[key])
        if mutant.random.random() < 0.3:
            del value[key]
        else:
            value[key] = odd
    else:
        index = mutant.random.randrange(len(value))
        if mutant.random.random() < 0.3:
            del value[index]
        elif mutant.random.random() < 0.3:
            value.append(odd)
        else:
            value[index] = odd
    return None


def change_patterns(mutant: Mutant) -> None:
    if not isinstance(mutant.config, dict) or mutant.sound.format == "mlx":
        return
    name = _some(mutant, ("rank_pattern", "alpha_pattern", "alpha_pattern", "target_modules"))
    words = [_some(mutant, EXPRESSIONS) for _ in range(mutant.random.choice((1, 1, 2, 3)))]
    if name == "target_modules":
        one = mutant.random.random() < 0.7
        mutant.config[name] = words[0] if one else words
    else:
        numbers = (1, 2, 3, 3, 4, 5, 7.5, 100, 1e9, 1e-9)
        pattern = _dict(mutant.config, name)
        pattern.update({word: _some(mutant, numbers) for word in words})
    mutant.say(name, mutant.config[name])


def change_text(mutant: Mutant) -> None:
    """The bytes of the config: another encoding, no JSON, no object, nesting without end."""
    if mutant.config is None:
        return flip_bits(mutant)
    part, bit = mutant.random.random(), mutant.random.randrange(8)
    changes = {
        "cut": lambda text: text[: int(part * len(text))],
        "empty": lambda text: b"",
        "list": lambda text: b"[" + text + b"]",
        "null": lambda text: b"null",
        "number": lambda text: b"1e999",
        "utf-16": lambda text: text.decode(errors="replace").encode("utf-16"),
        "bom": lambda text: b"\xef\xbb\xbf" + text,
        "latin": lambda text: text.replace(b'"r"', b'"\xe9"'),
        "zeros": lambda text: bytes(len(text)),
        "deep": lambda text: b'{"x":' * 100_000,
        "deep list": lambda text: text[:-1] + b', "y":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "long number": lambda text: text.replace(b"3", b"3" * 5000),
        "nan": lambda text: text.replace(b"null", b"NaN"),
        "inf": lambda text: text.replace(b": 6", b": Infinity"),
        "minus": lambda text: text.replace(b": 6", b": -Infinity"),
        "huge": lambda text: text.replace(b": 3", b": 1e999"),
        "twice": lambda text: text[:-1] + b', "lora_alpha": 12, "lora_alpha": 3}',
        "tail": lambda text: text + b"x",
        "comma": lambda text: text[:-1] + b",}",
        "single": lambda text: text.replace(b'"', b"'"),
        "pointer": lambda text: b"version https://git-lfs.github.com/spec/v1\noid x",
        "flip": lambda text: _flipped(text, part, bit),
        "flip again": lambda text: _flipped(text, part, bit),
    }
    how = _some(mutant, changes)
    mutant.say("text", how, part, bit)
    mutant.text.append(changes[how])
    mutant.reclassed = True  # a bit may have fallen in the task's name
    return None


def _flipped(text: bytes, part: float, bit: int) -> bytes:
    held = bytearray(text)
    if held:
        held[int(part * len(held))] ^= 1 << bit
    return bytes(held)


def change_mlx(mutant: Mutant) -> None:
    value = _some(mutant, ODD_VALUES)
    inner = mutant.config.get("lora_parameters")
    if isinstance(inner, dict) and mutant.random.random() < 0.7:
        name = _some(mutant, ("scale", "scale", "alpha", "rank", "dropout", "keys"))
        inner[name] = value
    else:
        name = _some(mutant, ("model", "fine_tune_type", "num_layers", "lora_parameters", "x"))
        mutant.config[name] = value
    mutant.say("mlx", name, "=", value)


def change_metadata(mutant: Mutant) -> None:
    """What a file of our own says of itself, or what others may say in theirs."""
    dice = mutant.random
    config = json.loads(mutant.sound.metadata.get("lora_export.config", "{}"))
    name = _some(mutant, ("config", "config", "config", "base", "labels", "training", "schema"))
    texts = ("", "{", "null", "[]", "{}", "1", "2", "NaN", '"x"', "[" * 100_000, "1" * 5000,
             '["a", "b"]', '["a"]', "[1]", '{"id": 5}', '{"id": "\\ud800"}', '{"x": 1}',
             '{"fingerprint": 5}', '{"fingerprint": {"sha256": 5, "tensors": "x", "dtype": []}}',
             '{"fingerprint": {"sha256": "0", "tensors": 1, "dtype": null}}',
             '{"architecture": "LlamaModel"}', '{"architecture": 5}', '{"architecture": "os"}',
             '{"architecture": "PreTrainedModel"}', '{"architecture": "AutoModel"}',
             '{"architecture": "\\u0000"}', '{"revision": []}')  # fmt: skip
    text: Any = _some(mutant, texts)
    if name == "config" and dice.random() < 0.8:
        config[_some(mutant, FIELDS)] = _some(mutant, ODD_VALUES)
        text = json.dumps(config)
    if dice.random() < 0.05:
        text = _some(mutant, ODD_NUMBERS)
    mutant.say("metadata", name, "=", text if len(str(text)) < 100 or name != "config" else "...",
               [v for v in config.items() if v not in _sound_config(mutant).items()])  # fmt: skip
    if dice.random() < 0.1:
        mutant.metadata.pop(f"lora_export.{name}", None)
    else:
        mutant.metadata[f"lora_export.{name}"] = text
    mutant.reclassed = True


def _sound_config(mutant: Mutant) -> dict[str, Any]:
    return json.loads(mutant.sound.metadata.get("lora_export.config", "{}"))


# ---------------------------------------------------------------- damage to pickles


class Calls:
    """Something to call where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.getenv, ("HOME",)


def change_pickle(mutant: Mutant) -> None:
    if mutant.sound.format not in ("pickle", "loralib-pt"):
        return change_header(mutant)
    name, dice = _name(mutant), mutant.random
    value = mutant.tensors[name]
    if not isinstance(value, torch.Tensor) or not value.numel() or value.layout != torch.strided:
        return None
    big = torch.arange(512.0)
    values: dict[str, Any] = {
        "number": lambda: 3, "none": lambda: None, "text": lambda: "x", "list": lambda: [1.0],
        "dict": lambda: {"a": value}, "bytes": lambda: b"x", "sparse": value.to_sparse,
        "csr": lambda: value.to_sparse_csr() if value.ndim == 2 else value,
        "complex": lambda: value.to(torch.complex64), "meta": lambda: value.to("meta"),
        "meta half": lambda: value.to(torch.bfloat16).to("meta"),
        "half": lambda: value.to(torch.bfloat16),
        "quantised": lambda: torch.quantize_per_tensor(value.float(), 0.1, 0, torch.qint8),
        "expanded": lambda: torch.ones(1).expand(value.shape),
        "expanded big": lambda: torch.ones(1).expand(2**40),
        "view": lambda: big[: value.numel()].view(value.shape) if value.numel() <= 512 else value,
        "strided": lambda: torch.as_strided(big, value.shape, [1] * value.ndim),
        "parameter": lambda: torch.nn.Parameter(value.float()),
        "turned": lambda: value.transpose(0, -1).contiguous().transpose(0, -1),
        "empty": lambda: torch.empty(0), "bool": lambda: value > 0,
        "float8": lambda: value.to(torch.float8_e4m3fn), "calls": Calls,
        "nested": lambda: torch.nested.nested_tensor([value, value]),
        "conjugate": lambda: value.to(torch.complex64).conj(),
        "negative": lambda: torch._neg_view(value), "array": value.numpy,
        "storage": value.clone().untyped_storage, "size": lambda: value.shape,
        "dtype": lambda: value.dtype,
        "u16": lambda: value.abs().to(torch.uint16),
    }  # fmt: skip
    how = _some(mutant, (*values, "key", "key", "wrap", "wrap twice", "wrong wrap", "old", "plain"))
    mutant.say("pickle", how, name)
    if how in values:
        target = name if dice.random() < 0.7 else PREFIX + "model.norm.weight"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some of these are new to torch itself
            mutant.tensors[target] = values[how]()
    elif how == "key":
        key = _some(mutant, (5, None, (1, 2), b"x", 1.5, True, "", "state_dict", "module"))
        mutant.tensors[key] = value
    elif how == "wrap":
        mutant.raw.append(lambda _, held=mutant.tensors: pickled({"state_dict": dict(held)}))
    elif how == "wrap twice":
        held = {"module": {"state_dict": mutant.tensors}, "epoch": 3}
        mutant.raw.append(lambda _: pickled(held))
    elif how == "wrong wrap":
        content = _some(mutant, (5, [mutant.tensors], {"state_dict": 5}, {"module": []}, value))
        mutant.raw.append(lambda _: pickled(content))
    else:
        mutant.raw.append(lambda _, old=how == "old": _older(mutant.tensors, old))
    return None


def _older(content: object, torches: bool) -> bytes:
    stream = io.BytesIO()
    if torches:
        torch.save(content, stream, _use_new_zipfile_serialization=False)
    else:
        pickle.dump(content, stream)
    return stream.getvalue()


def change_archive(mutant: Mutant) -> None:
    """The zip around a pickle: compressed, renamed, doubled or missing members."""
    if mutant.sound.format not in ("pickle", "loralib-pt"):
        return flip_bits(mutant)
    how = _some(mutant, ("deflate", "rename", "double", "drop", "other", "junk first", "grow"))
    spot = mutant.random.random()
    mutant.say("archive", how, spot)

    def change(data: bytes) -> bytes:
        if how == "junk first":
            return b"x" * 100 + data
        try:
            old = zipfile.ZipFile(io.BytesIO(data))
            held = {name: old.read(name) for name in old.namelist()}
        except Exception:  # damaged already
            return data
        stream, names = io.BytesIO(), list(held)
        if not names:
            return data
        chosen = names[int(spot * len(names))]
        packing = zipfile.ZIP_DEFLATED if how == "deflate" else zipfile.ZIP_STORED
        with zipfile.ZipFile(stream, "w", packing) as new, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name in names:
                content = held[name]
                if name == chosen and how == "drop":
                    continue
                if name == chosen and how == "grow":
                    content += b"\0" * 100
                new.writestr("x/y" if name == chosen and how == "rename" else name, content)
                if name == chosen and how == "double":
                    new.writestr(name, content[::-1])
            if how == "other":
                new.writestr("archive/code/x.py", "raise SystemExit")
        return stream.getvalue()

    mutant.raw.append(change)
    return None


# ---------------------------------------------------------------- damage to the base


def _files_of(mutant: Mutant) -> dict[str, bytes]:
    if mutant.base is None:
        names = ("config.json", "model.safetensors")
        mutant.base = {name: (mutant.sound.base / name).read_bytes() for name in names}
    mutant.reclassed = True
    return mutant.base


def change_base_config(mutant: Mutant) -> None:
    files = _files_of(mutant)
    try:
        config = json.loads(files["config.json"])
    except ValueError:
        return
    if not isinstance(config, dict):
        return
    more = ("model_type", "architectures", "tie_word_embeddings", "vocab_size", "id2label",
            "num_labels", "quantization_config", "text_config", "torch_dtype", "auto_map",
            "num_hidden_layers", "hidden_size", "num_attention_heads", "rope_scaling",
            "pad_token_id", "label2id", "hidden_act", "layer_types")  # fmt: skip
    name = _some(mutant, (*config, *more, *more))
    if mutant.random.random() < 0.15:
        config.pop(name, None)
        mutant.say("base config without", name)
    else:
        odd = [v for v in ODD_VALUES if v not in (10**18, 10**9)]
        extra = (16, 24, 40, 61, 59, "gpt2", "llama", "bert", ["LlamaModel"], ["os"], ["AutoModel"],
                 ["GPT2LMHeadModel"], ["LlamaForSequenceClassification"], [5], "LlamaForCausalLM",
                 {"quant_method": "gptq"}, {"x": "y"}, {"0": "a", "1": "b", "2": "c"})  # fmt: skip
        config[name] = _some(mutant, (*odd, *extra))
        mutant.say("base config", name, "=", config[name])
    files["config.json"] = json.dumps(config).encode()


def change_base_bytes(mutant: Mutant) -> None:
    files = _files_of(mutant)
    name = _some(mutant, files)
    part, bit = mutant.random.random(), mutant.random.randrange(8)
    how = _some(mutant, ("flip", "flip", "cut", "empty", "gone", "header"))
    mutant.say("base file", name, how, part, bit)
    data = files[name]
    if how == "gone":
        del files[name]
    elif how == "header":
        start = int(part * min(len(data), 3000))
        files[name] = (
            data[:start] + _flipped(data[start : start + 50], part, bit) + data[start + 50 :]
        )
    else:
        changed = {"flip": _flipped(data, part, bit), "cut": data[: int(part * len(data))]}
        files[name] = changed.get(how, b"")


def change_base_tensors(mutant: Mutant) -> None:
    files = _files_of(mutant)
    if "model.safetensors" not in files:
        return
    try:
        tensors = load(files["model.safetensors"])
    except Exception:
        return
    if not tensors:
        return
    name, other = _some(mutant, tensors), _some(mutant, tensors)
    value = tensors[name]
    how = _some(
        mutant, ("drop", "rename", "dtype", "all", "nan", "transpose", "less", "more", "add", "int")
    )
    mutant.say("base tensors", how, name, other)
    match how:
        case "drop":
            del tensors[name]
        case "rename":
            tensors[_some(mutant, (*ODD_NAMES[:3], *ODD_NAMES[5:], name + "x", "x." + name))] = (
                value
            )
            del tensors[name]
        case "dtype" | "int":
            kinds = (torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.float8_e4m3fn)
            tensors[name] = value.to(_some(mutant, kinds))
        case "all":
            kind = _some(mutant, (torch.bfloat16, torch.float16, torch.float64, torch.int8))
            tensors = {n: v.to(kind) for n, v in tensors.items()}
        case "nan" if value.numel():
            value = value.clone()
            odd = _some(mutant, (float("nan"), float("inf"), 0.0, 1e38))
            value.view(-1)[0] = odd
            tensors[name] = value
        case "transpose":
            tensors[name] = value.transpose(0, -1).contiguous()
        case "less":
            tensors[name] = value[:-1].contiguous()
        case "more":
            tensors[name] = torch.cat([value, value[:1]])
        case "add":
            tensors[_some(mutant, ("x", "x.weight", "model.x.lora_A.weight", "lm_head.weight"))] = (
                value
            )
    files["model.safetensors"] = save(
        {n: v.contiguous().clone() for n, v in tensors.items()}, {"format": "pt"}
    )


def split_base(mutant: Mutant) -> None:
    """Two shards and an index, in which something may be wrong."""
    files = _files_of(mutant)
    if "model.safetensors" not in files:
        return
    try:
        tensors = load(files.pop("model.safetensors"))
    except Exception:
        return
    shards = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    index: Any = {name: shards[place % 2] for place, name in enumerate(sorted(tensors))}
    for shard in shards:
        held = {n: tensors[n].clone() for n, s in index.items() if s == shard}
        files[shard] = save(held, {"format": "pt"})
    whole: Any = {"metadata": {"total_size": 5}, "weight_map": index}
    how = _some(
        mutant,
        ("right", "right", "other shard", "odd shard", "gone", "more", "no map", "odd map", "text",
         "doubled", "shard gone", "metadata"),
    )  # fmt: skip
    name = _some(mutant, index) if index else ""
    odd = _some(
        mutant,
        ("", "..", ".", "/", "\0", "\ud800", "x" * 300, "../x", 5, None, [], {}, True, "a/b", "~",
         "config.json", "model.safetensors", 10**400),
    )  # fmt: skip
    mutant.say("index", how, name, repr(odd))
    match how:
        case "other shard":
            index[name] = shards[0] if index[name] == shards[1] else shards[1]
        case "odd shard":
            index[name] = odd
        case "gone":
            del index[name]
        case "more":
            index["x.weight"] = shards[0]
        case "no map":
            del whole["weight_map"]
        case "odd map":
            whole["weight_map"] = _some(mutant, ODD_VALUES)
        case "text":
            whole = _some(mutant, ODD_VALUES)
        case "doubled":
            files[shards[1]] = files[shards[0]]
        case "shard gone":
            del files[shards[0]]
        case "metadata":
            whole["metadata"] = odd
    files[INDEX] = json.dumps(whole).encode()


# ---------------------------------------------------------------- putting mutants together


GENTLE = (
    rename_tensor, rename_tensor, drop_tensors, double_tensor, swap_tensors, add_tensor,
    change_dtype, change_values, change_shape, change_rank, no_rows, change_config, change_config,
    change_config, change_patterns, change_base_config, change_base_tensors, split_base,
    change_pickle,
)  # fmt: skip
ROUGH = (flip_bits, cut_bytes, write_over, change_header, change_header, change_text,
         change_archive, change_base_bytes)  # fmt: skip
FOR_KIND = {
    "native": (change_metadata, change_metadata), "mlx": (change_mlx,),
    "pickle": (change_pickle, change_pickle, change_archive),
    "loralib-pt": (change_pickle, change_pickle, change_archive),
}  # fmt: skip


def mutant(seed: int, corpus: list[Sound]) -> Mutant:
    """Return the mutant of this seed; the same seed makes the same one."""
    dice = random.Random(seed)
    made = untouched(corpus[seed % len(corpus)], dice)
    pool = (*GENTLE, *ROUGH, *FOR_KIND.get(made.sound.format, ()) * 3)
    chosen = [dice.choice(pool) for _ in range(dice.choice((1, 1, 1, 2, 2, 3)))]
    # What needs whole tensors comes before what breaks bytes.
    for change in sorted(
        chosen, key=lambda c: (c in (change_pickle, *ROUGH), c in (change_base_bytes, split_base))
    ):
        if made.tensors or change in ROUGH:
            change(made)
    return made


# ---------------------------------------------------------------- the oracle


class Unread(Exception):
    """The reference, or a third party, cannot make sense of what was merged."""


def third_party(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors as the libraries of the format's owners read them."""
    if path.suffix in (".bin", ".pt"):
        content = torch.load(path, weights_only=True, mmap=True)
        while any(key in content for key in ("state_dict", "model_state_dict", "module")):
            content = next(
                content[k] for k in ("state_dict", "model_state_dict", "module") if k in content
            )
        return {str(name): value for name, value in content.items()}
    return load_file(path)


_MARK = re.compile(
    r"(?P<path>.+?)\.(?P<part>lora_embedding_[AB]|lora_[ABE]|lora_diag|lora_magnitude_vector"
    r"|token_adapter\.trainable_tokens_delta)(?P<rest>(\.[^.]+)*)"
)
_SILENT = ("lora_velora_embed", "lora_monteclora_sampler", ".ranknum", ".original_module.",
           ".token_adapter.base_layer", ".token_adapter.trainable_tokens_original")  # fmt: skip


def spelled(key: str) -> str | None:
    """Return PEFT's own spelling of a tensor's name, or None of what it does not need."""
    name = key
    while found := re.match(
        r"base_model\.model\.|module\.|_orig_mod\.|_fsdp_wrapped_module\.", name
    ):
        name = name[found.end() :]
    name = name.replace("._orig_mod.", ".")
    if any(part in name for part in _SILENT):
        return None
    if found := _MARK.fullmatch(name):
        part, rest = found["part"], found["rest"].split(".")[1:]
        end = f".{rest[-1]}" if rest[-1:] in (["weight"], ["bias"]) else ""
        end = ".bias" if end == ".bias" and part == "lora_B" else ""
        plain = ".weight" if part in ("lora_A", "lora_B") else ""
        return f"{PREFIX}{found['path']}.{part}{end or plain}"
    return PREFIX + re.sub(r"\.modules_to_save(\.[^.]+)?(?=\.[^.]+$)", "", name).replace(
        ".base_layer.", "."
    )


def as_peft(
    made: Mutant, adapter: Path, stored: dict[str, torch.Tensor]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the adapter's tensors and config as PEFT would have written them."""
    kind = made.sound.format
    weights = adapter / FILES[kind] if adapter.is_dir() else adapter
    tensors = third_party(weights)
    config: dict[str, Any] = {"peft_type": "LORA", "lora_alpha": made.sound.options.get("alpha")}
    if kind in ("peft", "pickle", "mlx"):
        config = json.loads((adapter / CONFIG).read_bytes())
    if kind == "native":
        with safe_open(weights, "pt") as file:
            config = json.loads(file.metadata()["lora_export.config"])
    values = {name: value.detach().to_dense().double().numpy() for name, value in tensors.items()}
    factors: dict[str, float] = {}
    if kind == "mlx":
        values, config = _of_mlx(values, config)
    if kind == "kohya":
        values, factors = _of_kohya(values, stored)
    found: dict[str, np.ndarray] = {}
    for name, value in values.items():
        if (new := spelled(name)) is None:
            continue
        new = _at_home(new, stored)
        if new in found and not np.array_equal(found[new], value):
            raise Unread(f"{new} twice, with different values")
        # PEFT stores these with axes of one in some versions, and without in others.
        shape = {"lora_E": (-1, 1), "lora_diag": (-1,)}.get(new.rpartition(".")[2], value.shape)
        found[new] = value.reshape(shape) if value.size == max(value.shape, default=0) else value
    return _stated(found, config, factors, stored)


def _at_home(name: str, stored: dict[str, torch.Tensor]) -> str:
    """Return `name` with the model's prefix, where the base has it only so."""
    bare = name.removeprefix(PREFIX)
    path = re.split(r"\.(lora_|token_adapter)", bare)[0]
    known = {
        part for n in stored for part in (n, n.rpartition(".")[0], n.rpartition(".")[0] + ".weight")
    }
    if path in known or bare in known:
        return name
    for prefix, _, rest in sorted(n.partition(".") for n in stored):
        if path.partition(".")[0] == rest.partition(".")[0] != prefix:
            return f"{PREFIX}{prefix}.{bare}"
    return name


def _of_mlx(
    values: dict[str, np.ndarray], config: dict[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    ends = {
        ".lora_a": ".lora_A.weight",
        ".lora_b": ".lora_B.weight",
        ".m": ".lora_magnitude_vector",
    }
    found = {}
    for name, value in values.items():
        end = next((end for end in ends if name.endswith(end)), None)
        found[name if end is None else name.removesuffix(end) + ends[end]] = (
            value if end is None else value.T
        )
    scale = config.get("lora_parameters", config)["scale"]
    dora = any(name.endswith(".m") for name in values)
    return found, {"peft_type": "LORA", "scale": scale, "use_dora": dora}


def _of_kohya(
    values: dict[str, np.ndarray], stored: dict[str, torch.Tensor]
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    paths = {n.removesuffix(".weight").replace(".", "_"): n.removesuffix(".weight") for n in stored}
    found, factors = {}, {}
    for name, value in values.items():
        path, _, end = name.partition(".")
        if path == "text_encoder":  # diffusers' own names, with dots
            path, _, end = end.partition(".")
        path = re.sub(r"^(lora_te\d?|lora|lycoris)_", "", path)
        if end not in ("alpha", "lora_down.weight", "lora_up.weight"):
            raise Unread(f"{name} is no name of kohya's")
        home = paths.get(path, path)
        if end == "alpha":
            factors[home] = float(value.reshape(-1)[0])
        else:
            part = "lora_A" if "down" in end else "lora_B"
            found[f"{PREFIX}{home}.{part}.weight"] = value
    return found, factors


def _stated(
    found: dict[str, np.ndarray],
    config: dict[str, Any],
    factors: dict[str, float],
    stored: dict[str, torch.Tensor],
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Write out the defaults of PEFT's config, the tensors' own ranks, and odd layouts."""
    plain = {
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "init_lora_weights": True,
    }
    config = {**plain, **{k: v for k, v in config.items() if v is not None}}
    config |= {name: config[name] or {} for name in ("rank_pattern", "alpha_pattern")}
    init = config["init_lora_weights"]
    known = isinstance(init, str) and init.lower() in ("pissa", "olora")
    config["init_lora_weights"] = init.lower() if known else True
    config.setdefault("lora_alpha", None)
    config.setdefault("peft_type", "LORA")
    ranks, experts = {}, config.get("target_parameters")
    for name in list(found):
        path = name.removeprefix(PREFIX).split(".lora_")[0]
        if name.endswith(".lora_A.weight"):
            bare = path.replace(".base_layer", "")
            if f"{bare}.weight" in stored and found[name].ndim == 2:
                other = name.replace("lora_A", "lora_B")
                weight = stored[f"{bare}.weight"]
                if _is_embedding(bare, found[name], found[other], weight):
                    found[f"{PREFIX}{path}.lora_embedding_A"] = found.pop(name)
                    found[f"{PREFIX}{path}.lora_embedding_B"] = found.pop(other)
                    ranks[path] = len(found[f"{PREFIX}{path}.lora_embedding_A"])
                    continue
            elif experts:
                parameter = peft_made._parameter(path, experts)
                ranks[parameter] = peft_made._pattern(
                    config["rank_pattern"], parameter, config["r"]
                )
                if config.get("lora_B_layout") == "grouped_by_expert":
                    other = name.replace("lora_A", "lora_B")
                    rank = int(ranks[parameter])
                    wide = found[other].reshape(len(found[other]), -1, rank).transpose(0, 2, 1)
                    found[other] = wide.reshape(len(found[other]), -1)
                continue
            ranks[path] = len(found[name])
        elif name.endswith("lora_embedding_A"):
            ranks[path] = len(found[name])
    config["rank_pattern"] = {re.escape(path): rank for path, rank in ranks.items()}
    if "scale" in config:
        factors = {path: config["scale"] * rank for path, rank in ranks.items()}
        config["lora_alpha"] = 1.0
    elif config["lora_alpha"] is None:
        factors = {path: factors.get(path, float(rank)) for path, rank in ranks.items()}
    if factors:
        config["alpha_pattern"] = {re.escape(path): alpha for path, alpha in factors.items()}
    config.setdefault("r", 1)
    for name in [n for n in found if n.endswith("lora_A.weight")]:
        if config["peft_type"] == "ADALORA" and not found[name].size:
            for part in ("lora_A.weight", "lora_B.weight", "lora_E"):
                found.pop(name.replace("lora_A.weight", part), None)
    return found, config


def _is_embedding(path: str, a: np.ndarray, b: np.ndarray, weight: torch.Tensor) -> bool:
    wanted = tuple(weight.shape)
    embeds = re.search(r"embed|wte|wpe", path) is not None
    return embeds and (a.shape[1], b.shape[0]) == wanted


def oracle(
    made: Mutant, adapter: Path, base: Path, folder: Path
) -> tuple[dict[str, np.ndarray], dict[str, torch.Tensor], dict[str, np.ndarray] | float]:
    """Return what changes, the base as it is, and how large the terms of each sum are."""
    plain, wide = folder / "plain", folder / "wide"
    try:
        stored = base_tensors(base)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tensors, config = as_peft(made, adapter, stored)
        lists = [plain / "base", plain / "adapter", wide / "base", wide / "adapter"]
        for place in lists:
            place.mkdir(parents=True)
        # What a residual is rounded to on the way, the reference reads off the base.
        kept = len(_dtypes(stored)) == 1 and _is_residual(config)
        for place, shape in ((plain, lambda x: x), (wide, np.abs)):
            shutil.copy(made.sound.base / "config.json", place / "base" / "config.json")
            floats = {n: torch.from_numpy(shape(v.double().numpy())) for n, v in stored.items()}
            held = {n: v.to(stored[n].dtype) if kept else v for n, v in floats.items()}
            save_file(held, place / "base" / "model.safetensors")
            held = {n: torch.from_numpy(shape(v).copy()) for n, v in tensors.items()}
            save_file(held, place / "adapter" / WEIGHTS)
            (place / "adapter" / CONFIG).write_text(json.dumps(config))
        more = mock.patch.dict(peft_made.FORMATS, {"float64": FORMATS[torch.float64]})
        with np.errstate(all="ignore"), warnings.catch_warnings(), more:
            warnings.simplefilter("ignore")  # `re` has doubts about some expressions
            changed = peft_made.reference(plain / "base", plain / "adapter")
            size: dict[str, np.ndarray] | float = 1.0
            if not (config.get("use_dora") or _is_residual(config)):
                absolute = {**config, "lora_alpha": abs(config["lora_alpha"] or 0)}
                absolute["alpha_pattern"] = {k: abs(v) for k, v in config["alpha_pattern"].items()}
                (wide / "adapter" / CONFIG).write_text(json.dumps(absolute))
                size = peft_made.reference(wide / "base", wide / "adapter")
            elif _is_residual(config):
                # One rounding on the way is enough for two decompositions to part.
                size = (1e9 if kept and torch.float32 in _dtypes(stored) else 1e12) * _largest(
                    tensors, config
                )
            else:
                size = _largest(tensors, config)
        stored = peft_made.replicated(stored, config.get("layer_replication"))
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise Unread(f"{type(error).__name__}: {error} ({place.name}:{place.lineno})") from error
    return changed, stored, size


def _dtypes(tensors: dict[str, torch.Tensor]) -> set[torch.dtype]:
    return {value.dtype for value in tensors.values()}


def _is_residual(config: dict[str, Any]) -> bool:
    return bool(config.get("kasa_config")) or config["init_lora_weights"] is not True


def _largest(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> float:
    """Return a bound of what is added up where signs may cancel."""
    alphas = [config["lora_alpha"] or 1, *config["alpha_pattern"].values()]
    parts = [float(np.abs(v).max(initial=0)) for n, v in tensors.items() if "lora_" in n]
    top = sorted(parts)[-2:]
    return 10 * (1 + max(abs(float(a)) for a in alphas)) * (1 + float(np.prod(top)))


def base_tensors(base: Path) -> dict[str, torch.Tensor]:
    if (base / "model.safetensors").is_file():
        return load_file(base / "model.safetensors")
    index = json.loads((base / INDEX).read_bytes())["weight_map"]
    return {
        n: v for shard in sorted(set(index.values())) for n, v in load_file(base / shard).items()
    }


FORMATS = {
    torch.float64: (53, -1022), torch.float32: (24, -126), torch.bfloat16: (8, -126),
    torch.float16: (11, -14),
}  # fmt: skip


def differs(made: Mutant, adapter: Path, base: Path, out: Path, folder: Path) -> str:
    """Return how the merged model in `out` differs from the oracle; nothing where it does not."""
    changed, stored, sizes = oracle(made, adapter, base, folder)
    found = {n: v for file in out.glob("*.safetensors") for n, v in load_file(file).items()}
    record = json.loads((out / "lora_export.json").read_text())
    json.loads((out / "config.json").read_text())
    used = set()
    for name in stored.keys() | changed.keys():
        heads = sorted({n.partition(".")[0] for n in found})
        spellings = (name, *(f"{head}.{name}" for head in heads), name.partition(".")[2])
        home = next((n for n in spellings if n in found), None)
        if home is None:
            if made.reclassed and name in record["dropped"] and name not in changed:
                continue
            return f"{name} is missing"
        used.add(home)
        value = found[home]
        if name not in changed:
            if value.dtype != stored[name].dtype or _bits(value) != _bits(stored[name]):
                return f"{name} was changed"
            continue
        wanted = np.nan_to_num(changed[name], nan=0.0)  # a row without a direction stays zero
        if tuple(value.shape) != wanted.shape:
            return f"{name} has shape {tuple(value.shape)}, not {wanted.shape}"
        if name in stored and value.dtype != stored[name].dtype:
            return f"{name} has dtype {value.dtype}, the base {stored[name].dtype}"
        size = sizes if isinstance(sizes, float) else np.abs(sizes.get(name, 1.0))
        limit = 1e-14 * size
        if value.dtype in FORMATS:
            bits, least = FORMATS[value.dtype]
            _, powers = np.frexp(wanted)
            limit = limit + np.ldexp(0.5, np.maximum(powers - 1, least) - bits + 1)
        if not np.all(np.abs(value.double().numpy() - wanted) <= limit):
            worst = float(np.nanmax(np.abs(value.double().numpy() - wanted)))
            return f"{name} is not what the reference says, by {worst:g}"
    if strange := found.keys() - used:
        return f"{sorted(strange)[:3]} come from nowhere"
    return ""


def _bits(value: torch.Tensor) -> bytes:
    return value.contiguous().flatten().view(torch.uint8).numpy().tobytes()


# ---------------------------------------------------------------- the judgement


class TooSlow(BaseException):
    """The time for one mutant is over; no `except Exception` swallows this."""


def _ring(*_: object) -> None:
    raise TooSlow


def contents(folder: Path) -> dict[str, int]:
    return {
        str(f.relative_to(folder)): f.stat().st_size if f.is_file() else -1
        for f in folder.rglob("*")
    }


def attempt(
    adapter: Path, base: Path, out: Path, seconds: int = LIMIT, **options: Any
) -> BaseException | Any:
    """Merge; return the certificate, or what was raised instead."""
    before = signal.signal(signal.SIGALRM, _ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        return merged_files.merge_files(adapter, base=str(base), out=out, **options)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # of any kind: that is the question
        return error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def judged(made: Mutant, folder: Path) -> str:
    """Return "merged" or "refused" where the mutant ended as it should, else what is wrong."""
    folder.mkdir(parents=True)
    adapter, base = place(made, folder / "in")
    before, peak = contents(folder), _peak()
    result = attempt(adapter, base, folder / "out", **made.sound.options)
    if _peak() - peak > ROOM:
        return f"memory: {(_peak() - peak) >> 20} MiB more"
    if isinstance(result, LoraExportError):
        left = contents(folder).keys() ^ before.keys()
        if left or contents(folder) != before:
            return f"leaves {sorted(left)} after a refusal"
        return "refused" if str(result).strip() else "refused without a word"
    if isinstance(result, BaseException):
        return told(result)
    beside = {name for name in contents(folder) if not name.startswith("out")} ^ before.keys()
    if beside:
        return f"leaves {sorted(beside)} beside the output"
    if not result.ok:
        return f"verdict: {[(v.check, v.subject) for v in result.verdicts if not v.passed]}"
    try:
        return differs(made, adapter, base, folder / "out", folder / "oracle") or "merged"
    except Unread as error:
        return f"merged what the reference cannot read: {error}"


def told(error: BaseException) -> str:
    """Return an exception as one line, with the place in the package that it came through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [
        f
        for f in frames
        if "lora_export" in f.filename.split("/")[-2:][0] or "formats" in f.filename
    ]
    at = own[-1] if own else frames[-1]
    text = str(error).strip().splitlines()[:1]
    return f"{type(error).__name__} at {Path(at.filename).name}:{at.name}: {''.join(text)[:150]}"


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def faults_of(seeds: Any, corpus: list[Sound], folder: Path) -> list[str]:
    """Return one line for each seed that did not end as it should."""
    faults, merged = [], 0
    for seed in seeds:
        made = mutant(seed, corpus)
        place = folder / str(seed)
        fault = judged(made, place)
        merged += fault == "merged"
        if fault in ("merged", "refused"):
            shutil.rmtree(place)
        else:
            faults.append(f"seed {seed} ({made.sound.name}; {'; '.join(made.done)}): {fault}")
    assert faults or merged, "none of the mutants merged: they prove too little"
    return faults


@pytest.fixture(autouse=True)
def one_thread():
    """Small matrices go faster so, and other tests may run beside these."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_damaged_adapter_merges_right_or_is_refused_cleanly(corpus, tmp_path):
    chosen = os.environ.get("FUZZ_SEEDS")
    seeds = [int(seed) for seed in chosen.split(",")] if chosen else range(QUICK)
    faults = faults_of(seeds, corpus, tmp_path)
    assert not faults, "\n".join(faults)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(0, WHOLE, CHUNK))
def test_every_one_of_ten_thousand_merges_right_or_is_refused_cleanly(corpus, tmp_path, start):
    faults = faults_of(range(start, start + CHUNK), corpus, tmp_path)
    assert not faults, "\n".join(faults)


# ---------------------------------------------------------------- bombs


def plain_of(corpus: list[Sound], architecture: str, variant: str, format: str) -> Mutant:
    index = KINDS.index((architecture, variant, format))
    return untouched(corpus[index], random.Random(0))


def entry(dtype: str, shape: list[Any], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def raw_header(header: bytes, body: bytes = b"") -> Any:
    return lambda _: len(header).to_bytes(8, "little") + header + body


A = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight"
HEADERS = {
    "a petabyte is claimed": json.dumps({A: entry("F32", [2**40, 24], 0, 24 * 2**42)}).encode(),
    "a petabyte in no bytes": json.dumps({A: entry("F32", [2**40, 24], 0, 0)}).encode(),
    "nothing, but wide": json.dumps({A: entry("F32", [2**62, 2**62, 0], 0, 0)}).encode(),
    "nothing, and negative": json.dumps({A: entry("F32", [-(2**62), 0], 0, 0)}).encode(),
    "too many axes": json.dumps({A: entry("F32", [1] * 100 + [0], 0, 0)}).encode(),
    "a million axes": json.dumps({A: entry("F32", [1] * 1_000_000 + [0], 0, 0)}).encode(),
    "deep": b'{"x":' * 1_000_000,
    "deep lists": b'{"x":' + b"[" * 1_000_000,
    "a long number": b'{"x":' + b"9" * 1_000_000 + b"}",
    "a long name": json.dumps({"x" * 5_000_000: entry("F32", [0], 0, 0)}).encode(),
    "a dotted name": json.dumps({"x." * 100_000: entry("F32", [0], 0, 0)}).encode(),
    "wrapped for ever": json.dumps({PREFIX * 50_000: entry("F32", [0], 0, 0)}).encode(),
    "layers without end": json.dumps(
        {A.replace("lora_A", "base_layer." * 50_000 + "lora_A"): entry("F32", [0], 0, 0)}
    ).encode(),
    "much metadata": json.dumps({"__metadata__": {"x": "y" * 5_000_000}}).encode(),
    "many tensors": json.dumps(
        {f"{PREFIX}model.layers.{i}.x.weight": entry("F32", [0], 0, 0) for i in range(20_000)}
    ).encode(),
    "many pairs": json.dumps(
        {
            f"{PREFIX}model.layers.{i}.q_proj.lora_{side}.weight": entry("F32", shape, 0, 0)
            for i in range(5_000)
            for side, shape in (("A", [3, 0]), ("B", [0, 3]))
        }
    ).encode(),
}


def bounded(made: Mutant, folder: Path, room: int = 64 << 20) -> None:
    """Assert that the mutant is refused, soon, and in little memory."""
    adapter, base = place(made, folder)
    size = sum(count for count in contents(folder).values() if count > 0)
    before, peak = contents(folder), _peak()
    tracemalloc.start()
    try:
        result = attempt(adapter, base, folder / "out", TRACED * LIMIT, **made.sound.options)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert isinstance(result, LoraExportError), told(result) if result else result
    assert contents(folder) == before
    assert len(str(result)) < 1_000_000
    assert most < 2 * size + room, f"{most >> 20} MiB for {size >> 20} MiB"
    assert _peak() - peak < 2 * size + ROOM


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_a_header_that_claims_the_world_is_refused_in_little_time_and_memory(
    corpus, tmp_path, header
):
    made = plain_of(corpus, "llama", "plain", "peft")
    made.raw.append(raw_header(header))
    bounded(made, tmp_path)


def test_many_well_formed_pairs_for_modules_that_do_not_exist_are_refused_soon(corpus, tmp_path):
    """An adapter of a large model beside a small base: many names that fit nowhere."""
    made = plain_of(corpus, "llama", "plain", "peft")
    made.tensors = {
        f"{PREFIX}model.layers.{layer}.self_attn.{name}.lora_{side}.weight": value
        for layer in range(150)
        for name in ("a_proj", "b_proj", "c_proj")
        for side, value in (("A", torch.ones(3, 2)), ("B", torch.ones(2, 3)))
    }
    made.config["target_modules"] = ["a_proj", "b_proj", "c_proj"]
    bounded(made, tmp_path)


def _itself() -> bytes:
    # A dictionary whose "state_dict" is the dictionary: pickle can say that, torch.save as well.
    content: dict[str, Any] = {"x": torch.ones(1)}
    content["state_dict"] = content
    return pickled(content)


def _doubling(depth: int) -> Any:
    value: Any = ("x",)
    for _ in range(depth):
        value = (value, value)
    return value


def _turned_often() -> bytes:
    wide = torch.ones(512, 1024)
    return pickled({f"{PREFIX}x{i}.weight": wide.T for i in range(200)})


def _overlapping() -> bytes:
    flat = torch.ones(300_000)
    views = {f"x{i}": torch.as_strided(flat, (500, 500), (1, 500), i) for i in range(200)}
    return pickled(views)


def _deflated() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
        archive.writestr("archive/data/0", bytes(300 << 20))
    return stream.getvalue()


def _laughing() -> bytes:
    """A list of lists of lists, each twice the same."""
    value: Any = []
    for _ in range(60):
        value = [value, value]
    return pickled({"x": value})


BOMBS = {
    "itself": _itself,
    "a key of doubling tuples": lambda: pickled({_doubling(21): torch.ones(1)}),
    "one storage, turned often": _turned_often,
    "one storage, overlapping": _overlapping,
    "one number, spread out": lambda: pickled({A: torch.ones(1).expand(2**20, 2**20)}),
    "deflated": _deflated,
    "doubling lists": _laughing,
    "a long key": lambda: pickled({"x" * 5_000_000: torch.ones(1)}),
    "many numbers": lambda: pickled({f"x{i}": i for i in range(20_000)}),
    "deep": lambda: pickled({"x": _nested(300)}),
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_a_pickle_that_unfolds_is_refused_in_little_time_and_memory(corpus, tmp_path, bomb):
    made = plain_of(corpus, "llama", "plain", "pickle")
    made.raw.append(lambda _: bomb())
    bounded(made, tmp_path)


SLOW = r"(?:\w|[a-z_.]|.)+(?<!j)"  # on a path that ends in j, and has no other reason to fail
CONFIGS: dict[str, dict[str, Any]] = {
    "targets that backtrack": {"target_modules": SLOW},
    "ranks that backtrack": {"rank_pattern": {SLOW: 3}},
    "alphas that backtrack": {"alpha_pattern": {SLOW: 3}},
    "alphas that backtrack a little, often": {
        "alpha_pattern": {f"(.*.*.*.*.*.*)y{i}": 3 for i in range(300)}
    },
    "an expression that counts": {"alpha_pattern": {"(((a{1,100}){1,100}){1,100}){1,100}": 3}},
    "many expressions": {"alpha_pattern": {f".*x{i}": 3 for i in range(100_000)}},
    "a saved module that looks like an expression": {"modules_to_save": [f"re:{SLOW}"]},
    "a target that looks like an expression": {"target_modules": [f"re:{SLOW}"]},
    "a saved module of stars": {"modules_to_save": ["*a" * 200 + "b"]},
    "a saved module that no expression is": {"modules_to_save": ["re:("]},
    "many layers": {"layer_replication": [[0, 2]] * 200_000},
    "layers without end": {"layer_replication": [[0, 10**12]]},
    "an endless rank": {"r": 10**400},
    "an endless alpha": {"lora_alpha": 10**400},
    "an endless alpha of one": {"alpha_pattern": {"q_proj": 10**400}},
    "an endless dropout": {"lora_dropout": 10**400},
    "blocks without end": {"use_bdlora": {"nblocks": 10**12, "target_modules_bd_a": ["q_proj"]}},
    "deep": {"quux": _nested(500)},
}


LONG = ("ranks that backtrack", "alphas that backtrack")  # as their sibling does


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(changes, id=name, marks=pytest.mark.slow if name in LONG else ())
        for name, changes in CONFIGS.items()
    ],
)
def test_a_config_that_asks_for_too_much_ends_soon_and_in_little_memory(corpus, tmp_path, changes):
    """Some of these mean nothing and may merge; none may take long, or raise what it should not."""
    made = plain_of(corpus, "llama", "plain", "peft")
    made.config |= changes
    adapter, base = place(made, tmp_path)
    before, peak = contents(tmp_path), _peak()
    result = attempt(adapter, base, tmp_path / "out")
    assert _peak() - peak < ROOM
    if isinstance(result, LoraExportError):
        assert contents(tmp_path) == before
    else:
        assert not isinstance(result, BaseException), told(result)
        assert result.ok


def test_rows_without_number_are_refused_soon(corpus, tmp_path):
    made = plain_of(corpus, "llama", "trainable-tokens", "peft")
    made.config["trainable_token_indices"] = {"embed_tokens": list(range(1_000_000))}
    bounded(made, tmp_path, room=256 << 20)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**9}, {"num_hidden_layers": 20_000}, {"vocab_size": 10**15},
        {"hidden_size": 10**12}, {"intermediate_size": 10**400}, {"num_attention_heads": 0},
        {"num_key_value_heads": 0}, {"head_dim": 0}, {"num_labels": 10**9},
        {"id2label": {str(i): "x" for i in range(100_000)}}, {"architectures": 5},
        {"architectures": ["\0"]}, {"vocab_size": -1}, {"hidden_act": "(a+)+$"},
        {"max_position_embeddings": 10**12}, {"layer_types": ["x"] * 100_000},
    ],
    ids=lambda c: f"{next(iter(c))}-{str(next(iter(c.values())))[:20]!r}",
)  # fmt: skip
@pytest.mark.parametrize("variant", ["plain", "embedding"])
def test_a_base_whose_config_asks_for_too_much_ends_soon(corpus, tmp_path, variant, changes):
    """The second variant is one for which the model has to be built, without weights."""
    made = plain_of(corpus, "llama", variant, "peft")
    files = _files_of(made)
    files["config.json"] = json.dumps(json.loads(files["config.json"]) | changes).encode()
    assert judged(made, tmp_path / "x") in ("merged", "refused")


@pytest.mark.parametrize(
    "shard",
    ["\0", "", ".", "..", "x" * 5000, "/etc/passwd", "../config.json", "\ud800", "config.json"],
    ids=lambda s: repr(s[:12]),
)  # fmt: skip
def test_an_index_that_names_no_shard_is_refused(corpus, tmp_path, shard):
    made = plain_of(corpus, "llama", "plain", "peft")
    files = _files_of(made)
    del files["model.safetensors"]
    names = load_file(made.sound.base / "model.safetensors")
    files[INDEX] = json.dumps({"weight_map": dict.fromkeys(names, shard)}).encode()
    assert judged(made, tmp_path / "x") == "refused"


@pytest.mark.parametrize(
    "lost", ["h.0.attn.c_proj.bias", "h.0.attn.c_attn.bias", "h.0.mlp.c_fc.bias"]
)
def test_a_layer_whose_bias_the_base_lost_is_not_merged_the_wrong_way_round(corpus, tmp_path, lost):
    """It is square and stored as (in, out); without its bias it looks like an ordinary one."""
    made = plain_of(corpus, "gpt2", "plain", "peft")
    files = _files_of(made)
    tensors = load(files["model.safetensors"])
    del tensors[f"transformer.{lost}"]
    files["model.safetensors"] = save(tensors, {"format": "pt"})
    assert judged(made, tmp_path / "x") in ("merged", "refused")


def test_a_base_of_many_names_is_refused_soon(corpus, tmp_path):
    made = plain_of(corpus, "llama", "plain", "peft")
    files = _files_of(made)
    names = {f"x.{i}.weight": f"{i % 1000}.safetensors" for i in range(100_000)}
    del files["model.safetensors"]
    files[INDEX] = json.dumps({"weight_map": names}).encode()
    bounded(made, tmp_path)
