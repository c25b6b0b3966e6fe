"""A training loop under Hugging Face Accelerate, for the recipes: one process or many, one curve.

A step takes one global batch, whatever the number of processes and of micro-batches: it is cut
into as many parts, and every part's loss is divided by the labels of the whole batch. So the
gradient is that of the batch's mean loss however it is cut, unequal parts included. (Averaging the
parts' own means is not the same where they hold different numbers of labels.)

Needs the extra `recipes`.
"""

import argparse
import contextlib
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from lora_export import environment, publishing, storage
from lora_export.errors import InputError, LoraExportError
from lora_export.injection import trainable_parameters
from lora_export.methods import load_trained, trained
from lora_export.records import Array, Measurement

try:
    import accelerate
    from accelerate.state import AcceleratorState
    from accelerate.utils import (
        GradientAccumulationPlugin,
        broadcast_object_list,
        gather_object,
        parse_flag_from_env,
    )
except ImportError as error:
    raise InputError("training needs accelerate; install lora-export[recipes]") from error

_TOLD_EVERY = 20  # steps
IGNORED = -100  # a label that nothing is learned from
# Of what `about` returns: what has to be the same for a training to go on, or to be this one.
IDENTITY = ("method", "base", "base_sha256", "data_sha256", "options")
CHECKPOINT = "checkpoint"  # in the folder of a run, like the next two
BEST = "best.safetensors"
PROGRESS = "progress.json"
Example = tuple[list[int], int | list[int]]  # token ids; the class, or one label for each token
Evaluate = Callable[[nn.Module], Sequence[Measurement]]


def _option(default: Any, text: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": text, **more})


@dataclass(frozen=True)
class Settings:
    """How to train. Checks itself; raises `InputError`."""

    epochs: int = _option(3, "times through the training examples")
    batch_size: int = _option(64, "examples in a step, over all processes and micro-batches")
    accumulate: int = _option(1, "micro-batches that a process cuts its part of a step into")
    lr: float = _option(1e-3, "peak learning rate; it falls linearly to 0")
    warmup: float = _option(0.06, "share of the steps over which the learning rate rises from 0")
    weight_decay: float = _option(0.01, "of AdamW, on matrices")
    clip: float = _option(1.0, "largest norm of the gradient")
    seed: int = _option(0, "of the order of examples, of fresh weights and of dropout")
    precision: str = _option("no", "mixed precision", choices=("no", "bf16", "fp16"))
    matmul_precision: str = _option(
        "highest",
        "of float32 matrix products inside, as torch names it; medium is bfloat16 where that is "
        "quick",
        choices=("highest", "high", "medium"),
    )
    gradient_checkpointing: bool = _option(False, "compute activations again in the backward pass")
    evaluate_every: int = _option(200, "steps between evaluations, each with a checkpoint")
    patience: int = _option(
        0, "stop after so many evaluations without a better one, and keep the best; 0: never"
    )
    max_steps: int = _option(0, "end after so many steps; 0: after the epochs")
    monitor: str = _option("accuracy", "the measurement that --patience looks at")

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "evaluate_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; expected at least 1")
        for name in ("lr", "clip"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} is {getattr(self, name)}; expected a number above 0")
        for name in ("weight_decay", "patience", "max_steps"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name} is {getattr(self, name)}; expected 0 or more")
        for one in fields(self):
            choices = one.metadata.get("choices")
            if choices and getattr(self, one.name) not in choices:
                raise InputError(
                    f"{one.name} is {getattr(self, one.name)!r}; expected one of "
                    f"{', '.join(choices)}"
                )
        if not 0 <= self.warmup < 1:
            raise InputError(f"warmup is {self.warmup}; expected 0 <= warmup < 1")


def add_arguments(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Add an option for each field of `Settings`, and --resume; `defaults` replace the fields'."""
    group = parser.add_argument_group("training")
    for one in fields(Settings):
        name, default = f"--{one.name.replace('_', '-')}", defaults.get(one.name, one.default)
        if isinstance(one.default, bool):
            group.add_argument(
                name, action="store_true", default=default, help=one.metadata["help"]
            )
            continue
        group.add_argument(
            name,
            type=type(one.default),
            default=default,
            choices=one.metadata.get("choices"),
            help=f"{one.metadata['help']} (default: {default})",
        )
    group.add_argument(
        "--resume", action="store_true", help="go on from the checkpoint of a stopped run"
    )


def settings_of(args: argparse.Namespace) -> Settings:
    """Return the settings among parsed arguments."""
    return Settings(**{one.name: getattr(args, one.name) for one in fields(Settings)})


@dataclass
class History:
    """What a training did so far; part of its checkpoint."""

    step: int = 0
    losses: list[float] = field(default_factory=list)  # nats per label, one for each step
    step_seconds: list[float] = field(default_factory=list)
    evaluations: list[tuple[int, list[Measurement]]] = field(default_factory=list)
    seconds: float = 0.0  # evaluations and checkpoints included
    best: float | None = None  # of the monitored measurement
    stale: int = 0  # evaluations since then
    kept: int = -1  # which of the evaluations is that of the weights that the training ends with
    optimizer_bytes: int = 0
    peak_memory: int = 0  # bytes

    @property
    def final(self) -> tuple[int, list[Measurement]]:
        """The step of the weights that the training ends with, and what was measured there."""
        return self.evaluations[self.kept]

    def state_dict(self) -> dict[str, Any]:
        """Return plain values: a checkpoint is read without running code."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        for name, value in state.items():
            setattr(self, name, value)
        self.evaluations = [
            (step, [Measurement(**one) for one in found]) for step, found in state["evaluations"]
        ]


# ---------------------------------------------------------------- batches


def batches(examples: Sequence[Example], size: int, seed: int) -> list[list[Example]]:
    """Cut into batches of similar length, in an order that depends on the seed alone."""
    dice = random.Random(seed)
    order = sorted(examples, key=lambda example: (len(example[0]), dice.random()))
    cut = [order[start : start + size] for start in range(0, len(order), size)]
    dice.shuffle(cut)
    return cut


def collate(batch: Sequence[Example], pad: int) -> tuple[dict[str, Tensor], Tensor]:
    """Return the inputs, padded on the right, and the labels: (batch,) or (batch, length)."""
    longest = max(len(ids) for ids, _ in batch)
    ids = torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in batch])
    lengths = torch.tensor([len(ids) for ids, _ in batch])
    mask = (torch.arange(longest)[None] < lengths[:, None]).long()
    labels = [
        label if isinstance(label, int) else label + [IGNORED] * (longest - len(label))
        for _, label in batch
    ]
    return {"input_ids": ids, "attention_mask": mask}, torch.tensor(labels)


def label_count(batch: Iterable[Example]) -> int:
    """Return how many labels the loss of `batch` is a sum over.

    Of a sequence of labels the first counts for nothing: nothing comes before it.
    """
    return sum(
        label != IGNORED if isinstance(label, int) else sum(one != IGNORED for one in label[1:])
        for _, label in batch
    )


def loss_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy in nats, summed over the labels that count.

    Args:
        logits: (batch, classes); or (batch, length, vocabulary), of which each position is asked
            for the label of the next one.
        labels: (batch,) or (batch, length).
    """
    if labels.ndim == 2:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return functional.cross_entropy(
        logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )


# ---------------------------------------------------------------- processes


def run(main: Callable[[], None]) -> None:
    """Run `main` of a recipe, in as many processes as were asked for; say errors in one line.

    Accelerate's launcher for CPUs starts a single process, whatever --num_processes says, unless
    MPI starts them: the processes that are lacking are started here, by torch.
    """
    try:
        if (asked := _asked_of_the_launcher()) > 1:
            launcher = f"-m torch.distributed.run --standalone --nproc-per-node {asked}".split()
            os.execv(sys.executable, [sys.executable, *launcher, *sys.argv])
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; the same command with --resume goes on, if there is a checkpoint yet")
    except (LoraExportError, OSError) as error:
        sys.exit(f"Error: {error}")


def _asked_of_the_launcher() -> int:
    """Return how many processes `accelerate launch --cpu` was asked for, where it started one."""
    is_ours = os.environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_PORT" in os.environ
    if not is_ours or os.environ.keys() & {"WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"}:
        return 1
    import psutil
    from accelerate.commands import launch

    words = psutil.Process().parent().cmdline()
    try:
        start = next(
            at for at, word in enumerate(words, 1) if word.removesuffix(".py").endswith("launch")
        )
        given = launch.launch_command_parser().parse_args(words[start:])
        asked, *_ = launch._validate_launch_command(given)
    except (StopIteration, SystemExit, ValueError) as error:
        raise InputError(
            "accelerate launch was asked for several processes on CPUs and started one; "
            "use: torchrun --nproc-per-node N RECIPE"
        ) from error
    if asked.num_machines > 1:
        raise InputError(
            "several machines without GPUs need accelerate launch over MPI, or torchrun"
        )
    return int(asked.num_processes)


def processes() -> Any:
    """Return Accelerate's account of the processes: `num_processes`, `is_main_process`, ...

    Raises:
        InputError: several were started that do not know of each other.
    """
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = accelerate.PartialState(cpu=on_cpu)
    started = int(os.environ.get("WORLD_SIZE", "1"))
    # Accelerate goes on alone where the launcher's configuration names what the machine lacks:
    # every process would train by itself, and all would write the same files.
    if started != state.num_processes:
        raise InputError(
            f"{started} processes were started and Accelerate takes this one to be alone; "
            "what the launcher was told does not fit the machine (FSDP and DeepSpeed need GPUs)"
        )
    return state


# ---------------------------------------------------------------- answers, shared among processes


def class_logits(
    model: nn.Module, examples: Sequence[Example], pad: int, batch_size: int = 64
) -> Array:
    """Return the logits (examples, classes), float32, in the order of `examples`."""

    def answer(logits: Tensor, labels: Tensor) -> list[Any]:
        return list(logits.float().cpu().numpy())

    return np.stack(_answers(model, examples, pad, batch_size, answer))


def likelihood(
    model: nn.Module, examples: Sequence[Example], pad: int, batch_size: int = 16
) -> tuple[float, int]:
    """Return the negative log-likelihood of all labels in nats, summed, and their number."""

    def answer(logits: Tensor, labels: Tensor) -> list[Any]:
        return [float(loss_sum(logits[i : i + 1], labels[i : i + 1])) for i in range(len(labels))]

    return math.fsum(_answers(model, examples, pad, batch_size, answer)), label_count(examples)


@torch.inference_mode()
def _answers(
    model: nn.Module,
    examples: Sequence[Example],
    pad: int,
    batch_size: int,
    answer: Callable[[Tensor, Tensor], list[Any]],
) -> list[Any]:
    """Return `answer` of every example; each process computes a share and gets all."""
    state = processes()
    device = next(model.parameters()).device
    order = sorted(range(len(examples)), key=lambda index: len(examples[index][0]))
    cut = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    was_training = model.training
    model.eval()
    found: list[tuple[int, Any]] = []
    for start in range(0, len(cut), state.num_processes):
        # Wrapped models talk to each other in every call, so that all have to call equally often.
        turn = start + state.process_index
        indices = cut[min(turn, len(cut) - 1)]
        inputs, labels = collate([examples[index] for index in indices], pad)
        inputs = {name: value.to(device) for name, value in inputs.items()}
        answers = answer(model(**inputs).logits, labels.to(device))
        if turn < len(cut):
            found += zip(indices, answers, strict=True)
    model.train(was_training)
    return [value for _, value in sorted(gather_object(found), key=lambda pair: pair[0])]


# ---------------------------------------------------------------- training


def fit(
    model: nn.Module,
    examples: Sequence[Example],
    settings: Settings,
    *,
    pad: int,
    evaluate: Evaluate,
    folder: Path,
    identity: Mapping[str, Any],
    resume: bool = False,
) -> History:
    """Train the trainable parameters of `model`, in place; return what happened.

    Args:
        model: Its call takes `input_ids` and `attention_mask` and gives `logits`.
        examples: Of which each process holds all.
        settings: How.
        pad: The id that inputs are padded with.
        evaluate: Called by all processes at the same steps.
        folder: Holds the checkpoint, and `progress.json` for who follows from outside. Processes
            on several machines share it.
        identity: What else decides the result; a checkpoint of another is refused.
        resume: Go on from the checkpoint: to the same bits, on one process.

    Raises:
        InputError: there is nothing to resume, or it is of another training, or `folder` is not
            empty; an example has no label; the loss is no longer finite; the precision is none of
            this machine; the processes do not know of each other.
    """
    loop = _Loop(model, examples, settings, pad, folder, {**asdict(settings), **identity}, resume)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(settings.matmul_precision)
    try:
        with loop.bar:
            loop.run(evaluate)
    finally:
        torch.set_float32_matmul_precision(before)
        # Or a later training in this process could not have another mixed precision.
        AcceleratorState._reset_state()
    return loop.history


class _Loop:
    """A training that is going on."""

    def __init__(
        self,
        model: nn.Module,
        examples: Sequence[Example],
        settings: Settings,
        pad: int,
        folder: Path,
        settled: Mapping[str, Any],
        resume: bool,
    ) -> None:
        self.model, self.examples, self.settings, self.pad = model, examples, settings, pad
        self.folder = folder
        if processes().device.type == "cpu" and settings.precision == "fp16":
            raise InputError("fp16 needs a GPU, Accelerate would ignore it; on a CPU use bf16")
        self.settled = {**settled, "frozen": _digest_of_frozen(model)}
        if resume:
            _check_same(folder, self.settled)
        # What a run that was stopped before its first checkpoint leaves is worth nothing.
        elif folder.exists() and {one.name for one in folder.iterdir()} - {BEST, PROGRESS}:
            raise InputError(
                f"{folder} is not empty; --resume goes on with a stopped run, or choose another "
                "--out"
            )
        folder.mkdir(parents=True, exist_ok=True)
        if unlabelled := sum(not label_count([example]) for example in examples):
            raise InputError(f"{unlabelled} of {len(examples)} examples have no label to learn")
        if not examples:
            raise InputError("there are no examples to learn from")
        self.shapes = {name: p.shape for name, p in model.named_parameters()}
        self.per_epoch = math.ceil(len(examples) / settings.batch_size)
        self.total = settings.max_steps or self.per_epoch * settings.epochs
        if settings.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        # The plugin, because an environment variable overrides the plain number.
        cut = GradientAccumulationPlugin(num_steps=settings.accumulate)
        self.accelerator = accelerate.Accelerator(
            mixed_precision=settings.precision, gradient_accumulation_plugin=cut
        )
        optimizer = torch.optim.AdamW(_groups(model, settings.weight_decay), lr=settings.lr)
        # Not given to `prepare`, which would let it advance once for each process.
        self.schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._share_of_lr)
        self.wrapped, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.trained = [p for p in self.wrapped.parameters() if p.requires_grad]
        self.history = History()
        self.accelerator.register_for_checkpointing(self.history, self.schedule)
        self.accelerator.register_save_state_pre_hook(_drop_frozen)
        torch.manual_seed(settings.seed + 7919 * self.accelerator.process_index)  # for dropout
        if resume:
            self._restore(folder / CHECKPOINT)
        self.started = time.monotonic() - self.history.seconds
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            disable=not self.accelerator.is_main_process,
        )

    def _restore(self, checkpoint: Path) -> None:
        # Where Accelerate cannot read the state of the random numbers it goes on without a word.
        torch.manual_seed(self.settings.seed - 1)
        strange = torch.get_rng_state()
        self.accelerator.load_state(str(checkpoint), strict=False)
        if torch.equal(torch.get_rng_state(), strange):
            raise InputError(f"{checkpoint} has lost the state of the random numbers; start anew")

    def _share_of_lr(self, step: int) -> float:
        """Return the learning rate of a step as a share of its peak: up and down, linearly."""
        rising = max(1, int(self.settings.warmup * self.total))
        return min((step + 1) / rising, (self.total - step) / max(1, self.total - rising))

    def run(self, evaluate: Evaluate) -> None:
        """Take all steps; keep a checkpoint after each evaluation."""
        settings, history = self.settings, self.history
        task = self.bar.add_task("training", total=self.total, completed=history.step)
        plan: list[list[Example]] = []
        self.wrapped.train()
        while history.step < self.total and not (0 < settings.patience <= history.stale):
            epoch, index = divmod(history.step, self.per_epoch)
            if not plan or index == 0:
                plan = batches(self.examples, settings.batch_size, settings.seed + epoch)
            self.step(plan[index])
            recent = sum(history.losses[-50:]) / len(history.losses[-50:])
            self.bar.update(task, advance=1, description=f"loss {recent:.3f}")
            if self.accelerator.is_main_process and history.step % _TOLD_EVERY == 0:
                self.tell(recent)
            if history.step % settings.evaluate_every == 0 or history.step == self.total:
                self.evaluate(evaluate, recent)
        self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)
        _make_whole(self.model)
        if self.shapes != {name: p.shape for name, p in self.model.named_parameters()}:
            raise InputError(
                "the parameters are still sharded over the processes, so they cannot be saved; "
                "use FSDP2, or a ZeRO stage below 3"
            )
        if settings.patience and history.best is not None:
            load_trained(self.model, self.folder / BEST)
            self.accelerator.wait_for_everyone()  # the file goes when the run is written
        history.peak_memory = environment.peak_memory()

    def step(self, batch: Sequence[Example]) -> None:
        """Take one step on a global batch."""
        began, accelerator = time.monotonic(), self.accelerator
        labels_in_all = label_count(batch)
        parts = accelerator.num_processes * self.settings.accumulate
        total = torch.zeros((), device=accelerator.device)
        for part in range(accelerator.process_index, parts, accelerator.num_processes):
            with accelerator.accumulate(self.wrapped):
                # Every process takes part in every step: one that is left without examples takes
                # the first, for nothing.
                share = batch[part::parts] or batch[:1]
                inputs, labels = collate(share, self.pad)
                inputs = {name: value.to(accelerator.device) for name, value in inputs.items()}
                logits = self.wrapped(**inputs).logits
                loss = loss_sum(logits, labels.to(accelerator.device)) * (part < len(batch))
                # Undone by the mean over processes, and by Accelerate's over micro-batches.
                accelerator.backward(loss * (parts / labels_in_all))
                total += loss.detach()
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(self.trained, self.settings.clip)
                self.optimizer.step()
                self.optimizer.zero_grad()
        if not accelerator.optimizer_step_was_skipped:
            self.schedule.step()
        mean = float(accelerator.reduce(total, "sum")) / labels_in_all
        self.history.step += 1
        self.history.losses.append(mean)
        self.history.step_seconds.append(time.monotonic() - began)
        if not math.isfinite(mean):
            raise InputError(
                f"the loss is {mean} at step {self.history.step}; lower --lr or raise --warmup"
            )

    def evaluate(self, evaluate: Evaluate, recent: float) -> None:
        """Measure, compare with the best so far, keep a checkpoint, and say so."""
        history = self.history
        found = list(evaluate(self.wrapped))
        self.wrapped.train()
        history.evaluations.append((history.step, found))
        history.seconds = time.monotonic() - self.started
        history.optimizer_bytes = _bytes_of(self.optimizer)
        if self.settings.patience:
            self.compare_with_best(found)
        _keep(self.accelerator, self.folder / CHECKPOINT, self.settled)
        if self.accelerator.is_main_process:
            shown = "  ".join(f"{one.name} {one.value:.4f}" for one in found)
            where = f"step {history.step}/{self.total}  loss {recent:.4f}"
            self.bar.print(f"{where}  {shown}  {history.seconds:.0f} s", soft_wrap=True)

    def compare_with_best(self, found: Sequence[Measurement]) -> None:
        """Keep what is trained where the monitored measurement is the best so far."""
        history, monitor = self.history, self.settings.monitor
        value = next((one.value for one in found if one.name == monitor), None)
        names = [one.name for one in found]
        if value is None and f"{monitor} undefined" in names:  # see `scoring`
            value = math.nan  # never the best
        if value is None:
            raise InputError(f"--monitor is {monitor!r}; the evaluation gives {', '.join(names)}")
        is_loss, best = monitor in ("loss", "perplexity"), history.best
        if not math.isnan(value) and (best is None or (value < best if is_loss else value > best)):
            history.best, history.stale, history.kept = value, 0, len(history.evaluations) - 1
            weights = trained(self.model)
            if self.accelerator.is_main_process:
                with publishing.staged(self.folder / BEST, overwrite=True) as place:
                    save_file(weights, place)
            self.accelerator.wait_for_everyone()
        else:
            history.stale += 1

    def tell(self, loss: float) -> None:
        """Tell who follows from outside how far the training is."""
        seconds = time.monotonic() - self.started
        told = {"step": self.history.step, "total": self.total, "loss": loss, "seconds": seconds}
        with publishing.staged(self.folder / PROGRESS, overwrite=True) as place:
            storage.write_json(place, told)


def _groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Return the trainable parameters in two groups: biases and norms are not decayed."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trainable if parameter.ndim > 1]
    vectors = [parameter for parameter in trainable if parameter.ndim <= 1]
    return [
        {"params": group, "weight_decay": value}
        for group, value in ((matrices, decay), (vectors, 0.0))
        if group
    ]


def _make_whole(model: nn.Module) -> None:
    """Put whole parameters in place of those that are sharded over the processes."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(parameter, DTensor):
                whole = nn.Parameter(parameter.full_tensor(), parameter.requires_grad)
                module.register_parameter(name, whole)


def _bytes_of(optimizer: Any) -> int:
    return sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )


# ---------------------------------------------------------------- checkpoints


def _check_same(folder: Path, settled: Mapping[str, Any]) -> None:
    checkpoint = folder / CHECKPOINT
    if (folder / "run.json").is_file():
        raise InputError(f"nothing to resume: the run in {folder} is finished")
    if not (checkpoint / "settings.json").is_file():
        raise InputError(f"nothing to resume: there is no {checkpoint}")
    kept = storage.read_json(checkpoint / "settings.json")
    now = json.loads(json.dumps(settled))
    if faults := [
        f"{name} was {kept.get(name)!r} and is {now.get(name)!r}"
        for name in sorted({*kept, *now})
        if kept.get(name) != now.get(name)
    ]:
        raise InputError(f"{checkpoint} was written with other settings: {'; '.join(faults)}")


def _drop_frozen(models: list[nn.Module], weights: list[dict[str, Tensor]], _: str) -> None:
    """Leave out of a checkpoint what training does not change; called by Accelerate."""
    for model, state in zip(models, weights, strict=False):  # sharded models come without
        known = model.named_parameters(remove_duplicate=False)
        frozen = {name for name, parameter in known if not parameter.requires_grad}
        below = tuple(f"{name}." for name in frozen)  # what packed weights are unpacked with
        for name in list(state):
            if name in frozen or name.startswith(below):
                del state[name]


def _digest_of_frozen(model: nn.Module) -> str:
    """Return a digest of the parameters that training leaves as they are: of the base."""
    kept = ((n, p.detach().to("cpu")) for n, p in model.named_parameters() if not p.requires_grad)
    return storage.fingerprint(
        (name, str(value.dtype), value.shape, value.flatten().view(torch.uint8).numpy().tobytes())
        for name, value in kept
    ).sha256


def _keep(accelerator: Any, checkpoint: Path, settled: Mapping[str, Any]) -> None:
    """Replace the checkpoint in one step: a kill leaves either the old or the new one."""
    with contextlib.ExitStack() as stack:
        place = [""]
        if accelerator.is_main_process:
            staged = stack.enter_context(publishing.staged(checkpoint, overwrite=True))
            staged.mkdir()
            storage.write_json(staged / "settings.json", settled)
            place = [str(staged)]
        broadcast_object_list(place)
        accelerator.save_state(place[0])
        accelerator.wait_for_everyone()
    accelerator.wait_for_everyone()


# ---------------------------------------------------------------- what a run leaves


def is_main_process() -> bool:
    """Return whether this is the process that prints and writes."""
    return bool(processes().is_main_process)


def resources(model: nn.Module, history: History, saved: Path) -> tuple[Measurement, ...]:
    """Return what the training took: parameters, memory, time, and the size of what it saved.

    Memory is the largest that this process has had, the base's loading and evaluations included.
    """
    counts = trainable_parameters(model)
    times = torch.tensor(history.step_seconds, dtype=torch.float64)
    files = [saved] if saved.is_file() else [one for one in saved.rglob("*") if one.is_file()]
    found = [
        Measurement("trainable parameters", "model", counts.trainable, "count", 1),
        Measurement("parameters", "model", counts.total, "count", 1),
        Measurement("optimizer state", "AdamW", history.optimizer_bytes, "B", 1),
        Measurement("peak memory", "CPU, resident", history.peak_memory, "B", 1),
        Measurement("step time median", "train", float(times.median()), "s", len(times)),
        Measurement("step time p90", "train", float(times.quantile(0.9)), "s", len(times)),
        Measurement("checkpoint size", saved.name, sum(f.stat().st_size for f in files), "B", 1),
        Measurement("training time", "train", history.seconds, "s", 1),
    ]
    if torch.cuda.is_available():
        most = torch.cuda.max_memory_allocated()
        found.append(Measurement("peak memory", "GPU, allocated", most, "B", 1))
    return tuple(found)


def about(recipe: str, method: str, settings: Settings, **identity: Any) -> dict[str, Any]:
    """Return what a run is to be known by: command, settings, versions, machine; no path."""
    return {
        "recipe": recipe,
        "method": method,
        "command": environment.invoked("python", f"recipes/{recipe}.py"),
        "seed": settings.seed,
        "settings": asdict(settings),
        **identity,
        "processes": processes().num_processes,
        "machine": environment.describe(torch.get_num_threads()),
    }


def write(
    folder: Path,
    description: Mapping[str, Any],
    history: History,
    measurements: Iterable[Measurement],
) -> None:
    """Write `metrics.jsonl` and, last, `run.json` to `folder`; remove the checkpoint.

    A line of metrics is a measurement and its step: the loss of each step, each evaluation, and
    then `measurements`, at the last step.
    """
    rows = [
        (step, Measurement("loss", "train", loss, "nat", 1))
        for step, loss in enumerate(history.losses, start=1)
    ]
    rows += [(step, one) for step, found in history.evaluations for one in found]
    if history.kept != -1:  # not the last ones: again, so that the last line is of what is saved
        step, found = history.final
        rows += [(step, one) for one in found]
    rows += [(history.step, one) for one in measurements]
    write_metrics(folder, rows)
    with publishing.staged(folder / "run.json", overwrite=True) as place:
        storage.write_json(place, description)
    for left in (CHECKPOINT, BEST, PROGRESS):
        if (folder / left).exists():
            publishing.remove(folder / left)


def write_metrics(folder: Path, rows: Iterable[tuple[int, Measurement]]) -> None:
    """Write `metrics.jsonl` to `folder`: each measurement and its step, one JSON object a line."""
    lines = [json.dumps({**asdict(one), "step": step}) for step, one in rows]
    with publishing.staged(folder / "metrics.jsonl", overwrite=True) as place:
        place.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
