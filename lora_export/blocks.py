"""What a plan makes of each tensor: the files to write, and their tensors in blocks of rows.

A block is a few rows of one tensor, small enough to stay in a core's own cache from the reading to
the writing. Where an update's formula needs all of a tensor at once, the block is the tensor.
"""

import functools
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from lora_export import rounding, storage, variants
from lora_export.architecture import stack
from lora_export.arithmetic import LowRank, scratch
from lora_export.plan import BIAS, ROWS, MergePlan, Part, Step
from lora_export.records import CONV, LINEAR, Adapter, Array, Factors, is_float
from lora_export.storage import Checkpoint, TensorInfo, dtype_name

BLOCK_BYTES = 2**20  # of a block as it is stored


@dataclass(frozen=True)
class OutputFile:
    """A safetensors file to write: its header, and where each tensor goes."""

    name: str
    header: bytes
    places: tuple[tuple[Step, int], ...]  # offset of each tensor in the file
    size: int


# ---------------------------------------------------------------- layout


def layout(
    plan: MergePlan, checkpoint: Checkpoint, shard_bytes: int | None = None
) -> tuple[OutputFile, ...]:
    """Return the files of the output: the base's own, or as many as `shard_bytes` asks for.

    A file that holds the same tensors as the base's gets the base's header, byte for byte.
    """
    if shard_bytes is None:
        groups = {
            shard: steps
            for shard in checkpoint.shards
            if (steps := [step for step in plan.steps if step.shard == shard])
        }
    else:
        groups = _packed(plan.steps, shard_bytes)
    return tuple(_output_file(name, steps, checkpoint) for name, steps in groups.items())


def _packed(steps: Iterable[Step], most: int) -> dict[str, list[Step]]:
    """Return `steps` in shards of at most `most` bytes; a larger tensor gets one of its own."""
    shards: list[list[Step]] = [[]]
    room = most
    for step in steps:
        if step.size > room and shards[-1]:
            shards.append([])
            room = most
        shards[-1].append(step)
        room -= step.size
    count = len(shards)
    names = [storage.SINGLE] if count == 1 else [
        f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)
    ]  # fmt: skip
    return dict(zip(names, shards, strict=True))


def _output_file(name: str, steps: list[Step], checkpoint: Checkpoint) -> OutputFile:
    tensors = [(step.name, step.dtype, step.shape) for step in steps]
    own = checkpoint.metadata.get(name, checkpoint.metadata[checkpoint.shards[0]])
    metadata = {"format": "pt", **own}
    entries = storage.header_entries(tensors)
    header = storage.header_bytes(entries, metadata)
    if name in checkpoint.shards:
        as_it_was = storage.raw_header(checkpoint.root / name)
        if json.loads(as_it_was[8:]) == json.loads(header[8:]):
            header = as_it_was
    places = [(step, len(header) + entries[step.name]["data_offsets"][0]) for step in steps]
    size = len(header) + sum(step.size for step in steps)
    return OutputFile(name, header, tuple(places), size)


# ---------------------------------------------------------------- what becomes of a block


# (rows of the base, the same rows of the output, the piece's row that meets the first) -> count of
# elements that came out infinite or NaN
_Apply = Callable[[Array, Array, int], int]


@dataclass(frozen=True)
class _Piece:
    """What one update does to a region of a tensor, the tensor seen as rows of one width."""

    rows: range
    columns: slice
    apply: _Apply
    is_whole: bool = False  # the formula needs all rows at once

    def covers(self, rows: range, width: int) -> bool:
        """Return whether nothing of these rows lies outside of the region."""
        inside = self.rows.start <= rows.start and rows.stop <= self.rows.stop
        return inside and self.columns.indices(width) == (0, width, 1)


def _float64(array: Array) -> Array:
    return array.astype(np.float64)


def _factors(part: Part, pair: Factors, expert: int) -> tuple[Array, Array]:
    """Return left and right, whose product is the update without its scale, as (out, in)."""
    outs, ins = slice(*(part.outs or (None,))), slice(*(part.ins or (None,)))
    a, b = (_float64(side[expert]) for side in pair.matrices())
    if pair.diagonal is not None:
        b = b * _float64(pair.diagonal)
    return b[outs], a[:, ins]


class _Pieces:
    """The pieces of one step; `kept` is the dtype in which the base stores the tensor."""

    def __init__(self, step: Step, plan: MergePlan, adapter: Adapter, kept: str) -> None:
        self.step, self.plan, self.adapter, self.kept = step, plan, adapter, kept
        pairs = [adapter.modules.get(part.module) for part in step.parts]
        kind = CONV if any(pair and pair.kind == CONV for pair in pairs) else LINEAR
        self.view = stack(step.shape, kind)  # experts, rows, columns
        self.found = self._all()

    def _all(self) -> list[_Piece]:
        found: list[_Piece] = []
        for part in self.step.parts:
            pair = self.adapter.modules.get(part.module)
            if part.what == ROWS:
                found += self._rows(part)
            elif pair is None:
                raise AssertionError(part.module)
            elif pair.is_zero and not variants.changes_base(self.plan.variant):
                continue  # adding nothing would still turn -0 into 0
            elif part.what == BIAS:
                found.append(self._bias(pair))
            else:
                found += self._weights(part, pair)
        return found

    def _rows(self, part: Part) -> Iterator[_Piece]:
        trained = self.adapter.rows[part.module]
        for index, value in zip(trained.indices, _float64(trained.values), strict=True):
            row = rounding.rounded(value, self.step.dtype)

            def place(_: Array, out: Array, _first: int, row: Array = row) -> int:
                out[:] = row
                return _count_bad(row)

            yield _Piece(range(index, index + 1), slice(None), place)

    def _bias(self, pair: Factors) -> _Piece:
        assert pair.bias is not None
        update, dtype = pair.scale * _float64(pair.bias).reshape(-1, 1), self.step.dtype

        def add(stored: Array, out: Array, first: int) -> int:
            exact = _float64(stored) + update[first : first + len(stored)]
            out[:] = rounding.rounded(exact, dtype)
            return _count_bad(out)

        return _Piece(range(len(update)), slice(None), add)

    def _weights(self, part: Part, pair: Factors) -> Iterator[_Piece]:
        experts, rows, columns = self.view
        box = part.box or ((0, experts), (0, rows), (0, columns))
        start = part.experts[0] if part.experts else 0
        for index, expert in enumerate(range(*box[0])):
            region = range(expert * rows + box[1][0], expert * rows + box[1][1])
            yield self._weight(part, pair, start + index, region, slice(*box[2]))

    def _weight(
        self, part: Part, pair: Factors, expert: int, region: range, columns: slice
    ) -> _Piece:
        # No closure holds `self`, which holds the closures: a tensor's factors would stay in memory
        # until Python looks for cycles.
        variant, dtype, kept = self.plan.variant, self.step.dtype, self.kept
        changes_base = pair.kind == LINEAR and variants.changes_base(variant)
        if pair.magnitude is None and not changes_base:
            return _Piece(region, columns, self._sum(part, pair, expert, columns))
        factors = functools.cache(lambda: _factors(part, pair, expert))

        def merge(stored: Array, out: Array, first: int) -> int:
            left, right = factors()
            weight = _float64(stored[:, columns])
            mine = slice(first, first + len(stored))
            if part.transposed:  # then all rows are here
                weight = weight.T
            else:
                left = left[mine]
            if changes_base:
                if not np.isfinite(weight).all():  # what no decomposition takes
                    return weight.size
                base = variants.base(variant, weight, pair.scale, pair.rank)
                weight = _float64(rounding.rounded(base, kept))
            magnitude = None
            if pair.magnitude is not None:
                magnitude = _float64(pair.magnitude)[slice(*(part.outs or (None,)))]
                magnitude = magnitude if part.transposed else magnitude[mine]
            exact = variants.merged(variant, weight, pair.scale * (left @ right), magnitude)
            result = rounding.rounded(np.asarray(exact), dtype)
            out[:, columns] = result.T if part.transposed else result
            return _count_bad(result)

        return _Piece(region, columns, merge, is_whole=changes_base or part.transposed)

    def _sum(self, part: Part, pair: Factors, expert: int, columns: slice) -> _Apply:
        """Return what adds a low-rank update; its factors are prepared when the first rows come."""
        dtype = self.step.dtype

        @functools.cache
        def update() -> LowRank:
            left, right = _factors(part, pair, expert)
            if part.transposed:
                left, right = right.T, left.T
            return LowRank(left, right, pair.scale, dtype)

        first_column = columns.start or 0
        return lambda stored, out, first: update().add(stored, out, first, first_column)


def _count_bad(array: Array) -> int:
    return int((~np.isfinite(array)).sum())


def _converted(stored: Array, dtype: str) -> Array:
    """Return a copy of `stored` in `dtype`, rounded once."""
    target = rounding.DTYPES[dtype]
    if stored.dtype == target:
        return stored.copy()
    return rounding.rounded(_float64(stored), dtype)


@dataclass(frozen=True)
class Block:
    """Some rows of a tensor: what to read, what becomes of it, and where that goes."""

    source: tuple[int, int] | None  # start and end in the base's shard; None: nothing is read
    start: int  # in the tensor's bytes
    make: Callable[[Array | None], tuple[Array, int]]  # also counts infinite and NaN elements


@dataclass(frozen=True)
class Computed:
    """A tensor of the output that is not a copy of the base's, cut into blocks of rows."""

    step: Step
    source: TensorInfo | None
    blocks: tuple[Block, ...]


def computed(
    step: Step, plan: MergePlan, adapter: Adapter, checkpoint: Checkpoint
) -> Computed | None:
    """Return how the tensor of `step` is computed; None where it is the base's, byte for byte."""
    if step.source is not None:
        info = checkpoint.tensors[step.source]
        pieces = _Pieces(step, plan, adapter, info.dtype)
        if not pieces.found and step.dtype == info.dtype:
            return None
        return Computed(step, info, tuple(_blocks(step, info, pieces)))
    own = np.ascontiguousarray(adapter.replaced[str(step.placed)])
    if not is_float(own):
        return Computed(step, None, (Block(None, 0, lambda raw: (own, 0)),))
    pieces = _Pieces(step, plan, adapter, dtype_name(own))
    return Computed(step, None, tuple(_blocks(step, own, pieces)))


def _blocks(step: Step, start: TensorInfo | Array, pieces: _Pieces) -> Iterator[Block]:
    """Return blocks of nearly the same size."""
    kept = start.dtype if isinstance(start, TensorInfo) else dtype_name(start)
    experts, rows, width = pieces.view
    rows *= experts
    given, made = (width * storage.DTYPE_BYTES[dtype] for dtype in (kept, step.dtype))
    is_whole = any(piece.is_whole for piece in pieces.found)
    count = 1 if is_whole else max(-(-rows * given // BLOCK_BYTES), 1)
    edges = [rows * i // count for i in range(count + 1)]
    for first, stop in itertools.pairwise(edges):
        if first == stop:
            continue

        def make(raw: Array | None, first: int = first, stop: int = stop) -> tuple[Array, int]:
            if raw is not None:
                block = raw.view(rounding.DTYPES[kept]).reshape(stop - first, width)
            else:
                assert not isinstance(start, TensorInfo)
                block = start.reshape(rows, width)[first:stop]
            return _merged(block, first, pieces.found, step.dtype)

        source = None
        if isinstance(start, TensorInfo):
            source = (start.start + first * given, start.start + stop * given)
        yield Block(source, first * made, make)


def _merged(block: Array, first: int, pieces: list[_Piece], dtype: str) -> tuple[Array, int]:
    """Return rows `first` and on of the output, and how many elements are infinite or NaN."""
    stop = first + len(block)
    mine = [p for p in pieces if p.rows.start < stop and p.rows.stop > first]
    if len(mine) == 1 and mine[0].covers(range(first, stop), block.shape[1]):
        out = scratch("block", block.size, rounding.DTYPES[dtype]).reshape(block.shape)
    else:
        out = _converted(block, dtype)
    bad = 0
    with np.errstate(over="ignore", invalid="ignore"):  # counted
        for piece in mine:
            low, high = max(piece.rows.start, first), min(piece.rows.stop, stop)
            here = slice(low - first, high - first)
            bad += piece.apply(block[here], out[here], low - piece.rows.start)
    return out, bad if block.dtype == out.dtype else _count_bad(out)
