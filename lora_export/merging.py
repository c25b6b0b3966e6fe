"""Merge: a plan into a directory of plain weights; a live model into plain layers."""

import contextlib
import copy
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lora_export import models, recomputed, storage, variants
from lora_export.architecture import stack
from lora_export.errors import InputError
from lora_export.injection import forget, lora_layers
from lora_export.plan import BIAS, MERGE, PLACE, ROWS, MergePlan, Part, Step
from lora_export.records import LINEAR, Adapter, Factors, is_float, widened
from lora_export.rounding import TORCH_DTYPES, round_once
from lora_export.storage import Checkpoint, NewTensor, dtype_name

PROVENANCE = "lora_export.json"
# What a user of the base needs beside the weights. Code of the model is left behind on purpose.
LOADED = (".safetensors", ".bin", ".json", ".py", ".model")
TOKENIZER = (
    *models.VOCABULARIES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "merges.txt", "normalizer.json", "target.spm", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
COMPANIONS = (
    *TOKENIZER, "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json",
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
    if not layers and not any(recomputed.updates(model)):
        raise InputError("the model has no LoRA layers: nothing to merge")
    weights = {path: layer.merged_weight() for path, layer in layers.items()}
    result = model if in_place else copy.deepcopy(model)
    recomputed.merge(result)
    for path, weight in weights.items():
        layer = result.get_submodule(path)
        plain = layer.plain()  # type: ignore[operator]
        plain.weight = nn.Parameter(weight.clone(), requires_grad=False)
        result.set_submodule(path, plain)
    forget(result)
    return result


def write_merged(
    plan: MergePlan,
    adapter: Adapter,
    checkpoint: Checkpoint,
    settings: Mapping[str, Any],
    out: Path,
    companions: Mapping[str, Path] | None = None,
    options: Mapping[str, Any] | None = None,
) -> None:
    """Carry out `plan`: write a checkpoint directory that loads without any mention of LoRA.

    Shards keep their names. One tensor at a time is in memory. The same inputs give the same bytes.

    Args:
        plan: From `lora_export.plan.plan`.
        adapter: What the plan was made for.
        checkpoint: What the plan was made for.
        settings: Fields of config.json that differ from the base's: architecture, labels, sizes.
        out: The directory to make; it must not exist.
        companions: Files that a user of the model needs beside the weights, by name; None takes
            the base's.
        options: What the caller chose, to be written down beside the digests.

    Raises:
        InputError: a merged weight is not finite or overflows the dtype; names the tensor.
    """
    out.mkdir()
    weight_map: dict[str, str] = {}
    total = 0
    shards = [s for s in checkpoint.shards if any(step.shard == s for step in plan.steps)]
    with _one_thread():
        for shard in shards:
            steps = [step for step in plan.steps if step.shard == shard]
            tensors = [_new_tensor(step, plan, adapter, checkpoint) for step in steps]
            total += storage.write_safetensors(out / shard, tensors, {"format": "pt"})
            weight_map |= {step.name: shard for step in steps}
    if checkpoint.shards != (storage.SINGLE,):
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        storage.write_json(out / storage.INDEX, index)
    storage.write_json(out / "config.json", _config_json(checkpoint.root, settings, plan))
    found = companions_of(checkpoint.root) if companions is None else companions
    for name, file in found.items():
        _copy(file, out / name)
    files = {name: storage.sha256(out / name) for name in shards}
    known = {**_provenance(plan, adapter, checkpoint), "options": dict(options or {})}
    companion = {name: storage.sha256(out / name) for name in ("config.json", *found)}
    storage.write_json(out / PROVENANCE, {**known, "files": files, "companions": companion})


def is_loaded(name: str) -> bool:
    """Return whether a loader may read a file of this name, beside those that a merge wrote."""
    return name != PROVENANCE and "/" not in name and Path(name).suffix in LOADED


def companions_of(folder: Path) -> dict[str, Path]:
    """Return the files in `folder` that a user of the model needs beside the weights, by name."""
    return {name: folder / name for name in COMPANIONS if (folder / name).is_file()}


def _copy(source: Path, target: Path) -> None:
    """Copy a file that belongs to the base, without the place that it once was loaded from."""
    if source.name == "tokenizer_config.json":
        fields = storage.read_json(source)
        for name in ("name_or_path", "tokenizer_file", "special_tokens_map_file"):
            fields.pop(name, None)
        storage.write_json(target, fields)
    else:
        shutil.copyfile(source, target)


def _new_tensor(step: Step, plan: MergePlan, adapter: Adapter, checkpoint: Checkpoint) -> NewTensor:
    def read() -> bytes:
        info = checkpoint.tensors[step.source] if step.source is not None else None
        if info is not None and not step.parts and step.dtype == info.dtype:
            return info.read()
        stored = info.array() if info is not None else adapter.replaced[str(step.placed)]
        if not is_float(stored):
            return np.ascontiguousarray(stored).tobytes()
        kept = TORCH_DTYPES[info.dtype if info is not None else dtype_name(stored)]
        with _named(step.name):
            return _bytes(_merged(torch.from_numpy(widened(stored)), kept, step, plan, adapter))

    return NewTensor(step.name, step.dtype, step.shape, read)


def _merged(
    start: Tensor, kept: torch.dtype, step: Step, plan: MergePlan, adapter: Adapter
) -> Tensor:
    """Return the tensor of `step`: `start` with its updates, each rounded once.

    `kept` is the dtype in which the base stores it: training kept what it changed in that.
    """
    dtype = TORCH_DTYPES[step.dtype]
    result = round_once(start.double(), dtype)
    for part in step.parts:
        if part.what == ROWS:
            rows = adapter.rows[part.module]
            values = torch.from_numpy(widened(rows.values)).double()
            result[list(rows.indices)] = round_once(values, dtype)
            continue
        pair = adapter.modules[part.module]
        if pair.is_zero and not variants.changes_base(plan.variant):
            continue  # adding nothing would still turn -0 into 0
        if part.what == BIAS:
            assert pair.bias is not None
            exact = start.double() + pair.scale * torch.from_numpy(widened(pair.bias)).double()
            result = round_once(exact, dtype)
            continue
        old, new = (
            _region(tensor.view(stack(step.shape, pair.kind)), part) for tensor in (start, result)
        )
        for index in range(len(new)):  # one expert at a time: float64 is wide
            exact = _exact(old[index], index, part, pair, plan.variant, kept)
            new[index] = round_once(exact, dtype)
    return result


def _region(tensor: Tensor, part: Part) -> Tensor:
    """Return the part's region of `tensor` (experts, rows, columns) as (experts, out, in)."""
    if part.box is not None:
        experts, rows, columns = (slice(*span) for span in part.box)
        tensor = tensor[experts, rows, columns]
    return tensor.transpose(1, 2) if part.transposed else tensor


def _exact(
    weight: Tensor, index: int, part: Part, pair: Factors, variant: str, kept: torch.dtype
) -> Tensor:
    """Return the merged weight (out, in) of one expert of `part`, in float64."""
    outs, ins = slice(*(part.outs or (None,))), slice(*(part.ins or (None,)))
    expert = index + (part.experts[0] if part.experts else 0)
    a, b = (torch.from_numpy(widened(side[expert])).double() for side in pair.matrices())
    if pair.diagonal is not None:
        b = b * torch.from_numpy(widened(pair.diagonal)).double()
    delta = pair.scale * (b[outs] @ a[:, ins])
    wide = weight.double()
    if pair.kind == LINEAR and variants.changes_base(variant):
        wide = round_once(variants.base(variant, wide, pair.scale, pair.rank), kept).double()
    magnitude = None
    if pair.magnitude is not None:
        magnitude = torch.from_numpy(widened(pair.magnitude)).double()[outs]
    return variants.merged(variant, wide, delta, magnitude)  # type: ignore[no-any-return]


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


def _bytes(value: Tensor) -> bytes:
    return value.contiguous().view(torch.uint8).numpy().tobytes()


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Compute with one thread: how a sum is cut among threads shows in its last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _config_json(base: Path, settings: Mapping[str, Any], plan: MergePlan) -> dict[str, Any]:
    """Return the base's own config.json with what the adapter and the dtype change in it."""
    fields = storage.read_json(base / "config.json")
    text = fields.get("text_config")
    inner: dict[str, Any] = text if isinstance(text, dict) else {}
    for name, value in settings.items():  # at every level that has the field
        if name in inner:
            inner[name] = value
        if name in fields or name not in inner:
            fields[name] = value
    for name in ("num_labels", "_name_or_path"):  # told by the labels; a place, perhaps a path
        fields.pop(name, None)
    dtypes = {str(TORCH_DTYPES[step.dtype]).removeprefix("torch.") for step in plan.of(MERGE)}
    if len(dtypes) == 1:
        dtype = dtypes.pop()
        for level in (fields, inner):
            level |= dict.fromkeys(level.keys() & {"dtype", "torch_dtype"}, dtype)
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
            "merged_as": plan.variant,
            "labels": list(adapter.labels),
        },
        "merged": {
            step.name: {
                name: {"rank": adapter.modules[name].rank, "scale": adapter.modules[name].scale}
                for name in step.modules
                if name in adapter.modules
            }
            for step in plan.steps
            if step.parts
        },
        "placed": [step.name for step in plan.of(PLACE)],
        "rows": {path: list(rows.indices) for path, rows in adapter.rows.items()},
        "dropped": dict(plan.dropped),
        "ignored": dict(plan.ignored),
        "notes": [*plan.notes, *adapter.notes],
    }
