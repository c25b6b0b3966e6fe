"""Open a job: read the adapter, find its base, learn what has to be known of the model, and plan.

Nothing is written here. transformers is imported only where the checkpoint's own names and shapes
do not tell how the adapter lands in it.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_export import architecture as architectures
from lora_export import bases, companions, inputs, storage
from lora_export.adapter import locate, read_adapter
from lora_export.architecture import Again, Architecture, Target
from lora_export.errors import AdapterMismatch, InputError
from lora_export.plan import LAYOUTS, TIED, Choices, MergePlan, plan
from lora_export.records import EXPERTS, Adapter, FileDigest, Reading
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
    shard_size: str | None = None
    with_code: bool = False

    def __post_init__(self) -> None:
        for name, known in _KNOWN.items():
            if getattr(self, name) not in known:
                expected = ", ".join(str(value) for value in known if value)
                raise InputError(f"{name} is {getattr(self, name)!r}; expected one of {expected}")
        _ = self.reading, self.shard_bytes  # check themselves

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

    @property
    def shard_bytes(self) -> int | None:
        """The most bytes of a shard; None keeps the base's shards."""
        if self.shard_size is None:
            return None
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", self.shard_size.strip().upper())
        size = int(float(match[1]) * 1000 ** " KMGT".index(match[2] or " ")) if match else 0
        if size < 1:
            raise InputError(f"shard_size is {self.shard_size!r}; expected a size such as 5GB")
        return size

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
    tensors: Mapping[str, tuple[int, ...]]  # names and shapes that the model has

    def places(self, data: Path | None = None) -> tuple[Path, ...]:
        """Return the paths of everything that goes in."""
        return (self.source, self.base) if data is None else (self.source, self.base, data)

    def beside(self) -> dict[str, Path]:
        """Return the files that go beside the weights: of tokenizers, the one trained with."""
        found = companions.companions_of(
            self.base, with_code=self.options.with_code, architecture=self.plan.architecture
        )
        if not self.own_tokenizer:
            return found
        trained = companions.companions_of(self.source)
        own = {name: file for name, file in trained.items() if name in companions.TOKENIZER}
        return {n: file for n, file in found.items() if n not in companions.TOKENIZER} | own

    @property
    def own_tokenizer(self) -> bool:
        """Whether a tokenizer lies beside the adapter: it was trained with that one."""
        return self.source.is_dir() and companions.has_tokenizer(self.source)

    def inputs(
        self, data: Path | None = None, shards: Iterable[FileDigest] | None = None
    ) -> tuple[FileDigest, ...]:
        """Return the digests of everything that goes in: adapter, base, tokenizer, sentences.

        `shards` are the base's, where they were hashed already.
        """
        if self.source.is_dir():
            own = storage.digest_tree(self.source)
        else:
            own = (storage.digest(self.source),)
        if shards is None:
            shards = [storage.digest(self.base / name) for name in self.checkpoint.shards]
        names = ("config.json", *companions.companions_of(self.base))
        texts = inputs.files([data]) if data is not None else []
        weights = [dataclasses.replace(shard, name=f"base/{shard.name}") for shard in shards]
        return (
            *own,
            *weights,
            *(storage.digest(self.base / name, f"base/{name}") for name in names),
            *(storage.digest(text) for text in texts),
        )

    def settings(self, **more: Any) -> dict[str, Any]:
        """Return what decided the result beside the inputs."""
        beside = ["the tokenizer is the one beside the adapter"] if self.own_tokenizer else []
        if (code := companions.code_of(self.base)) and not self.options.with_code:
            beside.append(f"{', '.join(code)} of the base left behind; --with-code takes it along")
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

    target = _target(found, place.path, checkpoint, fields, options, again)
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
        target.architecture.shapes,
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


def _target(
    adapter: Adapter,
    base: Path,
    checkpoint: Checkpoint,
    fields: Mapping[str, Any],
    options: Options,
    again: Again,
) -> Target:
    """Return the model to merge into; transformers is asked where the names do not tell."""
    if (simple := architectures.read_off(adapter, checkpoint, fields)) is not None:
        return Target(adapter, simple, None, {})
    if (told := architectures.as_trained(adapter, checkpoint, fields)) is not None:
        return told
    from lora_export import fitting

    return fitting.target(adapter, base, checkpoint, options.tied, again)
