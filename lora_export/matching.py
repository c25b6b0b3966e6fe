"""Tensors found among others by their bits, and held to their names. No torch.

Names inside an artifact may be anybody's, so a tensor is looked for by its content. But what bears
the name of a tensor has to be that tensor: two that are swapped would otherwise both be found. A
tensor that is not there is compared with what is most like it.
"""

import itertools
import math
import operator
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from blake3 import blake3

from lora_export import registry
from lora_export.records import Array, Placement, is_float, widened

Shape = tuple[int, ...]
Tensors = Callable[[], Iterable[tuple[str, Array]]]  # of an artifact, in the same order every time
AS_IT_IS, TRANSPOSED, MISSING = "as it is", "transposed", "missing"
ONE_ADDED = "one added"  # the scale of a norm that multiplies by 1 + weight
REPEATED = "repeated"  # the rows of a table, as constant indices choose them
IN_BYTES = "in eight bits"
UNKNOWN = "in integers"  # of which no name tells whose they are
OTHER_SHAPE = "of another shape"
_NARROW = {"fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
_SAMPLE = 4096  # elements by which the most similar tensor is chosen
_MOST_VALUES = 2**17  # of a table, or of what is repeated of it
_LEAST_COPY = 16  # elements
_MOST_PARTS = 16  # of a tensor into which several were joined
# How `_onnx_schemes` names weights in eight bits, and their scales, one per column or row.
_BYTES, _SCALE = "_int8", "_scale"
# A weight is divided by its scale in float32 before it is rounded, to 127 at most.
_HALF_STEP = 0.5 + 127 * 2.0**-23


@dataclass(frozen=True)
class Wanted:
    """A floating-point tensor that a merged model computes with."""

    name: str  # in the merged files; in the model, where those hold it in another form
    path: str  # in the model
    shape: Shape
    read: Callable[[], Array]  # in the dtype that the model has it in


@dataclass(frozen=True)
class _Held:
    """A floating-point constant of an artifact."""

    place: int  # among all its constants
    name: str
    shape: Shape
    content: bytes
    owner: str | None  # path of the tensor that it is named after


@dataclass(frozen=True)
class _Contents:
    """What an artifact holds, without the numbers."""

    held: list[_Held]
    integers: Mapping[str, int]  # path of a tensor -> place of its values in eight bits
    scales: Mapping[str, Array]  # path of a tensor -> the scales of these


@dataclass
class _Search:
    """A tensor that is not where it should be, and what is most like it so far."""

    wanted: Wanted
    places: Collection[int]  # of the constants that may be it
    named: tuple[str, ...]  # those of them that bear its name
    sample: Array
    values: bytes  # digest of what occurs in it
    score: tuple[float, float] = (math.inf, math.inf)
    best: tuple[int, str] | None = None  # a place, and how to look at what is there

    def consider(self, place: int, array: Array, values: bytes) -> None:
        """Remember what is at `place`, or a part of it, if it is the most similar so far."""
        for how, view in _views(array, self.wanted.shape, bool(self.named)):
            part = _sample(view)
            with np.errstate(all="ignore"):
                apart = np.nan_to_num(np.abs(part - self.sample), nan=np.inf).mean()
            score = (float(np.count_nonzero(_bits(part) != _bits(self.sample))), float(apart))
            if score < self.score:
                self.score, self.best = score, (place, how)
        more = array.size > math.prod(self.wanted.shape)  # as many are the same in another order
        if self.score[0] and more and values and values == self.values:
            self.score, self.best = (0, 0), (place, REPEATED)


def placements(
    artifact: str,
    precision: str,
    tensors: Tensors,
    wanted: Sequence[Wanted],
    used: Callable[[Iterable[str]], Collection[str]],
) -> tuple[Placement, ...]:
    """Return where an artifact has each of the `wanted` tensors, in their order.

    Tensors that it neither has nor needs are left out. Of an artifact in eight bits or less, those
    that are not there are `UNKNOWN`.

    Args:
        artifact: Its format.
        precision: Its precision, to which each tensor is rounded once.
        tensors: Called for its constants, as `exporters` describes them.
        wanted: The tensors to look for.
        used: Called with the paths of tensors that are not there; returns those that should be.
    """

    def read(each: Wanted) -> Array:
        return rounded(each.read(), _NARROW.get(precision, np.dtype(np.float32)))

    inside = _contents(tensors, {each.path for each in wanted})
    digests = {each.path: _digest(read(each)) for each in wanted}
    own: dict[str, list[_Held]] = defaultdict(list)
    same: dict[bytes, list[_Held]] = defaultdict(list)
    for one in inside.held:
        if one.owner is not None:
            own[one.owner].append(one)
        # What is named after another tensor is this one too only where the two are equal.
        if one.owner is None or digests[one.owner] == one.content:
            same[one.content].append(one)
    found: dict[str, Placement] = {}
    lost: list[Wanted] = []
    claimed: set[int] = set()
    for each in wanted:
        if each.path in inside.integers and each.path not in own:
            continue
        for how, digest, shape in _forms(each, digests[each.path], read, each.path in own):
            candidates = own.get(each.path) or same[digest]
            hits = [o for o in candidates if o.content == digest and _refines(o.shape, shape)]
            if hits and (hits == candidates or each.path not in own):
                found[each.path] = _placement(artifact, each, [o.name for o in hits], how)
                claimed |= {one.place for one in hits}
                break
        else:
            lost.append(each)
    strangers = [each for each in lost if each.path not in own]
    if precision in registry.CALIBRATED:
        found |= {each.path: _placement(artifact, each, (), UNKNOWN) for each in strangers}
        strangers = []
    needed = used([each.path for each in strangers]) if strangers else ()
    rest = {one.place for one in inside.held} - claimed
    searches = [
        _search(each, read(each), digests[each.path], own.get(each.path, []), rest)
        for each in lost
        if each.path in own or each.path in needed
    ]
    found |= _nearest(artifact, tensors, searches, read)
    if not searches:
        large = {one.place for one in inside.held if math.prod(one.shape) >= _LEAST_COPY}
        found |= _damaged_copies(artifact, tensors, rest & large, wanted, read)
    found |= _in_bytes(artifact, tensors, [e for e in wanted if e.path not in own], inside)
    return tuple(found[each.path] for each in wanted if each.path in found)


def rounded(array: Array, dtype: np.dtype[Any]) -> Array:
    """Return `array` in the floating-point `dtype`, rounded once."""
    with np.errstate(over="ignore"):
        return array if array.dtype == dtype else widened(array).astype(dtype)


def _contents(tensors: Tensors, paths: Collection[str]) -> _Contents:
    held, integers, scales = [], {}, {}
    for place, (name, array) in enumerate(tensors()):
        if is_float(array):
            held.append(_Held(place, name, array.shape, _digest(array), _owner(name, paths)))
        of_bytes, of_scale = (_owner(name.removesuffix(end), paths) for end in (_BYTES, _SCALE))
        if array.dtype == np.int8 and of_bytes:
            integers[of_bytes] = place
        elif name.endswith(_SCALE) and of_scale:
            scales[of_scale] = array
    return _Contents(
        held, {path: place for path, place in integers.items() if path in scales}, scales
    )


def _owner(name: str, paths: Collection[str]) -> str | None:
    """Return the longest of `paths` that `name` is, or ends with after a dot."""
    parts = name.split(".")
    ends = (".".join(parts[first:]) for first in range(len(parts)))
    return next((end for end in ends if end in paths), None)


def _forms(
    each: Wanted, digest: bytes, read: Callable[[Wanted], Array], named: bool
) -> Iterator[tuple[str, bytes, Shape]]:
    """Yield the forms in which an artifact may have a tensor: what to call them, digest, shape."""
    yield AS_IT_IS, digest, each.shape
    array = read(each)
    if array.ndim == 2 and not (named and array.shape[0] == array.shape[1]):
        yield TRANSPOSED, _digest(array.T), array.T.shape
    if array.ndim == 1 and not named:
        yield ONE_ADDED, _digest(widened(array) + 1), array.shape


def _search(
    each: Wanted, array: Array, digest: bytes, own: Sequence[_Held], rest: Collection[int]
) -> _Search:
    wrong = [one for one in own if one.content != digest] or own
    places = {one.place for one in wrong} or rest
    return _Search(each, places, tuple(o.name for o in wrong), _sample(array), _values(array))


def _nearest(
    artifact: str, tensors: Tensors, searches: Sequence[_Search], read: Callable[[Wanted], Array]
) -> dict[str, Placement]:
    """Return what is most like each tensor that is searched, and how far off it is."""
    possible = {place for search in searches for place in search.places}
    for place, (_, array) in enumerate(tensors() if searches else ()):
        values = _values(array) if place in possible else b""
        for search in searches:
            if place in search.places:
                search.consider(place, array, values)
    found = {}
    for search in searches:
        each, how = search.wanted, OTHER_SHAPE if search.named else MISSING
        differing = math.prod(each.shape)
        found[each.path] = _placement(artifact, each, search.named, how, differing, math.inf)
    for place, (name, array) in enumerate(tensors() if searches else ()):
        for search in searches:
            if search.best is None or search.best[0] != place:
                continue
            each, how = search.wanted, search.best[1]
            if how == REPEATED:
                found[each.path] = _placement(artifact, each, [name], how)
                continue
            view = dict(_views(array, each.shape, bool(search.named)))[how]
            found[each.path] = _placement(
                artifact, each, [name], how, *difference(view, read(each))
            )
    return found


def _damaged_copies(
    artifact: str,
    tensors: Tensors,
    rest: Collection[int],
    wanted: Sequence[Wanted],
    read: Callable[[Wanted], Array],
) -> dict[str, Placement]:
    """Return tensors that are there, and a second time with some elements changed.

    An artifact may have a weight as it is and transposed. What is left over once every tensor was
    found is such a copy if most elements agree, which numbers that vary do not do by chance.
    """
    found = {}
    for place, (name, array) in enumerate(tensors() if rest else ()):
        for each in wanted if place in rest else ():
            for how, view in _views(array, each.shape, named=False):
                whole = read(each)
                differing, largest = difference(view, whole)
                varied = len(np.unique(_bits(whole))) > whole.size / 2
                if varied and 0 < differing < whole.size / 2:
                    found[each.path] = _placement(artifact, each, [name], how, differing, largest)
    return found


def _in_bytes(
    artifact: str, tensors: Tensors, wanted: Sequence[Wanted], inside: _Contents
) -> dict[str, Placement]:
    """Return how many weights in eight bits are farther than half a step from what they were."""
    places = {inside.integers[e.path]: e for e in wanted if e.path in inside.integers}
    found = {}
    for place, (name, values) in enumerate(tensors() if places else ()):
        if place not in places:
            continue
        each = places[place]
        scale = inside.scales[each.path].astype(np.float64)
        array = widened(each.read()).astype(np.float64)
        errors = [
            np.abs(values * scale - view) for view in (array, array.T) if view.shape == values.shape
        ]
        far = [(int((~(error <= _HALF_STEP * scale)).sum()), error.max()) for error in errors]
        differing, largest = min(far, default=(array.size, math.inf))
        found[each.path] = _placement(artifact, each, [name], IN_BYTES, differing, largest)
    return found


def _placement(
    artifact: str,
    each: Wanted,
    found: Iterable[str],
    how: str,
    differing: int = 0,
    largest: float = 0,
) -> Placement:
    elements = math.prod(each.shape)
    return Placement(artifact, each.name, tuple(found), how, elements, differing, float(largest))


def _views(array: Array, shape: Shape, named: bool) -> Iterator[tuple[str, Array]]:
    """Yield `array`, its transpose and the parts of both that have the given shape.

    One that bears the name of a square tensor is not taken for its transpose.
    """
    if _refines(array.shape, shape):
        yield AS_IT_IS, array.reshape(shape)
    for turned in (False, True) if array.ndim == 2 else (False,):
        seen = array.T if turned else array
        if turned and seen.shape == shape and not (named and shape[0] == shape[1]):
            yield TRANSPOSED, seen
        axes = [
            i for i, size in enumerate(shape) if seen.ndim == len(shape) and seen.shape[i] != size
        ]
        if len(axes) != 1 or axes[0] > 1 or seen.shape[axes[0]] < shape[axes[0]]:
            continue
        axis, size = axes[0], shape[axes[0]]
        rows = "columns" if (axis == 1) != turned else "rows"
        for start in range(0, seen.shape[axis] - size + 1, size)[:_MOST_PARTS]:
            stop = start + size
            part = seen[:, start:stop] if axis == 1 else seen[start:stop]
            yield f"{rows} {start} to {stop}{f', {TRANSPOSED}' * turned}", part


def _refines(shape: Shape, other: Shape) -> bool:
    """Return whether one shape is the other with neighbouring axes joined."""
    a, b = ({1, *itertools.accumulate(each, operator.mul)} for each in (shape, other))
    return math.prod(shape) == math.prod(other) and (a <= b or b <= a)


def difference(found: Array, expected: Array) -> tuple[int, float]:
    """Return how many elements differ in a bit, and the largest absolute difference."""
    found, expected = widened(found), widened(expected)
    if found.dtype != expected.dtype:
        found, expected = found.astype(np.float64), expected.astype(np.float64)
    unequal = _bits(found) != _bits(expected)
    with np.errstate(all="ignore"):
        apart = np.abs(found[unequal].astype(np.float64) - expected[unequal])
    largest = float(np.nan_to_num(apart, nan=np.inf).max(initial=0))
    return int(np.count_nonzero(unequal)), largest


def _sample(array: Array) -> Array:
    """Return some elements of `array`, the same for every array of its shape."""
    return widened(array.flat[:: max(1, array.size // _SAMPLE)])


def _bits(array: Array) -> Array:
    return array.view(f"u{array.itemsize}")


def _digest(array: Array) -> bytes:
    """Return a digest of the numbers, half precision as float32, whatever their shape."""
    whole = np.ascontiguousarray(widened(array)).reshape(-1).view(np.uint8)
    return blake3(whole.data).digest()


def _values(array: Array) -> bytes:
    """Return a digest of which numbers occur; nothing where there are too many."""
    return _digest(np.unique(_bits(widened(array)))) if array.size <= _MOST_VALUES else b""
