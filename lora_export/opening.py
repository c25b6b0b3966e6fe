"""Open a job: read the adapter, find its base, learn what has to be known of the model, and plan.

Nothing is written here. transformers is imported only where the checkpoint's own names and shapes
do not tell how the adapter lands in it.
"""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_export import architecture as architectures
from lora_export import bases, inputs, merging, models, resolving, storage
from lora_export.adapter import locate, read_adapter
from lora_export.architecture import Architecture, Link, names_of
from lora_export.errors import AdapterMismatch, InputError, listed
from lora_export.plan import LAYOUTS, TIED, Choices, MergePlan, order_of_model, plan
from lora_export.records import EMBEDDING, EXPERTS, Adapter, FileDigest, Reading
from lora_export.refusals import refused
from lora_export.storage import Checkpoint

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class Options:
    """What a caller may say about an adapter, its base and the merge. Checks itself."""

    dtype: str = "keep"
    adapter_format: str | None = None
    alpha: float | None = None
    tied: str = "error"
    pattern_order: str | None = None
    residual_base: bool = False
    expert_layout: str | None = None
    expert_b: str | None = None
    allow_base_mismatch: bool = False

    def __post_init__(self) -> None:
        for name, known in _KNOWN.items():
            if getattr(self, name) not in known:
                expected = ", ".join(str(value) for value in known if value)
                raise InputError(f"{name} is {getattr(self, name)!r}; expected one of {expected}")
        _ = self.reading  # checks itself

    @property
    def reading(self) -> Reading:
        """What a format reader is told."""
        return Reading(self.alpha, self.pattern_order, self.expert_b)

    @property
    def choices(self) -> Choices:
        """What the plan is told."""
        return Choices(
            dtype=DTYPES.get(self.dtype),
            tied=self.tied,
            residual_base=self.residual_base,
            expert_layout=self.expert_layout,
            allow_base_mismatch=self.allow_base_mismatch,
        )

    def stated(self) -> dict[str, Any]:
        """Return the options that differ from their defaults."""
        return {
            field.name: value
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) != field.default
        }


_KNOWN: dict[str, tuple[str | None, ...]] = {
    "dtype": ("keep", *DTYPES),
    "tied": TIED,
    "pattern_order": (None, "first", "last"),
    "expert_layout": (None, *LAYOUTS),
    "expert_b": (None, "rank-major", "expert-major"),
}


@dataclass(frozen=True)
class Job:
    """An adapter, its base, and the plan that merges one into the other."""

    adapter: Adapter
    base: Path
    checkpoint: Checkpoint
    config: Any  # transformers' config of the architecture; None where it was not needed
    settings_of_model: Mapping[str, Any]  # fields of config.json that differ from the base's
    plan: MergePlan
    source: Path  # of the adapter
    origin: str  # how the base was found
    options: Options
    live: Adapter  # under the names of the model, with the variant that is merged

    def places(self, data: Path | None = None) -> tuple[Path, ...]:
        """Return the paths of everything that goes in."""
        return (self.source, self.base) if data is None else (self.source, self.base, data)

    def companions(self) -> dict[str, Path]:
        """Return the files that go beside the weights: of tokenizers, the one trained with."""
        found = merging.companions_of(self.base)
        if not self.own_tokenizer:
            return found
        own = {
            n: f for n, f in merging.companions_of(self.source).items() if n in merging.TOKENIZER
        }
        return {name: file for name, file in found.items() if name not in merging.TOKENIZER} | own

    @property
    def own_tokenizer(self) -> bool:
        """Whether a tokenizer lies beside the adapter: it was trained with that one."""
        return self.source.is_dir() and models.has_tokenizer(self.source)

    def inputs(self, data: Path | None = None) -> tuple[FileDigest, ...]:
        """Return the digests of everything that goes in: adapter, base, tokenizer, sentences."""
        if self.source.is_dir():
            own = storage.digest_tree(self.source)
        else:
            own = (storage.digest(self.source),)
        names = (*self.checkpoint.shards, "config.json", *merging.companions_of(self.base))
        texts = inputs.files([data]) if data is not None else []
        return (
            *own,
            *(storage.digest(self.base / name, f"base/{name}") for name in names),
            *(storage.digest(text) for text in texts),
        )

    def settings(self, **more: Any) -> dict[str, Any]:
        """Return what decided the result beside the inputs."""
        beside = ["the tokenizer is the one beside the adapter"] if self.own_tokenizer else []
        return {
            "base": f"{self.adapter.base.public_id or self.base.name} ({self.origin})",
            **self.options.stated(),
            **more,
            "notes": [*self.plan.notes, *self.adapter.notes, *_ignored(self.plan), *beside],
        }


def _ignored(plan: MergePlan) -> list[str]:
    reasons: dict[str, int] = {}
    for reason in plan.ignored.values():
        reasons[reason] = reasons.get(reason, 0) + 1
    return [f"{count} adapter tensors left out: {why}" for why, count in sorted(reasons.items())]


def open_job(adapter: str | Path, base: str | None = None, options: Options | None = None) -> Job:
    """Read the adapter, find its base, and plan the merge; nothing is written.

    Raises:
        InputError: adapter or base is missing or damaged.
        AdapterMismatch: they do not fit together; every fault is listed.
    """
    options = options or Options()
    source = locate(adapter)
    found = read_adapter(source, options.adapter_format, options.reading)
    name = base or found.base.id
    if not name:
        raise InputError("the adapter names no base model; pass --base")
    place = bases.find(name, None if base else found.base.revision)
    checkpoint = Checkpoint.open(place.path)
    fields = storage.read_json(place.path / "config.json")
    if kind := fields.get("quantization_config"):
        method = kind.get("quant_method") if isinstance(kind, dict) else kind
        raise AdapterMismatch(refused("quantised-base", str(place.path.name), str(method)))

    def again(order: tuple[str, ...]) -> Adapter:
        reading = dataclasses.replace(options.reading, registered=order)
        return read_adapter(source, options.adapter_format, reading)

    target = _Target.of(found, place.path, checkpoint, fields, options, again)
    steps = plan(target.adapter, checkpoint, target.architecture, options.choices)
    return Job(
        target.adapter,
        place.path,
        checkpoint,
        target.config,
        target.settings,
        steps,
        source,
        place.origin,
        options,
        _live(target.adapter, target.architecture, steps),
    )


def _live(adapter: Adapter, found: Architecture, steps: MergePlan) -> Adapter:
    """Return `adapter` under the names that the model has for what it changes."""

    def named(name: str, end: str) -> str:
        links = found.names.get(name + end, ())
        whole = len(links) == 1 and links[0].is_whole
        return links[0].tensor.removesuffix(end) if whole else name

    return dataclasses.replace(
        adapter,
        modules={
            named(path, "" if pair.kind == EXPERTS else ".weight"): pair
            for path, pair in adapter.modules.items()
        },
        replaced={named(name, ""): value for name, value in adapter.replaced.items()},
        rows={named(path, ".weight"): rows for path, rows in adapter.rows.items()},
        variant=steps.variant,
    )


@dataclass(frozen=True)
class _Target:
    """The model to merge into: what is known of it, and how it differs from the base."""

    adapter: Adapter
    architecture: Architecture
    config: Any
    settings: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        adapter: Adapter,
        base: Path,
        checkpoint: Checkpoint,
        fields: Mapping[str, Any],
        options: Options,
        again: "Again",
    ) -> "_Target":
        if (simple := architectures.read_off(adapter, checkpoint, fields)) is not None:
            return cls(adapter, simple, None, {})
        if adapter.task_type and adapter.task_type not in models.TASKS:
            note = (
                f"the config's task_type is {adapter.task_type!r}, which is none of "
                f"{', '.join(models.TASKS)}: the base's own architecture is taken"
            )
            adapter = dataclasses.replace(adapter, task_type=None, notes=(*adapter.notes, note))
        config = models.config_of(
            base, models.architecture_of(adapter, base), adapter.labels, models.class_count(adapter)
        )
        if getattr(config, "pad_token_id", 0) is None and models.has_tokenizer(base):
            config.pad_token_id = models.tokenizer(base).pad_token_id
        return _Fitting(adapter, checkpoint, config, options, again).target()


Again = Callable[[tuple[str, ...]], Adapter]  # read the adapter with another order of parameters


def _rows_at_both_ends(adapter: Adapter, tied: Architecture) -> Adapter:
    """Return `adapter` with the rows of an input embedding at the output that was tied to it."""
    rows = dict(adapter.rows)
    for path, trained in adapter.rows.items():
        links = tied.names.get(f"{path}.weight", ())
        layer = tied.layers.get(links[0].tensor.removesuffix(".weight")) if links else None
        if layer is None or layer.kind != EMBEDDING:
            continue
        for other in tied.tied(links[0].tensor) - {links[0].tensor}:
            rows.setdefault(other.removesuffix(".weight"), trained)
    return dataclasses.replace(adapter, rows=rows)


class _Fitting:
    """Change a config until the model has the shape that the adapter was trained in."""

    def __init__(
        self,
        adapter: Adapter,
        checkpoint: Checkpoint,
        config: Any,
        options: Options,
        again: "Again",
    ) -> None:
        self.adapter, self.checkpoint, self.options = adapter, checkpoint, options
        self.config, self.again = config, again
        self.settings: dict[str, Any] = {"architectures": list(config.architectures)}
        for name in ("id2label", "label2id", "pad_token_id"):
            if (value := getattr(config, name, None)) is not None:
                self.settings[name] = value
        self.replication: dict[int, int] = {}

    def target(self) -> _Target:
        self._deepen()
        found = self._architecture()
        if order := order_of_model(self.adapter, found):
            self.adapter = self.again(order)
            found = self._architecture()
        if (size := self._vocabulary(found)) is not None:
            self._set("vocab_size", size)
            found = self._architecture()
        if self.options.tied == "untie" and self._touches_ties(found):
            found = self._untied(found)
        return _Target(self.adapter, found, self.config, self.settings)

    def _architecture(self) -> Architecture:
        self.model = models.blank(self.config)
        return resolving.architecture(
            self.model,
            self.checkpoint,
            names_of(self.adapter),
            flat=self.adapter.flat_names,
            replication=self.replication or None,
        )

    def _set(self, name: str, value: Any) -> None:
        """Change a field of the config, and of its text part where that owns it."""
        text = self.config.get_text_config()
        setattr(text if hasattr(text, name) else self.config, name, value)
        self.settings[name] = value

    def _deepen(self) -> None:
        """Have the layers that `layer_replication` asks for."""
        spans = self.adapter.fields.get("layer_replication")
        if not spans:
            return
        text = self.config.get_text_config()
        depth = getattr(text, "num_hidden_layers", None)
        if not isinstance(depth, int) or any(stop > depth for _, stop in spans):
            raise AdapterMismatch(
                f"layer_replication {spans} does not fit a base of {depth} layers"
            )
        copies = [index for start, stop in spans for index in range(start, stop)]
        if len(copies) <= max(copies):
            raise AdapterMismatch(f"layer_replication {spans} leaves layers out")
        if len(copies) > models.MOST_LAYERS:
            raise AdapterMismatch(f"layer_replication asks for {len(copies)} layers")
        self.replication = dict(enumerate(copies))
        for name, value in list(vars(text).items()):
            per_layer = name.endswith(("layer_types", "block_type"))
            if per_layer and isinstance(value, list) and len(value) == depth:
                self._set(name, [value[index] for index in copies])
        self._set("num_hidden_layers", len(copies))

    def _vocabulary(self, found: Architecture) -> int | None:
        """Return the number of rows of an embedding that the adapter brings, where it differs."""
        sizes = set()
        for name in models.embeddings(self.model):
            shape = found.shapes.get(name)
            for own, links in found.names.items():
                value = self.adapter.replaced.get(own)
                if value is None or not links or links[0].tensor not in found.tied(name):
                    continue
                if shape and value.shape[1:] == shape[1:] and value.shape[0] != shape[0]:
                    sizes.add(value.shape[0])
        if len(sizes) > 1:
            raise AdapterMismatch(listed("embeddings of several sizes", map(str, sizes)))
        return int(sizes.pop()) if sizes else None

    def _touches_ties(self, found: Architecture) -> bool:
        return any(
            len(found.tied(link.tensor)) > 1 for links in found.names.values() for link in links
        )

    def _untied(self, tied: Architecture) -> Architecture:
        """Return the architecture with input and output embeddings apart."""
        self.config = copy.deepcopy(self.config)
        self.config.tie_word_embeddings = False
        self.config.get_text_config().tie_word_embeddings = False
        self.settings["tie_word_embeddings"] = False
        self.adapter = _rows_at_both_ends(self.adapter, tied)
        found = self._architecture()
        links, outputs = list(found.links), dict(found.output_names)
        stored = {link.tensor for link in links}
        for name in found.shapes.keys() - stored:
            for link in tied.stored_for(name):
                links.append(Link(link.stored, name, link.box, link.offset, link.swapped))
                outputs[link.stored, name] = name
                outputs.setdefault((link.stored, link.tensor), link.stored)
        return dataclasses.replace(found, links=tuple(links), output_names=outputs)
