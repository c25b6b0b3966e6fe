"""What an artifact has of each module of its model, found by its numbers in float64."""

import contextlib
import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from lora_export import exporters, models, registry
from lora_export.records import REFERENCE, Array, Artifact, Batch, ModuleOutput
from lora_export.stages import Subject, exact

# The limit of a module, in what computing in float32 costs it: in 40 architectures, rightly
# exported, none came to a half of this. At least what rounding eight constants costs, of its size.
MULTIPLE = 0.5
SAME = 8 * 2.0**-24
OUTPUT = "output"  # the kind of an output of the whole model
_PROBES = 64  # elements by which values are told apart before all elements are looked at


def module_outputs(
    subject: Subject, artifact: Artifact, path: Path, batch: Batch
) -> tuple[ModuleOutput, ...]:
    """Return the output of every module, as they run, and then of the model, beside the artifact's.

    What the artifact has of a module is found by its numbers: of all values that its graph computes
    in float64, the one that lies nearest, its axes in any order. So it needs no names, and works
    for the file of any exporter. Modules whose output is no tensor, nor begins with one, are not
    listed; one that runs twice is listed twice.

    Raises:
        ExportFailed: the graph cannot be evaluated.
    """
    inside = exporters.load(artifact.format).in_double(path)
    values, given = _Values(inside.values(batch.arrays)), inside.run(batch.arrays)
    watch, own = (_Watch(subject, each, batch) for each in in_both(subject))
    masks = list(subject.signature.attended(batch.arrays).values())

    def beside(call: _Call, wanted: Array, rounded: Array) -> ModuleOutput:
        places = _attended(wanted.shape, masks)
        expected = wanted.ravel()[places]
        if call.kind != OUTPUT:
            value, error = values.nearest(wanted, places)
        elif call.name in given and given[call.name].shape == wanted.shape:
            value, error = call.name, largest(given[call.name].ravel()[places] - expected)
        else:
            value, error = "", math.inf
        size, noise = float(np.abs(expected).max()), largest(rounded.ravel()[places] - expected)
        limit = max(MULTIPLE * noise, SAME * size)
        return ModuleOutput(artifact.format, call.name, value, error, size, limit, call.kind)

    def sound(place: int) -> bool:
        """Return whether the artifact has what goes into the module at `place`."""
        call, rounded = watch.calls[place], own.calls[place].given
        if call.given is None or rounded is None:
            return True
        return beside(call, call.given, rounded).agrees

    pairs = zip(watch.calls, own.calls, strict=True)
    found = [beside(call, call.output, other.output) for call, other in pairs]
    return _judged(found, watch.reached, sound)


def _judged(
    found: list[ModuleOutput],
    reached: Callable[[int], Iterable[int]],
    sound: Callable[[int], bool],
) -> tuple[ModuleOutput, ...]:
    """Excuse the modules that differ and are not at fault, up to the one that is."""
    agree = all(one.agrees for one in found if one.kind == OUTPUT)
    differing = [i for i, one in enumerate(found) if not one.agrees and one.kind != OUTPUT]
    inside = ""  # of modules around a fault: the path of one that lies inside of them
    for place in differing:
        one = found[place]
        if not agree and (not inside or inside.startswith(f"{one.module}.")):
            after = [] if inside else [found[later] for later in reached(place)]
            at_fault = bool(inside) or (
                any(later.kind == OUTPUT for later in after)
                and not any(later.agrees for later in after)
            )
            if at_fault and sound(place):
                break
            inside = one.module if at_fault else inside
        found[place] = replace(one, excused=True)
    return tuple(found)


def in_both(subject: Subject) -> tuple[nn.Module, nn.Module]:
    """Return the merged model in float64 and in float32."""
    return exact(subject.model), models.in_precision(subject.model, registry.FULL)


class _Call(NamedTuple):
    """A call of a module, or an output of the model.

    `output` and `given` are the first floats that come out of it and go in.
    """

    name: str
    kind: str
    output: Array
    given: Array | None


class _Watch:
    """Runs a model and sees what its modules do.

    Attributes:
        calls: The calls of its modules, as they end, and then its outputs.
    """

    def __init__(self, subject: Subject, model: nn.Module, batch: Batch) -> None:
        self.model, self.batch = model, batch
        self.runner = subject.runner(REFERENCE, model)
        self.calls = self._run()

    def reached(self, place: int) -> Iterator[int]:
        """Yield the places in `calls` of what is computed from the module there."""
        again = self._run(place)
        for later in range(place + 1, len(self.calls)):
            known, new = self.calls[later].output, again[later].output
            if not np.array_equal(known, new, equal_nan=True):
                yield later

    def _run(self, disturbed: int = -1) -> list[_Call]:
        """Return `calls`, where the output of one is changed before it is handed on."""
        calls: list[_Call] = []

        def watched(name: str) -> Callable[..., Any]:
            def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
                floats = _first(output)
                if floats is None:
                    return None
                given = next(
                    (g for g in map(_first, (*args, *kwargs.values())) if g is not None), None
                )
                calls.append(
                    _Call(
                        name,
                        type(module).__name__,
                        floats.numpy().copy(),
                        None if given is None else given.numpy().copy(),
                    )
                )
                return _disturbed(output) if len(calls) == disturbed + 1 else None

            return hook

        with contextlib.ExitStack() as hooks:
            for name, module in self.model.named_modules():
                if name:  # of the model itself it is the outputs
                    handle = module.register_forward_hook(watched(name), with_kwargs=True)
                    hooks.callback(handle.remove)
            outputs = self.runner.run(self.batch.arrays)
        return calls + [
            _Call(name, OUTPUT, array, None) for name, array in outputs.items() if array.size
        ]


class _Values:
    """Values of a graph, to be found by their numbers."""

    def __init__(self, values: Mapping[str, Array]) -> None:
        groups: dict[tuple[int, ...], list[str]] = {}
        for name, array in values.items():
            groups.setdefault(tuple(n for n in array.shape if n != 1), []).append(name)
        self.groups = {
            shape: (names, np.stack([values[name].ravel() for name in names]))
            for shape, names in groups.items()
        }

    def nearest(self, array: Array, places: Array) -> tuple[str, float]:
        """Return which value is nearest to `array` at its flat `places`, and its deviation there.

        It has as many elements, and its axes are taken in any order. A few elements tell which
        cannot be the nearest; the others are compared whole.
        """
        wanted = array.ravel()[places]
        few = np.unique(np.linspace(0, len(places) - 1, _PROBES).astype(int))
        bounds: list[tuple[float, int, tuple[int, ...], tuple[int, ...], int]] = []
        for shape, (_, rows) in self.groups.items():
            if rows.shape[1] != array.size:
                continue
            for order in itertools.permutations(range(len(shape))):
                apart = np.abs(rows[:, _turned(shape, order, places[few])] - wanted[few])
                for row, bound in enumerate(np.nan_to_num(apart, nan=np.inf).max(1)):
                    bounds.append((float(bound), len(bounds), shape, order, row))
        best, name = math.inf, ""
        for bound, _, shape, order, row in sorted(bounds):
            if bound >= best:
                break
            names, rows = self.groups[shape]
            error = largest(rows[row, _turned(shape, order, places)] - wanted)
            if error < best:
                best, name = error, names[row]
        return name, best


def _turned(shape: Sequence[int], order: Sequence[int], places: Array) -> Array:
    """Return where the flat `places` of a transposed array lie in the array of this `shape`."""
    if list(order) == sorted(order):
        return places
    at = np.unravel_index(places, [shape[axis] for axis in order])
    by_axis = dict(zip(order, at, strict=True))
    return np.ravel_multi_index([by_axis[axis] for axis in range(len(shape))], tuple(shape))


def _attended(shape: tuple[int, ...], masks: Sequence[Array]) -> Array:
    """Return the flat places of an array that count: those of padding do not.

    Its tokens are found by the lengths of its axes: those of a mask, batch first, or one of both.
    """
    counts = np.ones(shape, bool)
    for mask in masks:
        flat = mask.reshape(math.prod(mask.shape[:-1]), mask.shape[-1])
        if shape[:1] == (mask.size,):
            counts &= _spread(mask.ravel(), shape, (0,))
        elif shape[:1] == flat.shape[:1] and shape[1:].count(flat.shape[1]) == 1:
            counts &= _spread(flat, shape, (0, 1 + shape[1:].index(flat.shape[1])))
    return np.flatnonzero(counts)


def _spread(mask: Array, shape: Sequence[int], axes: Sequence[int]) -> Array:
    """Return `mask`, whose axes are these of `shape`, so that it broadcasts to that."""
    return mask.reshape([size if axis in axes else 1 for axis, size in enumerate(shape)])


def largest(apart: Array) -> float:
    """Return the largest deviation, infinity where one is NaN."""
    found = float(np.abs(apart).max(initial=0))
    return found if found <= math.inf else math.inf


def _first(output: Any) -> torch.Tensor | None:
    """Return the floats that the output of a module is, or begins with."""
    while isinstance(output, tuple | list | dict) and output:
        output = next(iter(output.values() if isinstance(output, dict) else output))
    usable = isinstance(output, torch.Tensor) and output.is_floating_point() and output.numel()
    return output if usable else None


def _disturbed(output: Any) -> Any:
    """Return the output of a module with its first floats moved by up to a thousandth."""
    if isinstance(output, torch.Tensor):
        waves = torch.arange(output.numel(), dtype=output.dtype).cos().view(output.shape)
        return output + 1e-3 * (output.abs().max() or 1) * waves
    if isinstance(output, dict):
        found = copy.copy(output)
        name = next(iter(found))
        found[name] = _disturbed(found[name])
        return found
    return type(output)([_disturbed(output[0]), *output[1:]])
