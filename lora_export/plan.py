"""Adapter x Checkpoint -> MergePlan: what will become of every tensor on both sides.

All faults are found here and listed at once, before anything is written. No torch, no model: what
has to be known of the model stands in an `Architecture`.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lora_export import peft_config
from lora_export.architecture import (
    CONV1D,
    OTHER,
    Architecture,
    Box,
    Layer,
    Link,
    Span,
    first_in,
    stack,
)
from lora_export.config import is_named, nearest
from lora_export.errors import MOST_LISTED, AdapterMismatch, InputError, listed
from lora_export.records import (
    CONV,
    EMBEDDING,
    EXPERTS,
    LINEAR,
    Adapter,
    Array,
    Factors,
    is_float,
    tensor_of,
)
from lora_export.refusals import refused
from lora_export.storage import DTYPE_BYTES, Checkpoint, TensorInfo, dtype_name, fingerprint

FLOATS = ("F64", "F32", "F16", "BF16")
COPY, MERGE, PLACE = "copy", "merge", "place"
_FACTOR = re.compile(r"\.lora_([ABabE]|embedding_[AB]|magnitude_vector|down|up)\b")
_CHANGED = ("pissa", "olora", "kasa")  # variants whose training began by changing the base
WEIGHT, BIAS, ROWS = "weight", "bias", "rows"
TIED = ("error", "untie", "both")
LAYOUTS = ("out-in", "in-out")


@dataclass(frozen=True)
class Choices:
    """What a caller decides where adapter and base leave it open."""

    dtype: str | None = None  # safetensors' name of the output's float dtype; None keeps each
    tied: str = "error"
    residual_base: bool = False  # the base is already the residual that training began with
    expert_layout: str | None = None
    allow_base_mismatch: bool = False


@dataclass(frozen=True)
class Part:
    """One update, or a piece of it, and the region of a tensor that it changes. None means all."""

    module: str  # in the adapter
    what: str = WEIGHT  # WEIGHT, BIAS or ROWS
    transposed: bool = False  # the region is stored as (in, out)
    experts: Span | None = None  # of the update
    outs: Span | None = None
    ins: Span | None = None
    box: Box | None = None  # the region, with the tensor seen as (experts, rows, columns)


@dataclass(frozen=True)
class Step:
    """How one tensor of the output comes about."""

    operation: str  # COPY base bytes, MERGE updates into them, or PLACE the adapter's own tensor
    name: str  # in the output
    shard: str
    dtype: str  # of the output, safetensors' name
    shape: tuple[int, ...]
    source: str | None = None  # name in the base
    placed: str | None = None  # name among the adapter's own tensors
    parts: tuple[Part, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of the tensor in the output."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]

    @property
    def modules(self) -> tuple[str, ...]:
        """The adapter's modules whose updates are merged here."""
        return tuple(dict.fromkeys(part.module for part in self.parts))


@dataclass(frozen=True)
class MergePlan:
    """One step for each tensor of the output, in file order, and the account of the rest."""

    architecture: str
    steps: tuple[Step, ...]
    dropped: Mapping[str, str]  # base tensors that do not go into the output, and why
    ignored: Mapping[str, str]  # adapter tensors that do not, and why
    variant: str  # that is merged: the adapter's, less what the base already went through
    notes: tuple[str, ...]

    def of(self, operation: str) -> tuple[Step, ...]:
        """Return the steps with this operation."""
        return tuple(step for step in self.steps if step.operation == operation)


def plan(
    adapter: Adapter,
    checkpoint: Checkpoint,
    architecture: Architecture,
    choices: Choices | None = None,
) -> MergePlan:
    """Return the plan that merges `adapter` into `checkpoint`.

    Args:
        adapter: What to merge.
        checkpoint: The base.
        architecture: Which tensors the output needs, and where they lie in the checkpoint.
        choices: What the caller decides.

    Raises:
        AdapterMismatch: with every fault: an adapter tensor without a target, a target of another
            shape, a needed tensor that neither side has, a base with another fingerprint.
    """
    maker = _Planner(adapter, checkpoint, architecture, choices or Choices())
    return maker.plan()


def order_of_model(adapter: Adapter, found: Architecture) -> tuple[str, ...] | None:
    """Return the model's order of nested parameters, where another one was assumed."""
    places = {name: index for index, name in enumerate(found.shapes)}
    for module, assumed in adapter.nested.items():
        tensors = {leaf: found.names.get(f"{module}.{leaf}", ()) for leaf in assumed}
        if not all(tensors.values()):
            continue
        order = sorted(assumed, key=lambda leaf: places[tensors[leaf][0].tensor])
        if tuple(order) != assumed:
            return tuple(order)
    return None


class _Planner:
    """The work of `plan`, step by step; faults and notes gather on the way."""

    def __init__(
        self,
        adapter: Adapter,
        checkpoint: Checkpoint,
        architecture: Architecture,
        choices: Choices,
    ) -> None:
        self.adapter, self.checkpoint = adapter, checkpoint
        self.architecture, self.choices = architecture, choices
        self.faults: list[str] = []
        self.notes: list[str] = []
        # By name in the base and the model's tensor that it is read as.
        self.parts: dict[tuple[str, str], list[Part]] = defaultdict(list)
        self.links: dict[str, list[Link]] = defaultdict(list)
        for link in architecture.links:
            self.links[link.stored].append(link)
        self.renamed: dict[str, str] = {}
        self.landed: list[bool] = []  # whether each module was found in the model
        self.ignored = dict(adapter.ignored)
        self.squares: dict[str, list[str]] = {}  # how square experts were read, and where
        self.placed: dict[str, str] = {}  # the model's tensor -> the adapter's own
        self.onto: dict[str, list[Part]] = defaultdict(list)  # by the adapter's own tensor

    def plan(self) -> MergePlan:
        for name in self.adapter.replaced:
            self._place(name)
        for path, pair in self.adapter.modules.items():
            self._merge(path, pair)
        for path in self.adapter.rows:
            self._rows(path)
        init = self.adapter.fields.get("init_lora_weights")
        if peft_config.is_residual(self.adapter.fields) and not self.choices.residual_base:
            self.faults.append(refused("residual-base", found=f"init_lora_weights {init}"))
        if self.adapter.modules and not any(self.landed):
            kind, count = self.architecture.name, len(self.adapter.modules)
            self.faults.insert(
                0, f"all {count} modules are unknown to {kind}: another architecture?"
            )
            raise self._mismatch()
        self.faults += [
            *self._misordered(),
            *self._overlaps(),
            *self._missing(),
            *self._misshapen(),
            *self._broken_promises(),
            *(f"{n}: the base holds an unmerged adapter" for n in self._adapters_in_base()),
        ]
        if self.faults:
            raise self._mismatch()
        self.notes += self._base_notes()
        self.notes += _check_fingerprint(
            self.adapter, self.checkpoint, self._whole(), allow=self.choices.allow_base_mismatch
        )
        steps = self._steps()
        names = Counter(step.name for step in steps)
        self.faults += [
            f"{n}: comes twice in the output" for n, count in names.items() if count > 1
        ]
        if self.faults:
            raise self._mismatch()
        return MergePlan(
            self.architecture.name,
            steps,
            self._dropped(steps),
            self.ignored,
            self._variant(),
            tuple(self.notes),
        )

    def _mismatch(self) -> AdapterMismatch:
        root = self.checkpoint.root.name
        return AdapterMismatch(listed(f"the adapter does not fit the base {root}", self.faults))

    def _variant(self) -> str:
        """Return the variant to merge: a residual base went through its first part already."""
        names = self.adapter.variant.split("+")
        done = _CHANGED if self.choices.residual_base else ()
        return "+".join(name for name in names if name not in done)

    # ------------------------------------------------------------ where each update lands

    def _links(self, name: str) -> tuple[Link, ...]:
        """Return where the adapter's tensor `name` lies in the model; without one, a fault."""
        links = self.architecture.names.get(name, ())
        owner = self._layer_at(name)
        if not links and owner.refusal:
            self.faults.append(refused(owner.refusal, name, owner.found))
        elif not links:
            near = ""
            if len(self.faults) < MOST_LISTED:  # looking for neighbours takes its time
                near = f" (near: {nearest(name, self.architecture.shapes)})"
            self.faults.append(f"{name}: no such tensor{near}")
        elif links[0].tensor != name:
            self.renamed[name] = links[0].tensor
        return links

    def _place(self, name: str) -> None:
        """Have the adapter's own tensor `name` stored in place of the base's."""
        links = self._links(name)
        if not links:
            return
        stored = self.architecture.stored_for(links[0].tensor)
        moved = any(link.swapped or not link.is_whole for link in (*links, *stored))
        if len(links) > 1 or moved:
            self.faults.append(refused("conversion", name))
            return
        tensor, value = links[0].tensor, self.adapter.replaced[name]
        needed = self.architecture.shapes[tensor]
        if needed != value.shape:
            self.faults.append(f"{name}: adapter has shape {value.shape}, the model {needed}")
        if is_float(value) != self._is_float(tensor):
            self.faults.append(f"{name}: adapter has dtype {value.dtype}, which the model has not")
        others = self.architecture.tied(tensor) - {tensor}
        twins = [o for o in others if o in self.adapter.replaced]
        same = all(_equal(self.adapter.replaced[o], value) for o in twins)
        whole = len(twins) == len(others) or self.choices.tied == "both"
        if others and not (same and whole):
            self.faults.append(refused("tied", name, f"shared with {', '.join(sorted(others))}"))
        if not any(other in self.placed for other in others):
            self.placed[tensor] = name

    def _is_float(self, tensor: str) -> bool:
        """Return whether the model's `tensor` holds floats: as stored, or as all parameters do."""
        stored = self.architecture.stored_for(tensor)
        if stored:
            return self.checkpoint.tensors[stored[0].stored].dtype in FLOATS
        return tensor not in self.architecture.buffers

    def _merge(self, path: str, pair: Factors) -> None:
        """Have the update of the module at `path` added where it lies."""
        name = tensor_of(path, pair.kind)
        links = self._links(name)
        self.landed.append(bool(links))
        if not links:
            return
        tensor = links[0].tensor
        layer = self._layer_at(tensor)
        faults = self._layer_faults(path, pair, layer, links)
        others = self.architecture.tied(tensor) - {tensor}
        if twin := self._twin(path, pair, others) if others else None:
            self.ignored[path] = f"the same update as that of {twin}, whose weight is tied to it"
            return
        if others and not self._both_sides(path, pair, others):
            shared = f"shared with {', '.join(sorted(others))}"
            faults.append(refused("tied", path, shared))
        what = self.architecture.unfollowed.get(tensor)
        if what:
            faults = [refused("conversion", path, what)]
        if faults:
            self.faults += faults
            return
        transposed = self._is_transposed(path, pair, layer, links)
        if transposed is not None:
            self._lay(path, pair, links, transposed)
        if pair.bias is not None:
            self._bias(path)

    def _twin(self, path: str, pair: Factors, others: frozenset[str]) -> str | None:
        """Return an earlier module with the same update of a weight that is tied to this one's."""
        for other, known in self.adapter.modules.items():
            if other == path:
                return None
            links = self._known(tensor_of(other, known.kind))
            if links and links[0].tensor in others and _same_update(pair, known):
                return other
        return None

    def _both_sides(self, path: str, pair: Factors, others: frozenset[str]) -> bool:
        """Return whether every tensor that is tied to the one of `path` is to move with it."""
        held = {
            links[0].tensor
            for other, known in self.adapter.modules.items()
            if (links := self._known(tensor_of(other, known.kind))) and _same_update(pair, known)
        }
        return self.choices.tied == "both" or others <= held

    def _layer_faults(
        self, path: str, pair: Factors, layer: Layer, links: tuple[Link, ...]
    ) -> list[str]:
        """Return why the layer at `path` cannot take the update."""
        if layer.refusal:
            return [refused(layer.refusal, path, layer.found)]
        names = set(self.adapter.variant.split("+"))
        whole = all(link.is_whole for link in links)
        if pair.kind == EXPERTS:
            return []
        # AdaLoRA stores the pair of a 2-d convolution flat.
        flat = (CONV,) if "adalora" in names and _axes(self.architecture, links) == 4 else ()
        takes = {
            LINEAR: (LINEAR, CONV1D, *flat, *((EMBEDDING,) if pair.is_plain else ())),
            EMBEDDING: (EMBEDDING,),
            CONV: (CONV,),
        }[pair.kind]
        if whole and layer.kind not in takes:
            known = [p for p, known in self.architecture.layers.items() if known.kind in takes]
            found = layer.found or layer.kind
            near = f"no {pair.kind} layer but {found}; near: {nearest(path, known)}"
            return [refused("layer-kind", path, near)]
        faults = []
        if layer.kind == CONV1D and {"olora", "kasa"} & names:
            faults.append(refused("layer-kind", path, f"{self.adapter.variant} on HF Conv1D"))
        if not whole and names & {*_CHANGED} and not self.choices.residual_base:
            faults.append(refused("layer-kind", path, f"{self.adapter.variant} on a fused weight"))
        return faults

    def _is_transposed(
        self, path: str, pair: Factors, layer: Layer, links: tuple[Link, ...]
    ) -> bool | None:
        """Return whether the model's tensor is stored as (in, out); a misfit is a fault."""
        a, b = pair.matrices()
        count, outs, ins = len(a), b.shape[1], a.shape[2]
        shape = self.architecture.shapes[links[0].tensor]
        if pair.kind == EXPERTS:
            experts, rows, columns = stack(shape)
            straight, flipped = (rows, columns) == (outs, ins), (rows, columns) == (ins, outs)
            # With one expert PEFT adds B A as it is, whatever the layout.
            if experts != count or not (straight or (flipped and count > 1)):
                self.faults.append(
                    f"{path}: adapter is for (experts, out, in) {(count, outs, ins)}, "
                    f"the base has {shape}"
                )
                return None
            if count == 1 or straight != flipped:
                return not straight
            return self._expert_layout(path, layer)
        transposed = layer.kind in (CONV1D, EMBEDDING)
        box = links[0].box
        rows, columns = (
            stack(shape, pair.kind)[1:] if box is None else (_length(box[1]), _length(box[2]))
        )
        if links[0].swapped:
            rows, columns = columns, rows
        if links[0].offset is not None:
            rows = sum(_length(link.offset[1]) for link in links if link.offset)
        found = (columns, rows) if transposed else (rows, columns)
        kernel = pair.a.shape[1:] if pair.kind == CONV else None
        if found != (outs, ins) or (kernel is not None and kernel != shape[1:]):
            have = (outs, *kernel) if kernel else (outs, ins)
            stored = shape if kernel else found
            self.faults.append(f"{path}: adapter is for (out, in) {have}, the base has {stored}")
            return None
        return transposed

    def _expert_layout(self, path: str, layer: Layer) -> bool | None:
        """Return whether square experts are stored as (in, out), or note the fault."""
        if self.choices.expert_layout:
            return self.choices.expert_layout == "in-out"
        version = str(self.adapter.fields.get("peft_version") or "")
        in_first = first_in(version, layer.out_first is False)
        if in_first is None:
            self.faults.append(refused("expert-layout", path, "no peft_version"))
            return None
        order = "in-out" if in_first else "out-in"
        self.squares.setdefault(
            f"square experts read as {order}, as PEFT {version} does", []
        ).append(path)
        return in_first

    def _lay(self, path: str, pair: Factors, links: tuple[Link, ...], transposed: bool) -> None:
        """Cut the update of `path` into parts, one for each stored tensor that it reaches."""
        covered: dict[str, int] = defaultdict(int)  # by the name under which the base stores it
        for link in links:
            tensor = link.tensor
            if (own := self._own(tensor)) is not None:
                self.onto[own].append(Part(path, transposed=transposed != link.swapped))
                covered[tensor] += math.prod(self.architecture.shapes[tensor])
                continue
            for target in self.architecture.stored_for(tensor):
                size = stack(self.architecture.shapes[tensor], pair.kind)
                part, count = _part(path, link, target, size, transposed)
                info = self.checkpoint.tensors[target.stored]
                if part is None:
                    continue
                covered[target.tensor] += count
                if info.dtype not in FLOATS:
                    message = f"a weight of dtype {info.dtype}"
                    self.faults.append(refused("quantised-base", path, message))
                if pair.magnitude is not None and part.ins is not None:
                    self.faults.append(refused("layer-kind", path, "DoRA on part of the rows"))
                self.parts[target.stored, target.tensor].append(part)
        a, b = pair.matrices()
        expected = len(a) * b.shape[1] * a.shape[2]
        shared = len(links) == 1 and len(self.architecture.tied(links[0].tensor)) > 1
        held = max(covered.values(), default=0) if shared else sum(covered.values())
        if held != expected:
            self.faults.append(
                f"{path}: the base holds {held} of the {expected} weights that it updates"
            )

    def _own(self, tensor: str) -> str | None:
        """Return the adapter's own tensor that is stored as `tensor`, if any."""
        return next(
            (self.placed[n] for n in sorted(self.architecture.tied(tensor)) if n in self.placed),
            None,
        )

    def _bias(self, path: str) -> None:
        name = f"{path}.bias"
        links = self.architecture.names.get(name, ())
        pair = self.adapter.modules[path]
        if not links:
            self.faults.append(refused("no-bias", path))
            return
        part = Part(path, BIAS)
        if (own := self._own(links[0].tensor)) is not None:
            self.onto[own].append(part)
            return
        for target in self.architecture.stored_for(links[0].tensor):
            info = self.checkpoint.tensors[target.stored]
            if not (target.is_whole and links[0].is_whole):
                self.faults.append(refused("conversion", name))
            elif pair.bias is None or info.shape != pair.bias.shape:
                self.faults.append(f"{name}: the base has shape {info.shape}")
            elif info.dtype not in FLOATS:
                self.faults.append(refused("quantised-base", name, f"dtype {info.dtype}"))
            self.parts[target.stored, target.tensor].append(part)

    def _rows(self, path: str) -> None:
        """Have trained rows stored in place of the base's; tied weights share them, as in PEFT."""
        links = self._links(f"{path}.weight")
        if not links:
            return
        others = self.architecture.tied(links[0].tensor) - {links[0].tensor}
        for other, known in self.adapter.rows.items():
            if other == path:
                break
            if self._known(f"{other}.weight")[0].tensor in others:
                self.ignored[path] = f"the rows of {other}, whose weight is tied to it"
                mine = self.adapter.rows[path]
                if known.indices != mine.indices or not _equal(known.values, mine.values):
                    self.faults.append(refused("tied", path, f"other rows than {other}"))
                return
        # Rows of the input side are those of the output side too, and not the reverse.
        layer = self._layer_at(links[0].tensor)
        alone = layer.kind != EMBEDDING and not self._has_input_rows(others)
        if others and alone and self.choices.tied != "both":
            self.faults.append(refused("tied", path, f"shared with {', '.join(others)}"))
        rows, shape = self.adapter.rows[path], self.architecture.shapes[links[0].tensor]
        if len(shape) != 2 or shape[1] != rows.values.shape[1]:
            self.faults.append(f"{path}: rows {rows.values.shape}, the base has {shape}")
        elif max(rows.indices) >= shape[0]:
            self.faults.append(f"{path}: row {max(rows.indices)} of {shape[0]}")
        elif len(set(rows.indices)) != len(rows.indices):
            self.faults.append(f"{path}: the config names a row twice")
        part = Part(path, ROWS)
        if (own := self._own(links[0].tensor)) is not None:
            self.onto[own].append(part)
            return
        for target in self.architecture.stored_for(links[0].tensor):
            if target.swapped or not target.is_whole:
                self.faults.append(refused("conversion", path))
            if self.parts.get((target.stored, target.tensor)):
                self.faults.append(refused("layer-kind", path, "rows and an update of one weight"))
            if self.checkpoint.tensors[target.stored].dtype not in FLOATS:
                self.faults.append(refused("quantised-base", path))
            self.parts[target.stored, target.tensor].append(part)

    def _has_input_rows(self, tensors: frozenset[str]) -> bool:
        paths = [f"{path}.weight" for path in self.adapter.rows]
        return any(links[0].tensor in tensors for p in paths if (links := self._known(p)))

    # ------------------------------------------------------------ what does not fit

    def _overlaps(self) -> list[str]:
        """Return the tensors of which two updates change the same region."""
        faults = []
        changed = [(name, parts) for (name, _), parts in self.parts.items()]
        for name, parts in (*changed, *self.onto.items()):
            regions = [part for part in parts if part.what == WEIGHT]
            for index, one in enumerate(regions):
                for other in regions[index + 1 :]:
                    if one.box is None or other.box is None or _common(one.box, other.box):
                        modules = f"{one.module} and {other.module}"
                        faults.append(f"{name}: is changed by {modules} at once")
        return faults

    def _misordered(self) -> list[str]:
        """Return why nested updates would be mistaken for each other: the model's order decides."""
        order = order_of_model(self.adapter, self.architecture)
        return [f"the model registers its parameters as {', '.join(order)}"] if order else []

    def _missing(self) -> list[str]:
        have = self.placed.keys() | {link.tensor for link in self.architecture.links}
        return [
            f"{name}: neither the base nor the adapter has it"
            for name in self.architecture.shapes
            if not self.architecture.tied(name) & have
        ]

    def _misshapen(self) -> list[str]:
        """Return the base's tensors that do not have the shape that the model needs."""
        faults = []
        for link in self.architecture.links:
            whole = link.is_whole
            if link.tensor in self.architecture.unfollowed or (whole and self._own(link.tensor)):
                continue
            stored = self.checkpoint.tensors[link.stored].shape
            needed = self.architecture.shapes[link.tensor]
            same = stored == needed
            if not (same if whole and not link.swapped else _fits(stored, needed, link)):
                faults.append(f"{link.tensor}: the base has shape {stored}, the model {needed}")
        return faults

    def _adapters_in_base(self) -> list[str]:
        return [name for name in self.checkpoint.tensors if _FACTOR.search(name)]

    def _broken_promises(self) -> list[str]:
        """Return what the config says was trained and the file lost: a head, a layer in full."""
        promises, layers = self.adapter.promises, self.architecture.layers
        held = {x[0].tensor for n in self.adapter.replaced if (x := self._known(n))}
        pairs = [tensor_of(path, pair.kind) for path, pair in self.adapter.modules.items()]
        adapted = {x[0].tensor for name in pairs if (x := self._known(name))}
        heads = [
            path
            for path in _owners(self.architecture.shapes)
            if is_named(path, promises.saved)
            and not any(tensor.startswith(path + ".") for tensor in held)
        ]
        lost = [
            name
            for name in promises.adapted
            if "." in name
            and layers.get(name, Layer(OTHER)).kind != OTHER
            and f"{name}.weight" not in adapted | held
        ]
        if unadapted := [
            path
            for path, layer in layers.items()
            if layer.kind in (LINEAR, CONV1D)
            and not {f"{path}.weight"} & (adapted | held)
            and is_named(path, promises.adapted)
        ]:
            title = "the config targets these modules, the file has no pair for them"
            self.notes.append(listed(title, unadapted))
        return [
            *(f"{path}: trained whole by the config, absent from the file" for path in heads),
            *(f"{path}: adapted by the config, absent from the file" for path in lost),
        ]

    def _known(self, name: str) -> tuple[Link, ...]:
        return self.architecture.names.get(name, ())

    # ------------------------------------------------------------ what comes out

    def _base_notes(self) -> list[str]:
        notes = []
        if self.renamed:
            one, other = next(iter(sorted(self.renamed.items())))
            notes.append(
                f"{len(self.renamed)} of the adapter's tensors are called otherwise in this "
                f"architecture, for instance {one} is {other}"
            )
        if all(pair.is_zero for pair in self.adapter.modules.values()):
            notes.append(
                "the adapter is untrained: all its low-rank updates are zero, and the weights that "
                "they are for stay as they are"
            )
        elif idle := [path for path, pair in self.adapter.modules.items() if pair.is_zero]:
            count = f"{len(idle)} of {len(self.adapter.modules)} modules are untrained"
            notes.append(listed(f"{count}, their updates are zero", idle))
        kinds = {layer.kind for layer in map(self._layer_of, self.adapter.modules)}
        if self.adapter.fields.get("fan_in_fan_out") and CONV1D not in kinds:
            notes.append(
                "the config says fan_in_fan_out, and no adapted layer is stored so: the layers "
                "decide"
            )
        notes += [listed(how, paths) for how, paths in self.squares.items()]
        promised = self.adapter.fields.get("target_parameters") or ()
        known = self.adapter.modules
        if absent := [n for n in promised if not any(f".{k}".endswith(f".{n}") for k in known)]:
            notes.append(listed("the config targets parameters that the file lacks", absent))
        if strangers := self._strangers():
            notes.append(listed("the config targets what neither file nor model has", strangers))
        if self.choices.residual_base:
            notes.append("the base is taken as the residual that training began with")
        elif recomputed := {*self.adapter.variant.split("+")} & {*_CHANGED}:
            notes.append(
                f"{', '.join(sorted(recomputed))}: what training took out of the base was computed "
                "again from this base, in float64, and taken out"
            )
        return notes

    def _layer_of(self, path: str) -> Layer:
        links = self._known(tensor_of(path, self.adapter.modules[path].kind))
        return self._layer_at(links[0].tensor) if links else Layer(OTHER)

    def _layer_at(self, tensor: str) -> Layer:
        """Return the layer that owns a tensor of the model."""
        return self.architecture.layers.get(tensor.rpartition(".")[0], Layer(OTHER))

    def _strangers(self) -> list[str]:
        """Return the names among the config's targets that no module has."""
        paths = self.architecture.layers.keys() | self.adapter.modules.keys()
        ends = {path.rpartition(".")[2] for path in paths}
        return [
            name for name in self.adapter.promises.adapted if name.rpartition(".")[2] not in ends
        ]

    def _whole(self) -> dict[str, TensorInfo]:
        """Return the stored weight behind every adapted module that is stored whole."""
        found = {}
        for path in self.adapter.modules:
            name = f"{path}.weight"
            links = self._known(name)
            stored = self.architecture.stored_for(links[0].tensor) if links else []
            if stored:
                found[name] = self.checkpoint.tensors[stored[0].stored]
        return found

    def _steps(self) -> tuple[Step, ...]:
        shards = {name: index for index, name in enumerate(self.checkpoint.shards)}
        order = sorted(
            self.checkpoint.tensors.values(), key=lambda t: (shards[t.file.name], t.start)
        )
        steps = [step for info in order for step in self._steps_of(info)]
        floats = [step.dtype for step in steps if step.operation == MERGE]
        floats += [step.dtype for step in steps if step.dtype in FLOATS]
        if not floats:
            raise InputError("the base holds no floats at all")
        last = self.checkpoint.shards[-1]
        done = {step.placed for step in steps}
        steps += [
            self._placing(tensor, name, last, floats[0])
            for tensor, name in self.placed.items()
            if name not in done
        ]
        return tuple(steps)

    def _steps_of(self, info: TensorInfo) -> list[Step]:
        """Return the steps that the base's tensor leads to: none, one, or one for each copy."""
        dtype = self.choices.dtype if self.choices.dtype and info.dtype in FLOATS else info.dtype
        steps = []
        for name, (own, parts) in self._outputs(info).items():
            if own is not None:
                steps.append(self._placing(name, own, info.file.name, dtype))
                continue
            operation = MERGE if parts else COPY
            source = info.name
            steps.append(
                Step(operation, name, info.file.name, dtype, info.shape, source, parts=parts)
            )
        return steps

    def _outputs(self, info: TensorInfo) -> dict[str, tuple[str | None, tuple[Part, ...]]]:
        """Return under which names the base's tensor goes into the output, and what changes there.

        A name comes with the adapter's own tensor that takes its place, or with the updates.
        """
        found: dict[str, tuple[str | None, tuple[Part, ...]]] = {}
        for link in self.links.get(info.name, ()):
            own = self._own(link.tensor) if link.is_whole else None
            name = self.architecture.output_names.get((info.name, link.tensor), info.name)
            parts = self.parts.get((info.name, link.tensor), ())
            found[name] = (own, (*found.get(name, (None, ()))[1], *parts))
        return found

    def _placing(self, tensor: str, name: str, shard: str, dtype: str) -> Step:
        value = self.adapter.replaced[name]
        kept = dtype if is_float(value) else dtype_name(value)
        parts = tuple(self.onto.get(name, ()))
        return Step(PLACE, tensor, shard, kept, value.shape, None, name, parts)

    def _dropped(self, steps: Iterable[Step]) -> dict[str, str]:
        used = {step.source for step in steps}
        kind = self.architecture.name
        return {
            name: "replaced by the adapter's own tensor"
            if name in self.links
            else f"not a tensor of {kind}"
            for name in self.checkpoint.tensors
            if name not in used
        }


# ---------------------------------------------------------------- regions


def _axes(architecture: Architecture, links: tuple[Link, ...]) -> int:
    return len(architecture.shapes[links[0].tensor])


def _length(span: Span) -> int:
    return span[1] - span[0]


def _common(one: Box, other: Box) -> Box | None:
    """Return the region that two regions share, or None."""
    spans = [(max(a[0], b[0]), min(a[1], b[1])) for a, b in zip(one, other, strict=True)]
    return None if any(start >= stop for start, stop in spans) else (spans[0], spans[1], spans[2])


def _local(region: Box, link: Link, start: Box) -> Box:
    """Return a region of the model's tensor as one of the tensor at the other end of `link`."""
    origin = link.offset or ((0, 0), (0, 0), (0, 0))
    spans = [
        (r[0] - s[0] + o[0], r[1] - s[0] + o[0])
        for r, s, o in zip(region, start, origin, strict=True)
    ]
    return (spans[0], spans[2], spans[1]) if link.swapped else (spans[0], spans[1], spans[2])


def _fits(stored: tuple[int, ...], needed: tuple[int, ...], link: Link) -> bool:
    """Return whether the stored tensor is as large as its region of the model's tensor."""
    have = stack(stored)
    if link.offset is not None:
        return all(stop <= size for (_, stop), size in zip(link.offset, have, strict=True))
    experts, rows, columns = map(_length, link.box) if link.box else stack(needed)
    return have == ((experts, columns, rows) if link.swapped else (experts, rows, columns))


def _part(
    path: str, update: Link, target: Link, size: tuple[int, int, int], transposed: bool
) -> tuple[Part | None, int]:
    """Return the piece of the update at `path` that lands in the stored tensor, and its size.

    `update` and `target` tie the two to the same tensor of the model, which has `size`;
    `transposed` tells that the update's own end is stored as (in, out).
    """
    full: Box = ((0, size[0]), (0, size[1]), (0, size[2]))
    swapped = transposed != (update.swapped != target.swapped)
    if update.is_whole and target.is_whole:
        return Part(path, transposed=swapped), math.prod(size)
    region = _common(update.box or full, target.box or full)
    if region is None:
        return None, 0
    mine = _local(region, update, update.box or full)
    theirs = _local(region, target, target.box or full)
    outs, ins = (mine[2], mine[1]) if transposed else (mine[1], mine[2])
    own = update.box or full
    whole = _length(own[1 if update.swapped != transposed else 2])
    count = math.prod(map(_length, region))
    all_ins = _length(ins) == whole
    part = Part(path, WEIGHT, swapped, mine[0], outs, None if all_ins else ins, theirs)
    return part, count


def _owners(tensors: Iterable[str]) -> set[str]:
    """Return the paths of all modules that hold a tensor, themselves or further inside."""
    found: set[str] = set()
    for name in tensors:
        while name := name.rpartition(".")[0]:
            found.add(name)
    return found


def _same_update(one: Factors, other: Factors) -> bool:
    """Return whether two modules carry one update: as it is, or as its transpose.

    PEFT shares the factors of tied embeddings: lora_A of the one is lora_B of the other, turned.
    """
    if one is other:
        return True
    extras = (one.magnitude, other.magnitude, one.diagonal, other.diagonal, one.bias, other.bias)
    if one.scale != other.scale or any(extra is not None for extra in extras):
        return False
    if one.kind == other.kind:
        return _equal(one.a, other.a) and _equal(one.b, other.b)
    plain = {one.kind, other.kind} == {LINEAR, EMBEDDING}
    return plain and _equal(one.a, other.b.T) and _equal(one.b, other.a.T)


def _equal(one: Array, other: Array) -> bool:
    return one.shape == other.shape and bool((one == other).all())


# ---------------------------------------------------------------- the base's identity


def _check_fingerprint(
    adapter: Adapter, checkpoint: Checkpoint, infos: Mapping[str, TensorInfo], *, allow: bool
) -> tuple[str, ...]:
    """Compare the base with the one that the adapter was trained on; return what to note."""
    expected = adapter.base.fingerprint
    if expected is None:
        return ("the adapter carries no fingerprint of its base: identity of the base unchecked",)
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
