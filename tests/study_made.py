"""A recipe that trains nothing: it writes the directory that a training recipe writes.

python study_made.py --out DIR --method M --seed N [--fail] [--seconds S] [--resume]
"""

import argparse
import json
import sys
import time
from pathlib import Path

SIZES = {"lora": (300, 10), "full": (20_000, 40), "head": (20, 2)}  # parameters, tensors
ALL = 20_300


def rows(method: str, accuracy: float) -> list[dict]:
    """Return the lines of metrics.jsonl, as training.write writes them."""
    parameters, tensors = SIZES[method]
    names = ("name", "subject", "value", "unit", "samples", "step")
    found = [
        ("loss", "train", 0.7, "nat", 1, 1),
        ("loss", "train", 0.5, "nat", 1, 2),
        ("accuracy", "dev", accuracy - 0.1, "share", 872, 1),
        ("accuracy", "dev", accuracy, "share", 872, 2),
        ("trainable parameters", "model", parameters, "count", 1, 2),
        ("parameters", "model", ALL, "count", 1, 2),
        ("optimizer state", "AdamW", 8 * parameters + 4 * tensors, "B", 1, 2),
        ("checkpoint size", "model", 4 * parameters + 100, "B", 1, 2),
        ("stored tensors", "model", tensors, "count", 1, 2),
    ]
    return [dict(zip(names, row, strict=True)) for row in found]


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("--out", "--method", "--seed", "--data", "--base"):
        parser.add_argument(name)
    parser.add_argument("--accuracy", type=float, default=0.9)
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--fail", action="store_true")
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    out = Path(args.out)
    checkpoint = out / "checkpoint"
    checkpoint.mkdir(parents=True, exist_ok=args.resume)
    with (out / "starts").open("a") as file:
        file.write("resumed\n" if args.resume else "anew\n")
    if args.fail:
        checkpoint.rmdir()
        sys.exit(f"Error: {out.resolve()}/weights: the loss is not a number")
    (out / "progress.json").write_text(json.dumps({"step": 1, "total": 2, "seconds": 0.1}))
    time.sleep(0 if args.resume else args.seconds)
    lines = [json.dumps(row) for row in rows(args.method, args.accuracy + 0.001 * int(args.seed))]
    (out / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (out / "run.json").write_text(json.dumps({"method": args.method, "seed": args.seed}))
    checkpoint.rmdir()


if __name__ == "__main__":
    main()
