"""What a plan needs to know of a model: its tensors, its layers, and where they lie on disk.

Three ways lead here. `read_off` takes a checkpoint whose own names and shapes say it all,
`as_trained` an adapter that names every tensor of its model; both import nothing. Anything else
needs the model, built without weights: `resolving.architecture`.
"""

import functools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lora_export.records import CONV, EXPERTS, LINEAR, Adapter, tensor_of
from lora_export.storage import Checkpoint, TensorInfo

CONV1D = "conv1d"  # HF's Conv1D: a linear map stored as (in, out)
OTHER = "other"
Span = tuple[int, int]
Box = tuple[Span, Span, Span]  # a region of a tensor seen as (experts, rows, columns)


@dataclass(frozen=True)
class Layer:
    """A module with weights of its own."""

    kind: str  # LINEAR, CONV1D, EMBEDDING, CONV or OTHER
    refusal: str = ""  # name of a case in `refusals`: why it cannot be merged into
    found: str = ""  # what was found there
    out_first: bool | None = None  # of fused experts: (experts, out, in); None where unknown


@dataclass(frozen=True)
class Link:
    """A region of a stored tensor is a region of a tensor of the model.

    None means all of it. `swapped` tells that rows and columns change places between the two.
    """

    stored: str
    tensor: str
    box: Box | None = None  # in the model's tensor
    offset: Box | None = None  # in the stored one
    swapped: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether all of the one is all of the other."""
        return self.box is None and self.offset is None


@dataclass(frozen=True)
class Architecture:
    """The tensors and layers of a model, and their places in a checkpoint."""

    name: str  # class of the model; empty where the checkpoint itself was read off
    shapes: Mapping[str, tuple[int, ...]]  # of every tensor that the model needs
    layers: Mapping[str, Layer]  # by module path
    links: tuple[Link, ...]  # from the tensors on disk
    names: Mapping[str, tuple[Link, ...]]  # from the adapter's tensor names
    unfollowed: Mapping[str, str] = field(default_factory=dict)  # model tensor -> conversion
    ties: Mapping[str, frozenset[str]] = field(default_factory=dict)  # names of one storage
    output_names: Mapping[tuple[str, str], str] = field(default_factory=dict)  # of a link's tensor
    buffers: frozenset[str] = frozenset()

    def stored_for(self, tensor: str) -> list[Link]:
        """Return the links of the model's `tensor` to the disk, by its name and all tied ones.

        A checkpoint may hold both sides of a tie; what is done to one is done to the other.
        """
        names = sorted(self.tied(tensor))
        return [link for name in names for link in self._by_tensor.get(name, [])]

    def tied(self, tensor: str) -> frozenset[str]:
        """Return the names that share the storage of `tensor`, itself among them."""
        return self.ties.get(tensor, frozenset([tensor]))

    @property
    def _by_tensor(self) -> Mapping[str, list[Link]]:
        found: dict[str, list[Link]] | None = self.__dict__.get("_index")
        if found is None:
            found = defaultdict(list)
            for link in self.links:
                found[link.tensor].append(link)
            found = dict(found)
            object.__setattr__(self, "_index", found)
        return found


@dataclass(frozen=True)
class Target:
    """The model to merge into: what is known of it, and how it differs from the base."""

    adapter: Adapter
    architecture: Architecture
    config: Any  # transformers' config; None where the checkpoint was read off
    settings: Mapping[str, Any]  # fields of config.json that differ from the base's


Again = Callable[[tuple[str, ...]], Adapter]  # reads the adapter with another order of parameters


def first_in(peft_version: str, is_transposed: bool) -> bool | None:
    """Return whether PEFT took square fused experts as (experts, in, out); None for no version.

    Up to 0.18 it took every parameter so; 0.19.0 had the two layouts swapped, and 0.19.1 goes by
    the module's `is_transposed`.
    """
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", peft_version)
    if match is None:
        return None
    version = tuple(map(int, match.groups()))
    return version < (0, 19, 0) or is_transposed != (version == (0, 19, 0))


def stack(shape: tuple[int, ...], kind: str = LINEAR) -> tuple[int, int, int]:
    """Return `shape` seen as (experts, rows, columns); the kernel of a convolution is columns."""
    if len(shape) == 3 and kind != CONV:
        return shape[0], shape[1], shape[2]
    return (1, shape[0], math.prod(shape[1:])) if shape else (1, 1, 1)


def names_of(adapter: Adapter) -> dict[str, tuple[int, ...]]:
    """Return the names of the tensors that `adapter` changes, and the shapes of its updates."""
    found: dict[str, tuple[int, ...]] = {}
    for path, pair in adapter.modules.items():
        a, b = pair.matrices()
        size = (b.shape[1], a.shape[2])
        found[tensor_of(path, pair.kind)] = (len(a), *size) if pair.kind == EXPERTS else size
        if pair.bias is not None:
            found[f"{path}.bias"] = pair.bias.shape
    found |= {f"{path}.weight": rows.values.shape for path, rows in adapter.rows.items()}
    return found | {name: value.shape for name, value in adapter.replaced.items()}


# ---------------------------------------------------------------- without the model


def read_off(
    adapter: Adapter, checkpoint: Checkpoint, config: Mapping[str, Any]
) -> Architecture | None:
    """Return the architecture that the checkpoint's own names and shapes tell, or None.

    What the checkpoint holds is taken to be all that the model needs: layers that differ from each
    other are noticed, a tensor that is missing from all of them is not.

    None means that the model has to be asked: the adapter brings a head, touches what may be tied,
    has names that the checkpoint does not have, or a square weight could lie either way.
    """
    if not _is_simple(adapter, checkpoint, config):
        return None
    # Many updates lie in few stacks and layers: each is looked through once.
    whole = functools.cache(lambda head: _is_stack(head, checkpoint, config))
    votes = functools.cache(lambda start: _votes(start, checkpoint))

    def in_stack(name: str) -> bool:
        match = re.search(r"(?<=\.)\d+(?=\.)", name)
        return match is not None and whole(name[: match.start()])

    layers = {}
    for path, pair in adapter.modules.items():
        info = checkpoint.tensors.get(f"{path}.weight")
        if info is None or len(info.shape) != 2 or not in_stack(path):
            return None
        kind = _orientation(path, info, checkpoint, votes)
        bias = pair.bias is None or f"{path}.bias" in checkpoint.tensors
        parent = path.rpartition(".")[0]
        if kind is None or not bias or f"{parent}.in_proj_weight" in checkpoint.tensors:
            return None
        layers[path] = Layer(kind)
    for name, value in adapter.replaced.items():
        info = checkpoint.tensors.get(name)
        if info is None or info.shape != value.shape or not in_stack(name):
            return None
        if value.ndim > 1:  # a list of embeddings or heads is a stack too, and may be tied
            return None
    for name, info in checkpoint.tensors.items():  # for what the config targets, and the file lacks
        path = name.removesuffix(".weight")
        if path not in layers and name != path and len(info.shape) == 2:
            layers[path] = Layer(LINEAR)
    return Architecture(
        name=str(config["architectures"][0]),
        shapes={name: info.shape for name, info in checkpoint.tensors.items()},
        layers=layers,
        links=tuple(Link(name, name) for name in checkpoint.tensors),
        names={name: (Link(name, name),) for name in names_of(adapter)},
    )


def as_trained(
    adapter: Adapter, checkpoint: Checkpoint, config: Mapping[str, Any]
) -> Target | None:
    """Return the model that the adapter says it was trained in, or None where it does not say all.

    The adapter names every tensor of that model. Each one has to be in the checkpoint, under its
    own name or without the prefix that a model with a head puts before it, or to come with the
    adapter; so nothing is left for the model to make up.
    """
    trained = adapter.base.tensors
    plain = all(pair.is_plain for pair in adapter.modules.values()) and not adapter.rows
    padding = config.get("pad_token_id")
    if not trained or not plain or not adapter.base.architecture or type(padding) is not int:
        return None
    prefix = next((n for n in trained if n not in adapter.replaced), "").partition(".")[0] + "."
    links, layers = [], {}
    for name, shape in trained.items():
        stored = name if name in checkpoint.tensors else name.removeprefix(prefix)
        info = checkpoint.tensors.get(stored)
        if name in adapter.replaced:
            fits = adapter.replaced[name].shape == shape
        else:
            fits = info is not None and info.shape == shape
            links.append(Link(stored, name))
        if not fits:
            return None
        if len(shape) == 2 and name.endswith(".weight"):
            layers[name.removesuffix(".weight")] = Layer(LINEAR)
    places = {link.tensor: link.stored for link in links}
    votes = functools.cache(lambda start: _votes(start, checkpoint))
    for path in adapter.modules:
        own = places.get(f"{path}.weight")
        shape = trained.get(f"{path}.weight", ())
        # Tied weights have one shape, and both sides may be on disk.
        alike = [n for n, other in trained.items() if other == shape and not _in_layer(n)]
        if own is None or (not _in_layer(path) and len(alike) > 1):
            return None
        kind = _orientation(own.removesuffix(".weight"), checkpoint.tensors[own], checkpoint, votes)
        if kind is None:
            return None
        layers[path] = Layer(kind)
    settings: dict[str, Any] = {"architectures": [adapter.base.architecture]}
    if adapter.labels:
        settings["id2label"] = dict(enumerate(adapter.labels))
        settings["label2id"] = {label: index for index, label in enumerate(adapter.labels)}
    elif adapter.replaced:
        return None
    architecture = Architecture(
        name=adapter.base.architecture,
        shapes=dict(trained),
        layers=layers,
        links=tuple(links),
        names={name: (Link(name, name),) for name in names_of(adapter)},
        output_names={(link.stored, link.tensor): link.tensor for link in links},
    )
    return Target(adapter, architecture, None, {**settings, "pad_token_id": padding})


def _in_layer(name: str) -> bool:
    return re.search(r"\.\d+\.", name) is not None


_HEADS = {
    "CAUSAL_LM": ("ForCausalLM", "LMHeadModel"),
    "SEQ_CLS": ("ForSequenceClassification",),
    "TOKEN_CLS": ("ForTokenClassification",),
    "QUESTION_ANS": ("ForQuestionAnswering",),
    "SEQ_2_SEQ_LM": ("ForConditionalGeneration",),
}


def _is_simple(adapter: Adapter, checkpoint: Checkpoint, config: Mapping[str, Any]) -> bool:
    """Return whether nothing in the adapter asks for the model itself."""
    stated = config.get("architectures")
    if not isinstance(stated, list) or len(stated) != 1 or not isinstance(stated[0], str):
        return False
    if adapter.base.architecture not in (None, stated[0]):
        return False
    ends = _HEADS.get(adapter.task_type or "")
    if adapter.task_type and not (ends and stated[0].endswith(ends)):
        return False
    if adapter.labels:  # may be others than the base's
        return False
    plain = all(pair.kind == LINEAR for pair in adapter.modules.values())
    odd = adapter.rows or adapter.flat_names or adapter.fields.get("layer_replication")
    saved = [
        name
        for name in checkpoint.tensors
        if any(f".{part}." in f".{name}" for part in adapter.promises.saved)
        and name not in adapter.replaced
    ]
    return plain and not odd and not saved


def _is_stack(head: str, checkpoint: Checkpoint, config: Mapping[str, Any]) -> bool:
    """Return whether below `head` lies a stack of layers of which every one is on disk, and whole.

    Tied weights are stored once, so a linear map that is there for every layer is tied across none.
    """
    layers = _layers(checkpoint, head)
    same = len({frozenset(tails) for tails in layers.values()}) == 1
    return same and set(layers) == set(range(len(layers))) and len(layers) in _depths(config)


def _layers(checkpoint: Checkpoint, head: str) -> dict[int, set[tuple[str, tuple[int, ...]]]]:
    """Return names and shapes of the tensors of each layer below `head`, by the layer's index."""
    found: dict[int, set[tuple[str, tuple[int, ...]]]] = defaultdict(set)
    for name, info in checkpoint.tensors.items():
        index, _, tail = name.removeprefix(head).partition(".")
        if name.startswith(head) and index.isdigit():
            found[int(index)].add((tail, info.shape))
    return found


def _depths(config: Mapping[str, Any]) -> set[int]:
    """Return the numbers of layers that a config and its parts name."""
    found = {value for key, value in config.items() if type(value) is int and "layer" in key}
    for value in config.values():
        if isinstance(value, dict):
            found |= _depths(value)
    return found


def _orientation(
    path: str, info: TensorInfo, checkpoint: Checkpoint, votes: Callable[[str], "_Votes"]
) -> str | None:
    """Return LINEAR or CONV1D for the weight at `path`, or None where it cannot be told.

    HF's Conv1D always has a bias, of the length of its columns; a linear map's is as long as its
    rows. A square weight, or one without a bias, is judged by its neighbours in the same layer;
    a layer without a single bias is linear throughout.
    """
    bias = checkpoint.tensors.get(f"{path}.bias")
    if bias is not None and info.shape[0] != info.shape[1]:
        return LINEAR if bias.shape == info.shape[:1] else CONV1D
    layer = re.match(r".*?\.\d+\.", path)
    kinds, biased = votes(layer[0] if layer else "")
    if not kinds and not biased:
        return LINEAR
    return LINEAR if kinds == {LINEAR} else CONV1D if kinds == {CONV1D} and bias else None


_Votes = tuple[frozenset[str], bool]  # kinds that oblong weights with a bias show; any bias at all


def _votes(start: str, checkpoint: Checkpoint) -> _Votes:
    """Return how the layer whose tensors begin with `start` stores its weights."""
    names = [name for name in checkpoint.tensors if name.startswith(start)]
    kinds = {
        LINEAR if other.shape == weight.shape[:1] else CONV1D
        for name in names
        if name.endswith(".weight")
        and len((weight := checkpoint.tensors[name]).shape) == 2
        and weight.shape[0] != weight.shape[1]
        and (other := checkpoint.tensors.get(name.removesuffix("weight") + "bias")) is not None
    }
    return frozenset(kinds), any(name.endswith(".bias") for name in names)
