"""Adapter x Checkpoint -> MergePlan: what will become of every tensor on both sides.

All faults are found here and listed at once, before anything is written.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from lora_export.config import matches, nearest
from lora_export.errors import AdapterMismatch, InputError, listed
from lora_export.lora import LoraConv1D, layer_class
from lora_export.records import Adapter
from lora_export.storage import Checkpoint, TensorInfo, fingerprint

FLOATS = ("F64", "F32", "F16", "BF16")
# What old checkpoints call the parameters of a layer norm; transformers renames them on loading.
_LEGACY = {".gamma": ".weight", ".beta": ".bias"}

COPY, MERGE, PLACE = "copy", "merge", "place"


@dataclass(frozen=True)
class Step:
    """How one tensor of the output comes about."""

    operation: str  # COPY base bytes, MERGE an update into them, or PLACE the adapter's own tensor
    name: str  # in the output
    shard: str
    dtype: str  # of the output, safetensors' name
    shape: tuple[int, ...]
    source: str | None = None  # name in the base
    module: str | None = None  # for MERGE: module path in the adapter
    transposed: bool = False  # for MERGE: the weight is stored as (in, out)


@dataclass(frozen=True)
class MergePlan:
    """One step for each tensor of the output, in file order, and the account of the rest."""

    architecture: str
    steps: tuple[Step, ...]
    dropped: Mapping[str, str]  # base tensors that do not go into the output, and why
    notes: tuple[str, ...]

    def of(self, operation: str) -> tuple[Step, ...]:
        """Return the steps with this operation."""
        return tuple(step for step in self.steps if step.operation == operation)


def plan(
    adapter: Adapter,
    checkpoint: Checkpoint,
    model: nn.Module,
    *,
    dtype: str | None = None,
    allow_base_mismatch: bool = False,
) -> MergePlan:
    """Return the plan that merges `adapter` into `checkpoint`.

    Args:
        adapter: What to merge.
        checkpoint: The base.
        model: The adapter's architecture, without weights (meta device): it says which tensors
            the output needs, and which layers store their weight transposed.
        dtype: safetensors' name of the output's float dtype; None keeps each tensor's own.
        allow_base_mismatch: Go on where the base is not the one that the adapter was trained on.

    Raises:
        AdapterMismatch: with every fault: an adapter tensor without a target, a target of another
            shape, a needed tensor that neither side has, a base with another fingerprint.
    """
    wanted = _tensor_groups(model)
    sources = _sources(checkpoint, model, wanted)
    faults = [
        *_module_faults(adapter, checkpoint, model, sources, wanted),
        *_replaced_faults(adapter, model, wanted),
        *_missing(adapter, sources, wanted),
        *_broken_promises(adapter, model),
        *(f"{n}: the base holds an unmerged adapter" for n in checkpoint.tensors if "lora_" in n),
    ]
    if faults:
        raise AdapterMismatch(
            listed(f"the adapter does not fit the base {checkpoint.root.name}", faults)
        )
    notes = _check_fingerprint(adapter, checkpoint, sources, allow=allow_base_mismatch)
    if absent := _unadapted(adapter, model):
        notes += (
            listed("the config targets these modules, the file has no pair for them", absent),
        )
    steps = _steps(adapter, checkpoint, model, sources, dtype)
    used = {step.source for step in steps}
    kind = type(model).__name__
    dropped = {
        name: f"not a tensor of {kind}" for name in checkpoint.tensors if name not in used
    } | {
        source: "replaced by the adapter's own tensor"
        for name, source in sources.items()
        if name in adapter.replaced
    }
    return MergePlan(kind, steps, dropped, notes)


def _tensor_groups(model: nn.Module) -> dict[str, frozenset[str]]:
    """Return, for each tensor name of the model, the names that share its storage (tied ones)."""
    by_identity: dict[int, set[str]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        by_identity.setdefault(id(value), set()).add(name)
    return {name: frozenset(group) for group in by_identity.values() for name in group}


def _sources(
    checkpoint: Checkpoint, model: nn.Module, wanted: Mapping[str, frozenset[str]]
) -> dict[str, str]:
    """Return the base tensor behind each tensor name of the model, as transformers resolves it."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    found: dict[str, str] = {}
    for name in checkpoint.tensors:
        modern = name
        for old, new in _LEGACY.items():
            modern = modern.removesuffix(old) + new if modern.endswith(old) else modern
        for candidate in (name, prefix + name, name.removeprefix(prefix), modern, prefix + modern):
            if candidate in wanted:
                found.setdefault(candidate, name)
                break
    return found


def _module_faults(
    adapter: Adapter,
    checkpoint: Checkpoint,
    model: nn.Module,
    sources: Mapping[str, str],
    wanted: Mapping[str, frozenset[str]],
) -> list[str]:
    modules = dict(model.named_modules())
    linear = [path for path, module in modules.items() if layer_class(module)]
    faults = []
    for path, pair in adapter.modules.items():
        weight = f"{path}.weight"
        if path not in modules or not layer_class(modules[path]):
            faults.append(f"{path}: no linear module (near: {nearest(path, linear)})")
        elif len(wanted[weight]) > 1:
            others = ", ".join(sorted(wanted[weight] - {weight}))
            faults.append(f"{path}: its weight is shared with {others}")
        elif weight in sources:
            info = checkpoint.tensors[sources[weight]]
            expected = (pair.b.shape[0], pair.a.shape[1])
            stored = info.shape[::-1] if _is_transposed(model, path) else info.shape
            if stored != expected:
                faults.append(f"{path}: adapter is for (out, in) {expected}, the base has {stored}")
            if info.dtype not in FLOATS:
                faults.append(f"{path}: cannot merge into a weight of dtype {info.dtype}")
    return faults


def _replaced_faults(
    adapter: Adapter, model: nn.Module, wanted: Mapping[str, frozenset[str]]
) -> list[str]:
    state = model.state_dict()
    faults = []
    for name, value in adapter.replaced.items():
        if len(wanted.get(name, ())) > 1:
            others = ", ".join(sorted(wanted[name] - {name}))
            faults.append(f"{name}: is shared with {others}, which the adapter does not replace")
        elif name not in wanted:
            faults.append(f"{name}: no such tensor (near: {nearest(name, wanted)})")
        elif tuple(state[name].shape) != value.shape:
            faults.append(
                f"{name}: adapter has shape {value.shape}, the model {tuple(state[name].shape)}"
            )
    return faults


def _missing(
    adapter: Adapter, sources: Mapping[str, str], wanted: Mapping[str, frozenset[str]]
) -> list[str]:
    have = sources.keys() | adapter.replaced.keys()
    return [
        f"{name}: neither the base nor the adapter has it"
        for name, group in wanted.items()
        if not group & have
    ]


def _broken_promises(adapter: Adapter, model: nn.Module) -> list[str]:
    """Return what the config says was trained and the file lost: a head, a layer named in full."""
    paths = dict(model.named_modules())
    heads = [
        path
        for path, module in paths.items()
        if any(matches(name, path) for name in adapter.promises.saved)
        and any(True for _ in module.parameters())
        and not any(tensor.startswith(path + ".") for tensor in adapter.replaced)
    ]
    layers = [n for n in adapter.promises.adapted if n in paths and n not in adapter.modules]
    return [
        *(f"{path}: trained whole by the config, absent from the file" for path in heads),
        *(f"{path}: adapted by the config, absent from the file" for path in layers if "." in path),
    ]


def _unadapted(adapter: Adapter, model: nn.Module) -> list[str]:
    """Return the linear modules that the config's targets match and the file has no pair for."""
    return [
        path
        for path, module in model.named_modules()
        if layer_class(module)
        and path not in adapter.modules
        and f"{path}.weight" not in adapter.replaced
        and any(path == name or path.endswith("." + name) for name in adapter.promises.adapted)
    ]


def _check_fingerprint(
    adapter: Adapter, checkpoint: Checkpoint, sources: Mapping[str, str], *, allow: bool
) -> tuple[str, ...]:
    """Compare the base with the one that the adapter was trained on; return what to note."""
    expected = adapter.base.fingerprint
    if expected is None:
        return ("the adapter carries no fingerprint of its base: identity of the base unchecked",)
    infos = {f"{p}.weight": checkpoint.tensors[sources[f"{p}.weight"]] for p in adapter.modules}
    found = fingerprint((name, *_as_trained(info, expected.dtype)) for name, info in infos.items())
    if found == expected:
        return ("the base has the fingerprint that the adapter was trained on",)
    message = (
        f"the base {checkpoint.root.name} is not the one that this adapter was trained on: "
        f"fingerprint {found.sha256[:16]}, expected {expected.sha256[:16]} "
        f"({expected.tensors} tensors, {adapter.base.public_id or 'no id recorded'})"
    )
    if not allow:
        raise AdapterMismatch(f"{message}; --allow-base-mismatch merges all the same")
    return (f"allowed by the caller: {message}",)


def _as_trained(info: TensorInfo, dtype: str | None) -> tuple[str, tuple[int, ...], bytes]:
    """Return dtype, shape and bytes; a narrower base that was loaded as float32 is widened too."""
    if dtype == "F32" and info.dtype in ("BF16", "F16"):
        return "F32", info.shape, info.array().astype("<f4").tobytes()
    return info.dtype, info.shape, info.read()


def _steps(
    adapter: Adapter,
    checkpoint: Checkpoint,
    model: nn.Module,
    sources: Mapping[str, str],
    dtype: str | None,
) -> tuple[Step, ...]:
    targets = {source: name for name, source in sources.items()}
    merged = {f"{path}.weight": path for path in adapter.modules}
    order = sorted(
        checkpoint.tensors.values(), key=lambda t: (checkpoint.shards.index(t.file.name), t.start)
    )
    steps = []
    for info in order:
        name = targets.get(info.name)
        if name is None or name in adapter.replaced:
            continue
        stored = dtype if dtype and info.dtype in FLOATS else info.dtype
        path = merged.get(name)
        steps.append(
            Step(
                operation=MERGE if path else COPY,
                name=name,
                shard=info.file.name,
                dtype=stored,
                shape=info.shape,
                source=info.name,
                module=path,
                transposed=bool(path) and _is_transposed(model, str(path)),
            )
        )
    floats = [step.dtype for step in steps if step.operation == MERGE]
    if not floats:
        raise InputError("the adapter merges into no tensor")
    steps += [
        Step(PLACE, name, checkpoint.shards[-1], floats[0], value.shape)
        for name, value in adapter.replaced.items()
    ]
    return tuple(steps)


def _is_transposed(model: nn.Module, path: str) -> bool:
    return layer_class(model.get_submodule(path)) is LoraConv1D
