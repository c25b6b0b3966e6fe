"""The tokenizer as a part of the ONNX graph: text goes in. Needs the extra `text` to run.

That the graph of the tokenizer does what the tokenizer does is not assumed but tried, on the file
as it was written, before anything is handed out.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from lora_export import inputs
from lora_export.compare import differing
from lora_export.errors import ExportFailed, InputError, first_line, listed
from lora_export.exporters._onnx_graph import Model, Value
from lora_export.exporters._onnx_tokenizer import OPSETS, stated
from lora_export.records import LABEL, PROBABILITIES, TEXT, Signature
from lora_export.runners.onnx import OnnxTextRunner, text_library

_IDS = ("input_ids", "attention_mask", "token_type_ids")


def refuse(signature: Signature, tokens: Any, *, external_data: bool) -> None:
    """Raise `InputError` where there can be no file that takes text, or it cannot be proven here.

    That it is not for a tokenizer of this kind is said by `tokenizer`.
    """
    names = {spec.name for spec in signature.inputs}
    text_library()
    if tokens is None or "input_ids" not in names:
        raise InputError("the model takes no text: there is no tokenizer to put into the graph")
    if signature.has_cache or signature.has_target:
        raise InputError(
            "a model that writes goes on from its own tokens, and takes no text in every step"
            + ("; --no-cache exports one call" if signature.has_cache else "")
        )
    outputs = {spec.name for spec in signature.outputs}
    choices = any("choices" in spec.axes for spec in signature.inputs)
    if choices or "start_logits" in outputs or names - {*_IDS}:
        raise InputError(
            "the graph makes one sequence of one text; pairs of a question and a context, and "
            "choices, are not written"
        )
    if external_data:
        raise InputError("what takes text is one file: --text goes without --external-data")


def compose(model: Model, tokenizer: Model, signature: Signature) -> None:
    """Put `tokenizer` before the graph of `model`, and behind it what makes labels of logits."""
    graph = model.graph
    texts, ids = _graft(model, tokenizer, first=True)
    made = {value.name: value for value in ids}
    for old in graph.inputs:
        old.replace_all_uses_with(made[old.name])
    graph.inputs[:] = texts
    if signature.labels:
        decided = _decided(signature.labels)
        ((logits,), outputs) = _graft(model, decided, first=False)
        scores = next(value for value in graph.outputs if value.name == logits.name)
        logits.replace_all_uses_with(scores)
        graph.outputs[:0] = outputs
    RemoveUnusedNodesPass()(model)
    model.opset_imports.update(tokenizer.opset_imports)


def _decided(labels: Sequence[str]) -> Model:
    """Return the graph from logits to the name of the best class, and to all probabilities."""
    scores = f"float[batch, {len(labels)}]"
    return stated(
        f"<ir_version: 10, opset_import: {OPSETS}>\n"
        f"decided ({scores} logits) => (string[batch] {LABEL}, {scores} {PROBABILITIES})\n"
        "{"
        f"""
    {PROBABILITIES} = Softmax<axis = -1>(logits)
    chosen = ArgMax<axis = -1, keepdims = 0>(logits)
    {LABEL} = Gather<axis = 0>(names, chosen)
"""
        "}",
        {"names": list(labels)},
        {},
    )


def prove(path: Path, tokens: Any, signature: Signature) -> None:
    """Try the file at `path` on texts made to find faults, and on the sentences of this package.

    Raises:
        ExportFailed: ids or mask are not those of `tokens`, and the message lists such texts; or
            the file cannot be opened.
    """
    sentences = inputs.text_batches(tokens, signature, *inputs.read_texts(None))
    batches = (*inputs.hard_batches(tokens, signature), *sentences)
    try:
        runner = open_runner(path, 1)
        wrong = []
        for batch in batches:
            found = runner.tokenize(batch.texts)
            expected = {name: batch.arrays[name] for name in found}
            rows = differing(expected, found, len(batch.texts))
            wrong += [batch.texts[row] for row in rows]
    except Exception as error:  # onnxruntime's own class of errors is a plain Exception
        why = first_line(error)
        raise ExportFailed(f"the graph with the tokenizer inside does not run: {why}") from error
    if wrong:
        raise ExportFailed(
            listed(
                f"the tokenizer in the graph differs from {type(tokens).__name__} in {len(wrong)} "
                f"of {sum(len(batch.texts) for batch in batches)} texts",
                (repr(text[:40]) for text in wrong),
            )
        )


def open_runner(path: Path, threads: int) -> OnnxTextRunner:
    """Return a runner for the file at `path`, and for its two parts."""
    return OnnxTextRunner(
        path, threads, functools.partial(_front, path), functools.partial(behind, path)
    )


def _front(path: Path) -> bytes:
    """Return the model up to the token ids that is in the file at `path`."""
    model = ir.load(str(path))
    model.graph.outputs[:] = [value for value in _made(model) if value.name in _IDS]
    return _cut(model)


def behind(path: Path) -> bytes:
    """Return the model from the token ids on that is in the file at `path`."""
    model = ir.load(str(path))
    graph = model.graph
    graph.inputs.clear()
    for value in [value for value in _made(model) if value.name in _IDS]:
        given = ir.val(value.name, dtype=ir.DataType.INT64, shape=ir.Shape(["batch", "sequence"]))
        value.name = f"{TEXT}.{value.name}"
        value.replace_all_uses_with(given)
        graph.inputs.append(given)
    graph.outputs[:] = [v for v in graph.outputs if v.name not in (LABEL, PROBABILITIES)]
    return _cut(model)


def _cut(model: Model) -> bytes:
    RemoveUnusedNodesPass()(model)
    found: bytes = ir.to_proto(model).SerializeToString()
    return found


def _made(model: Model) -> list[Value]:
    return [value for node in model.graph for value in node.outputs]


def _graft(model: Model, part: Model, *, first: bool) -> tuple[list[Value], list[Value]]:
    """Move the nodes of `part` into the graph of `model`; return its inputs and its outputs."""
    nodes, graph = list(part.graph), model.graph
    given, made = list(part.graph.inputs), list(part.graph.outputs)
    for node in nodes:
        for value in node.outputs:
            if value not in made:
                value.name = f"{TEXT}.{value.name}"
        node.name = f"{TEXT}.{node.outputs[0].name}"
    part.graph.inputs.clear()
    part.graph.outputs.clear()
    part.graph.remove(nodes)
    if first:
        graph.insert_before(graph[0], nodes)
    else:
        graph.extend(nodes)
    return given, made
