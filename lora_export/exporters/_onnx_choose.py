"""Which layers of an ONNX graph can have narrow weights, and at which ranges of their inputs.

Both are found by running the graph on real inputs: a layer is as sensitive as the answers are when
it alone is narrow.
"""

import contextlib
import json
import math
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from lora_export.compare import divergence, probabilities, turn
from lora_export.environment import cores
from lora_export.errors import InputError
from lora_export.exporters import _onnx_translate
from lora_export.exporters._onnx_graph import Model, Node
from lora_export.exporters._onnx_layers import features, linears
from lora_export.exporters._onnx_schemes import (
    Blocks,
    Dynamic,
    Scheme,
    Static,
    largest,
    quantise,
)
from lora_export.records import PRESENT, Array, Form
from lora_export.runners.onnx import OnnxRunner

# Mean loss on the calibration inputs that is good enough: a tenth of what `checks.fidelity` allows,
# because those inputs are few.
TARGET = 0.001
# Products of numbers that trying layer by layer may take, a few minutes. Where it would be more, it
# is tried on fewer inputs, as far as there are several, and neighbours are tried together. A number
# and not a time, so that the choice is the same again.
MOST_PRODUCTS = 1e13
LEAST_TRIALS = 16  # that are made before inputs are left out
# Of the values of an input, the share that its range covers: all, or all but a few outliers.
SHARES = (1.0, 0.99999, 0.9999)
KEPT = "lora_export.kept_wider"  # metadata: layers that would have cost too much in few bits
_LARGEST = 0.01  # share of the values of each run that is kept to find the ranges in
Runs: TypeAlias = Sequence[Mapping[str, Array]]
Making: TypeAlias = Callable[[], Scheme]  # a scheme serves one graph, so each graph gets a new one


def narrow(model: Model, form: Form, runs: Runs, *, signed: bool = False) -> dict[str, str]:
    """Give the linear layers of `model` the narrow weights of `form`.

    Returns what the artifact should say of it: which layers keep wider ones.

    Args:
        model: Changed in place.
        form: In eight or four bits. Layers that four bits cost too much get eight.
        runs: Inputs of real texts or pictures.
        signed: See `Static`.

    Raises:
        InputError: static ranges are asked for, and there are no inputs to find them on.
    """
    schemes: list[Making]
    if form.precision == "int4":
        schemes = [Blocks]
    elif form.static:
        if not runs:
            raise InputError("static int8 needs inputs to find ranges on")
        found, most = ranges(model, runs), largest(form.target)
        schemes = [partial(Static, each, signed=signed, largest=most) for each in found]
    else:
        schemes = [partial(Dynamic, largest(form.target))]
    best, kept = choose(model, runs, schemes)
    quantise(model, best(), kept)
    if form.precision == "int4":
        quantise(model, Blocks(bits=8))
    return {KEPT: json.dumps(kept)}


def choose(model: Model, runs: Runs, schemes: Sequence[Making]) -> tuple[Making, tuple[str, ...]]:
    """Return the scheme that loses least, and the layers to keep as they are.

    These are the fewest of the most sensitive that suffice. The answers to `runs`, inputs of real
    texts or pictures, are compared with those of `model`. Without runs it is the first scheme, and
    nothing is kept.
    """
    best, layers = schemes[0], linears(model)
    if not runs or not layers:
        return best, ()
    runs = _affordable(layers, runs)
    reference = _answers(model, runs)
    if len(schemes) > 1:
        losses = [_trial_loss(model, runs, reference, one) for one in schemes]
        best = schemes[int(np.argmin(losses))]
    with _trial(model, best()) as runner:

        def loss(kept: Collection[str]) -> float:
            flags = {_flag(i): np.array(layer in kept) for i, layer in enumerate(layers)}
            return _loss(reference, [runner.run({**run, **flags}) for run in runs])

        if loss(()) <= TARGET:
            return best, ()
        groups = _groups(layers, runs)
        alone = [loss(layers.keys() - set(group)) for group in groups]
        kept: list[str] = []
        for place in np.argsort(alone, kind="stable")[::-1]:
            kept += groups[place]
            if loss(kept) <= TARGET:
                break
        return best, tuple(kept)


def ranges(model: Model, runs: Runs) -> list[dict[str, float]]:
    """Return what inputs of linear layers reach on `runs`, by name: once for each of `SHARES`."""
    names = {node.inputs[0].name for nodes in linears(model).values() for node in nodes}
    watched = model.clone()
    values = {value.name: value for node in watched.graph for value in node.outputs}
    values |= {value.name: value for value in watched.graph.inputs}
    watched.graph.outputs[:] = [values[name] for name in sorted(names)]
    most: dict[str, list[Array]] = {name: [] for name in names}
    counts = dict.fromkeys(names, 0)
    with _opened(watched) as runner:
        for run in runs:
            for name, array in runner.run(run).items():
                found = np.abs(array).ravel()
                counts[name] += found.size
                few = math.ceil(_LARGEST * found.size)
                most[name].append(np.partition(found, found.size - few)[found.size - few :])
    ordered = {name: np.sort(np.concatenate(found))[::-1] for name, found in most.items()}
    return [
        {
            name: float(found[min(int((1 - share) * counts[name]), found.size - 1)])
            for name, found in ordered.items()
        }
        for share in SHARES
    ]


def _trial_loss(model: Model, runs: Runs, reference: list[dict[str, Array]], one: Making) -> float:
    trial = model.clone()
    quantise(trial, one())
    return _loss(reference, _answers(trial, runs))


def _answers(model: Model, runs: Runs) -> list[dict[str, Array]]:
    with _opened(model) as runner:
        return [runner.run(run) for run in runs]


@contextlib.contextmanager
def _trial(model: Model, scheme: Scheme) -> Iterator[OnnxRunner]:
    """Open `model` with both forms of every layer in it, and an input per layer that says which.

    One session answers for all choices, where one for each would fill the memory: onnxruntime gives
    none back.
    """
    trial = model.clone()
    flags = {
        layer: ir.val(_flag(place), ir.DataType.BOOL, ir.Shape(()))
        for place, layer in enumerate(linears(trial))
    }
    trial.graph.inputs.extend(flags.values())
    quantise(trial, scheme, flags=flags)
    with _opened(trial) as runner:
        yield runner


@contextlib.contextmanager
def _opened(model: Model) -> Iterator[OnnxRunner]:
    with tempfile.TemporaryDirectory(prefix="lora_export-") as folder:
        path = Path(folder) / "model.onnx"
        _onnx_translate.save(model, path)
        yield OnnxRunner(path, cores())


def _flag(place: int) -> str:
    return f"lora_export.keep.{place}"


def _products(layers: Mapping[str, Sequence[Node]], runs: Runs) -> float:
    """Return the products of numbers in one trial on all of `runs`."""
    sizes = sum(math.prod(features(node)) for nodes in layers.values() for node in nodes)
    return float(sizes * sum(max(array.size for array in run.values()) for run in runs))


def _affordable(layers: Mapping[str, Sequence[Node]], runs: Runs) -> Runs:
    """Return the first of `runs`, as many as a trial may take."""
    count = len(runs)
    while count > 1 and LEAST_TRIALS * _products(layers, runs[:count]) > MOST_PRODUCTS:
        count -= 1
    return runs[:count]


def _groups(layers: Mapping[str, Sequence[Node]], runs: Runs) -> list[list[str]]:
    """Return neighbours that are tried together, one by one where that is not too much work."""
    together = math.ceil(len(layers) * _products(layers, runs) / MOST_PRODUCTS)
    names = list(layers)
    return [names[start : start + together] for start in range(0, len(names), together)]


def _loss(reference: list[dict[str, Array]], found: list[dict[str, Array]]) -> float:
    """Return the mean divergence of probabilities, in nats; of embeddings, their mean turn."""
    losses = []
    for expected, answer in zip(reference, found, strict=True):
        for name, array in expected.items():
            if name.startswith(f"{PRESENT}."):
                continue
            if "logits" in name:
                loss = divergence(probabilities(array), probabilities(answer[name]))
            else:
                loss = turn(array, answer[name])
            losses.append(loss.mean())
    return float(np.mean(losses))
