"""What of a model should be one operation each, and how often a graph, as it is run, has it."""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_export import exporters, inputs
from lora_export.exporters._onnx_choose import KEPT
from lora_export.exporters._onnx_layers import LEAST_FEATURES
from lora_export.records import MERGED, PLAIN, Array, Artifact, Form, Fusion
from lora_export.stages import Subject

# By format, and what should be one operation there: the operations that it may be.
OPERATIONS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "onnx": {
        "LayerNorm": ("LayerNormalization", "SkipLayerNormalization", "EmbedLayerNormalization"),
        "GELU": ("Gelu", "FastGelu", "BiasGelu"),
        "linear layers with a bias": ("Gemm", "FusedGemm"),
        "linear layers in eight bits": (
            "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QGemm",
            "QLinearMatMul",
        ),
        "linear layers in four bits": ("MatMulNBits",),
    },
    "openvino": {"linear layers in eight bits": ("FullyConnected in i8",)},
}  # fmt: skip
# Activations that compute GELU in one step, by erf or by tanh; others write it out.
_GELUS = ("GELU", "GELUActivation", "GELUTanh", "PytorchGELUTanh")


def fusions(
    subject: Subject, artifact: Artifact, folder: Path, form: Form = PLAIN
) -> tuple[Fusion, ...]:
    """Return how often `artifact`, in `folder` and in `form`, has as one operation what should be.

    What should be is counted on the model, see `_calls`. Nothing is said of formats that do not
    tell what they run, of a graph with the tokenizer inside, or of half precision, which runtimes
    widen as they like.
    """
    known = OPERATIONS.get(artifact.format, {})
    if not known or artifact.takes_text or artifact.precision in ("fp16", "bf16"):
        return ()
    kept = json.loads(artifact.facts["metadata"].get(KEPT, "[]"))
    expected = dict.fromkeys(known, 0)
    for path, (module, calls) in _calls(subject).items():
        if (what := _one_of(path, module, form, kept)) in known:
            expected[what] += calls
    counts = exporters.load(artifact.format).running(folder / artifact.files[0].name)
    found = []
    for what, count in expected.items():
        names = {kind: n for kind, n in counts.items() if kind.rpartition(":")[2] in known[what]}
        note = ", ".join(f"{n} {kind}" for kind, n in sorted(names.items()))
        if count:
            found.append(Fusion(artifact.format, what, count, sum(names.values()), note))
    return tuple(found)


def _one_of(path: str, module: nn.Module, form: Form, kept: list[str]) -> str:
    """Return which of the `OPERATIONS` should be found for a module; nothing where none is sure."""
    if isinstance(module, nn.LayerNorm):
        return "LayerNorm"
    if type(module).__name__ in _GELUS:
        return "GELU"
    width = _width(module)
    if form.precision == "int4" and width >= LEAST_FEATURES:
        return "linear layers in four bits"  # those that are kept wider are of the same kind
    if form.precision == "int8" and width >= LEAST_FEATURES and path not in kept:
        return "linear layers in eight bits"
    if form == Form(external_data=form.external_data) and width and module.bias is not None:
        return "linear layers with a bias"
    return ""


def _width(module: nn.Module) -> int:
    """Return the number of features that a linear layer gives; 0 for any other module."""
    if isinstance(module, nn.Linear):
        return module.out_features
    return int(module.nf) if type(module).__name__ == "Conv1D" else 0  # type: ignore[arg-type]


def _calls(subject: Subject) -> dict[str, tuple[nn.Module, int]]:
    """Return each module of the merged model, and how many of its calls a graph has to have.

    Calls with the same input are one, and a call whose input never changes is none, for its result
    is a constant. A layer with a bias that gives an output of the model keeps the shape of that.
    A decoder beside an encoder is traced with calls that are dropped, so each module counts once.
    """
    signature, runner = subject.signature, subject.runner(MERGED)
    runs: list[dict[str, set[str]]] = []
    for seed in (0, 1):
        length = min(7, signature.max_length - 3) if signature.max_length else 0
        given = inputs.made(signature, 2, length, "right", seed, past=3, target=5, target_past=4)
        with _heard(subject.model) as heard:
            answers = {_digest(torch.from_numpy(array)) for array in runner.run(given).values()}
        runs.append(
            {path: {i for i, o in calls if o not in answers} for path, calls in heard.items()}
        )
    found = {}
    for path, module in subject.model.named_modules():
        count = len(runs[0][path] - runs[1][path])
        found[path] = (module, min(count, 1) if signature.has_target else count)
    return found


@contextlib.contextmanager
def _heard(model: nn.Module) -> Iterator[dict[str, list[tuple[str, str]]]]:
    """Collect a digest of the input of every call of the modules of `model`.

    Beside it stands that of the output, of linear layers with a bias over several axes of tokens.
    """
    heard: dict[str, list[tuple[str, str]]] = {}
    hooks = []
    for path, module in model.named_modules():
        calls = heard[path] = []

        def hear(
            of: nn.Module, args: Any, output: Any, calls: list[tuple[str, str]] = calls
        ) -> None:
            if args and isinstance(args[0], Tensor):
                shaped = _width(of) and of.bias is not None and output.ndim > 2
                calls.append((_digest(args[0]), _digest(output) if shaped else ""))

        hooks.append(module.register_forward_hook(hear))
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()


def _digest(tensor: Tensor) -> str:
    array: Array = tensor.detach().float().contiguous().numpy()
    return hashlib.sha256(array.tobytes()).hexdigest()
