"""Merge: a plan into a directory of plain weights; a live model into plain layers."""

import copy
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_export import storage, variants
from lora_export.errors import InputError
from lora_export.injection import forget, lora_layers
from lora_export.plan import MERGE, PLACE, MergePlan, Step
from lora_export.records import Adapter, Array
from lora_export.rounding import TORCH_DTYPES, round_once
from lora_export.storage import Checkpoint, NewTensor

PROVENANCE = "lora_export.json"
# What a user of the base needs beside the weights. Code of the model is left behind on purpose.
COMPANIONS = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model",
    "sentencepiece.bpe.model", "tokenizer.model", "chat_template.jinja",
    "preprocessor_config.json",
)  # fmt: skip


def merge(model: nn.Module, *, in_place: bool = False) -> nn.Module:
    """Return `model` with each LoRA layer replaced by a plain layer that holds the merged weight.

    The module tree is the base's. Mode, device and dtype stay; merged weights are the float64
    value rounded once.

    Args:
        model: A model with LoRA layers, in train or eval mode.
        in_place: Change `model` itself; otherwise it is copied first and left alone.

    Raises:
        InputError: the model has no LoRA layers, or a merged weight is not finite; the model is
            then left as it was.
    """
    layers = lora_layers(model)
    if not layers:
        raise InputError("the model has no LoRA layers: nothing to merge")
    weights = {path: layer.merged_weight() for path, layer in layers.items()}
    result = model if in_place else copy.deepcopy(model)
    for path, weight in weights.items():
        layer = result.get_submodule(path)
        plain = layer.plain()  # type: ignore[operator]
        plain.weight = nn.Parameter(weight.clone(), requires_grad=False)
        result.set_submodule(path, plain)
    forget(result)
    return result


def write_merged(
    plan: MergePlan, adapter: Adapter, checkpoint: Checkpoint, config: Any, out: Path
) -> None:
    """Carry out `plan`: write a checkpoint directory that loads without any mention of LoRA.

    Shards keep their names. One tensor at a time is in memory. The same inputs give the same bytes.

    Args:
        plan: From `lora_export.plan.plan`.
        adapter: What the plan was made for.
        checkpoint: What the plan was made for.
        config: The transformers config that goes with the architecture and its labels.
        out: The directory to make; it must not exist.

    Raises:
        InputError: a merged weight is not finite or overflows the dtype; names the tensor.
    """
    out.mkdir()
    weight_map: dict[str, str] = {}
    total = 0
    for shard in checkpoint.shards:
        steps = [step for step in plan.steps if step.shard == shard]
        tensors = [_new_tensor(step, adapter, checkpoint) for step in steps]
        total += storage.write_safetensors(out / shard, tensors, {"format": "pt"})
        weight_map |= {step.name: shard for step in steps}
    if checkpoint.shards != (storage.SINGLE,):
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        storage.write_json(out / storage.INDEX, index)
    storage.write_json(out / "config.json", _config_json(checkpoint.root, config, plan))
    for name in COMPANIONS:
        if (checkpoint.root / name).is_file():
            _copy(checkpoint.root / name, out / name)
    files = {name: storage.sha256(out / name) for name in checkpoint.shards}
    storage.write_json(out / PROVENANCE, {**_provenance(plan, adapter, checkpoint), "files": files})


def _copy(source: Path, target: Path) -> None:
    """Copy a file that belongs to the base, without the place that it once was loaded from."""
    if source.name == "tokenizer_config.json":
        fields = storage.read_json(source)
        fields.pop("name_or_path", None)
        storage.write_json(target, fields)
    else:
        shutil.copyfile(source, target)


def _new_tensor(step: Step, adapter: Adapter, checkpoint: Checkpoint) -> NewTensor:
    def read() -> bytes:
        if step.operation == PLACE:
            return _stored(torch.from_numpy(adapter.replaced[step.name]), step)
        info = checkpoint.tensors[str(step.source)]
        if step.operation == MERGE:
            return _merged(info.array(), step, adapter)
        if step.dtype == info.dtype:
            return info.read()
        return _stored(torch.from_numpy(info.array()), step)

    return NewTensor(step.name, step.dtype, step.shape, read)


def _merged(base: Array, step: Step, adapter: Adapter) -> bytes:
    pair = adapter.modules[str(step.module)]
    a, b = torch.from_numpy(pair.a).double(), torch.from_numpy(pair.b).double()
    weight = torch.from_numpy(base).double()
    oriented = weight.T if step.transposed else weight
    exact = variants.load(adapter.variant).merged(oriented, pair.scale * (b @ a))
    return _stored(exact.T if step.transposed else exact, step)


def _stored(value: Tensor, step: Step) -> bytes:
    try:
        rounded = round_once(value.double(), TORCH_DTYPES[step.dtype])
    except InputError as error:
        raise InputError(f"{step.name}: {error}") from error
    return rounded.contiguous().view(torch.uint8).numpy().tobytes()


def _config_json(base: Path, config: Any, plan: MergePlan) -> dict[str, Any]:
    """Return the base's own config.json with what the head and the dtype change in it."""
    fields = storage.read_json(base / "config.json")
    fields["architectures"] = [plan.architecture]
    for name in ("id2label", "label2id", "pad_token_id"):
        if (value := getattr(config, name, None)) is not None:
            fields[name] = value
    for name in ("num_labels", "_name_or_path"):  # told by the labels; a place, perhaps a path
        fields.pop(name, None)
    dtypes = {str(TORCH_DTYPES[step.dtype]).removeprefix("torch.") for step in plan.of(MERGE)}
    if len(dtypes) == 1:
        fields |= dict.fromkeys(fields.keys() & {"dtype", "torch_dtype"}, dtypes.pop())
    return fields


def _provenance(plan: MergePlan, adapter: Adapter, checkpoint: Checkpoint) -> Mapping[str, Any]:
    from lora_export import __version__

    mark = adapter.base.fingerprint
    return {
        "schema": 1,
        "tool": f"lora-export {__version__}",
        "architecture": plan.architecture,
        "base": {
            "id": adapter.base.public_id,
            "revision": adapter.base.revision,
            "fingerprint": mark.sha256 if mark else None,
            "files": {name: storage.sha256(checkpoint.root / name) for name in checkpoint.shards},
        },
        "adapter": {
            "sha256": adapter.sha256,
            "format": adapter.format,
            "variant": adapter.variant,
            "labels": list(adapter.labels),
        },
        "merged": {
            step.name: {
                "rank": adapter.modules[str(step.module)].rank,
                "scale": adapter.modules[str(step.module)].scale,
            }
            for step in plan.of(MERGE)
        },
        "placed": [step.name for step in plan.of(PLACE)],
        "dropped": dict(plan.dropped),
        "notes": [*plan.notes, *adapter.notes],
    }
