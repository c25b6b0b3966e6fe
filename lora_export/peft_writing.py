"""An `Adapter` under PEFT's tensor names and config fields: what `peft_names` reads.

Source: what PEFT 0.21 writes, so that it loads what is written here.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from lora_export import variants
from lora_export.peft_names import PREFIX, REGISTERED, in_order, trained_biases
from lora_export.records import CONV, EMBEDDING, EXPERTS, Adapter, Array

WITH_HEADS = ("SEQ_CLS", "TOKEN_CLS")  # tasks for which PEFT expects a head in the file


def config_of(adapter: Adapter) -> dict[str, Any]:
    """Return the fields of PEFT's `adapter_config.json` that describe `adapter`.

    The commonest rank and alpha become `r` and `lora_alpha`; every other module gets a pattern
    that matches its path alone, so that no reader's order of patterns matters.
    """
    names = set(adapter.variant.split("+"))
    alphas = {path: _alpha(adapter, path) for path in adapter.modules}
    rank = int(_commonest(pair.rank for pair in adapter.modules.values()) or 8)
    alpha = _commonest(alphas.values()) or 8.0
    odd_ranks = {p: m.rank for p, m in adapter.modules.items() if m.rank != rank}
    odd_alphas = {p: value for p, value in alphas.items() if value != alpha}
    experts = [path for path, pair in adapter.modules.items() if pair.kind == EXPERTS]
    biases = any(pair.bias is not None for pair in adapter.modules.values())
    return {
        **adapter.fields,
        "peft_type": "LORA",
        "task_type": adapter.task_type,
        "base_model_name_or_path": adapter.base.id,
        "revision": adapter.base.revision,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": adapter.dropout,
        "use_rslora": "rslora" in names,
        "use_dora": "dora" in names,
        "lora_bias": biases,
        "rank_pattern": {_alone(path, alphas): value for path, value in odd_ranks.items()},
        "alpha_pattern": {_alone(path, alphas): value for path, value in odd_alphas.items()},
        "target_modules": sorted(adapter.modules.keys() - set(experts)),
        "target_parameters": sorted(experts) or None,
        "modules_to_save": _saved_modules(adapter) or None,
        "bias": _bias_setting(adapter),
        "fan_in_fan_out": False,
        "init_lora_weights": adapter.fields.get("init_lora_weights", True),
        "inference_mode": True,
    }


def _alone(path: str, paths: Iterable[str]) -> str:
    """Return a pattern that matches `path` and none of the other `paths`."""
    is_end = any(other.endswith("." + path) for other in paths)
    return "^" * is_end + re.escape(path)


def _alpha(adapter: Adapter, path: str) -> float:
    """Return the alpha from which a reader computes the scale of the module at `path`."""
    pair = adapter.modules[path]
    names = adapter.variant.split("+")
    plain = "rslora" if "rslora" in names else "lora"
    if variants.scaling(plain, pair.alpha, pair.rank) == pair.scale:
        return pair.alpha
    return pair.scale * (pair.rank**0.5 if plain == "rslora" else pair.rank)


def tensors_of(adapter: Adapter) -> dict[str, Array]:
    """Return the tensors of `adapter` under PEFT's names, sorted.

    What AdaLoRA stores as a diagonal is multiplied into B: plain LoRA has no place for it.
    """
    tensors = {PREFIX + _stored_as(name, adapter): v for name, v in adapter.replaced.items()}
    experts = [path for path, pair in adapter.modules.items() if pair.kind == EXPERTS]
    nesting = _nesting(experts, adapter.nested)
    for path, pair in adapter.modules.items():
        if pair.kind == EXPERTS:
            name = PREFIX + nesting[path]
            tensors[f"{name}.lora_A.weight"] = pair.a.reshape(-1, pair.a.shape[-1])
            wide = pair.b.transpose(1, 2, 0)  # the expert's index runs fastest
            tensors[f"{name}.lora_B.weight"] = wide.reshape(wide.shape[0], -1)
            continue
        kasa = "kasa" in adapter.variant.split("+")
        b = pair.b if pair.diagonal is None or kasa else _times(pair.b, pair.diagonal)
        first, second = ("lora_embedding_A", "lora_embedding_B"), ("lora_A.weight", "lora_B.weight")
        names = first if pair.kind == EMBEDDING else second
        tensors[f"{PREFIX}{path}.{names[0]}"], tensors[f"{PREFIX}{path}.{names[1]}"] = pair.a, b
        if pair.diagonal is not None and kasa:
            tensors[f"{PREFIX}{path}.lora_diag"] = pair.diagonal
        if pair.magnitude is not None:
            shape = (1, -1) + (1,) * (pair.a.ndim - 2) if pair.kind == CONV else (-1,)
            name = f"{PREFIX}{path}.lora_magnitude_vector"
            tensors[name] = pair.magnitude.reshape(shape)
        if pair.bias is not None:
            tensors[f"{PREFIX}{path}.lora_B.bias"] = pair.bias
    for path, rows in adapter.rows.items():
        tensors[f"{PREFIX}{path}.token_adapter.trainable_tokens_delta"] = rows.values
    return dict(sorted(tensors.items()))


def _times(b: Array, diagonal: Array) -> Array:
    product: Array = b.astype(np.float64) * diagonal.astype(np.float64)
    return product.astype(b.dtype)


def _nesting(names: Iterable[str], orders: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """Return under which path PEFT stores the update of each parameter."""
    of_module: dict[str, list[str]] = defaultdict(list)
    for name in names:
        of_module[name.rpartition(".")[0]].append(name)
    found = {}
    for module, group in of_module.items():
        leaves = [name.rpartition(".")[2] for name in group]
        inner_first = orders.get(module) or in_order(leaves, REGISTERED)
        for outside, leaf in enumerate(reversed(inner_first)):
            found[f"{module}.{leaf}"] = module + ".base_layer" * outside
    return found


def _commonest(values: Iterable[float]) -> float:
    """Return the value that occurs most often, the smallest of several; 0 where there is none."""
    return min(Counter(values).items(), key=lambda item: (-item[1], item[0]), default=(0.0, 0))[0]


def _stored_as(name: str, adapter: Adapter) -> str:
    """Return PEFT's name for a tensor stored whole: that of an adapted module lies in its base."""
    module, _, leaf = name.rpartition(".")
    return f"{module}.base_layer.{leaf}" if module in adapter.modules else name


def _bias_setting(adapter: Adapter) -> str:
    """Return PEFT's word for the biases that were trained."""
    paths = {name.removesuffix(".bias") for name in trained_biases(adapter.replaced)}
    if not paths:
        return "none"
    return "lora_only" if paths <= adapter.modules.keys() else "all"


def _saved_modules(adapter: Adapter) -> list[str]:
    """Return the modules that are stored whole, as PEFT wants them named.

    For a task with a head PEFT wraps the whole head, so its parts must not be named apart.
    """
    whole = adapter.replaced.keys() - trained_biases(adapter.replaced)
    modules = {name.rpartition(".")[0] for name in whole} - adapter.modules.keys()
    backbone = {path.partition(".")[0] for path in adapter.modules}
    if adapter.task_type in WITH_HEADS:
        tops = {module.partition(".")[0] for module in modules} - backbone
        modules = {m for m in modules if m.partition(".")[0] not in tops} | tops
    return sorted(modules)
