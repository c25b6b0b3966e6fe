"""The stages of a run, one function each: they act and record, and judge nothing."""

import copy
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from lora_export import (
    companions,
    environment,
    exporters,
    inputs,
    loading,
    models,
    registry,
    storage,
    weightless,
)
from lora_export.calling import Interface, interface_of
from lora_export.companions import PROVENANCE
from lora_export.errors import ExportFailed, InputError, listed
from lora_export.injection import attach, idle
from lora_export.judging import digests_now
from lora_export.opening import Job
from lora_export.recording import record
from lora_export.records import (
    IDLE,
    LABEL,
    MERGED,
    PLAIN,
    REFERENCE,
    UNMERGED,
    Array,
    Artifact,
    Batch,
    Evidence,
    Form,
    Recording,
    Reply,
    Signature,
)
from lora_export.runners import Runner
from lora_export.runners.eager import EagerRunner
from lora_export.runners.onnx import OnnxTextRunner

SHARED_TOKENIZER = "tokenizer"  # beside the artifacts of a run


@dataclass(frozen=True)
class Subject:
    """A model with its tokenizer, and how it is called: a merged one, loaded from disk, mostly."""

    folder: Path
    model: nn.Module
    tokens: Any | None  # None for a model of pictures
    interface: Interface

    @property
    def signature(self) -> Signature:
        """The inputs and outputs of the model."""
        return self.interface.signature

    def runner(self, name: str, model: nn.Module | None = None) -> EagerRunner:
        """Return a runner for the merged model, or for another one of the same signature."""
        return EagerRunner(name, self.interface.bind(model or self.model), self.signature)


def load_subject(folder: Path, *, cache: bool = True) -> Subject:
    """Load the merged model in `folder`; raises as `load_merged` and `interface_of` do."""
    model = loading.load_merged(folder).requires_grad_(False)
    tokens = models.processor(folder, model)
    return Subject(folder, model, tokens, interface_of(model, tokens, cache=cache, folder=folder))


def load_unmerged(job: Job) -> nn.Module:
    """Return the base with its live LoRA layers: what the adapter's author evaluated."""
    config = copy.deepcopy(job.config)
    if config is None:  # the plan did not need it
        named = models.architecture_of(job.live, job.base)
        classes = models.class_count(job.live)
        config = models.config_of(job.base, named, job.live.labels, classes)
        models.blank(config)  # says what is wrong with it; the loader raises as it comes
    model = models.load(job.base, config, provided=job.live.replaced)
    if hasattr(config, "use_cache"):
        config.use_cache = False
    attach(model, job.live)
    return model.eval().requires_grad_(False)


def exact(model: nn.Module) -> nn.Module:
    """Return `model` in float64: the reference."""
    found: Any = weightless.in_double(model)
    if hasattr(found, "set_experts_implementation"):  # the fused kernels know no float64
        found.set_experts_implementation("eager")
    return found  # type: ignore[no-any-return]


def export_stage(
    name: str,
    subject: Subject,
    folder: Path,
    file: str | None = None,
    form: Form = PLAIN,
    examples: Sequence[str] = (),
    say: Callable[[str], None] = lambda stage: None,
) -> Artifact:
    """Export the merged model to `folder` and return what is found in the written file.

    The tokenizer goes beside it: to FILE.tokenizer, or where no `file` is named to `tokenizer`,
    which all artifacts of the folder share. `examples` are texts to choose by what keeps its
    precision; none are those that come with the package. `say` is called with each stage.

    Raises:
        InputError: the format has no such form.
        ExportFailed: the backend cannot write the model, or cannot open what it wrote.
    """
    exporter = exporters.load(name)
    exporters.refuse_unknown(name, form)
    path = folder / (file or f"model{exporter.SUFFIX}")
    example = inputs.example(subject.signature)
    with models.quiet():
        model = subject.interface.bind(subject.model)
        known = about(subject) | {registry.PRECISION: json.dumps(form.precision)}
        known[exporters.MADE_WITH] = json.dumps(environment.writers(), sort_keys=True)
        if more := form.asked | ({exporters.CALIBRATION: True} if examples else {}):
            known[exporters.FORM] = json.dumps(more, sort_keys=True)
        runs = calibration(subject, examples) if form.precision in registry.CALIBRATED else ()
        exporter.export(
            exporters.Request(
                model, subject.signature, example, known, path, form, runs, subject.tokens, say
            )
        )
    _copy_processor(subject.folder, folder / (f"{file}.tokenizer" if file else SHARED_TOKENIZER))
    return described(name, path)


def described(name: str, path: Path) -> Artifact:
    """Return what the file at `path` in the format `name` says of itself, and what lies beside it.

    Raises:
        ExportFailed: it is no file of that format.
    """
    artifact = exporters.describe(name, path)
    own = path.with_name(f"{path.name}.tokenizer")
    folder = own if own.is_dir() else path.with_name(SHARED_TOKENIZER)
    present = [n for n in companions.PROCESSOR if (folder / n).is_file()]
    said = artifact.facts.get("metadata", {}).get(registry.PRECISION, json.dumps(registry.FULL))
    precision = next((known for known in registry.PRECISIONS if json.dumps(known) == said), None)
    if precision is None:
        raise ExportFailed(f"{path.name} says that its precision is {said[:60]}")
    return replace(
        artifact,
        beside=tuple(storage.digest(folder / n, f"{folder.name}/{n}") for n in present),
        precision=precision,
    )


def calibration(subject: Subject, texts: Sequence[str] = ()) -> list[Mapping[str, Array]]:
    """Return the inputs by which an exporter chooses what to keep in full precision."""
    if texts and subject.tokens is None:
        raise InputError("--calibration holds sentences, and the model takes pictures")
    chosen = texts or inputs.read_texts(None)[0]
    seed = 1  # other made pictures than those that the artifact is compared on
    return [batch.arrays for batch in real_batches(subject, chosen, (), seed)]


def _copy_processor(source: Path, target: Path) -> None:
    """Copy what turns texts or pictures into inputs."""
    found = companions.companions_of(source)
    for name in companions.PROCESSOR:
        if name in found:
            target.mkdir(exist_ok=True)
            companions.copy(found[name], target / name)


def about(subject: Subject) -> dict[str, str]:
    """Return what an artifact says of itself: labels, limits of its input, provenance."""
    config: Any = subject.model.config
    content: dict[str, Any] = {
        "architecture": config.architectures[0],
        "labels": [config.id2label[index] for index in sorted(config.id2label)],
        "max_length": subject.signature.max_length,
        "pad_token_id": subject.signature.pad_token_id,
        "padding_side": getattr(subject.tokens, "padding_side", None),
    }
    if (subject.folder / PROVENANCE).is_file():
        known = storage.read_json(subject.folder / PROVENANCE)
        content |= {name: known.get(name) for name in ("tool", "base", "adapter")}
    return {f"lora_export.{k}": json.dumps(v, sort_keys=True) for k, v in content.items()}


def open_runners(
    artifacts: Mapping[str, Artifact], folder: Path, threads: int
) -> dict[str, Runner]:
    """Open every artifact from disk."""
    return {
        name: open_runner(name, folder / artifact.files[0].name, threads)
        for name, artifact in artifacts.items()
    }


def open_runner(name: str, path: Path, threads: int) -> Runner:
    """Open the artifact at `path` from disk; raises `ExportFailed` where that is not possible."""
    try:
        runner: Runner = exporters.load(name).open_runner(path, threads)
    except RuntimeError as error:
        raise ExportFailed(f"cannot open the {name} file again: {error}") from error
    return runner


def batches_of(
    subject: Subject, texts: Sequence[str], labels: Sequence[int], seed: int
) -> tuple[Batch, ...]:
    """Return all inputs: sentences first, then the grid of shapes.

    Raises:
        InputError: a label is no class of the model.
    """
    types = getattr(subject.model.config, "type_vocab_size", 0)
    return inputs.within_budget(
        (
            *real_batches(subject, texts, labels, seed),
            *inputs.grid_batches(subject.signature, seed, special_tokens(subject), types or 0),
        ),
        subject.signature,
    )


def special_tokens(subject: Subject) -> list[int]:
    """Return the ids that mean something to the tokenizer and the model, the padding left out."""
    found = getattr(subject.tokens, "all_special_ids", [])
    size, padding = subject.signature.vocab_size, subject.signature.pad_token_id
    return [token for token in found if token < size and token != padding]


def real_batches(
    subject: Subject, texts: Sequence[str], labels: Sequence[int], seed: int = 0
) -> tuple[Batch, ...]:
    """Return `texts`, tokenized; made pictures for a model of pictures.

    Raises:
        InputError: a label is no class of the model, or there are labels and no texts are taken.
    """
    if subject.tokens is None:
        if labels:
            raise InputError("--data holds sentences, and the model takes pictures")
        return inputs.picture_batches(subject.signature, seed)
    classes = len(subject.model.config.id2label)  # type: ignore[union-attr, arg-type]
    if bad := sorted({label for label in labels if not 0 <= label < classes}):
        raise InputError(listed(f"labels outside 0 to {classes - 1}", map(str, bad)))
    return inputs.text_batches(subject.tokens, subject.signature, texts, labels)


def replies(subject: Subject, runner: Runner, batches: Iterable[Batch]) -> tuple[Reply, ...]:
    """Return what an artifact that takes text makes of hard texts, and of those of `batches`."""
    assert isinstance(runner, OnnxTextRunner)
    found = []
    for batch in (*inputs.hard_batches(subject.tokens, subject.signature), *batches):
        if not batch.texts:
            continue
        answers = runner.read(batch.texts) if batch.source == "text" else {}
        labels = tuple(map(str, answers.pop(LABEL, ())))
        made = runner.tokenize(batch.texts)
        expected = {name: batch.arrays[name] for name in made}
        found.append(Reply(batch.texts, expected, made, labels, answers))
    return tuple(found)


def settings_of(runners: Iterable[Runner], threads: int) -> dict[str, Any]:
    """Return how the runtime of each runner was set, by its name."""
    return {r.name: getattr(r, "settings", {"torch_threads": threads}) for r in runners}


def merged_evidence(subject: Subject, batches: tuple[Batch, ...]) -> Evidence:
    """Return what an artifact of the merged model is compared with, before there is one."""
    runners = (subject.runner(REFERENCE, exact(subject.model)), subject.runner(MERGED))
    return Evidence(
        modules=loading.modules_of(subject.model),
        signature=subject.signature,
        batches=batches,
        recordings={runner.name: record(runner, batches) for runner in runners},
        floor=MERGED,
    )


def with_artifact(
    evidence: Evidence, artifact: Artifact, runner: Runner, folder: Path, **more: Any
) -> Evidence:
    """Return `evidence` with an artifact in `folder` and what it answers, and `more` fields."""
    recording = record(runner, evidence.batches)
    return replace(
        evidence,
        artifacts=(artifact,),
        recordings={**evidence.recordings, artifact.format: recording},
        files=artifact.all_files,
        files_now=digests_now(artifact.all_files, folder),
        **more,
    )


def record_truth(unmerged: Subject, batches: tuple[Batch, ...]) -> dict[str, Recording]:
    """Return what the unmerged model answers: in float64, as it is, and without its updates."""
    own = unmerged.runner(UNMERGED)
    found = {
        REFERENCE: record(unmerged.runner(REFERENCE, exact(unmerged.model)), batches),
        UNMERGED: record(own, batches),
    }
    with idle(unmerged.model):
        found[IDLE] = record(own, batches)
    return found
