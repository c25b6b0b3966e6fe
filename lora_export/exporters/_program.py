"""What the formats that begin with torch.export share: a program whose string axes are free."""

import inspect
import json
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as symbolic

from lora_export.errors import ExportFailed, first_line, listed
from lora_export.inputs import made
from lora_export.records import Array, Signature, TensorSpec
from lora_export.runners._torch import answers

# Node metadata that carries paths of the exporting machine, or numbers that differ between runs.
_REVEALING = (
    "stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node", "custom",
)  # fmt: skip
# Conditions that keep a size from being 0 or 1, in the words of torch 2.13: "8*s != 8" is s != 1.
_ABOVE_ONE = re.compile(r"(> [01]|>= [12])$| != ")
# (batch, new tokens, cached tokens): every axis at its least, then each other one beside it
_LEAST = ((1, 1, 0), (2, 1, 3), (1, 3, 0), (2, 3, 0))
_CLOSE = 1e-4  # of the largest output: a branch that was wrongly taken is far beyond it
Specs = tuple[TensorSpec, ...]


def captured(
    name: str, model: nn.Module, signature: Signature, example: Mapping[str, Array]
) -> ExportedProgram:
    """Return `model` as a program in which every string axis of the signature is free.

    Which axes belong together (a mask's length and the cache's plus the ids') is left to torch to
    find, and is then checked by the program on every call.

    Raises:
        ExportFailed: torch cannot export the model, or fixed an axis; the message begins with
            `name`.
    """
    program = traced(name, model, signature, example)
    for node in program.graph.nodes:
        for key in _REVEALING:
            node.meta.pop(key, None)
    _refuse_fixed_axes(name, program, signature)
    _allow_least_sizes(name, program, model, signature)
    return program


def traced(
    name: str, model: nn.Module, signature: Signature, example: Mapping[str, Array]
) -> ExportedProgram:
    """Return `model` as torch exports it, with all that the program knows of where it is from.

    Raises:
        ExportFailed: torch cannot export the model; the message begins with `name`.
    """
    tensors = tuple(torch.from_numpy(example[spec.name]) for spec in signature.inputs)
    free = tuple(
        {i: Dim.AUTO for i, axis in enumerate(spec.axes) if isinstance(axis, str)}
        for spec in signature.inputs
    )
    shapes = dict(inspect.signature(model.forward).bind(*free).arguments)
    try:
        # Sizes 0 and 1 broadcast, so torch makes special cases of them, and then refuses them,
        # unless it is told not to look.
        oblivious = symbolic.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
        with warnings.catch_warnings(), torch.no_grad(), oblivious:
            warnings.simplefilter("ignore")
            program = torch.export.export(model, tensors, dynamic_shapes=shapes)
    except Exception as error:  # tracing runs the model's own code, which raises as it comes
        raise ExportFailed(f"{name}: {first_line(error)}") from error
    return program


def _refuse_fixed_axes(name: str, program: ExportedProgram, signature: Signature) -> None:
    found = declared(program, signature.inputs, signature.outputs)
    faults = [
        f"{want.name} is {list(got.axes)}, expected {list(want.axes)}"
        for want, got in zip(
            (*signature.inputs, *signature.outputs), (*found[0], *found[1]), strict=True
        )
        if got.axes != want.axes
    ]
    if faults:
        raise ExportFailed(listed(f"{name}: torch found axes that are not as free", faults))


def _allow_least_sizes(
    name: str, program: ExportedProgram, model: nn.Module, signature: Signature
) -> None:
    """Drop conditions that sizes be above 1, where the program is right without them.

    A model that asks "is this longer than one token?" in Python answers once, for the example, and
    torch makes a condition of the answer. Mostly it does not matter (attention asks so although
    it has a mask); that it does not is shown on the sizes in question.
    """
    kept = [guard for guard in program._guards_code if not _ABOVE_ONE.search(guard)]
    program._guards_code[:] = kept
    ins, outs = ([spec.name for spec in side] for side in (signature.inputs, signature.outputs))
    module = program.module()
    for batch, length, past in _LEAST:
        given = made(signature, batch, length, "none", 0, past=past)
        shape = f"batch {batch}, length {length}" + f", {past} cached" * signature.has_cache
        try:
            wanted, found = (answers(f, given, ins, outs) for f in (model, module))
        except Exception as error:  # whatever operator it is that cannot
            raise ExportFailed(f"{name}: not at {shape}: {first_line(error)}") from error
        for output, value in wanted.items():
            limit = _CLOSE * float(np.abs(value).max(initial=0))
            if (
                found[output].shape != value.shape
                or not (np.abs(found[output] - value) <= limit).all()
            ):
                raise ExportFailed(f"{name}: {output} is not the model's at {shape}")


def declared(
    program: ExportedProgram, inputs: Iterable[TensorSpec], outputs: Iterable[TensorSpec]
) -> tuple[Specs, Specs]:
    """Return the inputs and outputs of `program`, axes and dtypes as its graph has them.

    A program has symbols for axes, and no names. The given specs name them; a symbol has one name,
    so that two axes that were told apart and are one in the program show.
    """
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    known: dict[str, str] = {}
    signature = program.graph_signature

    def spec(node: Any, want: TensorSpec) -> TensorSpec:
        value = values[node]
        assert value is not None, node
        axes = [
            size
            if isinstance(size, int)
            else known.setdefault(str(size), axis if isinstance(axis, str) else str(size))
            for size, axis in zip(value.shape, want.axes, strict=True)
        ]
        return TensorSpec(want.name, str(value.dtype).removeprefix("torch."), tuple(axes))

    return (
        tuple(spec(n, want) for n, want in zip(signature.user_inputs, inputs, strict=True)),
        tuple(spec(n, want) for n, want in zip(signature.user_outputs, outputs, strict=True)),
    )


def as_text(inputs: Specs, outputs: Specs, about: Mapping[str, str], **more: Any) -> str:
    """Return what a file has to say of itself beside the program, as JSON."""
    sides = {
        side: [{"name": s.name, "dtype": s.dtype, "axes": s.axes} for s in specs]
        for side, specs in (("inputs", inputs), ("outputs", outputs))
    }
    return json.dumps({**sides, "metadata": dict(about), **more}, sort_keys=True)


def from_text(text: str) -> tuple[Specs, Specs, dict[str, Any]]:
    """Return inputs, outputs and the rest of what `as_text` wrote; raises `ValueError`."""
    try:
        content = json.loads(text)
        inputs, outputs = (
            tuple(TensorSpec(s["name"], s["dtype"], tuple(s["axes"])) for s in content.pop(side))
            for side in ("inputs", "outputs")
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError("its note about inputs and outputs is damaged") from error
    return inputs, outputs, content
