"""A recipe that trains nothing: it writes the directory that a training recipe writes.

python study_made.py --out DIR --method M --seed N [--fail] [--seconds S] [--resume]
"""

import argparse
import json
import sys
import time
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--out", type=Path)
parser.add_argument("--method")
parser.add_argument("--seed", type=int)
parser.add_argument("--data")
parser.add_argument("--base")
parser.add_argument("--accuracy", type=float, default=0.9)
parser.add_argument("--seconds", type=float, default=0.0)
parser.add_argument("--fail", action="store_true")
parser.add_argument("--resume", action="store_true")
args = parser.parse_args()

args.out.mkdir(parents=True, exist_ok=True)
checkpoint = args.out / "checkpoint"
begun = (args.out / "begun").open("a")
begun.write("resumed\n" if args.resume else "anew\n")
begun.close()
checkpoint.mkdir(exist_ok=True)
(args.out / "progress.json").write_text(json.dumps({"step": 1, "total": 2, "seconds": 0.1}))
time.sleep(args.seconds)
if args.fail:
    checkpoint.rmdir()
    sys.exit("Error: the loss is not a number")
names = ("name", "subject", "value", "unit", "samples", "step")
rows = [
    ("loss", "train", 0.7, "nat", 1, 1),
    ("accuracy", "dev", args.accuracy, "share", 872, 2),
]
lines = [json.dumps(dict(zip(names, row, strict=True))) for row in rows]
(args.out / "metrics.jsonl").write_text("\n".join(lines) + "\n")
checkpoint.rmdir()
about = {"recipe": "sst2", "method": args.method, "seed": args.seed}
(args.out / "run.json").write_text(json.dumps(about))
