"""The fields of PEFT's `adapter_config.json`, checked and read into a `PeftConfig`; and back.

Every field has its place in one of the tables below. One that has none is refused when it is set:
it may change the merged weight. Source: PEFT's LoraConfig and AdaLoraConfig, 0.1 to 0.21.
"""

import re
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import regex

from lora_export import variants
from lora_export.config import is_named
from lora_export.errors import InputError, listed
from lora_export.records import LARGEST, Reading
from lora_export.refusals import refused

# Fields whose use is refused, whatever the tensors say.
_REFUSED = {"alora_invocation_tokens": "alora", "arrow_config": "arrow", "use_qalora": "qalora"}
# Fields that do not change the merged weight, or that the tensors in the file answer for.
_HARMLESS = {
    "auto_mapping", "bias", "corda_config", "eva_config", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_ga_config",
    "megatron_config", "megatron_core", "merge_weights", "modules_to_save", "monteclora_config",
    "qalora_group_size", "runtime_config", "target_modules", "velora_config",
    # AdaLoRA's schedule
    "beta1", "beta2", "deltaT", "init_r", "orth_reg_weight", "target_r", "tfinal", "tinit",
    "total_step",
}  # fmt: skip
# Fields that are read.
_READ = {
    "alpha_pattern", "base_model_name_or_path", "enable_lora", "ensure_weight_tying",
    "init_lora_weights", "kasa_config", "layer_replication", "lora_alpha", "lora_B_layout",
    "lora_bias", "lora_dropout", "peft_type", "peft_version", "r", "rank_pattern", "revision",
    "target_parameters", "task_type", "trainable_token_indices", "use_bdlora", "use_dora",
    "use_rslora",
}  # fmt: skip
# Fields that a written config keeps as they were read: the plan needs them, or PEFT does.
_KEPT = (
    "ensure_weight_tying", "fan_in_fan_out", "init_lora_weights", "kasa_config",
    "layer_replication", "peft_version", "target_parameters", "trainable_token_indices",
)  # fmt: skip
_FLAGS = ("use_rslora", "use_dora", "lora_bias", "ensure_weight_tying")
_TEXTS = ("task_type", "base_model_name_or_path", "revision", "peft_version", "peft_type")
_INITS = ("gaussian", "eva", "orthogonal", "mica")  # leave the base as it is
_RESIDUAL = ("corda", "lora_ga", "loftq", "pissa_niter_")  # change it in ways that cannot be redone
MOST_SECONDS = 3.0  # for all expressions of one config on all paths
MOST_PATTERNS = 20_000
_PLAIN = re.compile(r"\^?[\w.-]+")
T = TypeVar("T")
_LAYOUTS = {"rank_major": "rank-major", "grouped_by_expert": "expert-major"}  # Unsloth's words


@dataclass(frozen=True)
class PeftConfig:
    """What a config says that the merged weight depends on."""

    rank: int
    alpha: float
    variant: str
    rank_pattern: Mapping[str, float] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    pattern_order: str | None = None
    target_modules: tuple[str, ...] | str | None = None
    target_parameters: tuple[str, ...] = ()
    rows: Mapping[str, tuple[int, ...]] | tuple[int, ...] = ()  # trainable tokens, by module
    lora_bias: bool = False
    blocks: Mapping[str, Any] = field(default_factory=dict)  # BD-LoRA's config
    enabled: tuple[bool, ...] = ()  # MergedLinear: which slices of the output are adapted
    expert_b: str = "rank-major"
    matcher: "_Matcher" = field(default_factory=lambda: _Matcher(), compare=False)

    def rank_of(self, path: str) -> float:
        """Return the rank that is stated for `path`; raises `InputError` where order decides."""
        return self._pattern("rank_pattern", path, self.rank)

    def alpha_of(self, path: str) -> float:
        """Return the alpha that is stated for `path`; raises `InputError` where order decides."""
        return float(self._pattern("alpha_pattern", path, self.alpha))

    def scale_of(self, path: str, rank: int) -> float:
        """Return the factor in front of B A for `path`, whose tensors have `rank`."""
        return variants.scaling(self.variant, self.alpha_of(path), rank)

    def targets(self, path: str) -> bool:
        """Return whether the config names the module at `path`, as PEFT matches names."""
        if isinstance(self.target_modules, str):
            if self.target_modules.lower() == "all-linear":
                return True
            if not _is_expression(self.target_modules):
                return True  # of syntax that is not matched here: taken to mean every module
            return self.matcher.fullmatch(self.target_modules, path)
        return self.target_modules is None or is_named(path, self.target_modules)

    def leaves(self, path: str, count: int = 1) -> set[str]:
        """Return the parameters of the module at `path` that `target_parameters` names.

        A name without a module may mean any module that is not a target itself; it counts where
        `count` parameters are to be explained and the names with a module do not suffice.
        """
        split = [name.rpartition(".")[::2] for name in self.target_parameters]
        named = {leaf for parent, leaf in split if parent and is_named(path, [parent])}
        if len(named) >= count or (self.target_modules and self.targets(path)):
            return named
        return named | {leaf for parent, leaf in split if not parent}

    def indices_of(self, path: str) -> tuple[int, ...] | None:
        """Return the trained rows of the embedding at `path`, or None where none are named."""
        if isinstance(self.rows, tuple):
            return self.rows or None
        return next((rows for name, rows in self.rows.items() if is_named(path, [name])), None)

    def ranks_of(self, path: str) -> list[float]:
        """Return every rank that a pattern states for `path`, in order; or the one for all."""
        return list(dict.fromkeys(self._matching("rank_pattern", path).values())) or [self.rank]

    def _pattern(self, name: str, path: str, default: float) -> float:
        """Return what PEFT's patterns give for `path`: the first match wins there."""
        found = self._matching(name, path)
        if len(set(found.values())) > 1 and self.pattern_order is None:
            raise InputError(refused("pattern-order", path, f"{name} {found}, ambiguous"))
        values = list(found.values()) or [default]
        return values[-1 if self.pattern_order == "last" else 0]

    def _matching(self, name: str, path: str) -> dict[str, float]:
        patterns: Mapping[str, float] = getattr(self, name)
        return self.matcher.matching(patterns, path)


class _Matcher:
    """Matches a stranger's expressions, within a limit of time for all of them together.

    Plain names, which are most of what patterns are, are looked up and not searched for.
    """

    def __init__(self) -> None:
        self.left = MOST_SECONDS

    def fullmatch(self, pattern: str, path: str) -> bool:
        """Return whether `pattern` matches the whole of `path`."""
        start = time.monotonic()
        try:
            if self.left <= 0:
                raise TimeoutError
            return regex.fullmatch(pattern, path, timeout=self.left) is not None
        except TimeoutError as error:
            self.left = 0.0
            raise InputError("the config's expressions take too long to match") from error
        finally:
            self.left -= time.monotonic() - start

    def matching(self, patterns: Mapping[str, T], path: str) -> dict[str, T]:
        """Return those of `patterns` that match `path` or a dotted end of it, in their order."""
        parts = path.split(".")
        ends = {".".join(parts[index:]) for index in range(len(parts))} | {"^" + path}
        found = {}
        for pattern, value in patterns.items():
            name = _literal(pattern)
            if name in ends if name else self.fullmatch(rf"(.*\.)?({pattern})", path):
                found[pattern] = value
        return found


def _literal(pattern: str) -> str | None:
    """Return the name that `pattern` spells, or None where it is more than a name."""
    name = pattern.replace("\\.", ".").replace("\\-", "-")
    plain = _PLAIN.fullmatch(name) and name.count(".") == pattern.count("\\.")
    return name if plain else None


def parse(config: Mapping[str, Any], reading: Reading) -> PeftConfig:
    """Return what `config` says.

    Raises:
        InputError: with every fault of the config: refused methods, unknown fields that are set,
            values of the wrong kind.
    """
    ada = config.get("peft_type") == "ADALORA"
    if faults := [*_method_faults(config), *_value_faults(config, ada=ada)]:
        raise InputError(listed("the config cannot be used", faults))
    init = config.get("init_lora_weights")
    parts = ["rslora" if config.get("use_rslora") else "adalora" if ada else "lora"]
    parts += ["dora"] * bool(config.get("use_dora")) + ["kasa"] * bool(config.get("kasa_config"))
    parts += [str(init).lower()] * (isinstance(init, str) and init.lower() in ("pissa", "olora"))
    targets = config.get("target_modules")
    rows = config.get("trainable_token_indices") or ()
    return PeftConfig(
        rank=int(config["init_r" if ada else "r"]),
        alpha=float(config["lora_alpha"]),
        variant="+".join(parts),
        rank_pattern={} if ada else config.get("rank_pattern") or {},
        alpha_pattern={} if ada else config.get("alpha_pattern") or {},  # PEFT has none there
        pattern_order=reading.pattern_order,
        target_modules=targets if isinstance(targets, str | None) else tuple(map(str, targets)),
        target_parameters=tuple(config.get("target_parameters") or ()),
        rows={k: tuple(v) for k, v in rows.items()} if isinstance(rows, dict) else tuple(rows),
        lora_bias=bool(config.get("lora_bias")),
        blocks=config.get("use_bdlora") or {},
        enabled=tuple(config.get("enable_lora") or ()),
        expert_b=reading.expert_b or _LAYOUTS.get(config.get("lora_B_layout") or "", "rank-major"),
    )


def architecture_of(config: Mapping[str, Any]) -> str | None:
    """Return the transformers class that PEFT recorded where no task said it."""
    mapping = config.get("auto_mapping")
    if config.get("task_type") or not isinstance(mapping, dict):
        return None
    name, library = mapping.get("base_model_class"), mapping.get("parent_library")
    of_transformers = isinstance(library, str) and library.startswith("transformers.models.")
    return name if of_transformers and isinstance(name, str) else None


def is_unmarked_unsloth(config: Mapping[str, Any]) -> bool:
    """Return whether Unsloth wrote the config without saying how it orders experts' lora_B."""
    mapping = config.get("auto_mapping")
    by_unsloth = isinstance(mapping, dict) and "unsloth_fixed" in mapping
    return by_unsloth and not config.get("lora_B_layout")


def is_residual(config: Mapping[str, Any]) -> bool:
    """Return whether training began by changing the base in a way that cannot be done again."""
    init = config.get("init_lora_weights")
    return isinstance(init, str) and init.lower().startswith(_RESIDUAL)


def changes_base(config: Mapping[str, Any]) -> bool:
    """Return whether training began by changing the base, in whatever way."""
    init = config.get("init_lora_weights")
    return isinstance(init, str) and init.lower() not in _INITS


def kept(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that a config written from this adapter keeps."""
    defaults: tuple[Any, ...] = (None, False, {}, [])
    found = {name: config[name] for name in _KEPT if config.get(name) not in defaults}
    if found.get("init_lora_weights") is True:
        del found["init_lora_weights"]
    return found


def _method_faults(config: Mapping[str, Any]) -> list[str]:
    faults = [refused(case, found=name) for name, case in _REFUSED.items() if config.get(name)]
    kind = config.get("peft_type", "LORA")
    if kind not in ("LORA", "ADALORA"):
        faults.append(refused("peft-type", found=f"peft_type is {kind!r}"))
        return faults
    unknown = config.keys() - _HARMLESS - _READ - _REFUSED.keys()
    faults += [
        refused("unknown-field", found=f"{name} is {_short(config[name])}")
        for name in sorted(unknown)
        if config[name]
    ]
    init = config.get("init_lora_weights")
    known = (*_INITS, "pissa", "olora")
    if isinstance(init, str) and init.lower() not in known and not is_residual(config):
        faults.append(f"init_lora_weights is {init!r}; expected one of {', '.join(known)}")
    return faults


def _value_faults(config: Mapping[str, Any], *, ada: bool) -> list[str]:
    rank, alpha = "init_r" if ada else "r", config.get("lora_alpha")
    faults = []
    if not _is_whole(config.get(rank)):
        faults.append(f"config: {rank} is {_short(config.get(rank))}; expected a number above 0")
    if not _is_positive(alpha) and not (ada and alpha == 0):  # 0 means the rank to AdaLoRA
        faults.append(f"config: lora_alpha is {_short(alpha)}; expected a number above 0")
    faults += [] if ada else _pattern_faults(config)
    faults += [
        f"config: {name} is {_short(config[name])}; expected true or false"
        for name in _FLAGS
        if config.get(name) not in (None, False, True)
    ]
    faults += [
        f"config: {name} is {_short(config[name])}; expected a text"
        for name in _TEXTS
        if not isinstance(config.get(name), str | None)
    ]
    dropout = config.get("lora_dropout")
    if dropout is not None and not (_is_number(dropout) and 0 <= dropout < 1):
        faults.append(f"lora_dropout is {_short(dropout)}; expected 0 <= dropout < 1")
    faults += [
        f"config: {name} is {_short(config.get(name))}; expected {what}"
        for name, what, test in _SHAPES
        if config.get(name) and not test(config[name])
    ]
    return faults


def _pattern_faults(config: Mapping[str, Any]) -> list[str]:
    faults = []
    for name, test in (("rank_pattern", _is_whole), ("alpha_pattern", _is_positive)):
        patterns = config.get(name) or {}
        if not isinstance(patterns, dict) or not all(map(test, patterns.values())):
            text = _short(patterns)
            faults.append(f"config: {name} is {text}; expected patterns with numbers above 0")
        elif len(patterns) > MOST_PATTERNS:
            faults.append(f"config: {name} has {len(patterns)} patterns")
        else:
            faults += [
                f"config: {name} holds {_short(pattern)}, which is no regular expression of the "
                "plain kind"
                for pattern in patterns
                if not _is_expression(pattern)
            ]
    return faults


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) and item for item in value)


def _is_targets(value: object) -> bool:
    return isinstance(value, str) or _is_texts(value)


def _is_flags(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is bool for item in value)


def _is_indices(value: object) -> bool:
    whole = isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
    return whole and bool(value)


def _is_rows(value: object) -> bool:
    return _is_indices(value) or (isinstance(value, dict) and all(map(_is_indices, value.values())))


def _is_spans(value: object) -> bool:
    return isinstance(value, list) and all(
        _is_indices(span) and len(span) == 2 and span[0] < span[1] for span in value
    )


def _is_blocks(value: object) -> bool:
    return (
        isinstance(value, dict)
        and type(value.get("nblocks")) is int
        and value["nblocks"] > 0
        and all(_is_texts(value.get(f"target_modules_bd_{side}") or []) for side in "ab")
    )


_SHAPES = (
    ("target_modules", "names or one expression", _is_targets),
    ("target_parameters", "names of parameters", _is_texts),
    ("modules_to_save", "names of modules", _is_texts),
    ("trainable_token_indices", "indices of rows", _is_rows),
    ("layer_replication", "pairs of layer indices", _is_spans),
    ("use_bdlora", "blocks with their number", _is_blocks),
    ("kasa_config", "an object", lambda v: isinstance(v, dict)),
    ("enable_lora", "a list of flags", _is_flags),
    ("lora_B_layout", " or ".join(_LAYOUTS), lambda v: str(v) in _LAYOUTS),
)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# Syntax that `re` and `regex` read differently, or that one of them does not know.
_ODD = re.compile(
    r"\(\?(?![:=!]|<[=!])|\[\[|[&|~-]{2}|\{(?!\d+(,\d*)?\})|[*+?}]\+|\\(?![dDwWsSbB\W])"
)


def _is_expression(pattern: object) -> bool:
    """Return whether `pattern` is an expression that means the same wherever it is matched."""
    if not isinstance(pattern, str) or _ODD.search(pattern):
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, Warning, RecursionError, OverflowError):
        return False
    return True


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_positive(value: object) -> bool:
    return _is_number(value) and 0 < value < LARGEST  # type: ignore[operator]


def _is_whole(value: object) -> bool:
    return _is_positive(value) and int(value) == value  # type: ignore[call-overload]
