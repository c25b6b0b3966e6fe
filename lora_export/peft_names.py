"""PEFT's tensor names, read into an `Adapter`. `peft_writing` is the way back.

Goes by the tensors in the file, never by the config's lists: what they hold decides, and where the
config says otherwise the adapter carries a note or is refused. Source: PEFT 0.1 to 0.21.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lora_export import peft_config
from lora_export.errors import InputError, listed
from lora_export.peft_config import PeftConfig
from lora_export.records import (
    CONV,
    EMBEDDING,
    EXPERTS,
    LINEAR,
    Adapter,
    Array,
    BaseRef,
    Factors,
    Promises,
    Reading,
    Rows,
    all_finite,
    is_float,
)
from lora_export.refusals import refused
from lora_export.storage import TensorInfo

PREFIX = "base_model.model."
# Prefixes that wrappers leave: distributed training, compilation.
_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.")
_NAME = r"(\.(?P<name>[^.]+))?"
_PARTS = tuple(
    (part, re.compile(rf"(?P<path>.+?)\.{pattern}"))
    for part, pattern in (
        ("a", rf"lora_A{_NAME}\.weight"),
        ("b", rf"lora_B{_NAME}\.weight"),
        ("bias", rf"lora_B{_NAME}\.bias"),
        ("a", rf"lora_A{_NAME}"),  # AdaLoRA, loralib
        ("b", rf"lora_B{_NAME}"),
        ("embedding_a", rf"lora_embedding_A{_NAME}"),
        ("embedding_b", rf"lora_embedding_B{_NAME}"),
        ("magnitude", rf"lora_magnitude_vector{_NAME}\.weight"),
        ("magnitude", rf"lora_magnitude_vector{_NAME}"),
        ("diagonal", rf"lora_diag{_NAME}"),
        ("singular", rf"lora_E{_NAME}"),
        ("rows", rf"token_adapter\.trainable_tokens_delta{_NAME}"),
    )
)
_SPELLED = {
    "a": "lora_A", "b": "lora_B", "embedding_a": "lora_embedding_A",
    "embedding_b": "lora_embedding_B", "expert_a": "lora_A", "expert_b": "lora_B",
}  # fmt: skip
# Tensors that training needs and merging does not.
_IDLE = (
    (re.compile(r"\.lora_velora_embed"), "VeLoRA: steers the gradient only"),
    (re.compile(r"\.lora_monteclora_sampler"), "MonteCLoRA: sampled in training only"),
    (re.compile(r"\.ranknum"), "AdaLoRA: a count"),
    (re.compile(r"\.original_module\."), "PEFT's copy of the untrained module"),
    (re.compile(r"\.token_adapter\.trainable_tokens_original"), "PEFT's copy of untrained rows"),
)
_SAVED = re.compile(r"\.modules_to_save(\.default)?(?=\.)")
_ODD = re.compile(r"(^|\.)(lora_|token_adapter|modules_to_save)")
# PEFT nests its wrappers in the order in which a module registers its parameters. transformers'
# own modules register theirs so; of others the model decides, once a base is given.
REGISTERED = (
    "gate_up_proj", "gate_up_proj_bias", "gate_proj", "w1", "up_proj", "w3", "down_proj",
    "down_proj_bias", "w2",
)  # fmt: skip


@dataclass
class _Sorted:
    """The tensors of a file by what they are, and what was found odd on the way."""

    parts: dict[str, dict[str, Array]] = field(default_factory=lambda: defaultdict(dict))
    replaced: dict[str, Array] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    prefixes: Counter[str] = field(default_factory=Counter)
    adapters: set[str] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)


def read(
    tensors: Mapping[str, TensorInfo] | Mapping[str, Array],
    config: Mapping[str, Any],
    where: str,
    reading: Reading | None = None,
) -> Adapter:
    """Return the adapter in `tensors`, as `config` says they are to be read.

    Raises:
        InputError: with every fault that was found in names, shapes, values and config.
    """
    reading = reading or Reading()
    faults = []
    stated = None
    try:
        stated = peft_config.parse(config, reading)
    except InputError as error:
        faults.append(str(error))
    found = _sort(tensors)
    faults += found.faults
    notes = [*_prefix_notes(found.prefixes), *_saved_notes(config, found)]
    modules: dict[str, Factors] = {}
    rows: dict[str, Rows] = {}
    nested: dict[str, tuple[str, ...]] = {}
    if stated is not None:
        groups, nested = _by_path(found.parts, stated, reading.registered or REGISTERED, faults)
        for path, parts in sorted(groups.items()):
            try:
                if "rows" in parts:
                    rows[path] = _rows(path, parts.pop("rows"), stated)
                if "adalora" in stated.variant and not any(v.size for v in parts.values()):
                    found.ignored[path] = "AdaLoRA pruned it to rank 0"
                elif parts:
                    name, pair = _factors(path, parts, stated)
                    modules[name] = pair
            except InputError as error:
                faults.append(str(error))
        faults += _rank_faults(modules, stated, notes)
        if any(p.kind == EXPERTS for p in modules.values()):
            marked = reading.expert_b or not peft_config.is_unmarked_unsloth(config)
            faults += [] if marked else [refused("expert-b")]
    else:
        faults += _lone_halves(found.parts)
    if not found.parts:
        faults.append("no lora_A and lora_B tensors at all")
    if faults:
        raise InputError(listed(f"cannot use the adapter {where}", faults))
    assert stated is not None
    dropout = config.get("lora_dropout")
    return Adapter(
        modules=modules,
        replaced=dict(sorted(found.replaced.items())),
        variant=stated.variant,
        dropout=float(dropout) if dropout is not None else 0.0,
        task_type=config.get("task_type"),
        base=BaseRef(
            config.get("base_model_name_or_path"),
            config.get("revision"),
            peft_config.architecture_of(config),
        ),
        promises=_promised(config),
        notes=tuple(notes),
        rows=rows,
        ignored=found.ignored,
        fields=peft_config.kept(config),
        nested=nested,
    )


def bare_config(
    tensors: Mapping[str, TensorInfo] | Mapping[str, Array], alpha: float
) -> dict[str, Any]:
    """Return a config for tensors that have none: alpha as given, ranks as the tensors say."""
    ranks, parts = {}, set()
    for key, value in tensors.items():
        part, path, _ = _part(module_name(key)[0])
        parts.add(part)
        if part in ("a", "embedding_a") and value.shape and value.shape[0]:
            ranks[path] = value.shape[0]
    return {
        "r": next(iter(ranks.values()), 1),
        "lora_alpha": alpha,
        "rank_pattern": {re.escape(path): rank for path, rank in ranks.items()},
        "use_dora": "magnitude" in parts,
        "lora_bias": "bias" in parts,
    }


# ---------------------------------------------------------------- names


def module_name(key: str) -> tuple[str, str]:
    """Return `key` without the prefixes of PEFT and of wrappers, and these prefixes."""
    name = key
    while True:
        for prefix in (PREFIX, *_WRAPPERS):
            if name.startswith(prefix):
                name = name.removeprefix(prefix)
                break
        else:
            return name.replace("._orig_mod.", "."), key[: len(key) - len(name)]


def _sort(tensors: Mapping[str, TensorInfo] | Mapping[str, Array]) -> _Sorted:
    found = _Sorted()
    origins: dict[tuple[str, str], str] = {}
    for key in sorted(tensors):
        value = tensors[key]
        if isinstance(value, TensorInfo):
            value = value.stored()
        name, prefix = module_name(key)
        found.prefixes[prefix] += 1
        if reason := next((why for pattern, why in _IDLE if pattern.search(name)), None):
            found.ignored[key] = reason
            continue
        if is_float(value) and not all_finite(value):
            bad = int(value.size - np.isfinite(value).sum())
            found.faults.append(f"{key}: {bad} of {value.size} values are NaN or infinite")
            continue
        part, path, of_adapter = _part(name)
        found.adapters |= {of_adapter} if of_adapter else set()
        known = origins.setdefault((path, part), key)
        if known != key:
            _compare(key, known, value, found, path, part)
        elif part == "whole":
            found.replaced[path] = value
        elif not is_float(value):
            found.faults.append(f"{key}: dtype {value.dtype}; expected floats")
        else:
            found.parts[path][part] = value
        if part == "whole" and _ODD.search(path):
            found.faults.append(refused("unknown-tensor", key))
    if len(found.adapters) > 1:
        names = ", ".join(sorted(found.adapters))
        found.faults.append(refused("several-adapters", found=names))
    return found


def _part(name: str) -> tuple[str, str, str | None]:
    """Return what the tensor `name` is, of which module, of which adapter.

    What is no part of an update is "whole", under the name that it has in the model.
    """
    for part, pattern in _PARTS:
        if match := pattern.fullmatch(name):
            return part, match["path"], match["name"]
    if match := _SAVED.search(name):
        return "whole", name[: match.start()] + name[match.end() :], None
    bare = name.replace(".token_adapter.base_layer.", ".").replace(".base_layer.", ".")
    return "whole", bare, None


def _compare(key: str, known: str, value: Array, found: _Sorted, path: str, part: str) -> None:
    """Two keys of one meaning: the second is left out where it says the same, else a fault."""
    first = found.replaced.get(path) if part == "whole" else found.parts[path].get(part)
    if first is not None and first.shape == value.shape and np.array_equal(first, value):
        found.ignored[key] = f"the same as {known}"
    else:
        found.faults.append(
            f"{key}: a second {_SPELLED.get(part, part)} for {path}, unlike {known}"
        )


def _prefix_notes(prefixes: Counter[str]) -> list[str]:
    odd = {prefix: count for prefix, count in prefixes.items() if prefix != PREFIX}
    return [
        f"{count} tensors have "
        + (f"the prefix {prefix!r}" if prefix else "no prefix")
        + f" where PEFT writes {PREFIX!r}: PEFT would not load them"
        for prefix, count in sorted(odd.items())
    ]


# ---------------------------------------------------------------- tensors into factors


def _by_path(
    parts: Mapping[str, Mapping[str, Array]],
    stated: PeftConfig,
    registered: tuple[str, ...],
    faults: list[str],
) -> tuple[dict[str, dict[str, Array]], dict[str, tuple[str, ...]]]:
    """Return the parts of each update under its own name: a module's path, or a parameter's.

    The updates of several parameters of one module are told apart by `base_layer`, once for each
    wrapper that lies outside.
    """
    nested: dict[str, dict[int, dict[str, Array]]] = defaultdict(dict)
    for path, held in parts.items():
        bare, depth = path, 0
        while bare.endswith(".base_layer"):
            bare, depth = bare.removesuffix(".base_layer"), depth + 1
        nested[bare.replace(".base_layer.", ".")][depth] = dict(held)
    result, orders = {}, {}
    for path, depths in nested.items():
        leaves = in_order(stated.leaves(path, len(depths)), registered)
        if not leaves:
            if len(depths) > 1:
                faults.append(refused("unknown-tensor", path, "nested wrappers"))
            result[path] = depths[min(depths)]
            continue
        if len(leaves) != len(depths):
            faults.append(
                f"{path}: target_parameters names {', '.join(leaves)}, the file holds "
                f"{len(depths)} of them"
            )
            continue
        if len(leaves) > 1:
            orders[path] = tuple(leaves)
        # The innermost wrapper, which has the most `base_layer` in its name, is the first.
        for leaf, depth in zip(leaves, sorted(depths, reverse=True), strict=True):
            result[f"{path}.{leaf}"] = {f"expert_{k}": v for k, v in depths[depth].items()}
    return result, orders


def _lone_halves(parts: Mapping[str, Mapping[str, Array]]) -> list[str]:
    """Return the pairs of which one half is missing, whatever the config says."""
    return [
        f"{path}: {_SPELLED[name]} is missing"
        for path, held in parts.items()
        for one, name in (("a", "b"), ("b", "a"), ("embedding_a", "embedding_b"))
        if one in held and name not in held
    ]


def in_order(leaves: Iterable[str], registered: tuple[str, ...]) -> list[str]:
    """Return the parameters of one module in the order in which it registers them."""
    places = {leaf: index for index, leaf in enumerate(registered)}
    return sorted(leaves, key=lambda leaf: (places.get(leaf, len(places)), leaf))


def _factors(path: str, parts: Mapping[str, Array], stated: PeftConfig) -> tuple[str, Factors]:
    """Return the name of what is updated, and its factors; raises `InputError`."""
    if {"expert_a", "expert_b"} & parts.keys():
        return _experts(path, parts, stated)
    embedding = {"embedding_a", "embedding_b"} & parts.keys()
    names = ("embedding_a", "embedding_b") if embedding else ("a", "b")
    if missing := [_SPELLED[name] for name in names if name not in parts]:
        raise InputError(f"{path}: {' and '.join(missing)} is missing")
    if embedding and {"a", "b"} & parts.keys():
        raise InputError(f"{path}: holds a pair for an embedding and one for a linear layer")
    a, b = parts[names[0]], parts[names[1]]
    of_scale = None
    if stated.enabled and (b.ndim == 3 or (b.ndim == 2 and a.shape[:1] != b.shape[1:])):
        of_scale, a, b = _unmerged(path, a, b, stated.enabled)
    elif stated.blocks:
        a, b = _dense(path, a, b, stated.blocks)
    rank = int(a.shape[0]) if a.ndim else 0
    kind = EMBEDDING if embedding else CONV if a.ndim > 2 else LINEAR
    matrices = kind == LINEAR and a.ndim == b.ndim == 2
    if matrices and 0 < b.shape[1] < rank and rank % b.shape[1] == 0:
        raise InputError(refused("merged-linear", path, f"lora_A {a.shape}, lora_B {b.shape}"))
    if kind == CONV and a.ndim == b.ndim and 0 < b.shape[1] < rank and rank % b.shape[1] == 0:
        raise InputError(refused("conv-groups", path, f"lora_B {b.shape} for rank {rank}"))
    if not _is_pair(a, b, kind):
        raise InputError(f"{path}: lora_A {a.shape} and lora_B {b.shape} do not form a pair")
    if "adalora" in stated.variant:  # keeps its initial rank in the formula, whatever was pruned
        of_scale = stated.rank
    pair = Factors(
        a=a,
        b=b,
        alpha=stated.alpha_of(path),
        scale=stated.scale_of(path, of_scale or rank),
        kind=kind,
        diagonal=_flat(path, parts.get("diagonal", parts.get("singular")), rank, "the diagonal"),
        magnitude=_flat(path, parts.get("magnitude"), int(b.shape[0]), "lora_magnitude_vector"),
        bias=_flat(path, parts.get("bias"), int(b.shape[0]), "lora_B.bias"),
    )
    _check_variant(path, parts, stated)
    return path, pair


# Parts that belong to a variant: the tensor, the setting that announces it.
_VARIANT_PARTS = {
    "magnitude": ("lora_magnitude_vector", "use_dora", "dora"),
    "diagonal": ("lora_diag", "kasa_config", "kasa"),
    "singular": ("lora_E", "peft_type ADALORA", "adalora"),
    "bias": ("lora_B.bias", "lora_bias", None),
}


def _check_variant(path: str, parts: Mapping[str, Array], stated: PeftConfig) -> None:
    """Raise where the tensors and the config's variant contradict each other."""
    names = stated.variant.split("+")
    for part, (tensor, setting, variant) in _VARIANT_PARTS.items():
        wanted = stated.lora_bias if variant is None else variant in names
        if wanted and part not in parts:
            raise InputError(f"{path}: the config says {setting}, the file holds no {tensor}")
        if part in parts and not wanted:
            raise InputError(
                f"{path}: the file holds {tensor}, the config does not say {setting}; PEFT would "
                "leave it out. Correct the config, or remove the tensor"
            )


def _experts(path: str, parts: Mapping[str, Array], stated: PeftConfig) -> tuple[str, Factors]:
    """Return the factors of a parameter that PEFT wraps by itself; `path` is its name."""
    if missing := {"expert_a", "expert_b"} - parts.keys():
        raise InputError(f"{path}: {_SPELLED[missing.pop()]} is missing")
    if beyond := set(stated.variant.split("+")) - {"lora", "rslora"}:
        found = f"{', '.join(sorted(beyond))} on fused experts"
        raise InputError(refused("layer-kind", path, found))
    if extra := parts.keys() - {"expert_a", "expert_b"}:
        raise InputError(refused("unknown-tensor", path, ", ".join(sorted(extra))))
    a, b = parts["expert_a"], parts["expert_b"]
    rank = int(stated.rank_of(path))
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or a.shape[0] % rank or not a.size:
        raise InputError(
            f"{path}: lora_A {a.shape} and lora_B {b.shape} are no pairs of rank {rank} for experts"
        )
    count = a.shape[0] // rank
    if stated.expert_b == "expert-major":
        b = b.reshape(b.shape[0], count, rank).transpose(1, 0, 2)
    else:  # the expert's index runs fastest
        b = b.reshape(b.shape[0], rank, count).transpose(2, 0, 1)
    scale = stated.scale_of(path, rank)
    return path, Factors(a.reshape(count, rank, -1), b, stated.alpha_of(path), scale, EXPERTS)


def _is_pair(a: Array, b: Array, kind: str) -> bool:
    if a.ndim < 2 or b.ndim < 2 or 0 in (*a.shape, *b.shape) or a.shape[0] != b.shape[1]:
        return False
    if kind == CONV:
        return a.ndim == b.ndim and a.ndim <= 5 and set(b.shape[2:]) == {1}
    return a.ndim == b.ndim == 2


def _flat(path: str, value: Array | None, length: int, what: str) -> Array | None:
    """Return a vector that PEFT may have stored with axes of one around it."""
    if value is None:
        return None
    if value.size != length or max(value.shape, default=0) != length:
        raise InputError(f"{path}: {what} has shape {value.shape}; expected {length} values")
    return value.reshape(-1)


def _unmerged(path: str, a: Array, b: Array, enabled: tuple[bool, ...]) -> tuple[int, Array, Array]:
    """Return the rank of a MergedLinear (PEFT 0.1 and 0.2, loralib), and its pair as a plain one.

    Its B is a grouped convolution (out of the enabled slices, rank, 1): one group for each slice.
    """
    groups = sum(enabled)
    b = b[..., 0] if b.ndim == 3 and b.shape[2] == 1 else b
    rank = b.shape[1] if b.ndim == 2 else 0
    if not groups or not rank or a.ndim != 2 or a.shape[0] != rank * groups or len(b) % groups:
        raise InputError(f"{path}: lora_A {a.shape} and lora_B {b.shape} do not fit {enabled}")
    width = len(b) // groups
    wide = np.zeros((width * len(enabled), rank * groups), b.dtype)
    for group, place in enumerate(index for index, on in enumerate(enabled) if on):
        block = b[group * width : (group + 1) * width]
        wide[place * width : (place + 1) * width, group * rank : (group + 1) * rank] = block
    return rank, a, wide


def _dense(path: str, a: Array, b: Array, blocks: Mapping[str, Any]) -> tuple[Array, Array]:
    """Return the pair of BD-LoRA with its block-diagonal side written out."""
    count = int(blocks["nblocks"])
    sides = [
        any(name in path for name in blocks.get(f"target_modules_bd_{side}") or ()) for side in "ab"
    ]
    if all(sides):
        raise InputError(f"{path}: named as block-diagonal for both A and B")
    return (
        _block_diagonal(path, a, count) if sides[0] else a,
        _block_diagonal(path, b, count) if sides[1] else b,
    )


def _block_diagonal(path: str, value: Array, count: int) -> Array:
    if value.ndim != 2 or value.shape[0] % count:
        raise InputError(f"{path}: {value.shape} cannot be cut into {count} blocks")
    rows, columns = value.shape[0] // count, value.shape[1]
    wide = np.zeros((value.shape[0], columns * count), value.dtype)
    for index in range(count):
        place = slice(index * rows, (index + 1) * rows)
        wide[place, index * columns : (index + 1) * columns] = value[place]
    return wide


def _rows(path: str, values: Array, stated: PeftConfig) -> Rows:
    indices = stated.indices_of(path)
    if indices is None:
        raise InputError(f"{path}: the file holds trained rows, the config names none")
    if values.ndim != 2 or values.shape[0] != len(indices):
        raise InputError(
            f"{path}: {values.shape} for the {len(indices)} rows that the config names"
        )
    return Rows(indices, values)


def _rank_faults(modules: Mapping[str, Factors], stated: PeftConfig, notes: list[str]) -> list[str]:
    """Hold the ranks of the tensors against the config's; what it does not target gets a note."""
    faults, strangers = [], Counter[str]()
    for path, pair in modules.items():
        if pair.kind == EXPERTS or stated.enabled or "adalora" in stated.variant:
            continue
        ranks = stated.ranks_of(path)  # of several patterns the tensor tells which one won
        rank = " or ".join(f"{rank:g}" for rank in ranks)
        targeted = stated.targets(path) or stated.leaves(path)
        if pair.rank not in ranks and targeted:
            found = f"the config says rank {rank}, the tensors have rank {pair.rank}"
            faults.append(refused("rank-mismatch", path, found))
        elif not targeted:
            strangers[
                f"rank {pair.rank} in the tensors, {rank} in the config, scale {pair.scale:g}"
            ] += 1
    notes += [
        f"{count} modules are in the file and not among the config's target_modules (PEFT would "
        f"leave them out; here the file decides): {ranks}"
        for ranks, count in sorted(strangers.items())
    ]
    return faults


# ---------------------------------------------------------------- config against file


def _saved_notes(config: Mapping[str, Any], found: _Sorted) -> list[str]:
    notes = []
    bias = config.get("bias") or "none"
    if bias != "none" and not trained_biases(found.replaced):
        notes.append(
            f"the config says bias={_text(bias)}, but the file holds no bias of an adapted layer: "
            "if biases were trained, they were lost when it was saved, and the merged model has "
            "those of the base"
        )
    if found.replaced and not config.get("modules_to_save") and bias == "none":
        notes.append(
            "the config names no modules_to_save, the file holds "
            + listed("whole tensors", found.replaced)
        )
    return notes


def trained_biases(replaced: Mapping[str, Array]) -> set[str]:
    """Return the biases that are stored without the weight beside them."""
    return {
        name
        for name in replaced
        if name.endswith(".bias") and name.removesuffix("bias") + "weight" not in replaced
    }


def _text(value: object) -> str:
    return repr(value)[:60]


def _promised(config: Mapping[str, Any]) -> Promises:
    """Return the modules that the config says were adapted or trained whole.

    `target_modules` counts only as a list that nothing else narrows.
    """
    targets, saved = config.get("target_modules"), config.get("modules_to_save")
    narrowed = config.get("layers_to_transform") or config.get("exclude_modules")
    return Promises(
        adapted=_names(targets) if not narrowed else (),
        saved=_names(saved),
    )


def _names(value: object) -> tuple[str, ...]:
    return tuple(map(str, value)) if isinstance(value, list) else ()
