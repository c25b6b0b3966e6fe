"""The stages of a run, one function each: they act and record, and judge nothing."""

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lora_export import auditing, bases, exporters, inputs, merging, models, storage
from lora_export.adapter import read_adapter
from lora_export.errors import ExportFailed, InputError, listed
from lora_export.injection import attach, idle
from lora_export.plan import MergePlan, plan
from lora_export.records import (
    IDLE,
    MERGED,
    REFERENCE,
    UNMERGED,
    Account,
    Adapter,
    Artifact,
    Batch,
    FileDigest,
    Modules,
    Recording,
    Signature,
    WeightAudit,
)
from lora_export.runners import Runner
from lora_export.runners.eager import EagerRunner
from lora_export.storage import Checkpoint

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class Job:
    """An adapter, its base, and the plan that merges one into the other."""

    adapter: Adapter
    base: Path
    checkpoint: Checkpoint
    config: Any
    blank: nn.Module  # the architecture without weights
    plan: MergePlan
    source: Path  # of the adapter
    origin: str  # how the base was found

    def places(self, data: Path | None = None) -> tuple[Path, ...]:
        """Return the paths of everything that goes in."""
        return (self.source, self.base) if data is None else (self.source, self.base, data)

    def inputs(self, data: Path | None = None) -> tuple[FileDigest, ...]:
        """Return the digests of everything that goes in: adapter, base, tokenizer, sentences."""
        if self.source.is_dir():
            own = storage.digest_tree(self.source)
        else:
            own = (storage.digest(self.source),)
        companions = [n for n in merging.COMPANIONS if (self.base / n).is_file()]
        names = (*self.checkpoint.shards, "config.json", *companions)
        texts = inputs.files([data]) if data is not None else []
        return (
            *own,
            *(storage.digest(self.base / name, f"base/{name}") for name in names),
            *(storage.digest(text) for text in texts),
        )

    def settings(self, **more: Any) -> dict[str, Any]:
        """Return what decided the result beside the inputs."""
        return {
            "base": f"{self.adapter.base.public_id or self.base.name} ({self.origin})",
            **more,
            "notes": [*self.plan.notes, *self.adapter.notes],
        }


def open_job(
    adapter: str | Path,
    base: str | None = None,
    *,
    dtype: str = "keep",
    allow_base_mismatch: bool = False,
) -> Job:
    """Read the adapter, find its base, and plan the merge; nothing is written.

    Raises:
        InputError: adapter or base is missing or damaged, or the adapter is untrained.
        AdapterMismatch: they do not fit together; every fault is listed.
    """
    found = read_adapter(adapter)
    if all(pair.is_zero for pair in found.modules.values()):
        raise InputError(
            f"the adapter {adapter} is untrained: all {len(found.modules)} low-rank updates are "
            "zero, so merging it would change nothing"
        )
    name = base or found.base.id
    if not name:
        raise InputError("the adapter names no base model; pass --base")
    place = bases.find(name, None if base else found.base.revision)
    checkpoint = Checkpoint.open(place.path)
    architecture = models.architecture_of(found, place.path)
    config = models.config_of(place.path, architecture, found.labels, models.class_count(found))
    if getattr(config, "pad_token_id", 0) is None and models.has_tokenizer(place.path):
        config.pad_token_id = models.tokenizer(place.path).pad_token_id
    blank = models.blank(config)
    if dtype != "keep" and dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}; expected keep, {', '.join(DTYPES)}")
    target = DTYPES.get(dtype)
    steps = plan(found, checkpoint, blank, dtype=target, allow_base_mismatch=allow_base_mismatch)
    return Job(found, place.path, checkpoint, config, blank, steps, Path(adapter), place.origin)


@dataclass(frozen=True)
class MergeRecord:
    """What a merge left behind, as found in the files."""

    account: Account
    weights: tuple[WeightAudit, ...]
    files: tuple[FileDigest, ...]


def merge_stage(job: Job, folder: Path, prefix: str = "") -> MergeRecord:
    """Write the merged checkpoint to `folder`, read it back, and record what happened to it.

    `prefix` goes before the names of the files in the record.
    """
    merging.write_merged(job.plan, job.adapter, job.checkpoint, job.config, folder)
    written = Checkpoint.open(folder)
    return MergeRecord(
        auditing.account(job.plan, job.adapter, job.checkpoint, written),
        auditing.weights(job.plan, job.adapter, job.checkpoint, written),
        storage.digest_tree(folder, prefix),
    )


@dataclass(frozen=True)
class Subject:
    """A merged model, loaded from disk, with its tokenizer and its signature."""

    folder: Path
    model: nn.Module
    tokens: Any
    signature: Signature

    def runner(self, name: str, model: nn.Module | None = None) -> EagerRunner:
        """Return a runner for the merged model, or for another one of the same signature."""
        return EagerRunner(name, self.tensors(model), self.signature)

    def tensors(self, model: nn.Module | None = None) -> nn.Module:
        """Return a model as a function of tensors, with the arguments of the signature."""
        ins = tuple(spec.name for spec in self.signature.inputs)
        outs = tuple(spec.name for spec in self.signature.outputs)
        return models.as_tensors(model or self.model, ins, outs)


def load_merged(folder: Path) -> nn.Module:
    """Load the merged model in `folder` as any user would: with plain transformers.

    Raises:
        InputError: it holds no model, one that was changed after the merge, or tensors that the
            model does not use: an adapter that was never merged, for instance.
        AdapterMismatch: weights are missing.
    """
    if not folder.is_dir():
        raise InputError(f"no merged model in {folder}: run `lora-export merge` first")
    if not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").is_file()
        hint = "it is an adapter; run `lora-export merge` first" if adapter else "no config.json"
        raise InputError(f"no model in {folder}: {hint}")
    _refuse_altered(folder)
    architecture = models.architecture_of(Adapter({}, {}, "lora"), folder)
    config = models.config_of(folder, architecture, (), None)
    return models.load(folder, config, all_used=True)


def load_subject(folder: Path) -> Subject:
    """Load the merged model in `folder` with its tokenizer; raises as `load_merged` does."""
    model = load_merged(folder)
    tokens = models.tokenizer(folder)
    return Subject(folder, model, tokens, models.signature_of(model, tokens))


def _refuse_altered(folder: Path) -> None:
    """Refuse weights that are not the ones that the merge wrote and audited."""
    if not (folder / merging.PROVENANCE).is_file():
        return
    written = storage.read_json(folder / merging.PROVENANCE).get("files", {})
    now = {file.name: file.sha256 for file in storage.digest_tree(folder)}
    if changed := [name for name, digest in written.items() if now.get(name) != digest]:
        raise InputError(listed(f"{folder} was changed after it was merged", changed))


def load_unmerged(job: Job) -> nn.Module:
    """Return the base with its live LoRA layers: what the adapter's author evaluated."""
    config = copy.deepcopy(job.config)
    model = models.load(job.base, config, provided=job.adapter.replaced)
    if hasattr(config, "use_cache"):
        config.use_cache = False
    attach(model, job.adapter)
    return model.eval().requires_grad_(False)


def exact(model: nn.Module) -> nn.Module:
    """Return a float64 copy of `model`: the reference."""
    return copy.deepcopy(model).double()


def export_stage(name: str, subject: Subject, folder: Path, file: str | None = None) -> Artifact:
    """Export the merged model to `folder` and return what is found in the written file.

    Raises:
        ExportFailed: the backend cannot write the model, or cannot open what it wrote.
    """
    exporter = exporters.load(name)
    path = folder / (file or f"model{exporter.SUFFIX}")
    example = inputs.made(subject.signature, *inputs.EXAMPLE, seed=0)
    with models.quiet():
        model = subject.tensors(models.widened(subject.model))
        exporter.export(model, subject.signature, example, about(subject), path)
    return exporters.describe(name, path)


def about(subject: Subject) -> dict[str, str]:
    """Return what an artifact says of itself: labels, limits of its input, provenance."""
    config: Any = subject.model.config
    content: dict[str, Any] = {
        "architecture": config.architectures[0],
        "labels": [config.id2label[index] for index in sorted(config.id2label)],
        "max_length": subject.signature.max_length,
        "pad_token_id": subject.signature.pad_token_id,
    }
    if (subject.folder / merging.PROVENANCE).is_file():
        known = storage.read_json(subject.folder / merging.PROVENANCE)
        content |= {name: known.get(name) for name in ("tool", "base", "adapter")}
    return {f"lora_export.{k}": json.dumps(v, sort_keys=True) for k, v in content.items()}


def open_runners(
    artifacts: Mapping[str, Artifact], folder: Path, threads: int
) -> dict[str, Runner]:
    """Open every artifact from disk."""
    found: dict[str, Runner] = {}
    for name, artifact in artifacts.items():
        try:
            found[name] = exporters.load(name).open_runner(folder / artifact.files[0].name, threads)
        except RuntimeError as error:
            raise ExportFailed(f"cannot open the {name} file again: {error}") from error
    return found


def batches_of(
    subject: Subject, texts: Sequence[str], labels: Sequence[int], seed: int
) -> tuple[Batch, ...]:
    """Return all inputs: sentences first, then the grid of shapes.

    Raises:
        InputError: a label is no class of the model.
    """
    classes = len(subject.model.config.id2label)  # type: ignore[union-attr, arg-type]
    if bad := sorted({label for label in labels if not 0 <= label < classes}):
        raise InputError(listed(f"labels outside 0 to {classes - 1}", map(str, bad)))
    batches = (
        *inputs.text_batches(subject.tokens, subject.signature, texts, labels),
        *inputs.grid_batches(subject.signature, seed),
    )
    return inputs.within_budget(batches, subject.signature)


def record(runner: Runner, batches: Iterable[Batch]) -> Recording:
    """Return what `runner` answers on `batches`."""
    return Recording(
        runner.name, runner.precision, tuple(runner.run(batch.arrays) for batch in batches)
    )


def record_all(
    unmerged: nn.Module,
    subject: Subject,
    runners: Mapping[str, Runner],
    batches: tuple[Batch, ...],
) -> dict[str, Recording]:
    """Return the recordings of the reference, the unmerged and merged models and the artifacts."""
    own = subject.runner(UNMERGED, unmerged)
    found = {
        REFERENCE: record(subject.runner(REFERENCE, exact(unmerged)), batches),
        UNMERGED: record(own, batches),
        MERGED: record(subject.runner(MERGED), batches),
    }
    with idle(unmerged):
        found[IDLE] = record(own, batches)
    return found | {name: record(runner, batches) for name, runner in runners.items()}


def modules_of(model: nn.Module) -> Modules:
    """Return the module tree of the merged `model`, and that of its architecture."""
    names = (*model.state_dict(), *(name for name, _ in model.named_modules()))
    return Modules(
        expected=models.module_classes(models.blank(model.config)),
        found=models.module_classes(model),
        lora_names=tuple(sorted({name for name in names if "lora" in name.lower()})),
    )
