"""The architecture of a model built without weights, and how transformers finds it on disk.

transformers renames and rearranges checkpoints as it loads them (experts are fused, projections
split, prefixes come and go). The same renamings, asked of transformers itself, say where each
tensor of the model lies in the stored ones; the rearrangements are followed as regions.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lora_export.architecture import CONV1D, OTHER, Architecture, Layer, Link, stack
from lora_export.records import CONV, EMBEDDING, LINEAR
from lora_export.storage import Checkpoint

Shape = tuple[int, ...]
# What old checkpoints call the parameters of a layer norm; transformers renames them on loading.
_LEGACY = {".gamma": ".weight", ".beta": ".bias"}


def architecture(
    model: nn.Module,
    checkpoint: Checkpoint,
    names: Mapping[str, Shape],
    *,
    flat: bool = False,
    replication: Mapping[int, int] | None = None,
) -> Architecture:
    """Return the architecture of `model` (on the meta device) over `checkpoint`.

    Args:
        model: Without weights.
        checkpoint: The base.
        names: Names of the tensors that an adapter changes, as the adapter has them, with the
            shapes of their updates.
        flat: The names have underscores for dots.
        replication: Layer of the model -> layer of the checkpoint that it is a copy of.
    """
    ties: dict[int, set[str]] = defaultdict(set)
    values = model.state_dict(keep_vars=True)
    for name, value in values.items():
        ties[id(value)].add(name)
    shapes = {name: tuple(value.shape) for name, value in values.items()}
    groups = [frozenset(group) for group in ties.values()]
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    finder = _Finder(model, shapes)
    stored = {info.name: info.shape for info in checkpoint.tensors.values()}
    links, unfollowed, outputs = finder.links(stored)
    if replication:
        links = _replicated(links, shapes, replication)
        outputs |= {(link.stored, link.tensor): _copied(link) for link in links}
    by_stored: dict[str, list[Link]] = defaultdict(list)
    for link in links:
        by_stored[link.stored].append(link)
    dotted = _dotted(shapes, stored) if flat else {}
    resolved: dict[str, tuple[Link, ...]] = {}
    for name, shape in names.items():
        key = dotted.get(name, name)
        if key in shapes:
            resolved[name] = (Link(name, key),)
        elif key in by_stored:
            resolved[name] = tuple(replace(link, stored=name) for link in by_stored[key])
        else:
            resolved[name] = tuple(replace(x, stored=name) for x in finder.guess(key, shape))
    return Architecture(
        name=type(model).__name__,
        shapes=shapes,
        layers=_layers(model),
        links=tuple(links),
        names=resolved,
        unfollowed=unfollowed,
        ties={
            name: group
            for group in groups
            if not _stored_apart(group, links, checkpoint)
            for name in group
        },
        output_names=outputs,
        buffers=frozenset(shapes.keys() - parameters),
    )


def _stored_apart(group: frozenset[str], links: Sequence[Link], checkpoint: Checkpoint) -> bool:
    """Return whether the checkpoint holds several of a tied group, and unlike: then none is tied.

    transformers ties what is stored once, or alike.
    """
    stored = [link.stored for link in links if link.tensor in group] if len(group) > 1 else []
    if len(set(stored)) < 2:
        return False
    first, *others = (checkpoint.tensors[name].read() for name in stored)
    return any(other != first for other in others)


# ---------------------------------------------------------------- layers


def _layers(model: nn.Module) -> dict[str, Layer]:
    found = {path: _layer(module) for path, module in model.named_modules()}
    for path, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            inner = [name for name in found if name.startswith(f"{path}.")]
            for name in (path, *inner):
                found[name] = replace(found[name], refusal="attention", found=name)
    return found


def _layer(module: nn.Module) -> Layer:
    kind = type(module)
    if isinstance(module, nn.modules.conv._ConvNd):
        if module.groups > 1:
            return Layer(CONV, "conv-groups", f"groups={module.groups}")
        if module.padding_mode != "zeros":
            return Layer(CONV, "conv-padding", f"padding_mode={module.padding_mode}")
        if module.transposed:
            return Layer(OTHER, "layer-kind", kind.__name__)
        return Layer(CONV)
    if isinstance(module, nn.Embedding):
        limited = module.max_norm is not None
        return Layer(EMBEDDING, "max-norm" if limited else "", f"max_norm={module.max_norm}")
    if kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils":
        return Layer(CONV1D)
    # Subclasses of nn.Linear that transformers defines compute the same map with the same weight.
    weight = getattr(module, "weight", None)
    matrix = getattr(weight, "ndim", 0) == 2
    if isinstance(module, nn.Linear) or (matrix and hasattr(module, "in_features")):
        return Layer(LINEAR)
    transposed = getattr(module, "is_transposed", None)
    out_first = None if transposed is None else not transposed
    return Layer(LINEAR if matrix else OTHER, out_first=out_first, found=kind.__name__)


# ---------------------------------------------------------------- names


@dataclass(frozen=True)
class _Collected:
    """What one converter of transformers gathers for one target."""

    converter: Any
    pattern: str
    target: str
    source: str


class _Finder:
    """Names as transformers resolves them when it loads a checkpoint into one model."""

    def __init__(self, model: nn.Module, shapes: Mapping[str, Shape]) -> None:
        self.model, self.shapes = model, shapes
        self.prefix = str(getattr(model, "base_model_prefix", "") or "")
        self.renamings, self.converters = _conversions(model)

    def links(
        self, stored: Mapping[str, Shape]
    ) -> tuple[list[Link], dict[str, str], dict[tuple[str, str], str]]:
        """Return the links of all `stored` tensors, what could not be followed, and new names."""
        links, outputs = [], {}
        groups: dict[tuple[int, str], list[_Collected]] = defaultdict(list)
        taken = set()
        for name in sorted(stored, key=_natural):
            found = self.find(name)
            if isinstance(found, _Collected):
                groups[id(found.converter), found.target].append(found)
            elif found and found not in taken:
                taken.add(found)
                links.append(Link(name, found))
                outputs[name, found] = found if self._is_plain(name, found) else name
        unfollowed: dict[str, str] = {}
        for group in groups.values():
            try:
                links += self._follow(group, stored)
            except _Unfollowed as error:
                unfollowed |= dict.fromkeys(error.targets, str(error))
                links += [Link(c.source, t) for c in group for t in error.targets]
        return links, unfollowed, outputs

    def find(self, name: str) -> "str | _Collected | None":
        """Return the model's tensor that `name` becomes, or what a converter collects it for."""
        key = _through(name, self.renamings)
        for converter in self.converters:
            target, pattern = converter.rename_source_key(key)
            if pattern is not None:
                full = self._known(target)
                if full is not None:
                    return _Collected(converter, pattern, full, name)
                break
        return self._known(key) or self._known(name) or self._known(_modern(name))

    def _known(self, name: str) -> str | None:
        """Return `name` as the model has it, with the base model's prefix added or taken away."""
        dotted = f"{self.prefix}."
        bare = name.removeprefix(dotted)
        for candidate in (name, dotted + name, bare):
            if candidate in self.shapes:
                return candidate
        return None

    def _is_plain(self, name: str, found: str) -> bool:
        """Return whether the two differ by prefix and old spelling only."""
        ends = {name, _modern(name)}
        dotted = f"{self.prefix}."
        return found in {x for e in ends for x in (e, dotted + e, e.removeprefix(dotted))}

    def _follow(self, group: Sequence[_Collected], stored: Mapping[str, Shape]) -> list[Link]:
        """Return the links of the tensors that one converter gathers for one target."""
        converter, target = group[0].converter, group[0].target
        by_pattern: dict[str, list[str]] = defaultdict(list)
        for collected in group:
            by_pattern[collected.pattern].append(collected.source)
        sources = [by_pattern[p] for p in converter.source_patterns if p in by_pattern]
        return self._regions(converter, target, sources, [stored[s[0]] for s in sources])

    def _regions(
        self,
        converter: Any,
        target: str,
        sources: Sequence[Sequence[str]],
        shapes: Sequence[Shape],
        first: int = 0,
    ) -> list[Link]:
        """Return where each of `sources` (one list for each pattern) lies in the model's tensors.

        `first` is the index of the first of each list among the experts.
        """
        targets = _targets(converter, target, self.model)
        kinds = [(type(op).__name__, op) for op in converter.operations]
        names = tuple(name for name, _ in kinds)
        if any(name not in self.shapes for name in targets):
            raise _Unfollowed(targets, f"{' '.join(names)} into unknown tensors")
        if names in (("Chunk",), ("Split",)) and kinds[0][1].dim == 0 and len(sources) == 1:
            return _chunked(sources[0][0], targets, self.shapes)
        whole = stack(self.shapes[target])
        swapped = False
        if names and names[-1] == "Transpose":
            flipped = shapes[0][-2:] != self.shapes[target][-2:] or not kinds[-1][1].check_dims
            swapped, names = flipped, names[:-1]
        if names == () and len(sources) == 1 and len(sources[0]) == 1:
            return [Link(sources[0][0], target, swapped=swapped)]
        merged = names[:1] == ("MergeModulelist",) and kinds[0][1].dim == 0
        names = names[1:] if merged else names
        joined = names == ("Concatenate",)
        axis = kinds[1 if merged else 0][1].dim - (1 if merged else 0) if joined else 0
        if names not in ((), ("Concatenate",)) or axis not in (0, 1) or (not joined and not merged):
            raise _Unfollowed(targets, " ".join(name for name, _ in kinds))
        if swapped:
            axis = 1 - axis
        links, start = [], 0
        for parts, shape in zip(sources, shapes, strict=True):
            size = (stack(shape)[1:][::-1] if swapped else stack(shape)[1:])[axis]
            span = (start, start + size) if joined else (0, whole[1 + axis])
            for index, source in enumerate(parts, first):
                if not merged and index > first:
                    span = (span[1], span[1] + size)
                spans = [(0, whole[1]), (0, whole[2])]
                spans[axis] = span
                expert = (index, index + 1) if merged else (0, 1)
                links.append(Link(source, target, (expert, spans[0], spans[1]), swapped=swapped))
            start = span[1]
        if joined and start != whole[1 + axis]:
            raise _Unfollowed(targets, f"{start} of {whole[1 + axis]} along axis {axis}")
        return links

    def guess(self, name: str, shape: Shape) -> list[Link]:
        """Return where a tensor that is not on disk would lie: old names of experts, of layers."""
        found = self.find(name)
        if isinstance(found, str):
            return [Link(name, found)]
        if found is None:
            return []
        converter = found.converter
        index = _expert(found.pattern, _through(name, self.renamings))
        sources: list[list[str]] = [[f"{name}#{p}"] for p in converter.source_patterns]
        place = converter.source_patterns.index(found.pattern)
        sources[place] = [name]
        try:
            links = self._regions(converter, found.target, sources, [shape] * len(sources), index)
        except _Unfollowed:
            return []
        return [link for link in links if link.stored == name]


class _Unfollowed(Exception):
    """A conversion that moves elements in a way that no region describes."""

    def __init__(self, targets: Iterable[str], what: str) -> None:
        super().__init__(what)
        self.targets = tuple(targets)


def _conversions(model: nn.Module) -> tuple[list[Any], list[Any]]:
    """Return transformers' own renamings and converters for `model`."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    found = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    return (
        [entry for entry in found if isinstance(entry, WeightRenaming)],
        [entry for entry in found if isinstance(entry, WeightConverter)],
    )


def _through(name: str, renamings: Iterable[Any]) -> str:
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    return name


def _targets(converter: Any, target: str, model: nn.Module) -> list[str]:
    """Return all tensors that a converter makes, `target` being the first of them."""
    patterns = converter.target_patterns
    if len(patterns) == 1:
        return [target]
    return [target.replace(patterns[0], pattern) for pattern in patterns]


def _chunked(source: str, targets: Sequence[str], shapes: Mapping[str, Shape]) -> list[Link]:
    """Return the links of a stored tensor that is cut along its first axis."""
    links, start = [], 0
    for target in targets:
        rows = shapes[target][0] if shapes[target] else 1
        columns = stack(shapes[target])[2]
        links.append(Link(source, target, None, ((0, 1), (start, start + rows), (0, columns))))
        start += rows
    return links


def _expert(pattern: str, name: str) -> int:
    """Return the number that stands where `pattern` has its star."""
    match = re.search(pattern.replace("*.", r"(\d+)\."), name)
    return int(match[1]) if match and match.groups() else 0


def _modern(name: str) -> str:
    for old, new in _LEGACY.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sort layer 2 before layer 10."""
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in name.split(".")]


def _dotted(shapes: Mapping[str, Shape], stored: Mapping[str, Shape]) -> dict[str, str]:
    """Return the names of weights by their spelling with underscores; clashes are left out."""
    found: dict[str, set[str]] = defaultdict(set)
    for known in (shapes, stored):
        spelled: dict[str, set[str]] = defaultdict(set)
        for name in known:
            if name.endswith(".weight"):
                path = name.removesuffix(".weight")
                spelled[path.replace(".", "_") + ".weight"].add(name)
        found |= {key: names for key, names in spelled.items() if key not in found}
    return {key: next(iter(names)) for key, names in found.items() if len(names) == 1}


# ---------------------------------------------------------------- replicated layers

_LAYER = re.compile(r"(?P<head>.*?(?:^|\.)(?:layers|layer|h)\.)(?P<index>\d+)(?P<tail>\..*)")


def _copied(link: Link) -> str:
    """Return the name of a copy: the model's, or the stored one with the index of its layer."""
    if link.is_whole:
        return link.tensor
    stored, tensor = _LAYER.fullmatch(link.stored), _LAYER.fullmatch(link.tensor)
    if stored is None or tensor is None:
        return link.stored
    return f"{stored['head']}{tensor['index']}{stored['tail']}"


def _replicated(
    links: Sequence[Link], shapes: Mapping[str, Shape], replication: Mapping[int, int]
) -> list[Link]:
    """Return the links of a deeper model whose layers are copies of the checkpoint's."""
    by_tensor: dict[str, list[Link]] = defaultdict(list)
    for link in links:
        by_tensor[link.tensor].append(link)
    found = []
    for name in shapes:
        match = _LAYER.fullmatch(name)
        source = name
        if match:
            index = replication.get(int(match["index"]))
            source = f"{match['head']}{index}{match['tail']}"
        found += [replace(link, tensor=name) for link in by_tensor.get(source, [])]
    return found
