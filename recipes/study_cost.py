"""What a training step costs, by method: memory of a fresh process, and time as a ratio.

    python recipes/study_cost.py --method lora --out out/memory
    python recipes/study_cost.py --method full,lora,bitfit --ratios --out out/steps

Without --ratios: by how much this process grows, at its peak, while it loads the base and takes
--steps steps of AdamW, and how large the optimizer's state is then. With --ratios: the time of a
step of each method as a ratio to the first one, all in this process, in shuffled order round by
round, so that what else the machine does meets all of them alike. Inputs are random tokens.

Writes metrics.jsonl and, last, run.json to --out, as the training recipes do. `study.py` runs it.
"""

import argparse
import gc
import importlib
import os
import random
import re
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads give the core back

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

import lora_export
from lora_export import (
    InputError,
    LoraConfig,
    bases,
    environment,
    heads,
    methods,
    storage,
    training,
)
from lora_export.compare import median_interval
from lora_export.quantised import load_nf4
from lora_export.records import Measurement

STATUS = Path("/proc/self/status")
WARM_UP = 2  # steps of each method before the first round


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--base", default="sentence-transformers/all-MiniLM-L6-v2", help="directory or hub id")
    add("--method", default="lora", help="one; with --ratios several, with commas")
    add("--ratios", action="store_true", help="time the methods, as ratios to the first")
    add("--out", type=Path, default=Path("out/cost"), help="directory")
    add("--rank", type=int, default=8)
    add("--batch-size", type=int, default=64)
    add("--length", type=int, default=32, help="tokens of each row")
    add("--steps", type=int, default=20, help="steps over which memory is measured")
    add("--rounds", type=int, default=30, help="rounds over which time is measured")
    add("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    for name in ("steps", "rounds"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} is {getattr(args, name)}; expected at least 1")
    torch.manual_seed(args.seed)
    found = ratios(args) if args.ratios else memory(args)
    args.out.mkdir(parents=True, exist_ok=True)
    step = args.rounds if args.ratios else args.steps
    training.write_metrics(args.out, [(step, one) for one in found])
    left_out = ("base", "method", "out", "seed")
    about = {
        "recipe": "study_cost",
        "method": args.method,
        "seed": args.seed,
        "settings": {name: value for name, value in vars(args).items() if name not in left_out},
        "machine": environment.describe(torch.get_num_threads()),
    }
    storage.write_json(args.out / "run.json", about)


def memory(args: argparse.Namespace) -> list[Measurement]:
    """Return the growth of this process at its peak, and what the optimizer holds."""
    if args.method == "qlora":
        with suppress(ImportError):  # which is refused later, with what to do
            importlib.import_module("bitsandbytes")  # a library is none of what a method needs
    gc.collect()
    forget_peak()
    before = environment.resident_memory()
    model, optimizer, step = stepping(args, args.method)
    for _ in range(args.steps):
        step()
    grown = peak() - before
    tensors = [value for state in optimizer.state.values() for value in state.values()]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    size = sum(value.numel() * value.element_size() for value in tensors)
    return [
        Measurement("peak memory growth", "CPU, resident", max(0, grown), "B", 1),
        Measurement("optimizer state", "AdamW", size, "B", 1),
        Measurement("trainable parameters", "model", sum(p.numel() for p in trained), "count", 1),
        Measurement("trainable tensors", "model", len(trained), "count", 1),
    ]


def ratios(args: argparse.Namespace) -> list[Measurement]:
    """Return the step time of each method: its median, and its ratio to the first with interval."""
    names = args.method.split(",")
    steps = {name: stepping(args, name)[2] for name in names}
    samples: dict[str, list[float]] = {name: [] for name in names}
    dice = random.Random(args.seed)
    for turn in range(-WARM_UP, args.rounds):
        for name in dice.sample(names, len(names)):
            started = time.perf_counter()
            steps[name]()
            if turn >= 0:
                samples[name].append(time.perf_counter() - started)
    found = []
    for name, seconds in samples.items():
        paired = np.divide(seconds, samples[names[0]])
        median, low, high = median_interval(paired, args.seed)
        rows = (("", median), (", low", low), (", high", high))
        kinds = [(f"step time ratio{end}", value, f"x {names[0]}") for end, value in rows]
        kinds.append(("step time median", float(np.median(seconds)), "s"))
        found += [Measurement(kind, name, value, unit, args.rounds) for kind, value, unit in kinds]
    return found


def stepping(
    args: argparse.Namespace, method: str
) -> tuple[nn.Module, torch.optim.Optimizer, Callable[[], None]]:
    """Return a model that `method` trains, its optimizer, and a function that takes one step."""
    base = bases.find(args.base)
    if method == "qlora":
        model, method = load_nf4(AutoModelForSequenceClassification, base.path), "lora"
    else:
        model = AutoModelForSequenceClassification.from_pretrained(base.path)
    methods.adapt(model, method, LoraConfig(rank=args.rank, modules_to_save=heads(model)))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    dice = torch.Generator().manual_seed(args.seed)
    ids = torch.randint(vocabulary, (args.batch_size, args.length), generator=dice)
    labels = torch.randint(2, (args.batch_size,), generator=dice)
    model.train()

    def step() -> None:
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, optimizer, step


def forget_peak() -> None:
    """Let the kernel count the peak of resident memory from here; Linux alone can."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Return the peak of resident memory since `forget_peak`, in bytes."""
    if not STATUS.is_file():
        return environment.peak_memory()
    line = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())
    return 1024 * int(line[1]) if line else environment.peak_memory()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped")
    except (lora_export.LoraExportError, OSError) as error:
        sys.exit(f"Error: {error}")
