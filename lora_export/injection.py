"""Put LoRA layers into a model, take them out, switch between adapters: all on one base in memory.

The base's weights are never copied and never changed here.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_export import recomputed, variants
from lora_export.config import ALL_LINEAR, LoraConfig, is_trainable, matches, nearest, select
from lora_export.errors import AdapterMismatch, InputError, listed
from lora_export.lora import FACTORS, LoraLayer, layer_class, shape_of
from lora_export.records import Adapter, Array, Factors, tensor_of, widened
from lora_export.storage import fingerprint
from lora_export.torch_rounding import TORCH_DTYPES

_STATE = "_lora_export"
# How transformers names the classes of a task, and PEFT the task.
_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
}


@dataclass
class _State:
    """What must be put back when the adapter is taken off."""

    trainable: dict[str, bool]  # requires_grad by parameter name
    saved: tuple[str, ...]  # names of the parameters that are trained and stored whole
    originals: dict[str, Tensor] = field(default_factory=dict)


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Return the LoRA layers of `model` by module path."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def heads(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the task head: children of a Hugging Face model beside its base model."""
    backbone = getattr(model, "base_model", model)
    shared = {id(parameter) for parameter in backbone.parameters()}
    return tuple(
        name
        for name, child in model.named_children()
        if child is not backbone
        and any(id(parameter) not in shared for parameter in child.parameters())
    )


def inject(model: nn.Module, config: LoraConfig) -> tuple[str, ...]:
    """Replace the selected linear layers of `model`, in place; return their module paths.

    All other parameters are frozen, but for those of `config.modules_to_save`. What belongs to a
    `torch.nn.MultiheadAttention` is left alone: it reads weights without calling a layer.

    Raises:
        InputError: the model has LoRA layers already, or a pattern matches nothing; the message
            names the nearest modules.
    """
    if lora_layers(model):
        raise InputError("the model has LoRA layers already; detach or merge them first")
    saved = parameters_of(model, config.modules_to_save)
    chosen = _chosen(model, config)
    if unsafe := _unsafe(model, chosen):
        raise InputError(listed("cannot adapt", unsafe))
    layers = {
        path: replace(config, rank=config.rank_of(path), alpha=config.alpha_of(path))
        for path in chosen
    }
    _install(model, layers, saved)
    return chosen


def attach(model: nn.Module, adapter: Adapter) -> None:
    """Make `adapter` the one that `model` computes with, in place of any other.

    Only the low-rank pairs and the replaced tensors are copied; the base stays where it is. The
    model comes back in its own mode, with the adapter's parameters trainable.

    Raises:
        AdapterMismatch: a module or tensor is missing in the model, or its shape differs. All
            faults are listed, and the model is left as it was.
    """
    with recomputed.aside(model):
        others = _without_layer(model, adapter)
        if faults := _misfits(model, adapter, others):
            raise AdapterMismatch(listed("the adapter does not fit this model", faults))
        prepared = recomputed.prepare(model, adapter, others)
    layers = {
        path: LoraConfig(pair.rank, pair.alpha, adapter.dropout, variant=adapter.variant)
        for path, pair in adapter.modules.items()
        if path not in others
    }
    detach(model)
    _install(model, layers, tuple(adapter.replaced))
    with torch.no_grad():
        for path, layer in lora_layers(model).items():
            pair = adapter.modules[path]
            layer.scale = pair.scale
            for name, factor in layer.factors().items():
                setattr(layer, name, _parameter(getattr(pair, FACTORS[name]), factor))
        for name, value in adapter.replaced.items():
            _tensor(model, name).copy_(torch.from_numpy(widened(value)))
    recomputed.attach(model, prepared)


def _without_layer(model: nn.Module, adapter: Adapter) -> list[str]:
    """Return the paths whose updates no LoRA layer computes, so that they are computed anew.

    That is what has no layer of its own, and weights that are tied with both sides updated.
    """
    layered = is_trainable(adapter.variant)
    updated = {tensor_of(path, pair.kind) for path, pair in adapter.modules.items()}
    names: dict[int, set[str]] = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(value), set()).add(name)
    tied = {n for group in names.values() if len(group) > 1 and group <= updated for n in group}
    return [
        path
        for path, pair in adapter.modules.items()
        if not (layered and replace(pair, magnitude=None).is_plain) or f"{path}.weight" in tied
    ]


def _tensor(model: nn.Module, name: str) -> Tensor:
    """Return the parameter or the buffer `name` of `model`."""
    found: Tensor = model.state_dict(keep_vars=True)[name]
    return found


def detach(model: nn.Module) -> None:
    """Take the LoRA layers out again: plain layers with the base's own bits, heads as they were."""
    state = getattr(model, _STATE, None)
    recomputed.detach(model)
    for path, layer in lora_layers(model).items():
        if layer.is_merged:
            layer.unmerge()
        model.set_submodule(path, layer.plain())
    if isinstance(state, _State):
        with torch.no_grad():
            for name, value in state.originals.items():
                _tensor(model, name).copy_(value)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(state.trainable.get(name, True))
    forget(model)


def forget(model: nn.Module) -> None:
    """Drop what was kept for taking the adapter off: its layers are gone from `model`."""
    if hasattr(model, _STATE):
        delattr(model, _STATE)


def extract(model: nn.Module) -> Adapter:
    """Return the adapter that `model` holds at present, its values copied.

    Raises:
        InputError: the model has no LoRA layers, or a merged one, or several variants.
    """
    layers = lora_layers(model)
    if any(recomputed.updates(model)):
        raise InputError("the model holds updates that have no layer; convert their file instead")
    if not layers:
        raise InputError("the model has no LoRA layers; call inject or load_adapter first")
    kinds = {layer.variant for layer in layers.values()}
    if any(layer.is_merged for layer in layers.values()):
        raise InputError("the adapter is merged at present; call unmerge on its layers first")
    if len(kinds) > 1:
        raise InputError(f"the model mixes the variants {sorted(kinds)}; a file holds one")
    return Adapter(
        modules={
            path: Factors(alpha=layer.alpha, scale=float(layer.scale), **_arrays(layer))
            for path, layer in layers.items()
        },
        replaced={name: _array(model.get_parameter(name)) for name in _saved(model, layers)},
        variant=kinds.pop(),
        dropout=next(iter(layers.values())).dropout.p,
    )


def describe(model: nn.Module, **about: Any) -> Adapter:
    """Return the adapter that `model` holds, with `about` and the base's fingerprint filled in.

    Labels and task type come from the model where `about` does not say them.
    The fingerprint covers the base's weight of every adapted layer, as it is in memory.

    Raises:
        InputError: see `extract`; or a base that is held in 4 bits, which has no such weight.
    """
    adapter = replace(extract(model), **{**_known(model), **about})
    architecture = adapter.base.architecture or type(model).__name__
    mark = fingerprint(
        (f"{path}.weight", *_bytes(layer.base_weight()))
        for path, layer in lora_layers(model).items()
    )
    base = replace(
        adapter.base, architecture=architecture, fingerprint=mark, tensors=_tensors(model)
    )
    return replace(adapter, base=base)


def _tensors(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the base's tensors, where no layer is hidden behind another."""
    if any(recomputed.updates(model)):
        return {}
    return {
        name: tuple(value.shape)
        for name, value in model.state_dict().items()
        if name.rpartition(".")[2] not in FACTORS
    }


def _known(model: nn.Module) -> dict[str, Any]:
    """Return what a Hugging Face model says of its own task."""
    name = type(model).__name__
    task = next((task for ending, task in _TASKS.items() if name.endswith(ending)), None)
    labels = getattr(getattr(model, "config", None), "id2label", None)
    if task not in ("SEQ_CLS", "TOKEN_CLS") or not labels:
        return {"task_type": task}
    return {"task_type": task, "labels": tuple(labels[index] for index in sorted(labels))}


@contextlib.contextmanager
def idle(model: nn.Module) -> Iterator[None]:
    """Switch the low-rank updates off within the block; trained heads stay."""
    switches: list[Any] = [*lora_layers(model).values(), *recomputed.updates(model)]
    for switch in switches:
        switch.active = False
    try:
        yield
    finally:
        for switch in switches:
            switch.active = True


@dataclass(frozen=True)
class ParameterCount:
    """How many parameters a model has, and how many of them are trained."""

    lora: int
    saved: int  # trained whole: the head
    total: int

    @property
    def trainable(self) -> int:
        """Parameters that training changes."""
        return self.lora + self.saved

    @property
    def ratio(self) -> float:
        """Trainable parameters as a share of all."""
        return self.trainable / self.total if self.total else 0.0

    def __str__(self) -> str:
        rows = [
            ("LoRA", self.lora),
            ("trained whole", self.saved),
            ("trainable", self.trainable),
            ("all", self.total),
        ]
        lines = [
            f"{name:<14}{count:>15,}{count / max(self.total, 1):>10.3%}" for name, count in rows
        ]
        return "\n".join(["parameters" + " " * 14 + "count     share", *lines])


def trainable_parameters(model: nn.Module) -> ParameterCount:
    """Return the counts of trainable and of all parameters; shared ones count once."""
    lora = _factor_ids(lora_layers(model))
    counts = {"lora": 0, "saved": 0, "total": 0}
    for parameter in model.parameters():
        # A packed weight counts as what it stands for.
        packing = getattr(parameter, "quant_state", None)
        size = parameter.numel() if packing is None else packing.shape.numel()
        counts["total"] += size
        if parameter.requires_grad:
            counts["lora" if id(parameter) in lora else "saved"] += size
    return ParameterCount(**counts)


# ---------------------------------------------------------------- inside


def _saved(model: nn.Module, layers: Mapping[str, LoraLayer]) -> tuple[str, ...]:
    """Return the parameters that are stored whole: those that inject or attach was told to train.

    In a model that was built from `LoraLinear` layers by hand, they are all other trainable ones.
    """
    state = getattr(model, _STATE, None)
    if isinstance(state, _State):
        return state.saved
    lora = _factor_ids(layers)
    return tuple(n for n, p in model.named_parameters() if p.requires_grad and id(p) not in lora)


def _factor_ids(layers: Mapping[str, LoraLayer]) -> set[int]:
    return {id(p) for layer in layers.values() for p in layer.factors().values()}


def _install(model: nn.Module, layers: Mapping[str, LoraConfig], saved: tuple[str, ...]) -> None:
    state = _State({n: p.requires_grad for n, p in model.named_parameters()}, saved)
    model.requires_grad_(False)
    for path, config in layers.items():
        module = model.get_submodule(path)
        kind = layer_class(module)
        assert kind is not None, path
        model.set_submodule(path, kind.over(module, config))
    for name in saved:
        tensor = _tensor(model, name)
        state.originals[name] = tensor.detach().clone()
        if isinstance(tensor, nn.Parameter):
            tensor.requires_grad_(True)
    setattr(model, _STATE, state)


def _chosen(model: nn.Module, config: LoraConfig) -> tuple[str, ...]:
    try:
        return select(config, _candidates(model, config))
    except InputError as error:
        uncalled = [p for p, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)]
        if not uncalled:
            raise
        raise InputError(f"{error}; {_uncalled(uncalled[0])}") from error


def _uncalled(path: str) -> str:
    return (
        f"{path}: torch.nn.MultiheadAttention reads its weights without calling a layer, so that "
        "an update would be skipped silently; adapt an attention made of nn.Linear layers instead"
    )


def _candidates(model: nn.Module, config: LoraConfig) -> list[str]:
    """Return the paths of the layers that LoRA can adapt: linear, and not trained whole.

    A language model's output layer counts only where a target names it: `all-linear` leaves it.
    """
    getter = getattr(model, "get_output_embeddings", None)
    output = getter() if getter else None
    named = [target for target in config.targets if target != ALL_LINEAR]
    paths = []
    for path, module in model.named_modules():
        if not layer_class(module) or _inside(path, config.modules_to_save):
            continue
        if module is output and not any(matches(target, path) for target in named):
            continue
        paths.append(path)
    return paths


def _inside(path: str, modules: tuple[str, ...]) -> bool:
    return any(path == name or path.startswith(name + ".") for name in modules)


def _unsafe(model: nn.Module, paths: Iterable[str]) -> list[str]:
    """Return why layers at `paths` must not be adapted: an update would be lost or leak."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    faults = []
    for path in paths:
        faults += _uncalled_faults(model, path)
        twins = names[id(model.get_submodule(path).weight)]
        if others := [name for name in twins if name != f"{path}.weight"]:
            faults.append(
                f"{path}: shares its weight with {', '.join(others)}, which an update would also "
                "move when merged; untie them first"
            )
    return faults


def _uncalled_faults(model: nn.Module, path: str) -> list[str]:
    owner = model.get_submodule(path.rpartition(".")[0])
    return [_uncalled(path)] if isinstance(owner, nn.MultiheadAttention) else []


def parameters_of(model: nn.Module, modules: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of all parameters of `modules`; raise `InputError` where one is missing."""
    known = dict(model.named_modules())
    if missing := [name for name in modules if name not in known]:
        raise InputError(
            listed("no such module to save", [f"{n} (near: {nearest(n, known)})" for n in missing])
        )
    return tuple(
        f"{module}.{name}" for module in modules for name, _ in known[module].named_parameters()
    )


def _misfits(model: nn.Module, adapter: Adapter, others: Sequence[str]) -> list[str]:
    """Return why `adapter` does not fit; `others` are the paths without a LoRA layer."""
    modules = dict(model.named_modules())
    tensors = model.state_dict(keep_vars=True)
    faults = []
    variants.check(adapter.variant)
    updated = {tensor_of(path, pair.kind) for path, pair in adapter.modules.items()}
    for path, pair in adapter.modules.items():
        if path in others:
            faults += _rebuilt_faults(model, tensor_of(path, pair.kind), updated)
            continue
        shape = shape_of(modules.get(path))
        if shape is None:
            linear = [name for name, m in modules.items() if layer_class(m)]
            faults.append(f"{path}: no linear module (near: {nearest(path, linear)})")
            continue
        faults += _unsafe(model, [path])
        if (pair.magnitude is None) == ("dora" in adapter.variant.split("+")):
            faults.append(f"{path}: a magnitude and the variant {adapter.variant} do not agree")
        if shape != (pair.b.shape[0], pair.a.shape[1]):
            faults.append(
                f"{path}: adapter is for (out, in) {(pair.b.shape[0], pair.a.shape[1])}, "
                f"the model has {shape}"
            )
    for name, value in adapter.replaced.items():
        if name not in tensors:
            faults.append(f"{name}: no such parameter (near: {nearest(name, tensors)})")
        elif tuple(tensors[name].shape) != value.shape:
            faults.append(
                f"{name}: adapter has shape {value.shape}, model {tuple(tensors[name].shape)}"
            )
    return faults


def _rebuilt_faults(model: nn.Module, name: str, updated: set[str]) -> list[str]:
    """Return why the parameter `name` cannot be computed anew in every call."""
    known = dict(model.named_parameters(remove_duplicate=False))
    twins = [other for other, value in known.items() if value is known.get(name)]
    if name not in known:
        return [f"{name}: no such parameter (near: {nearest(name, known)})"]
    if faults := _uncalled_faults(model, name.rpartition(".")[0]):
        return faults
    others = ", ".join(twin for twin in twins if twin not in updated)
    return [f"{name}: is shared with {others}; untie them first"] if others else []


def _bytes(weight: Tensor) -> tuple[str, tuple[int, ...], bytes]:
    raw = weight.detach().to("cpu").contiguous()
    name = next(name for name, dtype in TORCH_DTYPES.items() if dtype == raw.dtype)
    return name, tuple(raw.shape), raw.view(torch.uint8).numpy().tobytes()


def _parameter(array: Array, fresh: Tensor) -> nn.Parameter:
    """Return `array` as a parameter on the device of `fresh`, in the wider dtype of the two."""
    value = torch.from_numpy(widened(array))
    dtype = torch.promote_types(value.dtype, fresh.dtype)
    return nn.Parameter(value.to(fresh.device, dtype, copy=True))


def _arrays(layer: LoraLayer) -> dict[str, Any]:
    return {FACTORS[name]: _array(factor) for name, factor in layer.factors().items()}


def _array(tensor: Tensor) -> Array:
    """Return a copy as float32, or float64 where the tensor is that; both are exact."""
    wide = tensor.detach().to("cpu")
    kept = wide if wide.dtype == torch.float64 else wide.float()
    return kept.clone().numpy()
