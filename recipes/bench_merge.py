"""Time `lora-export merge` beside `cp -r`, PEFT and mergekit. Copy it and change it.

    python recipes/bench_merge.py --size 0.5 --size 2 --busy

Needs Linux and the extra `test` (peft, matplotlib). The checkpoints are made here: a Llama's shapes
and names, random weights, no download, with two adapters of rank 16 (all linear layers; q_proj and
v_proj). For every size, rounds of all tools in shuffled order, every run a process of its own:

    cp -r          what moving the bytes costs; the unit of the ratios, taken round by round
    cp -r + fsync  the same, and on the disk when it ends, as a merge of ours is
    lora-export    the command; the parts of its work as its certificate states them
    peft           merge_and_unload and save_pretrained in bfloat16, where it fits into memory
    mergekit       its LoRA merge, where --mergekit-python names an interpreter that has it

"Wall" is the whole process, "work" leaves out the imports. The base is read into the page cache
before every run; with --cold there is a second set of runs before which it is dropped from there.
Where the file system clones files (Btrfs, XFS), `cp -r` copies nothing, and a ratio says little.

Writes bench_merge.json (every sample), bench_merge.md and bench_merge.png into --out.
"""

import contextlib
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from lora_export import environment

Size = tuple[int, ...]  # of a tensor

RANK, ALPHA, STD = 16, 32, 0.02
TARGETS = {
    "all": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "qv": ("q_proj", "v_proj"),
}
COPIES = ("cp -r", "cp -r + fsync")
OURS = "lora-export"
THEIRS = ("peft", "mergekit")
PARTS = ("merge", "streaming", "sync", "audit")  # names of measurements in a certificate, seconds
MARK = "bench.json"  # beside a checkpoint: that it is complete, and what it is
REHEARSAL_GB = 0.01
RESERVE = 1.2  # free disk for one output, in checkpoints
FITS = 2.5  # memory that PEFT gets, in checkpoints
BLOCK = 4_194_301  # random numbers drawn; a prime, so that no two rows of a weight are the same

# A process reports at least the peak memory of the one that started it. So a small one stands
# between this one and what is measured; `peak_floor_bytes` says how small.
LAUNCH = """
import json, os, sys, time
started = time.perf_counter()
child = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ)
_, status, used = os.wait4(child, 0)
wall = time.perf_counter() - started
print(file=sys.stderr)
print(json.dumps({
    "exit_code": os.waitstatus_to_exitcode(status),
    "seconds": {"wall": wall, "user": used.ru_utime, "system": used.ru_stime},
    "peak_rss_bytes": used.ru_maxrss * 1024,
    "disk_read_bytes": used.ru_inblock * 512,
}), file=sys.stderr)
"""
COPY_AND_SYNC = 'cp -r "$1" "$2" && find "$2" -exec sync {} +'
SPIN = """
import os
owner = os.getppid()
while os.getppid() == owner:
    sum(range(100_000))
"""
PEFT = """
import json, sys, time
started = time.perf_counter()
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM
imported = time.perf_counter()
base, adapter, out = sys.argv[1:]
model = LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
done = time.perf_counter()
print(json.dumps({"import": imported - started, "work": done - imported}))
"""
MERGEKIT = """
import json, sys, time
started = time.perf_counter()
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from transformers import LlamaForCausalLM
imported = time.perf_counter()
base, adapter, out = sys.argv[1:]
wanted = {"merge_method": "passthrough", "dtype": "bfloat16"}
wanted["models"] = [{"model": base + "+" + adapter}]
run_merge(
    MergeConfiguration.model_validate(wanted), out,
    MergeOptions(lora_merge_cache=out + "-cache", lora_merge_dtype="bfloat16", quiet=True,
                 copy_tokenizer=False, write_model_card=False),
)
done = time.perf_counter()
print(json.dumps({"import": imported - started, "work": done - imported}))
"""
VERSIONS = """
import json
from importlib import metadata
print(json.dumps({name: metadata.version(name) for name in
                  ("mergekit", "torch", "transformers", "peft")}))
"""


@dataclass(frozen=True)
class Shape:
    """A Llama in numbers: enough to write its config and to name every tensor."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int

    def linears(self) -> dict[str, tuple[int, int]]:
        """Return name and shape (out, in) of the linear layers of one decoder layer."""
        narrow = self.hidden * self.kv_heads // self.heads
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (narrow, self.hidden),
            "self_attn.v_proj": (narrow, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }

    def tensors(self) -> dict[str, Size]:
        """Return name and shape of every tensor of the checkpoint, in its order."""
        found: dict[str, Size] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        for index in range(self.layers):
            layer = f"model.layers.{index}"
            found[f"{layer}.input_layernorm.weight"] = (self.hidden,)
            found |= {f"{layer}.{name}.weight": size for name, size in self.linears().items()}
            found[f"{layer}.post_attention_layernorm.weight"] = (self.hidden,)
        found["model.norm.weight"] = (self.hidden,)
        found["lm_head.weight"] = (self.vocabulary, self.hidden)
        return found

    def config(self) -> dict[str, Any]:
        """Return the content of config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "intermediate_size": self.intermediate,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 2048,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }


# 2 is the shape of TinyLlama-1.1B, 14 that of Llama-2-7B.
SHAPES = {
    0.1: Shape(512, 6, 1408, 8, 2, 32000),
    0.5: Shape(1024, 16, 2816, 16, 4, 32000),
    2.0: Shape(2048, 22, 5632, 32, 4, 32000),
    7.0: Shape(3072, 32, 8192, 24, 8, 32000),
    14.0: Shape(4096, 32, 11008, 32, 32, 32000),
}
TINY = Shape(256, 1, 704, 8, 2, 2048)


@dataclass(frozen=True)
class Case:
    """What is run: one bar of the plot."""

    tool: str
    adapter: str = ""
    cache: str = "warm"
    busy: bool = False

    @property
    def label(self) -> str:
        """What tells it from the others, for people."""
        more = (self.adapter, "cold" * (self.cache == "cold"), "one core busy" * self.busy)
        return ", ".join(filter(None, (self.tool, *more)))


@dataclass(frozen=True)
class Sample:
    """One run.

    `seconds` holds wall, user and system; work, where the tool states it (of cp that is wall); and
    what else it states of itself.
    """

    size_gb: float
    case: Case
    round: int
    seconds: dict[str, float]
    peak_rss_bytes: int
    disk_read_bytes: int
    load_average: float


@dataclass
class Bench:
    """What all runs share, and what they have found so far."""

    cases: list[Case]
    mergekit: str | None
    seed: int
    about: dict[str, Any]
    samples: list[Sample] = field(default_factory=list)
    not_run: list[str] = field(default_factory=list)


# fmt: off
FOLDER = click.Path(file_okay=False, path_type=Path)
PROGRAM = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@click.option("--size", "sizes", type=click.FloatRange(0.001), multiple=True, default=(0.5, 2.0),
              show_default=True, help="GB (1e9 bytes) of a checkpoint; repeatable.")
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True,
              help="Rounds per size.")
@click.option("--tool", "tools", type=click.Choice((OURS, *THEIRS)), multiple=True,
              default=(OURS, *THEIRS), show_default=True, help="Beside cp; repeatable.")
@click.option("--adapter", "adapters", type=click.Choice(tuple(TARGETS)), multiple=True,
              default=tuple(TARGETS), show_default=True, help="What it changes; repeatable.")
@click.option("--cold", is_flag=True, help="Also with the base dropped from the page cache.")
@click.option("--busy", is_flag=True, help="Also ours while another process keeps a core busy.")
@click.option("--mergekit-python", type=PROGRAM, help="Interpreter that can import mergekit.")
@click.option("--shard", type=click.FloatRange(0, min_open=True), default=1.0, show_default=True,
              help="GB that one file of a checkpoint holds at most.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of weights and orders.")
@click.option("--rehearse/--no-rehearse", default=True, show_default=True,
              help="Run every tool once on a tiny checkpoint first, uncounted.")
@click.option("--work", type=FOLDER,
              help="Where checkpoints and outputs lie; complete checkpoints are used again. "
                   "Default: a new folder in ./artifacts.")
@click.option("--keep", is_flag=True, help="Leave the checkpoints in --work.")
@click.option("--out", type=FOLDER, default=Path("artifacts/bench"), show_default=True,
              help="Where the results are written.")
def main(
    sizes: tuple[float, ...], repeats: int, tools: tuple[str, ...], adapters: tuple[str, ...],
    cold: bool, busy: bool, mergekit_python: Path | None, shard: float, seed: int, rehearse: bool,
    work: Path | None, keep: bool, out: Path,
) -> None:
    """Time lora-export merge beside cp -r, PEFT and mergekit."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # clean up, as after Ctrl-C
    made = work is None or not work.exists()
    (work or Path("artifacts")).mkdir(parents=True, exist_ok=True)
    place = work or Path(tempfile.mkdtemp(prefix="bench-", dir="artifacts"))
    # Not resolved: an environment is found by the name of its interpreter, which is a link.
    mergekit = str(mergekit_python.absolute()) if mergekit_python else None
    about: dict[str, Any] = {"command": command(), "machine": machine(place, mergekit)}
    about["peak_floor_bytes"] = measured(["true"], place)[0]["peak_rss_bytes"]
    about["checkpoints"] = []
    bench = Bench(cases_of(tools, adapters, cold=cold, busy=busy), mergekit, seed, about)
    try:
        leave_out_the_missing(bench)
        if rehearse:
            with checkpoint(bench, place, REHEARSAL_GB, shard, keep=keep) as folder:
                rehearsal(bench, folder)
        for size in dict.fromkeys(sizes):
            with checkpoint(bench, place, size, shard, keep=keep) as folder:
                about["checkpoints"].append(json.loads((folder / MARK).read_text()))
                run_size(bench, folder, size, repeats)
            write(out, bench)
    finally:
        if made:
            with contextlib.suppress(OSError):
                place.rmdir()  # not empty: what was kept
    show(bench)
# fmt: on


def cases_of(
    tools: tuple[str, ...], adapters: tuple[str, ...], *, cold: bool, busy: bool
) -> list[Case]:
    found = []
    for cache in ("warm", "cold")[: 1 + cold]:
        found += [Case(tool, cache=cache) for tool in COPIES]
        found += [Case(tool, adapter, cache) for tool in tools for adapter in adapters]
    if busy and OURS in tools:
        found += [Case(OURS, adapter, busy=True) for adapter in adapters]
    return list(dict.fromkeys(found))


# ---------------------------------------------------------------- checkpoints


def shape_of(size: float) -> Shape:
    """Return the named shape, or the widths of the next smaller one and layers to fill `size` GB.

    Below the smallest named one the widths are tiny.
    """
    if size in SHAPES:
        return SHAPES[size]
    shape = SHAPES.get(max((named for named in SHAPES if named < size), default=0), TINY)
    one, two = (bytes_of(replace(shape, layers=layers)) for layers in (1, 2))
    return replace(shape, layers=max(1, 1 + round((size * 1e9 - one) / (two - one))))


def bytes_of(shape: Shape) -> int:
    return 2 * sum(map(prod, shape.tensors().values()))


@contextlib.contextmanager
def checkpoint(
    bench: Bench, place: Path, size: float, shard: float, *, keep: bool
) -> Iterator[Path]:
    """Give a folder with `base`, the adapters and a description of both; remove it after."""
    shape, folder = shape_of(size), place / f"bench-{size:g}GB"
    aside = place / f"{folder.name}.making"
    wanted: dict[str, Any] = {
        "size_gb": size, "bytes": bytes_of(shape), "shape": asdict(shape), "rank": RANK,
        "seed": bench.seed, "shard_gb": shard,
    }  # fmt: skip
    shutil.rmtree(folder / "out", ignore_errors=True)  # of a run that was killed
    complete = is_complete(folder, wanted)
    if not complete:
        discard(folder)
    # mergekit writes PEFT's merge first, and then its own.
    checkpoints = RESERVE + (not complete) + any(case.tool == "mergekit" for case in bench.cases)
    needed, free = checkpoints * bytes_of(shape), shutil.disk_usage(place).free
    if free < needed:
        raise click.ClickException(
            f"{size:g} GB need {needed / 1e9:.1f} GB of disk, and {free / 1e9:.1f} GB are free; "
            "choose another --work or a smaller --size"
        )
    try:
        if not complete:
            say(f"making a checkpoint of {bytes_of(shape) / 1e9:.2f} GB")
            shutil.rmtree(aside, ignore_errors=True)
            make(aside, shape, bench.seed, int(shard * 1e9))
            wanted["files"] = sizes_in(aside)
            (aside / MARK).write_text(json.dumps(wanted) + "\n")
            os.sync()
            aside.rename(folder)
        yield folder
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if not keep:
            discard(folder)


def is_complete(folder: Path, wanted: dict[str, Any]) -> bool:
    if not (folder / MARK).is_file():
        return False
    found = json.loads((folder / MARK).read_text())
    present = sizes_in(folder)
    del present[MARK]
    return bool(found == wanted | {"files": present})


def discard(folder: Path) -> None:
    """Remove a folder that this recipe made, and no other."""
    if folder.exists() and not (folder / MARK).is_file():
        raise click.ClickException(f"{folder} was not made by this recipe; choose another --work")
    shutil.rmtree(folder, ignore_errors=True)


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def sizes_in(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_size for path in files_in(folder)}


def make(folder: Path, shape: Shape, seed: int, shard_bytes: int) -> None:
    """Write `base`, and an adapter in PEFT's layout for each of `TARGETS`. No model is built."""
    import ml_dtypes
    import numpy as np

    dice = np.random.default_rng(seed)
    noise = STD * dice.standard_normal(BLOCK, dtype=np.float32)
    block = noise.astype(ml_dtypes.bfloat16)

    def weight(size: Size) -> Iterator[bytes]:
        """Yield the block over and over, from a place in it that the dice choose."""
        if len(size) == 1:  # a norm's weights lie around one
            yield (1 + noise[: size[0]]).astype(ml_dtypes.bfloat16).tobytes()
            return
        start, left = int(dice.integers(BLOCK)), prod(size)
        while left:
            piece = block[start : start + left]
            yield piece.tobytes()
            start, left = 0, left - len(piece)

    def factor(size: Size) -> Iterator[bytes]:
        yield (STD * dice.standard_normal(size, dtype=np.float32)).tobytes()

    (folder / "base").mkdir(parents=True)
    write_json(folder / "base" / "config.json", shape.config())
    shards = cut(shape.tensors(), shard_bytes)
    names = [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    else:
        where = {tensor: name for name, held in zip(names, shards, strict=True) for tensor in held}
        index = {"metadata": {"total_size": bytes_of(shape)}, "weight_map": where}
        write_json(folder / "base" / "model.safetensors.index.json", index)
    for name, held in zip(names, shards, strict=True):
        write_tensors(folder / "base" / name, held, "BF16", weight)
    for adapter, targets in TARGETS.items():
        (folder / adapter).mkdir()
        write_json(folder / adapter / "adapter_config.json", adapter_config(targets))
        file = folder / adapter / "adapter_model.safetensors"
        write_tensors(file, factors(shape, targets), "F32", factor)


def factors(shape: Shape, targets: tuple[str, ...]) -> dict[str, Size]:
    """Return names, as PEFT gives them, and shapes of A (rank, in) and B (out, rank)."""
    found: dict[str, Size] = {}
    for index in range(shape.layers):
        for name, (rows, columns) in shape.linears().items():
            if name.rpartition(".")[2] in targets:
                module = f"base_model.model.model.layers.{index}.{name}"
                found[f"{module}.lora_A.weight"] = (RANK, columns)
                found[f"{module}.lora_B.weight"] = (rows, RANK)
    return found


def adapter_config(targets: tuple[str, ...]) -> dict[str, Any]:
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA,
        "target_modules": list(targets), "lora_dropout": 0.0, "bias": "none",
        "fan_in_fan_out": False, "inference_mode": True, "base_model_name_or_path": None,
    }  # fmt: skip


def cut(tensors: dict[str, Size], shard_bytes: int) -> list[dict[str, Size]]:
    """Cut into shards of at most `shard_bytes` each, in order; a larger tensor gets its own."""
    shards: list[dict[str, Size]] = [{}]
    room = shard_bytes
    for name, size in tensors.items():
        if shards[-1] and 2 * prod(size) > room:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = size
        room -= 2 * prod(size)
    return shards


def write_tensors(
    path: Path, tensors: dict[str, Size], dtype: str, data: Callable[[Size], Iterable[bytes]]
) -> None:
    """Write one safetensors file: a length, a header in JSON, and the bytes of tensor by tensor."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, size in tensors.items():
        start, end = end, end + prod(size) * {"BF16": 2, "F32": 4}[dtype]
        entries[name] = {"dtype": dtype, "shape": size, "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data is aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for size in tensors.values():
            file.writelines(data(size))


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


# ---------------------------------------------------------------- runs


def leave_out_the_missing(bench: Bench) -> None:
    for tool, python in (("peft", sys.executable), ("mergekit", bench.mergekit)):
        if not any(case.tool == tool for case in bench.cases):
            continue
        if python is None:
            leave_out(bench, tool, "no --mergekit-python was given")
        elif measured([python, "-c", f"import {tool}"], Path.cwd())[0]["exit_code"]:
            leave_out(bench, tool, "cannot be imported")


def leave_out(bench: Bench, tool: str, why: str) -> None:
    bench.cases = [case for case in bench.cases if case.tool != tool]
    bench.not_run.append(f"{tool}: {why}")
    say(f"not run: {bench.not_run[-1]}")


def rehearsal(bench: Bench, folder: Path) -> None:
    """Run every tool once: one that fails is left out, and what they import lies in memory."""
    say("rehearsal")
    for case in {case.tool: case for case in reversed(bench.cases)}.values():
        found = run(bench, case, folder, REHEARSAL_GB, 0)
        if isinstance(found, str):
            leave_out(bench, case.tool, found)


def run_size(bench: Bench, folder: Path, size: float, repeats: int) -> None:
    cases = list(bench.cases)
    if memory_bytes() < FITS * bytes_of(shape_of(size)):
        tools = sorted({case.tool for case in cases} & set(THEIRS))
        why = f"at {size:g} GB: the machine has less than {FITS:g} times that in memory"
        bench.not_run += [f"{tool} {why}" for tool in tools]
        cases = [case for case in cases if case.tool not in THEIRS]
    for turn in range(1, repeats + 1):
        random.Random(f"{bench.seed} {size} {turn}").shuffle(cases)
        for case in list(cases):
            if case not in cases:
                continue
            found = run(bench, case, folder, size, turn)
            if isinstance(found, str):
                bench.not_run.append(f"{case.tool} at {size:g} GB, from round {turn}: {found}")
                cases = [other for other in cases if other.tool != case.tool]
                continue
            bench.samples.append(found)
            times = [f"{name} {found.seconds[name]:.2f} s" for name in ("wall", "work")
                     if name in found.seconds]  # fmt: skip
            say(f"{size:g} GB, round {turn} of {repeats}: {case.label}: {', '.join(times)}")


def run(bench: Bench, case: Case, folder: Path, size: float, turn: int) -> Sample | str:
    """Run once and clean up; where another's tool fails, return how.

    Raises:
        click.ClickException: cp or lora-export failed, or wrote too little.
    """
    out, load = folder / "out", os.getloadavg()[0]
    out.mkdir()
    try:
        inputs = files_in(folder / "base")
        if case.adapter:
            inputs += files_in(folder / case.adapter)
        (warm_up if case.cache == "warm" else drop)(inputs)
        with spinning() if case.busy else contextlib.nullcontext():
            used, stdout, stderr = measured(words(case, bench.mergekit), folder)
        written = sum(file.stat().st_size for file in out.glob("merged/*.safetensors"))
    finally:
        shutil.rmtree(out)
        os.sync()  # so that no run waits for what another one wrote
    failure = ""
    if used["exit_code"]:
        failure = f"ended with {used['exit_code']}"
    elif written < bytes_of(shape_of(size)):
        failure = f"wrote {written} bytes of weights"
    if failure:
        say(stderr.strip()[-2000:] or stdout)
        if case.tool in THEIRS:
            return failure
        raise click.ClickException(f"{case.label}: {failure}")
    seconds = used["seconds"] | stated_by(case.tool, stdout)
    if case.tool in COPIES:
        seconds["work"] = seconds["wall"]
    peak, read = used["peak_rss_bytes"], used["disk_read_bytes"]
    return Sample(size, case, turn, seconds, peak, read, load)


def words(case: Case, mergekit: str | None) -> list[str]:
    """Return the command line of a case, for the folder that holds base and adapters."""
    base, out = "base", "out/merged"
    if case.tool == COPIES[0]:
        return ["cp", "-r", base, out]
    if case.tool == COPIES[1]:
        return ["sh", "-c", COPY_AND_SYNC, "sh", base, out]
    if case.tool == "peft":
        return [sys.executable, "-c", PEFT, base, case.adapter, out]
    if case.tool == "mergekit":
        return [str(mergekit), "-c", MERGEKIT, base, case.adapter, out]
    program = Path(sys.executable).with_name(OURS)
    start = [str(program)] if program.is_file() else [sys.executable, "-m", "lora_export"]
    options = ["--adapter", case.adapter, "--base", base, "--out", out, "--json", "--quiet"]
    return [*start, "merge", *options]


def stated_by(tool: str, stdout: str) -> dict[str, float]:
    """Return the seconds that a tool states about itself: ours in its certificate."""
    if tool in THEIRS:
        return dict(json.loads(stdout.splitlines()[-1]))
    if tool != OURS:
        return {}
    found = {
        entry["name"]: entry["value"]
        for entry in json.loads(stdout)["measurements"]
        if entry["name"] in PARTS and entry["unit"] == "s"
    }
    return found | ({"work": found[PARTS[0]]} if PARTS[0] in found else {})


def measured(command: list[str], folder: Path) -> tuple[dict[str, Any], str, str]:
    """Run `command` in `folder` to its end. Return what it used, its stdout and its stderr."""
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", LAUNCH, *command],
        cwd=folder, env=os.environ | {"HF_HUB_OFFLINE": "1"}, text=True, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        stdout, stderr = child.communicate()
    except BaseException:
        os.killpg(child.pid, signal.SIGKILL)  # the launcher and what it launched
        child.wait()
        raise
    talk, _, report = stderr.rstrip().rpartition("\n")
    if child.returncode:
        raise click.ClickException(f"cannot start {command[0]}: {report}")
    return json.loads(report), stdout, talk


@contextlib.contextmanager
def spinning() -> Iterator[None]:
    """Keep one core busy meanwhile."""
    child = subprocess.Popen([sys.executable, "-I", "-S", "-c", SPIN])
    try:
        yield
    finally:
        child.kill()
        child.wait()


def warm_up(files: list[Path]) -> None:
    buffer = bytearray(1 << 22)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def drop(files: list[Path]) -> None:
    """Take files out of the page cache; what lies below this kernel may still hold them."""
    os.sync()  # only what is on the disk can be dropped
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# ---------------------------------------------------------------- results


def summarised(samples: list[Sample]) -> list[dict[str, Any]]:
    """Return one row per size and case: medians, and medians of the ratios of each round."""
    groups: dict[tuple[float, Case], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.size_gb, sample.case), []).append(sample)
    found = []
    for (size, case), group in sorted(groups.items(), key=lambda item: order_of(*item[0])):
        seconds = {name: median(values) for name, values in collected(group).items()}
        works = collected(group).get("work")
        row = {
            "size_gb": size, "bytes": bytes_of(shape_of(size)), **asdict(case),
            "label": case.label, "runs": len(group), "seconds": seconds,
            "work_range": [min(works), max(works)] if works else None,
            "bytes_per_s": bytes_of(shape_of(size)) / seconds["work"] if works else None,
            "peak_rss_bytes": max(sample.peak_rss_bytes for sample in group),
            "disk_read_bytes": median(sample.disk_read_bytes for sample in group),
        }  # fmt: skip
        for name, tool in zip(("to_cp", "to_cp_fsync"), COPIES, strict=True):
            copies = groups.get((size, Case(tool, cache=case.cache)), [])
            walls = {copy.round: copy.seconds["wall"] for copy in copies}
            paired = [sample for sample in group if sample.round in walls]
            ratios = collected(paired, {turn: 1 / wall for turn, wall in walls.items()})
            row[name] = {part: median(values) for part, values in ratios.items()}
        if case.busy:
            idle = collected(groups.get((size, replace(case, busy=False)), []))
            row["slowdown"] = {
                part: seconds[part] / median(idle[part]) for part in ("work", "wall")
                if part in seconds and part in idle
            }  # fmt: skip
        found.append(row)
    return found


def collected(
    samples: list[Sample], weights: dict[int, float] | None = None
) -> dict[str, list[float]]:
    """Return the values of each kind of seconds, times the weight of their round."""
    found: dict[str, list[float]] = {}
    for sample in samples:
        for name, value in sample.seconds.items():
            found.setdefault(name, []).append(value * (weights[sample.round] if weights else 1))
    return found


def order_of(size: float, case: Case) -> tuple[Any, ...]:
    tools = (*COPIES, OURS, *THEIRS)
    return size, case.cache == "cold", case.busy, tools.index(case.tool), case.adapter


# fmt: off
def tables(rows: list[dict[str, Any]]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Yield title, head and cells of each table."""
    idle = [row for row in rows if not row["busy"]]
    own = [row for row in idle if row["tool"] == OURS]
    yield (
        "Medians; a ratio is the median over the rounds of work to the wall time of cp",
        ["GB", "tool", "adapter", "cache", "runs", "work s", "min to max", "wall s", "process s",
         "disk MB", "peak MB", "GB/s", "x cp -r", "x cp -r + fsync"],
        [[
            shown(row["bytes"], 1e9), row["tool"], row["adapter"] or "-", row["cache"],
            str(row["runs"]), shown(row["seconds"].get("work")),
            " to ".join(map(shown, row["work_range"] or [None])), shown(row["seconds"]["wall"]),
            shown(process_seconds(row)),
            shown(row["disk_read_bytes"], 1e6), shown(row["peak_rss_bytes"], 1e6),
            shown(row["bytes_per_s"], 1e9),
            shown(row["to_cp"].get("work")), shown(row["to_cp_fsync"].get("work")),
        ] for row in idle],
    )
    yield (
        "Parts of lora-export's work, from its certificate",
        ["GB", "adapter", "cache", "part", "s", "x cp -r", "x cp -r + fsync"],
        [[
            shown(row["bytes"], 1e9), row["adapter"], row["cache"], part,
            shown(row["seconds"][part]), shown(row["to_cp"].get(part)),
            shown(row["to_cp_fsync"].get(part)),
        ] for row in own for part in PARTS if part in row["seconds"]],
    )
    ours = {(row["bytes"], row["adapter"], row["cache"]): row for row in own}
    yield (
        "Process time (user and system) of the others, against lora-export's",
        ["GB", "tool", "adapter", "cache", "process s", "x lora-export"],
        [[
            shown(row["bytes"], 1e9), row["tool"], row["adapter"], row["cache"],
            shown(process_seconds(row)), shown(process_seconds(row) / process_seconds(mine)),
        ] for row in idle if row["tool"] in THEIRS
            and (mine := ours.get((row["bytes"], row["adapter"], row["cache"])))],
    )
    yield (
        "lora-export while another process keeps one core busy, against idle",
        ["GB", "adapter", "work s", "slowdown", "wall s", "slowdown of wall"],
        [[
            shown(row["bytes"], 1e9), row["adapter"],
            shown(row["seconds"].get("work")), shown(row["slowdown"].get("work")),
            shown(row["seconds"]["wall"]), shown(row["slowdown"].get("wall")),
        ] for row in rows if row["busy"]],
    )
# fmt: on


def process_seconds(row: dict[str, Any]) -> float:
    return float(row["seconds"]["user"] + row["seconds"]["system"])


def shown(value: float | None, unit: float = 1) -> str:
    if value is None:
        return "-"
    return f"{value / unit:.0f}" if value / unit >= 100 else f"{value / unit:.3g}"


def machine(place: Path, mergekit: str | None) -> dict[str, Any]:
    """Describe what it is measured on, without a path or a host name."""
    found = environment.describe(threads=0)
    del found["threads"]  # every tool's own choice
    with contextlib.suppress(metadata.PackageNotFoundError):
        found["packages"]["peft"] = metadata.version("peft")
    if mergekit:
        asked = subprocess.run([mergekit, "-c", VERSIONS], capture_output=True, text=True)
        found["mergekit_with"] = json.loads(asked.stdout) if not asked.returncode else None
    copy = subprocess.run(["cp", "--version"], capture_output=True, text=True)
    return found | {
        "memory_bytes": memory_bytes(),
        "kernel": platform.release(),
        "file_system": file_system(place.resolve()),
        "cp": copy.stdout.partition("\n")[0],
    }


def memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def file_system(path: Path) -> str:
    """Return the type of the file system that holds `path`."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    # The deepest mount point counts, and of several in one place the last.
    holding = [(len(at), n, kind) for n, (_, at, kind, *_) in enumerate(mounts)
               if path.is_relative_to(at)]  # fmt: skip
    return max(holding)[2]


def command() -> str:
    """Return the command line that ran, with folders of this machine left out."""
    return environment.invoked("python", "recipes/bench_merge.py")


def say(text: str) -> None:
    click.echo(text, err=True)


def write(out: Path, bench: Bench) -> None:
    """Write what was found so far: every sample, tables to read, and a plot."""
    rows = summarised(bench.samples)
    out.mkdir(parents=True, exist_ok=True)
    found = {"schema": 1, **bench.about, "not_run": bench.not_run, "summary": rows}
    found["samples"] = [asdict(sample) for sample in bench.samples]
    (out / "bench_merge.json").write_text(json.dumps(found, indent=1) + "\n")
    host = bench.about["machine"]
    versions = [f"{name} {version}" for name, version in host["packages"].items() if version]
    if host.get("mergekit_with"):
        versions.append("mergekit " + host["mergekit_with"]["mergekit"])
    blocks = [
        "# Merging beside copying",
        f"    {bench.about['command']}",
        f"{host['processor']}, {host['cores']} cores, {shown(host['memory_bytes'], 1e9)} GB of "
        f"memory, {host['file_system']}, {host['system']} {host['kernel']}, {host['cp']}, Python "
        f"{host['python']}, {', '.join(versions)}.",
        f"Adapters: float32, rank {RANK}; all: on every linear layer of the decoder layers; qv: on "
        "q_proj and v_proj. Warm: the base was read into the page cache before every run. Cold: it "
        "was dropped from there before every run; what lies below the kernel may still hold it. "
        "Disk: what was read from there. Work is without imports. It includes getting the output "
        "onto the disk for lora-export and cp -r + fsync; the others end when the kernel has it. "
        "Peak memory counts mapped files too, and cannot read less than "
        f"{shown(bench.about['peak_floor_bytes'], 1e6)} MB.",
    ]
    for title, head, cells in tables(rows):
        if cells:
            grid = [head, ["---"] * len(head), *cells]
            blocks += [f"{title}:", "\n".join(f"| {' | '.join(line)} |" for line in grid)]
    blocks += [f"Not run: {line}." for line in bench.not_run]
    (out / "bench_merge.md").write_text("\n\n".join(blocks) + "\n")
    plot(rows, out / "bench_merge.png")


def show(bench: Bench) -> None:
    console = Console()
    console.width = max(console.width, 140)  # a number is never cut
    for title, head, cells in tables(summarised(bench.samples)):
        table = Table(*head, title=title, title_justify="left", box=None)
        for row in cells:
            table.add_row(*row)
        if cells:
            console.print(table, "")
    for line in bench.not_run:
        console.print(f"not run: {line}")


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        say("no plot: matplotlib is missing; install lora-export[recipes]")
        return
    labels = list(dict.fromkeys(row["label"] for row in rows))
    sizes = sorted({(row["size_gb"], row["bytes"]) for row in rows})
    height, thick = 1.2 + 0.18 * len(labels) * (1 + len(sizes)), 0.8 / len(sizes)
    figure = Figure(figsize=(11, height), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for number, (size, size_bytes) in enumerate(sizes):
        chosen = [row for row in rows if row["size_gb"] == size]
        shift = (number - (len(sizes) - 1) / 2) * thick
        at = [labels.index(row["label"]) + shift for row in chosen]
        ratios = [row["to_cp"].get("work", 0) for row in chosen]
        works = [f"{shown(row['seconds']['work'])} s" if "work" in row["seconds"] else "not stated"
                 for row in chosen]  # fmt: skip
        peaks = [row["peak_rss_bytes"] / 1e6 for row in chosen]
        name = f"{shown(size_bytes, 1e9)} GB"
        bars = left.barh(at, ratios, thick, label=name)
        left.bar_label(bars, works, padding=2, fontsize=7)
        bars = right.barh(at, peaks, thick)
        right.bar_label(bars, [shown(peak) for peak in peaks], padding=2, fontsize=7)
    left.axvline(1, color="0.6", linewidth=0.8)
    left.set(title="work, relative to cp -r", yticks=range(len(labels)), yticklabels=labels)
    left.invert_yaxis()
    left.legend(fontsize=8)
    right.set(title="peak resident memory, MB")
    for axes in (left, right):
        axes.margins(x=0.15)
    figure.savefig(path, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
