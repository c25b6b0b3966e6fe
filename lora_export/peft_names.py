"""PEFT's tensor names and config fields, read into an `Adapter`'s parts and written from them.

Goes by the tensors in the file, never by the config's lists: ranks come from the tensors and are
cross-checked against the config. What cannot be merged exactly is refused with its reason.
Source: PEFT's `adapter_config.json` and `adapter_model.safetensors`, versions 0.4 to 0.21.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from lora_export import variants
from lora_export.errors import InputError, listed
from lora_export.records import Adapter, Array, BaseRef, Factors, Promises, all_finite
from lora_export.storage import TensorInfo

PREFIX = "base_model.model."
_PAIR = re.compile(r"(?P<path>.+)\.lora_(?P<side>[AB])(\.default)?\.weight")
_LORA = re.compile(r"\.(lora_|token_adapter|base_layer|modules_to_save|original_module)")

# Fields that change the merged weight in ways that this version does not compute.
_REFUSED = {
    "use_dora": "DoRA",
    "lora_bias": "a bias in lora_B",
    "layer_replication": "layer replication",
    "use_qalora": "QALoRA",
    "alora_invocation_tokens": "activated LoRA, which cannot be merged",
    "arrow_config": "Arrow routing, which cannot be merged",
    "use_bdlora": "BD-LoRA",
    "kasa_config": "KaSA",
    "target_parameters": "target_parameters (fused experts)",
    "trainable_token_indices": "trainable tokens",
    "enable_lora": "MergedLinear of PEFT 0.2",
}
# Fields that do not change the merged weight, or that the tensors in the file answer for.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config",
    "megatron_config", "megatron_core", "merge_weights", "modules_to_save", "monteclora_config",
    "alpha_pattern", "init_lora_weights", "peft_type", "peft_version", "qalora_group_size", "r",
    "rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_rslora",
    "velora_config",
}  # fmt: skip
_TEXTS = ("task_type", "base_model_name_or_path", "revision")
WITH_HEADS = ("SEQ_CLS", "TOKEN_CLS")  # tasks for which PEFT expects a head in the file
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")


def read(infos: Mapping[str, TensorInfo], config: Mapping[str, Any], where: str) -> Adapter:
    """Return the adapter in the tensors `infos`, as `config` says they are to be read.

    Raises:
        InputError: with every fault that was found in names, shapes, values and config.
    """
    tensors = {name: info.array() for name, info in infos.items()}
    variant = "rslora" if config.get("use_rslora") is True else "lora"
    modules, replaced = _parts(tensors, config, variant, where)
    return Adapter(
        modules=modules,
        replaced=replaced,
        variant=variant,
        dropout=_dropout(config, where),
        task_type=config.get("task_type"),
        base=BaseRef(config.get("base_model_name_or_path"), config.get("revision")),
        promises=_promised(config),
    )


def _parts(
    tensors: Mapping[str, Array], config: Mapping[str, Any], variant: str, where: str
) -> tuple[dict[str, Factors], dict[str, Array]]:
    """Return the low-rank pairs by module path, and the replaced tensors by name."""
    unsound = _number_faults(config)
    faults = [*_config_faults(config), *unsound]
    halves: dict[str, dict[str, Array]] = {}
    replaced: dict[str, Array] = {}
    for key, value in tensors.items():
        if not key.startswith(PREFIX):
            faults.append(f"{key}: does not begin with {PREFIX}")
        elif value.dtype.kind != "f":
            faults.append(f"{key}: dtype {value.dtype}; expected floats")
        elif not all_finite(value):
            bad = int(value.size - np.isfinite(value).sum())
            faults.append(f"{key}: {bad} of {value.size} values are NaN or infinite")
        elif pair := _PAIR.fullmatch(key.removeprefix(PREFIX)):
            sides = halves.setdefault(pair["path"], {})
            if pair["side"] in sides:
                faults.append(f"{key}: a second lora_{pair['side']} for {pair['path']}")
            sides[pair["side"]] = _wide(value)
        elif _LORA.search(key):
            faults.append(f"{key}: a kind of tensor that this version cannot merge")
        else:
            replaced[key.removeprefix(PREFIX)] = _wide(value)
    modules = {}
    for path, sides in sorted(halves.items()):
        try:
            a, b = _pair(path, sides)
            if not unsound:  # ranks and scales can be judged by sound numbers only
                modules[path] = _factors(path, a, b, config, variant)
        except InputError as error:
            faults.append(str(error))
    if not halves:
        faults.append("no lora_A and lora_B tensors at all")
    if faults:
        raise InputError(listed(f"cannot use the adapter {where}", faults))
    return modules, dict(sorted(replaced.items()))


def config_of(adapter: Adapter) -> dict[str, Any]:
    """Return the fields of PEFT's `adapter_config.json` that describe `adapter`.

    The commonest rank and alpha become `r` and `lora_alpha`; every other module gets a pattern
    that matches its path alone, so that no reader's order of patterns matters.
    """
    rank = int(_commonest(pair.rank for pair in adapter.modules.values()))
    alpha = _commonest(pair.alpha for pair in adapter.modules.values())
    odd_ranks = {p: m.rank for p, m in adapter.modules.items() if m.rank != rank}
    odd_alphas = {p: m.alpha for p, m in adapter.modules.items() if m.alpha != alpha}
    return {
        "peft_type": "LORA",
        "task_type": adapter.task_type,
        "base_model_name_or_path": adapter.base.id,
        "revision": adapter.base.revision,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": adapter.dropout,
        "use_rslora": adapter.variant == "rslora",
        "rank_pattern": {re.escape(path): value for path, value in odd_ranks.items()},
        "alpha_pattern": {re.escape(path): value for path, value in odd_alphas.items()},
        "target_modules": sorted(adapter.modules),
        "modules_to_save": _saved_modules(adapter) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _dropout(config: Mapping[str, Any], where: str) -> float:
    """Return the dropout that the config states; raises `InputError` where it is none."""
    value = config.get("lora_dropout")
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise InputError(f"{where}: lora_dropout is {value!r}; expected 0 <= dropout < 1")
    return float(value)


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


def tensors_of(adapter: Adapter) -> dict[str, Array]:
    """Return the tensors of `adapter` under PEFT's names, sorted."""
    tensors = {PREFIX + name: value for name, value in adapter.replaced.items()}
    for path, pair in adapter.modules.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = pair.a
        tensors[f"{PREFIX}{path}.lora_B.weight"] = pair.b
    return dict(sorted(tensors.items()))


def _config_faults(config: Mapping[str, Any]) -> list[str]:
    faults = [f"{what} is not supported yet" for name, what in _REFUSED.items() if config.get(name)]
    unknown = config.keys() - _HARMLESS - _REFUSED.keys()
    faults += [f"config: {n} is set, and not known to this version" for n in unknown if config[n]]
    if config.get("use_rslora") not in (None, False, True):
        faults.append(f"config: use_rslora is {config['use_rslora']!r}; expected true or false")
    faults += [
        f"config: {name} is {config[name]!r}; expected a text"
        for name in _TEXTS
        if not isinstance(config.get(name), str | None)
    ]
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        faults.append(f"peft_type is {kind!r}; expected 'LORA'")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.startswith(_BASE_CHANGING_INITS):
        faults.append(f"init_lora_weights is {init!r}, which changed the base before training")
    return faults


def _number_faults(config: Mapping[str, Any]) -> list[str]:
    faults = []
    for name in ("r", "lora_alpha"):
        if not _is_positive(config.get(name)):
            faults.append(f"config: {name} is {config.get(name)!r}; expected a number above 0")
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(name) or {}
        if not isinstance(patterns, dict) or not all(map(_is_positive, patterns.values())):
            faults.append(f"config: {name} is {patterns!r}; expected patterns with numbers above 0")
        faults += [
            f"config: {name} holds a bad regular expression {pattern!r}"
            for pattern in patterns
            if not _is_expression(str(pattern))
        ]
    return faults


def _is_expression(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _is_positive(value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and value > 0  # type: ignore[arg-type, operator]


def _wide(value: Array) -> Array:
    """Return `value` as float32, or float64 where it is that; both are exact."""
    return value if value.dtype == np.float64 else value.astype(np.float32, copy=False)


def _commonest(values: Iterable[float]) -> float:
    """Return the value that occurs most often, the smallest of several: never a matter of order."""
    return min(Counter(values).items(), key=lambda item: (-item[1], item[0]))[0]


def _saved_modules(adapter: Adapter) -> list[str]:
    """Return the modules that are stored whole, as PEFT wants them named.

    For a task with a head PEFT wraps the whole head, so its parts must not be named apart.
    """
    modules = {name.rpartition(".")[0] for name in adapter.replaced}
    if adapter.task_type in WITH_HEADS:
        modules = {module.partition(".")[0] for module in modules}
    return sorted(modules)


def _pair(path: str, sides: Mapping[str, Array]) -> tuple[Array, Array]:
    """Return A (rank, in) and B (out, rank), or raise `InputError`."""
    if missing := {"A", "B"} - sides.keys():
        raise InputError(f"{path}: lora_{missing.pop()} is missing")
    a, b = sides["A"], sides["B"]
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or a.shape[0] == 0:
        raise InputError(f"{path}: lora_A {a.shape} and lora_B {b.shape} do not form a pair")
    return a, b


def _factors(path: str, a: Array, b: Array, config: Mapping[str, Any], variant: str) -> Factors:
    rank = a.shape[0]
    stated = _pattern(config, "rank_pattern", path, config.get("r"))
    if stated != rank:
        raise InputError(f"{path}: the config says rank {stated}, the tensors have rank {rank}")
    alpha = float(_pattern(config, "alpha_pattern", path, config.get("lora_alpha")))
    return Factors(a, b, alpha, variants.load(variant).scaling(alpha, rank))


def _pattern(config: Mapping[str, Any], name: str, path: str, default: Any) -> Any:
    """Return the value that PEFT's patterns give for `path`; refuse where their order decides."""
    patterns = config.get(name) or {}
    found = {k: v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", path)}
    if len(set(found.values())) > 1:
        raise InputError(f"{path}: {name} is ambiguous, PEFT's order of {found} decides")
    return next(iter(found.values()), default)
