"""A live update of any kind: the merged weight, computed anew in every call.

For what has no layer of its own (DoRA, embeddings, convolutions, fused experts, ...). It answers
as the adapter's author saw it, and costs what computing a weight costs; nothing here is trained.
"""

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lora_export import variants
from lora_export.architecture import first_in
from lora_export.errors import AdapterMismatch
from lora_export.lora import have_called
from lora_export.records import CONV, EMBEDDING, EXPERTS, LINEAR, Adapter, Array, Factors, widened
from lora_export.refusals import refused
from lora_export.torch_rounding import round_once


class Update(nn.Module):
    """From a base's parameter to the merged one."""

    def __init__(self) -> None:
        super().__init__()
        self.active = True

    def forward(self, base: Tensor) -> Tensor:
        """Return the merged parameter, or the base's own where the update is switched off."""
        return self.merged(base).to(base.dtype) if self.active else base

    def merged(self, base: Tensor) -> Tensor:
        """Return the merged parameter in the dtype of `base`, which may be float64."""
        raise NotImplementedError


class WeightUpdate(Update):
    """The update of a weight by a low-rank pair, of whatever variant and layout."""

    a: Tensor  # (experts, rank, in)
    b: Tensor  # (experts, out, rank)
    diagonal: Tensor | None
    magnitude: Tensor | None
    residual: Tensor | None  # what training began with, (1, out, in)

    def __init__(self, pair: Factors, variant: str, base: Tensor, *, transposed: bool) -> None:
        super().__init__()
        self.scale, self.variant, self.transposed = pair.scale, variant, transposed
        self.shape = tuple(base.shape)
        a, b = pair.matrices()
        self.register_buffer("a", _tensor(a, base))
        self.register_buffer("b", _tensor(b, base))
        for name in ("diagonal", "magnitude"):
            value = getattr(pair, name)
            self.register_buffer(name, None if value is None else _tensor(value, base))
        self.register_buffer("residual", None)
        if pair.kind == LINEAR and variants.changes_base(variant):
            # Training kept what was left of the base in the base's own dtype.
            before = self._oriented(base.detach()).double()
            exact = variants.base(variant, before, pair.scale, pair.rank)
            self.residual = round_once(exact, base.dtype)

    def merged(self, base: Tensor) -> Tensor:
        """Return W0 + s B A, or what the variant makes of the two."""
        weight = self._oriented(base if self.residual is None else base.detach())
        if self.residual is not None:
            weight = self.residual.to(base.dtype)
        a, b = self.a.to(base.dtype), self.b.to(base.dtype)
        if self.diagonal is not None:
            b = b * self.diagonal.to(base.dtype)
        magnitude = None if self.magnitude is None else self.magnitude.to(base.dtype)
        found: Tensor = variants.merged(self.variant, weight, self.scale * (b @ a), magnitude)
        return (found.transpose(-1, -2) if self.transposed else found).reshape(self.shape)

    def _oriented(self, base: Tensor) -> Tensor:
        """Return `base` as (experts, out, in)."""
        rows, columns = self.b.shape[1], self.a.shape[2]
        shape = (len(self.a), columns, rows) if self.transposed else (len(self.a), rows, columns)
        stacked = base.reshape(shape)
        return stacked.transpose(1, 2) if self.transposed else stacked


class BiasUpdate(Update):
    """The update of a bias: plus s times the bias of lora_B."""

    bias: Tensor

    def __init__(self, pair: Factors, base: Tensor) -> None:
        super().__init__()
        assert pair.bias is not None
        self.scale = pair.scale
        self.register_buffer("bias", _tensor(pair.bias, base))

    def merged(self, base: Tensor) -> Tensor:
        """Return b0 + s b."""
        return base + self.scale * self.bias.to(base.dtype)


class RowUpdate(Update):
    """Rows of an embedding that were trained, in place of the base's."""

    rows: Tensor

    def __init__(self, indices: Iterable[int], values: Array, base: Tensor) -> None:
        super().__init__()
        self.indices = list(indices)
        self.register_buffer("rows", _tensor(values, base))

    def merged(self, base: Tensor) -> Tensor:
        """Return `base` with the trained rows."""
        found = base.clone()
        found[self.indices] = self.rows.to(base.dtype)
        return found


def _tensor(value: Array, base: Tensor) -> Tensor:
    return torch.from_numpy(widened(value)).to(base.device)


class Recomputed(nn.Module):
    """A module of the base whose updated parameters are computed anew in every call."""

    def __init__(self, base: nn.Module, updates: dict[str, Update]) -> None:
        super().__init__()
        self.base = base
        self.updates = nn.ModuleDict(updates)
        self.train(base.training)
        have_called(self)

    def forward(self, *args: Any, **named: Any) -> Any:
        """Return what the base answers with the updated parameters."""
        return functional_call(self.base, self.parameters_of(), args, named)

    def parameters_of(self) -> dict[str, Tensor]:
        """Return the updated parameters by name."""
        return {
            name: update(self.base.get_parameter(name)) for name, update in self.updates.items()
        }

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # models read sizes, dtypes and padding off their layers
            return getattr(super().__getattr__("base"), name)


Prepared = dict[str, dict[str, Update]]  # by module path and name of the parameter


def prepare(model: nn.Module, adapter: Adapter, paths: Iterable[str]) -> Prepared:
    """Return the updates of `adapter` at `paths` and its rows; the model is not touched.

    Raises:
        AdapterMismatch: a shape does not fit, or square experts could lie either way.
    """
    found: Prepared = defaultdict(dict)
    version = str(adapter.fields.get("peft_version") or "")
    for path in paths:
        pair = adapter.modules[path]
        owner, name = path.rpartition(".")[::2] if pair.kind == EXPERTS else (path, "weight")
        module = model.get_submodule(owner)
        base = module.get_parameter(name)
        transposed = _is_transposed(path, pair, module, base, version)
        found[owner][name] = WeightUpdate(pair, adapter.variant, base, transposed=transposed)
        if pair.bias is not None:
            bias = getattr(module, "bias", None)
            if bias is None or tuple(bias.shape) != pair.bias.shape:
                raise AdapterMismatch(refused("no-bias", path))
            found[owner]["bias"] = BiasUpdate(pair, bias)
    for path, rows in adapter.rows.items():
        weight = dict(model.named_parameters(remove_duplicate=False)).get(f"{path}.weight")
        shape = () if weight is None else tuple(weight.shape)
        if len(shape) != 2 or shape[1] != rows.values.shape[1] or max(rows.indices) >= shape[0]:
            raise AdapterMismatch(f"{path}: rows {rows.values.shape}, the model has {shape}")
        for owner, module in model.named_modules():  # tied weights share their rows, as in PEFT
            if getattr(module, "weight", None) is weight and weight is not None:
                found[owner]["weight"] = RowUpdate(rows.indices, rows.values, weight)
    return found


def attach(model: nn.Module, prepared: Prepared) -> None:
    """Have the updates computed in every call of `model`."""
    for owner, found in prepared.items():
        model.set_submodule(owner, Recomputed(model.get_submodule(owner), found))


@contextlib.contextmanager
def aside(model: nn.Module) -> Iterator[None]:
    """Show the base's own modules within the block."""
    wrapped = _wrapped(model)
    detach(model)
    try:
        yield
    finally:
        for path, module in wrapped:
            model.set_submodule(path, module)


def updates(model: nn.Module) -> Iterator[Update]:
    """Yield the updates that `model` computes in every call."""
    return (module for module in model.modules() if isinstance(module, Update))


def detach(model: nn.Module) -> None:
    """Take all updates off: the base's own modules are what they were."""
    for path, module in _wrapped(model):
        model.set_submodule(path, module.base)


def merge(model: nn.Module) -> None:
    """Put the merged parameters in place of the base's: float64, rounded once.

    Raises:
        InputError: a merged value is not finite; the model is then left as it was.
    """
    merged: list[tuple[str, str, nn.Parameter]] = []
    shared: dict[int, nn.Parameter] = {}
    for path, module in _wrapped(model):
        for name, update in module.updates.items():
            base = module.base.get_parameter(name)
            exact = update.merged(base.detach().double())  # type: ignore[operator]
            value = nn.Parameter(round_once(exact, base.dtype), requires_grad=False)
            merged.append((path, name, shared.setdefault(id(base), value)))  # ties stay
    detach(model)
    for path, name, value in merged:
        model.get_submodule(path).register_parameter(name, value)


def _wrapped(model: nn.Module) -> list[tuple[str, Recomputed]]:
    return [(path, m) for path, m in model.named_modules() if isinstance(m, Recomputed)]


def _is_transposed(path: str, pair: Factors, module: nn.Module, base: Tensor, version: str) -> bool:
    a, b = pair.matrices()
    size, shape = (b.shape[1], a.shape[2]), tuple(base.shape)
    if pair.kind == EXPERTS:
        if len(a) == 1 and shape[-2:] == size:
            return False
        straight, flipped = shape[1:] == size, shape[1:] == size[::-1]
        square = first_in(version, bool(getattr(module, "is_transposed", False)))
        found = square if straight and flipped else flipped
        if len(a) != shape[0] or not (straight or flipped) or found is None:
            raise AdapterMismatch(f"{path}: experts {(len(a), *size)} do not fit {shape} one way")
        return found
    transposed = pair.kind == EMBEDDING or type(module).__name__ == "Conv1D"
    rows, columns = shape[0], base.numel() // max(shape[0], 1)
    if ((columns, rows) if transposed else (rows, columns)) != size:
        raise AdapterMismatch(f"{path}: adapter is for (out, in) {size}, the model has {shape}")
    if pair.kind == CONV and shape[1:] != tuple(pair.a.shape[1:]):
        raise AdapterMismatch(f"{path}: adapter is for a kernel {pair.a.shape[1:]}, not {shape}")
    return transposed
