"""Time what `lora-export` writes beside torch, transformers' exporter and OpenVINO. Copy it.

    python recipes/bench_export.py --model distilbert --batch 1 --batch 8 --length 128

Needs Linux and the extra `test` (openvino, matplotlib). Models are built here from their configs,
with random weights and no download; minilm is all-MiniLM-L6-v2 itself, from the extra `demo`.

    torch eager               float32, the unit of all ratios; twice, which shows the noise
    LoRA not merged           the same with rank 16 on every linear layer (B is zero: same answers)
    torch.compile, bf16, int8 what torch offers without an export; int8 is its dynamic quantisation
    lora-export ...           artifacts of this package, run by its runners
    OpenVINO's own choice     our OpenVINO file, with nothing said of precision, streams or pinning
    transformers ...          transformers.exporters: as it comes, fused for onnxruntime, int8
    optimum onnx              with --optimum, which makes an environment of its own for it

A decoder is timed twice: prefill (all tokens new) and decode (one new token, the others cached).
Cached keys and values are float32 arrays on the way in and out, whatever it computes in between.
transformers.exporters writes a graph for each of the two, everybody else one for both.

Every contender lives in a process of its own, so that no pool of threads, allocator or setting is
shared, and only one of them works at a time: rounds of all contenders in shuffled order. A turn
begins with one run that is not counted, after which caches and threads are those of the contender,
and lasts at least TURN seconds; its sample is the median of the turn. What a contender leaves
behind for the next one is looked for in the samples, and stated. Idle OpenMP threads sleep
(OMP_WAIT_POLICY=PASSIVE), and so do onnxruntime's (no spinning).

Every export is a fresh process as well: it loads the model, runs it, and exports; stated are the
seconds and the kernel's peak of resident memory above the loaded model, both with what the exporter
imports, as when one model is exported from a command line.

Writes bench_export.jsonl (every sample), bench_export.md and bench_export.png into --out.
"""

import contextlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # here, because whoever is started below inherits it

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from lora_export import bases, environment, inputs
from lora_export.compare import median_interval
from lora_export.errors import LoraExportError, first_line
from lora_export.records import Array, Signature

RANK, ALPHA = 16, 32.0
TURN = 0.1  # seconds that a turn lasts at least
WARM_UP = 3
LEAST_ROUNDS = 5
TORCH_MB, OTHER_MB = 500, 200  # memory of a process beside the weights, for planning
DEMO = "sentence-transformers/all-MiniLM-L6-v2"
OPTIMUM = "optimum-onnx"

# Class and the fields of its config that are not transformers' defaults, which are the base sizes.
LLAMA = {
    "hidden_size": 2048, "num_hidden_layers": 22, "intermediate_size": 5632, "vocab_size": 32000,
    "num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 2048,
}  # fmt: skip
TINY = {
    "vocab_size": 400, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128,
    "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
TINY_GPT2 = {"vocab_size": 400, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
MODELS: dict[str, tuple[str, dict[str, int]]] = {
    "distilbert": ("DistilBertForSequenceClassification", {}),
    "bert": ("BertForSequenceClassification", {}),
    "minilm": ("", {}),  # the only one that exists
    "gpt2": ("GPT2LMHeadModel", {}),
    "llama-1b": ("LlamaForCausalLM", LLAMA),
    "tiny-bert": ("BertForSequenceClassification", TINY),  # for tests
    "tiny-gpt2": ("GPT2LMHeadModel", TINY_GPT2),
}
LARGE = 5e8  # parameters
PREFILLS = {"llama-1b": (128,)}  # lengths of prefill that are worth the wait

BASE, AGAIN = "torch eager", "torch eager, again"
DEFAULT_OPENVINO = "OpenVINO's own choice"


@dataclass(frozen=True)
class Contender:
    """What is timed."""

    name: str
    runtime: str  # that it computes with: the package
    artifact: str = ""  # what has to be exported for it
    weight: float = 1.0  # memory that it needs, in float32 models


# fmt: off
CONTENDERS = {contender.name: contender for contender in (
    Contender(BASE, "torch"),
    Contender(AGAIN, "torch"),
    Contender("torch eager, LoRA not merged", "torch", weight=1.1),
    Contender("torch.compile", "torch", weight=1.3),
    Contender("torch bf16", "torch", weight=1.5),
    Contender("torch int8", "torch", weight=1.5),
    Contender("lora-export torchscript", "torch", "torchscript fp32", 1.5),
    Contender("lora-export pt2", "torch", "pt2 fp32", 1.5),
    Contender("lora-export aoti", "torch", "aoti fp32", 1.5),
    Contender("lora-export onnx", "onnxruntime", "onnx fp32", 2),
    Contender("lora-export onnx int8", "onnxruntime", "onnx int8", 0.6),
    Contender("lora-export onnx int8 static", "onnxruntime", "onnx int8 static", 0.6),
    Contender("lora-export onnx int4", "onnxruntime", "onnx int4", 0.6),
    Contender("lora-export openvino", "openvino", "openvino fp32", 2),
    Contender("lora-export openvino bf16", "openvino", "openvino bf16", 1.5),
    Contender("lora-export openvino int8", "openvino", "openvino int8", 1),
    Contender(DEFAULT_OPENVINO, "openvino", "openvino fp32", 1.5),
    Contender("transformers onnx", "onnxruntime", "transformers onnx", 2),
    Contender("transformers onnx fused", "onnxruntime", "transformers onnx fused", 2),
    Contender("transformers onnx int8", "onnxruntime", "transformers onnx int8", 0.6),
    Contender("transformers onnx fused int8", "onnxruntime", "transformers onnx fused int8", 0.6),
    Contender("optimum onnx", "onnxruntime", "optimum onnx", 2),
)}
# fmt: on
OPTIONAL = ("lora-export aoti", "optimum onnx")
DEFAULTS = tuple(name for name in CONTENDERS if name not in OPTIONAL)

OPTIMUM_EXPORT = """
import gc, json, re, sys, time, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import torch, transformers
def memory(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
source, target, task = sys.argv[1:]
gc.collect()
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
started = time.perf_counter()
from optimum.exporters.onnx import main_export
main_export(source, target, task=task, do_validation=False, no_post_process=True,
            local_files_only=True)
seconds = time.perf_counter() - started
print(json.dumps({"seconds": seconds, "peak_bytes": memory("VmHWM") - before,
                  "with_model": True}))
"""
OPTIMUM_VERSIONS = """
import json
from importlib import metadata
print(json.dumps({name: metadata.version(name) for name in
                  ("optimum", "optimum-onnx", "transformers", "torch")}))
"""


@dataclass(frozen=True)
class Case:
    """What the contenders are run on."""

    model: str
    batch: int
    length: int
    phase: str  # forward; of a decoder prefill or decode

    @property
    def label(self) -> str:
        """The case in words."""
        phase = "" if self.phase == "forward" else f", {self.phase}"
        return f"{self.model}, batch {self.batch}, length {self.length}{phase}"

    def arrays(self, signature: Signature) -> dict[str, Array]:
        """Return the inputs: rows of different length for an encoder, full rows for a decoder."""
        new = 1 if self.phase == "decode" else self.length
        past = self.length if self.phase == "decode" else 0
        padding = "right" if self.phase == "forward" else "none"
        return inputs.made(signature, self.batch, new, padding, 0, past=past)


@dataclass(frozen=True)
class Sample:
    """One turn of a contender."""

    case: Case
    contender: str
    round: int
    ms: float
    after: str  # the contender that worked before it


@dataclass(frozen=True)
class Opened:
    """What a contender says of itself before it is timed on a case."""

    case: Case
    contender: str
    precision: str
    open_s: float
    first_s: float  # the first call at this shape; of torch.compile that is the compilation
    resident_bytes: int
    deviation: float | None  # the largest, from torch eager; None where they do not compare
    spread: float  # standard deviation of what torch eager answers
    load_average: float


@dataclass(frozen=True)
class Exported:
    """One export."""

    model: str
    artifact: str
    round: int
    seconds: float
    peak_bytes: int  # above what was resident when it began
    size_bytes: int
    with_model: bool = False  # the model was loaded meanwhile, and counts


@dataclass
class Bench:
    """What all runs share, and what they have found so far."""

    names: tuple[str, ...]
    threads: int
    rounds: int
    repeats: int
    seconds: float
    seed: int
    place: Path
    about: dict[str, Any] = field(default_factory=dict)
    optimum: str | None = None  # interpreter
    samples: list[Sample] = field(default_factory=list)
    opened: list[Opened] = field(default_factory=list)
    exports: list[Exported] = field(default_factory=list)
    not_run: list[str] = field(default_factory=list)

    def leave_out(self, what: str, why: str) -> None:
        """Note and say that something was not run."""
        line = f"{what}: {why}"
        if line not in self.not_run:
            self.not_run.append(line)
            say(f"not run: {line}")


class Failed(Exception):
    """A process of ours did not do what it was asked; says how."""


# fmt: off
FOLDER = click.Path(file_okay=False, path_type=Path)


@click.command()
@click.option("--model", "models", type=click.Choice(tuple(MODELS)), multiple=True,
              default=("distilbert",), show_default=True, help="Repeatable.")
@click.option("--batch", "batches", type=click.IntRange(1), multiple=True, default=(1, 8),
              show_default=True, help="Rows; repeatable.")
@click.option("--length", "lengths", type=click.IntRange(1), multiple=True, default=(128,),
              show_default=True, help="Tokens of a row; repeatable.")
@click.option("--contender", "names", type=click.Choice(tuple(CONTENDERS)), multiple=True,
              default=DEFAULTS, help="Beside torch eager; repeatable. Default: all but "
              + " and ".join(OPTIONAL) + ".")
@click.option("--aoti", is_flag=True, help="Also lora-export aoti, which compiles for a minute.")
@click.option("--optimum", is_flag=True, help="Also optimum's exporter, installed from the index.")
@click.option("--threads", type=click.IntRange(1), default=environment.cores(),
              help="Of every contender. Default: the cores that this process may use.")
@click.option("--rounds", type=click.IntRange(1), default=15, show_default=True,
              help="Turns of every contender at every shape.")
@click.option("--seconds", type=click.FloatRange(0), default=300.0, show_default=True,
              help=f"No further round at a shape after these, once {LEAST_ROUNDS} are done.")
@click.option("--repeats", type=click.IntRange(0), default=3, show_default=True,
              help="Exports of every kind; with 0 those that are needed, untimed.")
@click.option("--quick", is_flag=True, help="One export of a kind and two rounds: does it work?")
@click.option("--seed", type=int, default=0, show_default=True, help="Of weights and orders.")
@click.option("--work", type=FOLDER, default=Path("artifacts"), show_default=True,
              help="Where models and artifacts lie meanwhile.")
@click.option("--out", type=FOLDER, default=Path("artifacts/bench-export"), show_default=True,
              help="Where the results are written.")
def main(
    models: tuple[str, ...], batches: tuple[int, ...], lengths: tuple[int, ...],
    names: tuple[str, ...], aoti: bool, optimum: bool, threads: int, rounds: int, seconds: float,
    repeats: int, quick: bool, seed: int, work: Path, out: Path,
) -> None:
    """Time what lora-export writes beside torch, transformers' exporter and OpenVINO."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # clean up, as after Ctrl-C
    os.environ["OMP_NUM_THREADS"] = str(threads)
    work.mkdir(parents=True, exist_ok=True)
    chosen = {BASE, *names, *(["lora-export aoti"] * aoti), *(["optimum onnx"] * optimum)}
    with tempfile.TemporaryDirectory(prefix="bench-export-", dir=work) as folder:
        bench = Bench(
            tuple(name for name in CONTENDERS if name in chosen), threads, 2 if quick else rounds,
            min(1, repeats) if quick else repeats, seconds, seed, Path(folder),
        )
        bench.about = {"command": command(), "machine": machine(threads)}
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(bench.place / "inductor")
        leave_out_the_missing(bench)
        for model in dict.fromkeys(models):
            run_model(bench, model, cases_of(model, batches, lengths))
            write(out, bench)
    show(bench)
# fmt: on


def cases_of(model: str, batches: Iterable[int], lengths: Iterable[int]) -> list[Case]:
    decodes = MODELS[model][0].endswith("ForCausalLM") or "LMHead" in MODELS[model][0]
    found = []
    for length in dict.fromkeys(lengths):
        for batch in dict.fromkeys(batches):
            if not decodes:
                found.append(Case(model, batch, length, "forward"))
                continue
            if length in PREFILLS.get(model, (length,)):
                found.append(Case(model, batch, length, "prefill"))
            found.append(Case(model, batch, length, "decode"))
    return found


def leave_out_the_missing(bench: Bench) -> None:
    """Take out what this machine lacks a tool for, and say which."""
    for name in bench.names:
        if why := lacking(CONTENDERS[name]):
            bench.leave_out(name, why)
            bench.names = tuple(other for other in bench.names if other != name)
    if "optimum onnx" in bench.names:
        try:
            bench.optimum = optimum_environment(bench.place / "optimum")
            asked = subprocess.run(
                [bench.optimum, "-c", OPTIMUM_VERSIONS], capture_output=True, text=True, check=True
            )
            bench.about["optimum_with"] = json.loads(asked.stdout)
        except (Failed, OSError, subprocess.SubprocessError) as error:
            bench.leave_out("optimum onnx", first_line(error))
            bench.names = tuple(name for name in bench.names if name != "optimum onnx")


def lacking(contender: Contender) -> str:
    """Return what a contender needs and this machine lacks; nothing where there is nothing."""
    if find_spec(contender.runtime) is None:
        return f"{contender.runtime} is not installed"
    if contender.artifact.startswith("transformers") and not find_spec("transformers.exporters"):
        return f"transformers {metadata.version('transformers')} has no exporters"
    compiles = contender.name in ("torch.compile", "lora-export aoti")
    if compiles and not any(map(shutil.which, filter(None, (os.environ.get("CXX"), "g++")))):
        return "there is no C++ compiler"
    return ""


def optimum_environment(folder: Path) -> str:
    """Make an environment with optimum beside the torch that runs here; return its interpreter."""
    say("installing optimum")
    venv.create(folder, with_pip=True, symlinks=True)
    python = str((folder / "bin" / "python").absolute())
    own = Path(subprocess.check_output(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    ).strip())  # fmt: skip
    import sysconfig

    # What it does not bring itself, torch above all, it finds here, behind its own packages.
    (own / "beside.pth").write_text(sysconfig.get_path("purelib") + "\n")
    done = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", OPTIMUM], capture_output=True, text=True
    )
    if done.returncode:
        raise Failed(f"cannot be installed: {done.stderr.strip().splitlines()[-1]}")
    return python


# ---------------------------------------------------------------- one model


def run_model(bench: Bench, model: str, cases: Sequence[Case]) -> None:
    """Export and time all contenders on one model, as many at a time as memory allows."""
    say(f"{model}: making")
    folder = bench.place / model
    try:
        made = apart(bench, "making", make, model, folder, bench.seed)
    except Failed as error:
        bench.leave_out(model, str(error))
        return
    signature, size = made["signature"], made["bytes"]
    bench.about.setdefault("models", {})[model] = {
        name: made[name] for name in ("parameters", "bytes", "linear_layers")
    }
    allowed = [case for case in cases if fits_model(bench, case, signature)]
    free = memory_bytes("MemAvailable")
    if free < 3 * size:
        bench.leave_out(
            model, f"it needs {3 * size / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free"
        )
        return
    names = [name for name in bench.names if applies(bench, model, name, made)]
    for group in groups(names, size, 0.85 * free):
        artifacts = bench.place / f"{model}-artifacts"
        artifacts.mkdir()
        try:
            failed = export_all(bench, model, Path(made["folder"]), artifacts, group, size)
            ready = [name for name in group if CONTENDERS[name].artifact not in failed]
            time_all(bench, allowed, Path(made["folder"]), artifacts, ready, signature)
        finally:
            shutil.rmtree(artifacts)
    shutil.rmtree(folder, ignore_errors=True)


def fits_model(bench: Bench, case: Case, signature: Signature) -> bool:
    total = case.length + (case.phase == "decode")
    if total > signature.max_length:
        bench.leave_out(case.label, f"the model takes at most {signature.max_length} tokens")
    return total <= signature.max_length


def applies(bench: Bench, model: str, name: str, made: Mapping[str, Any]) -> bool:
    why = ""
    if name == "torch int8" and not made["linear_layers"]:
        why = "torch's dynamic quantisation knows nn.Linear, and this model has none but its head"
    elif name == "optimum onnx" and made["signature"].has_cache:
        why = "only encoders are compared"
    if why:
        bench.leave_out(f"{name} of {model}", why)
    return not why


def groups(names: Sequence[str], size: int, room: float) -> list[list[str]]:
    """Split contenders into groups that fit into `room` bytes together; torch eager is in all."""

    def needed(name: str) -> float:
        contender = CONTENDERS[name]
        beside = TORCH_MB if contender.runtime == "torch" else OTHER_MB
        return contender.weight * size + beside * 1e6

    found: list[list[str]] = [[BASE]]
    for name in names:
        if name == BASE:
            continue
        if len(found[-1]) > 1 and sum(map(needed, [*found[-1], name])) > room:
            found.append([BASE])
        found[-1].append(name)
    return found


def export_all(
    bench: Bench, model: str, folder: Path, target: Path, group: Sequence[str], size: int
) -> dict[str, str]:
    """Write the artifacts of `group`, in shuffled rounds; return those that failed, and how."""
    wanted = list(dict.fromkeys(filter(None, (CONTENDERS[name].artifact for name in group))))
    failed: dict[str, str] = {}
    for turn in range(1, max(1, bench.repeats) + 1):
        random.Random(f"{bench.seed} {model} {turn}").shuffle(wanted)
        for artifact in wanted:
            if artifact in failed:
                continue
            place = target / artifact.replace(" ", "-")
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            try:
                if (free := shutil.disk_usage(target).free) < 4 * size:
                    raise Failed(f"{free / 1e9:.1f} GB of disk are free, which is too little")
                os.sync()  # so that no export waits for what another one wrote
                found = exported(bench, artifact, folder, place)
            except Failed as error:
                failed[artifact] = str(error)
                for name in group:
                    if CONTENDERS[name].artifact == artifact:
                        bench.leave_out(f"{name} of {model}", str(error))
                continue
            written = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
            if bench.repeats:
                bench.exports.append(Exported(model, artifact, turn, size_bytes=written, **found))
            say(f"{model}: {artifact} exported in {found['seconds']:.1f} s")
    return failed


def exported(bench: Bench, artifact: str, folder: Path, place: Path) -> dict[str, Any]:
    if artifact != "optimum onnx":
        return dict(apart(bench, artifact, export, folder, artifact, place, bench.threads))
    # It reads its own, older transformers' files: config and weights, no tokenizer.
    source = place.with_name("optimum-source")
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir()
    for name in ("config.json", "model.safetensors"):
        (source / name).symlink_to((folder / name).absolute())
    said = json.loads((folder / "config.json").read_text())["architectures"][0]
    task = "text-classification" if "Classification" in said else "feature-extraction"
    done = subprocess.run(
        [str(bench.optimum), "-c", OPTIMUM_EXPORT, str(source), str(place), task],
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise Failed((done.stderr.strip().splitlines() or ["it ended without a word"])[-1])
    return dict(json.loads(done.stdout.splitlines()[-1]))


def time_all(
    bench: Bench,
    cases: Sequence[Case],
    folder: Path,
    artifacts: Path,
    names: Sequence[str],
    signature: Signature,
) -> None:
    """Open every contender in a process of its own, and time them on every case in turns."""
    workers: dict[str, Worker] = {}
    try:
        for name in names:
            place = artifacts / CONTENDERS[name].artifact.replace(" ", "-")
            workers[name] = Worker(bench, name, serve, name, folder, place, bench.threads)
            try:
                said = workers[name].receive()
                say(f"{name}: opened in {said['open_s']:.1f} s, computes in {said['precision']}")
            except Failed as error:
                workers.pop(name).close()
                bench.leave_out(f"{name} of {cases[0].model if cases else ''}", str(error))
        if BASE in workers:
            for case in cases:
                time_case(bench, case, workers, case.arrays(signature))
    finally:
        for worker in workers.values():
            worker.close()


def time_case(
    bench: Bench, case: Case, workers: Mapping[str, "Worker"], arrays: dict[str, Array]
) -> None:
    """Time the workers on one case; who fails is left out of it."""
    answers = str(bench.place / "answers.npz")
    taking = []
    for name, worker in workers.items():  # torch eager is the first, and writes its answers
        try:
            said = worker.ask(("case", case.phase, arrays, answers))
        except Failed as error:
            bench.leave_out(f"{name} at {case.label}", str(error))
            continue
        bench.opened.append(Opened(case, name, load_average=os.getloadavg()[0], **said))
        taking.append(name)
    if BASE not in taking:
        return
    before = max((s.round for s in bench.samples if s.case == case), default=0)
    dice = random.Random(f"{bench.seed} {case.label}")
    last, start = taking[-1], time.monotonic()
    for turn in range(before + 1, before + bench.rounds + 1):
        dice.shuffle(taking)
        for name in list(taking):
            try:
                ms = float(workers[name].ask(("turn",)))
            except Failed as error:
                bench.leave_out(f"{name} at {case.label}, from round {turn}", str(error))
                taking.remove(name)
                continue
            bench.samples.append(Sample(case, name, turn, ms, last))
            last = name
        if turn - before >= LEAST_ROUNDS and time.monotonic() - start > bench.seconds:
            break
    say(f"{case.label}: {turn - before} rounds in {time.monotonic() - start:.0f} s")


# ---------------------------------------------------------------- processes


class Worker:
    """A process of its own that answers what it is asked; its talk goes to a file."""

    def __init__(
        self, bench: Bench, name: str, task: Callable[..., None], *arguments: object
    ) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.log = bench.place / f"{re.sub('[^a-z0-9]+', '-', name.lower())}.log"
        self.end, theirs = spawn.Pipe()
        self.process = spawn.Process(
            target=child, args=(theirs, str(self.log), task, *arguments), daemon=True
        )
        self.process.start()
        theirs.close()

    def ask(self, message: object) -> Any:
        """Return the answer to `message`; raises `Failed`."""
        try:
            self.end.send(message)
        except OSError:
            self._dead()
        return self.receive()

    def receive(self) -> Any:
        """Return what the process says next; raises `Failed` where it failed or died."""
        try:
            said, content = self.end.recv()
        except (EOFError, OSError):
            self._dead()
        if said == "failed":
            raise Failed(content)
        return content

    def _dead(self) -> None:
        self.process.join(5)
        code = self.process.exitcode
        why = "was killed, perhaps for memory" if code == -signal.SIGKILL else f"ended with {code}"
        raise Failed(f"the process {why}")

    def close(self) -> None:
        """End the process."""
        self.end.close()
        self.process.join(2)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def apart(bench: Bench, name: str, task: Callable[..., Any], *arguments: object) -> Any:
    """Return what `task` returns in a process of its own; raises `Failed`."""
    worker = Worker(bench, name, once, task, *arguments)
    try:
        return worker.receive()
    finally:
        worker.close()


def once(end: Connection, task: Callable[..., Any], *arguments: object) -> None:
    end.send(("done", task(*arguments)))


def child(end: Connection, log: str, task: Callable[..., None], *arguments: object) -> None:
    """Run `task`, with everything that libraries print in a file."""
    with Path(log).open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    try:
        task(end, *arguments)
    except (EOFError, BrokenPipeError):
        pass
    except Exception as error:  # four libraries: they raise as it comes
        import traceback

        traceback.print_exc()
        text = first_line(error) if isinstance(error, LoraExportError) else (
            f"{type(error).__name__}: {first_line(error)}"
        )  # fmt: skip
        with contextlib.suppress(OSError):
            end.send(("failed", text[:200]))


def resident(name: str = "VmRSS") -> int:
    """Return the resident memory of this process in bytes; with "VmHWM" its peak."""
    found = re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def make(model: str, folder: Path, seed: int) -> dict[str, Any]:
    """Write the model to `folder`, unless it exists elsewhere, and return what to know of it."""
    import torch
    import transformers
    from torch import nn

    from lora_export import stages

    architecture, fields = MODELS[model]
    if not architecture:
        folder = bases.find(DEMO).path
    else:
        kind = getattr(transformers, architecture)
        torch.manual_seed(seed)
        built = kind(kind.config_class(**fields))
        built.config.pad_token_id = 0
        built.save_pretrained(folder)
        longest = built.config.max_position_embeddings
        tokenizer(built.config.vocab_size, longest).save_pretrained(folder)
        del built
    subject = stages.load_subject(folder)
    linear = [m for n, m in subject.model.named_modules()
              if isinstance(m, nn.Linear) and "head" not in n]  # fmt: skip
    parameters = sum(p.numel() for p in subject.model.parameters())
    return {
        "folder": str(folder), "signature": subject.signature, "parameters": parameters,
        "bytes": 4 * parameters, "linear_layers": len(linear),
    }  # fmt: skip


def tokenizer(size: int, longest: int) -> Any:
    """Return a tokenizer of whole words: those of the package's sentences, as many as fit."""
    from transformers import BertTokenizerFast  # type: ignore[attr-defined]

    words = re.findall(r"\w+|[^\w\s]", " ".join(inputs.read_texts(None)[0]).lower())
    known = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    names = list(dict.fromkeys(known))[:size]
    return BertTokenizerFast(
        vocab={word: index for index, word in enumerate(names)}, model_max_length=longest
    )


def export(folder: Path, artifact: str, place: Path, threads: int) -> dict[str, Any]:
    """Write an artifact of the model in `folder` and return seconds and peak memory above it."""
    import gc

    import torch

    from lora_export import stages

    torch.set_num_threads(threads)
    subject = stages.load_subject(folder)
    example = inputs.example(subject.signature)
    # The model has run; what is imported from here on is the exporter's, and counts.
    if artifact.startswith("transformers"):
        work = their_export(subject, artifact.partition("onnx")[2].strip(), place)
    else:
        name, precision, *more = artifact.split()
        texts = stages.real_batches(subject, *inputs.read_texts(None))

        def work() -> None:
            from lora_export import exporters, models
            from lora_export.records import Form

            exporter = exporters.load(name)
            with models.quiet():
                module = subject.interface.bind(subject.model)
                note = {"lora_export.precision": json.dumps(precision)}
                form = Form(precision, static=bool(more))
                # Which of random weights are sensitive says nothing, and takes long of so many.
                is_large = sum(p.numel() for p in subject.model.parameters()) > LARGE
                runs = [batch.arrays for batch in texts] if more or not is_large else []
                path = place / f"model{exporter.SUFFIX}"
                exporter.export(
                    exporters.Request(
                        module,
                        subject.signature,
                        example,
                        note,
                        path,
                        form,
                        runs,
                    )
                )

    gc.collect()
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    started = time.perf_counter()
    work()
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "peak_bytes": resident("VmHWM") - before}


def their_export(subject: Any, more: str, place: Path) -> Callable[[], None]:
    """Return an export by transformers.exporters, with every axis free, as it offers that."""
    import torch

    names = [spec.name for spec in subject.signature.inputs]
    side = "left" if subject.signature.has_cache else "right"  # all ones, and the mask is dropped
    made = inputs.made(subject.signature, 2, 7, side, 0)
    # A decoder is called as `generate` is: without a cache.
    sample = {n: torch.from_numpy(made[n]) for n in names if not n.startswith("past_key_values")}

    def work() -> None:
        import transformers.exporters

        tool: Any = transformers.exporters
        config = tool.OnnxConfig(dynamic=True, ort_fusions="cpu" if "fused" in more else None)
        if "int8" in more:
            config.quantizer = tool.OnnxRuntimeQuantizer(tool.OnnxRuntimeDynamicConfig())
        exporter = tool.OnnxExporter()
        one = exporter.export_for_generation if subject.signature.has_cache else exporter.export
        one(subject.model, sample, config).save_pretrained(place)

    return work


# ---------------------------------------------------------------- contenders


Run = Callable[[str, Mapping[str, Array]], Mapping[str, Array]]  # phase and inputs to outputs


def serve(end: Connection, name: str, folder: Path, place: Path, threads: int) -> None:
    """Open a contender, then answer: run it on a case, and compare; take a turn."""
    started = time.perf_counter()
    run, precision = opened(name, folder, place, threads)
    open_s = time.perf_counter() - started
    end.send(("open", {"open_s": open_s, "precision": precision}))
    ready: Callable[[], object] = list
    while True:
        message = end.recv()
        if message[0] == "turn":
            end.send(("ms", turn_of(ready)))
            continue
        _, phase, arrays, answers = message
        ready = partial(run, phase, arrays)
        try:
            started = time.perf_counter()
            outputs = run(phase, arrays)
            first_s = time.perf_counter() - started
            for _ in range(WARM_UP):
                ready()
            said: dict[str, Any] = {"precision": precision, "open_s": open_s, "first_s": first_s}
            found = comparable(outputs, arrays, phase)
            if name == BASE:
                np.savez(answers, **found)  # type: ignore[arg-type]
            deviation, spread = deviation_of(found, dict(np.load(answers)))
            said |= {"resident_bytes": resident(), "deviation": deviation, "spread": spread}
            end.send(("ready", said))
        except Exception as error:  # at this shape; perhaps not at the next
            end.send(("failed", f"{type(error).__name__}: {first_line(error)}"[:200]))


def turn_of(run: Callable[[], object]) -> float:
    """Return the median time of the runs of one turn, in milliseconds; the first does not count."""
    run()
    times: list[float] = []
    while sum(times) < TURN * 1e3:
        begin = time.perf_counter_ns()
        run()
        times.append((time.perf_counter_ns() - begin) / 1e6)
    return median(times)


def comparable(
    outputs: Mapping[str, Array], arrays: Mapping[str, Array], phase: str
) -> dict[str, Array]:
    """Return what answers are compared by: no padding, no cache, of a decoder the last token."""
    found = {}
    for name, array in outputs.items():
        if name in ("logits", "last_hidden_state", "sentence_embedding"):
            if phase != "forward":
                array = array[:, -1]
            elif array.ndim == 3:
                array = array[arrays["attention_mask"] == 1]
            found[name] = np.asarray(array, np.float32)
    return found


def deviation_of(
    found: Mapping[str, Array], expected: Mapping[str, Array]
) -> tuple[float | None, float]:
    """Return the largest deviation and the standard deviation of what is expected.

    Nothing to compare, another shape or a value that is not finite is no small deviation: None.
    """
    spread = max((float(np.std(array)) for array in expected.values()), default=0.0)
    same = [name for name in expected if name in found]
    if not same or any(found[name].shape != expected[name].shape for name in same):
        return None, spread
    errors = [np.abs(found[name].astype(np.float64) - expected[name]).max() for name in same]
    return (float(max(errors)) if np.isfinite(errors).all() else None), spread


def opened(name: str, folder: Path, place: Path, threads: int) -> tuple[Run, str]:
    """Return a contender, ready to run, and what it computes in."""
    contender = CONTENDERS[name]
    tool, _, what = contender.artifact.partition(" ")
    if contender.runtime == "torch":
        import torch

        torch.set_num_threads(threads)
        if not tool:
            return in_torch(name, folder)
    if tool in ("transformers", "optimum"):
        return theirs(place, threads, what)
    if name == DEFAULT_OPENVINO:
        return openvino_alone(place / "model.xml", threads)
    runner = our_runner(tool, what, place, threads)
    precision = runner.precision
    if what.startswith("int") and tool == "onnx":
        if kept := json.loads(runner.metadata.get("lora_export.kept_wider", "[]")):
            precision += f", {len(kept)} layers wider"
    elif what.startswith("int"):
        precision = f"{what}, else {precision}"
    return (lambda _, arrays: runner.run(arrays)), precision


def our_runner(tool: str, precision: str, place: Path, threads: int) -> Any:
    """Return the runner of an artifact, as a server would open it: without the exporter."""
    if tool == "onnx":
        from lora_export.runners.onnx import OnnxRunner

        return OnnxRunner(place / "model.onnx", threads)
    if tool == "openvino":
        from lora_export.runners.openvino import OpenvinoRunner

        return OpenvinoRunner(place / "model.xml", threads, {"fp32": "f32"}.get(precision, "bf16"))
    if tool == "torchscript":
        from lora_export.runners.torchscript import TorchScriptRunner

        return TorchScriptRunner(place / "model.pt")
    if tool == "aoti":
        from lora_export.runners.aoti import AotiRunner

        return AotiRunner(place / "model.aoti.pt2")
    from lora_export.runners.pt2 import Pt2Runner

    return Pt2Runner(place / "model.pt2")


def in_torch(name: str, folder: Path) -> tuple[Run, str]:
    """Return the live model, as it is or as torch itself changes it."""
    import warnings

    import torch
    from torch import nn

    from lora_export import LoraConfig, inject, stages
    from lora_export.runners.eager import EagerRunner

    subject = stages.load_subject(folder)
    model, said = subject.model, ""
    if name.endswith("LoRA not merged"):
        inject(model, LoraConfig(rank=RANK, alpha=ALPHA))
        model.eval().requires_grad_(False)
    elif name == "torch bf16":
        model = model.to(torch.bfloat16)
    runner = EagerRunner(name, subject.interface.bind(model), subject.signature)
    if name == "torch int8":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.ao.quantization.quantize_dynamic(
                model, {nn.Linear}, dtype=torch.qint8, inplace=True
            )
        said = f"int8 ({torch.backends.quantized.engine})"
    elif name == "torch.compile":
        torch._dynamo.config.recompile_limit = 64  # every shape gets its own code
        runner.model = torch.compile(runner.model, dynamic=False)  # type: ignore[assignment]
    return (lambda _, arrays: runner.run(arrays)), said or runner.precision


def openvino_alone(path: Path, threads: int) -> tuple[Run, str]:
    """Return OpenVINO told nothing but the number of threads."""
    import openvino

    module = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_NUM_THREADS": threads})
    names = [port.any_name for port in module.outputs]
    precision = module.get_property("INFERENCE_PRECISION_HINT").get_type_name()

    def run(_: str, arrays: Mapping[str, Array]) -> dict[str, Array]:
        found = module(dict(arrays))
        return {name: found[name] for name in names}

    return run, {"bf16": "bfloat16", "f32": "float32"}.get(precision, precision)


def theirs(place: Path, threads: int, what: str) -> tuple[Run, str]:
    """Return graphs of transformers.exporters or optimum in sessions like ours.

    Of a decoder there are two, and they name the cache by attributes of its class.
    """
    from lora_export.runners.onnx import OnnxRunner

    runners = {path.stem: OnnxRunner(path, threads) for path in sorted(place.glob("*.onnx"))}
    wants = {
        stem: [port.name for port in runner.session.get_inputs()]
        for stem, runner in runners.items()
    }

    def run(phase: str, arrays: Mapping[str, Array]) -> Mapping[str, Array]:
        stem = phase if phase in runners else "model"
        return runners[stem].run({name: fed(name, arrays) for name in wants[stem]})

    return run, "int8" if "int8" in what else "float32"


def fed(name: str, arrays: Mapping[str, Array]) -> Array:
    """Return the array that another exporter's input `name` takes."""
    if found := re.search(r"past_key_values\.layers\.(\d+)\.(key|value)s$", name):
        return arrays[f"past_key_values.{found[1]}.{found[2]}"]
    if name == "position_ids":  # the rows of a decoder are full
        batch, new = arrays["input_ids"].shape
        total = arrays["attention_mask"].shape[1]
        return np.broadcast_to(np.arange(total - new, total), (batch, new)).copy()
    return arrays[name]


# ---------------------------------------------------------------- results


def summarised(samples: Sequence[Sample], opened: Sequence[Opened]) -> list[dict[str, Any]]:
    """Return one row per case and contender: medians, and the interval of the paired ratios."""
    groups: dict[tuple[Case, str], dict[int, float]] = {}
    for sample in samples:
        groups.setdefault((sample.case, sample.contender), {})[sample.round] = sample.ms
    said = {(entry.case, entry.contender): entry for entry in reversed(opened)}
    cases = list(dict.fromkeys(sample.case for sample in samples))
    found = []
    for case in cases:
        base = groups.get((case, BASE), {})
        for name in CONTENDERS:
            times = groups.get((case, name), {})
            ratios = [ms / base[turn] for turn, ms in times.items() if turn in base]
            if not ratios:
                continue
            middle, low, high = median_interval(np.asarray(ratios))
            entry = said.get((case, name))
            facts = asdict(entry) if entry else {}
            found.append({
                **{k: v for k, v in facts.items() if k != "case"}, **asdict(case),
                "label": case.label, "contender": name, "runs": len(times),
                "ms": median(times.values()), "ratio": middle, "interval": [low, high],
            })  # fmt: skip
    return found


def exports_of(exports: Sequence[Exported]) -> list[dict[str, Any]]:
    """Return one row per model and artifact: medians over the repeats."""
    groups: dict[tuple[str, str], list[Exported]] = {}
    for entry in exports:
        groups.setdefault((entry.model, entry.artifact), []).append(entry)
    return [
        {
            "model": model, "artifact": artifact, "runs": len(group),
            "seconds": median(entry.seconds for entry in group),
            "range": [min(e.seconds for e in group), max(e.seconds for e in group)],
            "peak_bytes": median(entry.peak_bytes for entry in group),
            "size_bytes": group[-1].size_bytes, "with_model": group[-1].with_model,
        }
        for (model, artifact), group in sorted(groups.items())
    ]  # fmt: skip


def left_behind(samples: Sequence[Sample]) -> dict[str, tuple[float, int]]:
    """Return for each runtime how long a turn after one of it lasts, and how many there were.

    It is the median of a turn's time over the median of the same contender at the same case; one
    where nothing is left behind.
    """
    own: dict[tuple[Case, str], list[float]] = {}
    for sample in samples:
        own.setdefault((sample.case, sample.contender), []).append(sample.ms)
    found: dict[str, list[float]] = {}
    for sample in samples:
        if sample.after != sample.contender:
            ratio = sample.ms / median(own[sample.case, sample.contender])
            found.setdefault(CONTENDERS[sample.after].runtime, []).append(ratio)
    return {runtime: (median(ratios), len(ratios)) for runtime, ratios in sorted(found.items())}


# fmt: off
def tables(bench: Bench) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Yield title, head and cells of each table."""
    rows = summarised(bench.samples, bench.opened)
    for label in dict.fromkeys(row["label"] for row in rows):
        chosen = [row for row in rows if row["label"] == label]
        spread = next((row["spread"] for row in chosen if "spread" in row), None)
        yield (
            f"{label}: medians of {max(row['runs'] for row in chosen)} rounds; the answers of "
            f"torch eager spread by {shown(spread)}",
            ["contender", "computes in", "ms", f"x {BASE}", "95 % interval", "deviation",
             "first call s", "open s", "resident MB"],
            [[
                row["contender"], row.get("precision", "-"), shown(row["ms"]),
                f"{row['ratio']:.2f}", " to ".join(f"{end:.2f}" for end in row["interval"]),
                deviation_shown(row), shown(row.get("first_s")), shown(row.get("open_s")),
                shown(row.get("resident_bytes"), 1e6),
            ] for row in chosen],
        )
    yield (
        "Exports, each in a fresh process, its imports counted: medians, and the peak of memory "
        "above the loaded model",
        ["model", "artifact", "runs", "s", "min to max", "peak MB", "files MB"],
        [[
            row["model"], row["artifact"], str(row["runs"]), shown(row["seconds"]),
            " to ".join(map(shown, row["range"])),
            shown(row["peak_bytes"], 1e6) + " with the model" * row["with_model"],
            shown(row["size_bytes"], 1e6),
        ] for row in exports_of(bench.exports)],
    )
    yield (
        "What a contender leaves behind for the next one: a turn after one of this runtime, "
        "relative to the same contender's median",
        ["after", "turns", "x"],
        [[runtime, str(count), f"{ratio:.3f}"]
         for runtime, (ratio, count) in left_behind(bench.samples).items()],
    )
# fmt: on


def deviation_shown(row: Mapping[str, Any]) -> str:
    if row["contender"] == BASE or "deviation" not in row:
        return "-"
    return "not comparable" if row["deviation"] is None else f"{row['deviation']:.1e}"


def shown(value: float | None, unit: float = 1) -> str:
    if value is None:
        return "-"
    return f"{value / unit:.0f}" if value / unit >= 100 else f"{value / unit:.3g}"


def machine(threads: int) -> dict[str, Any]:
    """Describe what it is measured on, without a path or a host name."""
    found = environment.describe(threads)
    for name in ("openvino", "onnx-ir"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found["packages"][name] = metadata.version(name)
    return found | {"memory_bytes": memory_bytes("MemTotal"), "onnxruntime_spinning": False}


def memory_bytes(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    assert found is not None
    return 1024 * int(found[1])


def command() -> str:
    """Return the command line that ran, with folders of this machine left out."""
    return environment.invoked("python", "recipes/bench_export.py")


def say(text: str) -> None:
    click.echo(text, err=True)


def lines_of(bench: Bench) -> Iterator[dict[str, Any]]:
    """Yield what was found, one object a line; "kind" says what it is."""
    yield {"kind": "about", "schema": 1, **bench.about, "not_run": bench.not_run}
    for row in summarised(bench.samples, bench.opened):
        yield {"kind": "summary", **row}
    for row in exports_of(bench.exports):
        yield {"kind": "export summary", **row}
    yield {"kind": "left behind", **left_behind(bench.samples)}
    for kind, entries in (("opened", bench.opened), ("export", bench.exports),
                          ("sample", bench.samples)):  # fmt: skip
        yield from ({"kind": kind, **asdict(entry)} for entry in entries)


def write(out: Path, bench: Bench) -> None:
    """Write what was found so far: every sample, tables to read, and a plot."""
    out.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines_of(bench))
    (out / "bench_export.jsonl").write_text(text)
    (out / "bench_export.md").write_text(page(bench))
    plot(bench, out / "bench_export.png")


def page(bench: Bench) -> str:
    """Return the results in Markdown."""
    host = bench.about["machine"]
    versions = [f"{name} {version}" for name, version in host["packages"].items() if version]
    if with_it := bench.about.get("optimum_with"):
        versions.append(f"optimum-onnx {with_it['optimum-onnx']} on transformers "
                        f"{with_it['transformers']}")  # fmt: skip
    blocks = [
        "# Exported models beside each other",
        f"    {bench.about['command']}",
        f"{host['processor']} ({', '.join(host['instruction_sets'])}), {host['cores']} cores, "
        f"{host['threads']} threads for every contender, {shown(host['memory_bytes'], 1e9)} GB of "
        f"memory, load average {host['load_average']} before the first run, {host['system']}, "
        f"Python {host['python']}, {', '.join(versions)}.",
        "Every contender in a process of its own, one at a time, in shuffled rounds; a ratio is "
        "the median over the rounds of its time to torch eager's, below 1 where it is faster, with "
        "a bootstrap interval. OMP_WAIT_POLICY=PASSIVE, onnxruntime without spinning. Deviation: "
        "the largest from what torch eager answers in float32 to random tokens, padding left out; "
        "random weights, those of all models but minilm, say little of what int8 costs. Opening "
        "includes imports. Resident memory counts mapped files.",
    ]
    for title, head, cells in tables(bench):
        if cells:
            grid = [head, ["---"] * len(head), *cells]
            blocks += [f"{title}:", "\n".join(f"| {' | '.join(line)} |" for line in grid)]
    blocks += [f"Not run: {line}." for line in bench.not_run]
    return "\n\n".join(blocks) + "\n"


def show(bench: Bench) -> None:
    console = Console()
    console.width = max(console.width, 140)  # a number is never cut
    for title, head, cells in tables(bench):
        table = Table(*head, title=title, title_justify="left", box=None)
        for row in cells:
            table.add_row(*row)
        if cells:
            console.print(table, "")
    for line in bench.not_run:
        console.print(f"not run: {line}")


def plot(bench: Bench, path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        say("no plot: matplotlib is missing; install lora-export[recipes]")
        return
    rows = summarised(bench.samples, bench.opened)
    labels = list(dict.fromkeys(row["label"] for row in rows))
    exports = exports_of(bench.exports)
    panels = len(labels) + bool(exports)
    if not panels:
        return
    figure = Figure(figsize=(9, panels * 4.2), layout="constrained")
    axes = figure.subplots(panels, 1, squeeze=False)[:, 0]
    for label, area in zip(labels, axes, strict=False):
        chosen = [row for row in rows if row["label"] == label]
        ratios = [row["ratio"] for row in chosen]
        ends = [[row["ratio"] - row["interval"][0], row["interval"][1] - row["ratio"]]
                for row in chosen]  # fmt: skip
        names = [f"{row['contender']} ({row.get('precision', '?')})" for row in chosen]
        bars = area.barh(names, ratios, xerr=np.maximum(np.transpose(ends), 0), color="tab:blue")
        area.bar_label(bars, [f"{shown(row['ms'])} ms" for row in chosen], padding=4, fontsize=7)
        area.axvline(1, color="0.6", linewidth=0.8)
        area.set(title=f"{label}: time relative to torch eager")
    if exports:
        names = [f"{row['model']}, {row['artifact']}" for row in exports]
        bars = axes[-1].barh(names, [row["seconds"] for row in exports], color="tab:orange")
        peaks = [f"{shown(row['peak_bytes'], 1e6)} MB above the model" for row in exports]
        axes[-1].bar_label(bars, peaks, padding=4, fontsize=7)
        axes[-1].set(title="seconds of an export")
    for area in axes:
        area.tick_params(labelsize=8)
        area.invert_yaxis()
        area.margins(x=0.2)
    figure.savefig(path, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
