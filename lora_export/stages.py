"""The stages of a run, one function each: they act and record, and judge nothing."""

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lora_export import auditing, exporters, inputs, merging, models, storage
from lora_export.errors import ExportFailed, InputError, listed
from lora_export.injection import attach, idle
from lora_export.opening import Job, Options
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
    merging.write_merged(
        job.plan,
        job.adapter,
        job.checkpoint,
        job.settings_of_model,
        folder,
        job.companions(),
        job.options.stated(),
    )
    return audit_stage(job, folder, prefix)


def audit_stage(job: Job, folder: Path, prefix: str = "") -> MergeRecord:
    """Read the merged checkpoint in `folder`, and record what was made of adapter and base."""
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


def recorded_files(folder: Path) -> tuple[FileDigest, ...]:
    """Return the digests of the files in `folder` as the merge wrote them down."""
    known = storage.read_json(folder / merging.PROVENANCE)
    written, beside = known.get("files"), known.get("companions")
    if not isinstance(written, dict) or not written or not isinstance(beside, dict):
        raise InputError(f"{folder / merging.PROVENANCE} names no files")
    sizes = {f.name: f.size_bytes for f in storage.digest_tree(folder)}
    return tuple(
        FileDigest(name, sizes.get(name, 0), str(digest))
        for name, digest in (written | beside).items()
    )


def recorded_options(folder: Path, replaced: Mapping[str, Any]) -> Options:
    """Return the options that the merge in `folder` was made with, some of them `replaced`."""
    written = storage.read_json(folder / merging.PROVENANCE).get("options", {})
    try:
        return Options(**{**written, **replaced})
    except TypeError as error:
        raise InputError(f"{folder / merging.PROVENANCE} is damaged: {error}") from error


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
    if config is None:  # the plan did not need it
        config = models.config_of(job.base, models.architecture_of(job.live, job.base), (), None)
    model = models.load(job.base, config, provided=job.live.replaced)
    if hasattr(config, "use_cache"):
        config.use_cache = False
    attach(model, job.live)
    return model.eval().requires_grad_(False)


def exact(model: nn.Module) -> nn.Module:
    """Return a float64 copy of `model`: the reference."""
    found: Any = copy.deepcopy(model).double()
    if hasattr(found, "set_experts_implementation"):  # the fused kernels know no float64
        found.set_experts_implementation("eager")
    return found  # type: ignore[no-any-return]


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


def merged_modules(job: Job, folder: Path) -> Modules:
    """Return what the merged model in `folder` consists of, beside what it should.

    Where the plan needed no model, the base's own tensors are what it should: names and shapes.
    """
    if job.config is not None:
        return modules_of(load_merged(folder))
    found = Checkpoint.open(folder).tensors
    return Modules(
        expected={name: str(info.shape) for name, info in job.checkpoint.tensors.items()},
        found={name: str(info.shape) for name, info in found.items()},
        lora_names=_lora_names(found, job.checkpoint.tensors),
        claim="the tensors are those of the base, by name and shape",
    )


def modules_of(model: nn.Module) -> Modules:
    """Return the module tree of the merged `model`, and that of its architecture."""
    plain = models.blank(model.config)
    names, known = ((*m.state_dict(), *dict(m.named_modules())) for m in (model, plain))
    return Modules(
        expected=models.module_classes(plain),
        found=models.module_classes(model),
        lora_names=_lora_names(names, known),
    )


def _lora_names(names: Iterable[str], known: Iterable[str]) -> tuple[str, ...]:
    """Return the `names` that speak of LoRA, where the architecture itself does not."""
    return tuple(sorted(n for n in {*names} - {*known} if "lora" in n.lower()))
