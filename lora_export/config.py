"""`LoraConfig`, and which modules its patterns select. Pure names and numbers; imports no torch."""

import difflib
import fnmatch
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from lora_export.errors import InputError

ALL_LINEAR = "all-linear"
INITS = ("kaiming", "gaussian")
# Variants with a layer of their own, alone or joined by "+"; the others are merged only.
TRAINABLE = ("lora", "rslora", "dora")
T = TypeVar("T")


@dataclass(frozen=True)
class LoraConfig:
    r"""What to adapt, and how. Checks itself; raises `InputError`.

    A target selects modules by path. It is one of: `all-linear`; a name or the dotted end of a
    path (`query`, `attention.self.query`); a glob over the whole path (`*.layer.[0-3].*.query`);
    a regular expression over the whole path (`re:.*\.(query|value)`). The keys of `rank_pattern`
    and `alpha_pattern` are patterns of the same kinds.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = (ALL_LINEAR,)
    exclude: tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None  # only these layer indices; None means every layer
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    variant: str = "lora"
    init: str = "kaiming"  # of A; B starts at zero
    modules_to_save: tuple[str, ...] = ()  # whole modules that are trained and stored: the head

    def __post_init__(self) -> None:
        for name in ("targets", "exclude", "modules_to_save"):
            object.__setattr__(self, name, _strings(name, getattr(self, name)))
        if self.layers is not None:
            object.__setattr__(self, "layers", _indices(self.layers))
        for name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(getattr(self, name), Mapping):
                raise InputError(f"{name} is {getattr(self, name)!r}; expected a mapping")
        for rank in (self.rank, *self.rank_pattern.values()):
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise InputError(f"rank is {rank!r}; expected a whole number of at least 1")
        for alpha in (self.alpha, *self.alpha_pattern.values()):
            if not (_is_number(alpha) and math.isfinite(alpha) and alpha > 0):
                raise InputError(f"alpha is {alpha!r}; expected a number above 0")
        if not (_is_number(self.dropout) and 0 <= self.dropout < 1):
            raise InputError(f"dropout is {self.dropout!r}; expected 0 <= dropout < 1")
        if not is_trainable(self.variant):
            known = ", ".join(TRAINABLE)
            raise InputError(
                f"variant is {self.variant!r}; expected one of {known}, or several joined by '+'"
            )
        if self.init not in INITS:
            raise InputError(f"init is {self.init!r}; expected one of {', '.join(INITS)}")
        if not self.targets:
            raise InputError("targets is empty; name modules, or 'all-linear'")
        for pattern in (*self.targets, *self.exclude, *self.rank_pattern, *self.alpha_pattern):
            matches(pattern, "")  # raises on a bad regular expression

    def rank_of(self, path: str) -> int:
        """Return the rank for the module at `path`."""
        return _lookup("rank_pattern", self.rank_pattern, path, self.rank)

    def alpha_of(self, path: str) -> float:
        """Return alpha for the module at `path`."""
        return _lookup("alpha_pattern", self.alpha_pattern, path, self.alpha)

    def selects(self, path: str) -> bool:
        """Return whether the module at `path` is a target, given that it can be adapted."""
        if self.layers is not None and layer_index(path) not in self.layers:
            return False
        if any(matches(pattern, path) for pattern in self.exclude):
            return False
        return any(pattern == ALL_LINEAR or matches(pattern, path) for pattern in self.targets)


def is_trainable(variant: str) -> bool:
    """Return whether every part of `variant` has a layer that trains it."""
    return set(variant.split("+")) <= {*TRAINABLE}


def matches(pattern: str, path: str) -> bool:
    """Return whether `pattern` (suffix, glob or `re:` expression) selects `path`."""
    if pattern.startswith("re:"):
        try:
            return re.fullmatch(pattern[3:], path) is not None
        except re.error as error:
            raise InputError(f"{pattern!r} is not a regular expression: {error}") from error
    if any(character in pattern for character in "*?["):
        return fnmatch.fnmatchcase(path, pattern)
    return is_named(path, [pattern])


def is_named(path: str, names: Iterable[str]) -> bool:
    """Return whether one of `names` is `path` or a dotted end of it."""
    return any(path == name or path.endswith("." + name) for name in names)


def layer_index(path: str) -> int | None:
    """Return the first number among the components of `path`, which is the layer's index."""
    return next((int(part) for part in path.split(".") if part.isdigit()), None)


def select(config: LoraConfig, paths: Iterable[str]) -> tuple[str, ...]:
    """Return those of `paths` that `config` selects, in the given order.

    Raises:
        InputError: nothing is selected, or one of the targets selects nothing; the message names
            the nearest modules.
    """
    known = list(paths)
    idle = [t for t in config.targets if t != ALL_LINEAR and not _any(t, known, matches)]
    if idle:
        raise InputError("; ".join(no_match(pattern, known) for pattern in idle))
    chosen = tuple(path for path in known if config.selects(path))
    if not chosen:
        raise InputError(
            f"targets {list(config.targets)} with layers {config.layers} and exclude "
            f"{list(config.exclude)} select none of the {len(known)} linear modules"
        )
    patterns = {*config.rank_pattern, *config.alpha_pattern}
    if unused := [p for p in patterns if not _any(p, chosen, matches)]:
        raise InputError("; ".join(no_match(pattern, chosen) for pattern in sorted(unused)))
    return chosen


def no_match(pattern: str, paths: Iterable[str]) -> str:
    """Return a message that `pattern` matches nothing, with the nearest module paths."""
    known = list(paths)
    return f"no linear module matches {pattern!r}; the model has e.g. {nearest(pattern, known)}"


def nearest(name: str, candidates: Iterable[str], most: int = 3) -> str:
    """Return the `most` candidates that look most like `name`, by whole path or by its end."""
    known = list(candidates)
    if not known:
        return "none"
    width = name.count(".") + 1
    by_end: dict[str, str] = {}
    for path in known:
        by_end.setdefault(".".join(path.split(".")[-width:]), path)
    close = difflib.get_close_matches(name, by_end, n=most, cutoff=0.5)
    return ", ".join([by_end[end] for end in close] or list(by_end.values())[:most])


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _indices(layers: object) -> tuple[int, ...]:
    found = tuple(layers) if isinstance(layers, Iterable) else (layers,)
    if all(isinstance(index, int) and index >= 0 for index in found):
        return found
    raise InputError(f"layers is {layers!r}; expected indices of layers")


def _any(pattern: str, paths: Iterable[str], test: Callable[[str, str], bool]) -> bool:
    return any(test(pattern, path) for path in paths)


def _lookup(name: str, patterns: Mapping[str, T], path: str, default: T) -> T:
    found = {pattern: value for pattern, value in patterns.items() if matches(pattern, path)}
    if len(set(found.values())) > 1:
        # PEFT takes the first match, but its files are written with sorted keys, so which one is
        # first changes when an adapter is saved.
        raise InputError(f"{name} is ambiguous for {path}: {found}")
    return next(iter(found.values()), default)


def _strings(name: str, value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    if isinstance(value, Iterable):
        values = tuple(value)
        if all(isinstance(item, str) and item for item in values):
            return values
    raise InputError(f"{name} is {value!r}; expected names of modules")
