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

from lora_export.compare import deciding, divergence, drift, options, probabilities, turn
from lora_export.environment import cores
from lora_export.errors import ExportFailed, InputError
from lora_export.exporters import Request, _onnx_translate
from lora_export.exporters._onnx_graph import Model, insert
from lora_export.exporters._onnx_layers import features, linears
from lora_export.exporters._onnx_schemes import (
    Blocks,
    Dynamic,
    Scheme,
    Static,
    largest,
    quantise,
)
from lora_export.records import PRESENT, Array, Batch, Evidence, Signature
from lora_export.runners.onnx import OnnxRunner

# Mean loss on the calibration inputs that is good enough: a 20th of what `checks.fidelity` allows,
# because those inputs are few.
TARGET = 0.0005
# Products of numbers that trying layer by layer may take, a few minutes. Where it would be more, it
# is tried on fewer inputs, as far as there are several, and neighbours are tried together. A number
# and not a time, so that the choice is the same again.
MOST_PRODUCTS = 1e13
LEAST_TRIALS = 16  # that are made before inputs are left out
# Of the values of an input, the share that its range covers: all, or all but a few outliers.
SHARES = (1.0, 0.99999, 0.9999)
KEPT = "lora_export.kept_wider"  # metadata: layers that would have cost too much in few bits
MADE = "lora_export.quantised"  # metadata: how many layers there are, how the others were made
_LARGEST = 0.01  # share of the values of each run that is kept to find the ranges in
Answers: TypeAlias = dict[str, Array]
Runs: TypeAlias = Sequence[Mapping[str, Array]]
Making: TypeAlias = Callable[[], Scheme]  # a scheme serves one graph, so each graph gets a new one


def narrow(model: Model, request: Request, *, static: bool, signed: bool = False) -> dict[str, str]:
    """Give the linear layers of `model` the narrow weights that are asked for.

    Returns what the artifact should say of it: which layers keep wider ones, and how the others
    were made.

    Args:
        model: Changed in place.
        request: Asks for eight or four bits. Layers that four bits cost too much get eight.
        static: Whether eight bits are `Static`.
        signed: See `Static`.

    Raises:
        InputError: static ranges are asked for, and there are no inputs to find them on.
        ExportFailed: no layer of the model can have such weights.
    """
    layers, form, runs = linears(model), request.form, request.calibration
    if not layers:
        raise ExportFailed(f"the model has no linear layer that {form.precision} is written for")
    schemes: list[Making]
    if form.precision == "int4":
        schemes = [Blocks]
    elif static:
        if not runs:
            raise InputError("static int8 needs inputs to find ranges on")
        request.say("finding the ranges of activations")
        found, most = ranges(model, runs), largest(form.target)
        schemes = [partial(Static, each, signed=signed, largest=most) for each in found]
    else:
        schemes = [partial(Dynamic, largest(form.target))]
    best, kept = choose(model, request.signature, runs, schemes, request.say)
    if len(kept) == len(layers):
        raise ExportFailed(f"{form.precision} costs too much in each of {len(layers)} layers")
    quantise(model, best(), kept, Blocks(bits=8) if form.precision == "int4" else None)
    made = {"layers": len(layers), "static": static, "target": form.target}
    return {KEPT: json.dumps(kept), MADE: json.dumps(made)}


def choose(
    model: Model,
    signature: Signature,
    runs: Runs,
    schemes: Sequence[Making],
    say: Callable[[str], None] = lambda stage: None,
) -> tuple[Making, tuple[str, ...]]:
    """Return the scheme that loses least, and the layers to keep as they are.

    These are the fewest of the most sensitive that suffice. The answers to `runs`, inputs of real
    texts or pictures, are compared with those of `model`. Without runs it is the first scheme, and
    nothing is kept.
    """
    best, layers = schemes[0], linears(model)
    if not runs or not layers:
        return best, ()
    reference, products = _asked(model, runs)
    count = _affordable(products)
    runs, reference, products = runs[:count], reference[:count], products[:count]
    if len(schemes) > 1:
        losses = [_trial_loss(model, signature, runs, reference, one) for one in schemes]
        best = schemes[int(np.argmin(np.nan_to_num(losses, nan=np.inf)))]
    with _trial(model, best()) as runner:

        def loss(kept: Collection[str]) -> float:
            flags = {_flag(i): np.array(layer in kept) for i, layer in enumerate(layers)}
            found = [runner.run({**run, **flags}) for run in runs]
            return _loss(signature, runs, reference, found)

        if loss(()) <= TARGET:
            return best, ()
        groups = _groups(list(layers), sum(products))
        say(f"trying each of {len(groups)} layers alone, or neighbours together")
        alone = [loss(layers.keys() - set(group)) for group in groups]
        kept: list[str] = []
        say("finding how many of them have to stay wider")
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


def _trial_loss(
    model: Model, signature: Signature, runs: Runs, reference: Sequence[Answers], one: Making
) -> float:
    trial = model.clone()
    quantise(trial, one())
    with _opened(trial) as runner:
        return _loss(signature, runs, reference, [runner.run(run) for run in runs])


def _asked(model: Model, runs: Runs) -> tuple[list[Answers], list[int]]:
    """Return what `model` answers to each run, and how many products its linear layers take."""
    counting = model.clone()
    outputs = {}  # of a product, by the name of the value that says how many elements it has
    for place, node in enumerate([node for nodes in linears(counting).values() for node in nodes]):
        size = insert(counting.graph, node, "Size", [node.inputs[0]])
        size.name, size.dtype = f"lora_export.size.{place}", ir.DataType.INT64
        size.shape = ir.Shape(())
        counting.graph.outputs.append(size)
        outputs[size.name] = features(node)[1]
    answers, products = [], []
    with _opened(counting) as runner:
        for run in runs:
            found = runner.run(run)
            products.append(sum(int(found.pop(name)) * out for name, out in outputs.items()))
            answers.append(found)
    return answers, products


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


def _affordable(products: Sequence[int]) -> int:
    """Return on how many of the runs, whose products are given, a trial is made."""
    count = len(products)
    while count > 1 and LEAST_TRIALS * sum(products[:count]) > MOST_PRODUCTS:
        count -= 1
    return count


def _groups(layers: Sequence[str], products: int) -> list[list[str]]:
    """Return neighbours that are tried together, one by one where that is not too much work."""
    together = math.ceil(len(layers) * products / MOST_PRODUCTS)
    return [list(layers[start : start + together]) for start in range(0, len(layers), together)]


def _loss(
    signature: Signature, runs: Runs, reference: Sequence[Answers], found: Sequence[Answers]
) -> float:
    """Return the mean loss over the outputs of all runs, padding left out.

    It is the divergence of probabilities, in nats; of embeddings their turn; of values, such as
    scores, their drift.
    """
    losses = []
    evidence = Evidence(signature=signature)
    for run, expected, answer in zip(runs, reference, found, strict=True):
        batch = Batch("text", "", run)
        for name in expected:
            if name.startswith(f"{PRESENT}."):
                continue
            a, b = (options(of[name], batch, evidence, name) for of in (expected, answer))
            if name in deciding(expected):
                loss = divergence(probabilities(a), probabilities(b))
            else:
                loss = drift(a, b) if "logits" in name else turn(a, b)
            losses.append(loss.mean())
    return float(np.mean(losses))
