"""A harness for runs of `lora-export merge` that are killed, stopped, or run out of disk.

A run is a process of its own. Where it has to stop at a certain place, a prelude of a few lines
replaces one function of it, and the command line comes after.
"""

import contextlib
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import on_disk
from blake3 import blake3

from lora_export import publishing

HEAD = "from lora_export import publishing, storage, streaming; import os, signal, time\n"
TAIL = "\nfrom lora_export.cli import main; main()"
# Waits after each tensor, so that a signal comes in the middle.
SLOW = """
note = streaming._Stream._note
def slow(self, task, step):
    note(self, task, step)
    print("one", flush=True)
    time.sleep(0.1)
streaming._Stream._note = slow
"""


def died_at(place, call, before=True):
    """A prelude: the function `place` kills its process in the given call of it."""
    return f"""
import itertools
real, calls = {place}, itertools.count(1)
def killing(*args, **kwargs):
    mine = next(calls) == {call}
    if mine and {before}:
        os.kill(os.getpid(), signal.SIGKILL)
    found = real(*args, **kwargs)
    if mine:
        os.kill(os.getpid(), signal.SIGKILL)
    return found
{place} = killing
"""


def base(folder, layers=4, width=64, seed=0, shards=1, rows=2, **companions):
    """Write a base with `layers` layers of two matrices of (`rows` width, width); return it."""
    dice = np.random.default_rng((seed, width))
    names = ["model.embed_tokens.weight"]
    for index in range(layers):
        attention = f"model.layers.{index}.self_attn"
        names += [f"{attention}.q_proj.weight", f"{attention}.k_proj.weight"]
    tensors = {
        name: dice.standard_normal((rows * width, width), dtype=np.float32).astype(on_disk.BF16)
        for name in names
    }
    config = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": layers}
    on_disk.base_folder(folder, tensors, model_type="llama", **config)
    if shards > 1:
        (folder / "model.safetensors").unlink()
        files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
        held = {name: files[i * shards // len(names)] for i, name in enumerate(names)}
        for file in files:
            on_disk.save(folder / file, {n: tensors[n] for n in names if held[n] == file})
        index = {"metadata": {}, "weight_map": held}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name, text in companions.items():
        (folder / f"{name}.json").write_text(text)
    return folder


def adapter(folder, layers=4, width=64, seed=0, rows=2, **config):
    """Write an adapter for every q_proj of such a base; return it."""
    pairs = {
        f"model.layers.{index}.self_attn.q_proj": on_disk.pair(
            rows * width, width, rank=2, seed=seed + 2 * index
        )
        for index in range(layers)
    }
    config = {"target_modules": ["q_proj"], **config}
    return on_disk.peft_folder(folder, on_disk.keyed(pairs), **config)


def tree(path):
    """Digests of all files below `path` by name; None where there is nothing."""
    if not os.path.lexists(path):
        return None
    if path.is_file():
        return {"": blake3(path.read_bytes()).hexdigest()}
    return {
        str(file.relative_to(path)): blake3(file.read_bytes()).hexdigest()
        if file.is_file()
        else "folder"
        for file in sorted(path.rglob("*"))
    }


def beside(out):
    """What lies beside an output but for what its name says, leftovers of runs above all."""
    return sorted(path.name for path in out.parent.iterdir() if path != out)


def started(adapter, base, out, *options, prelude=""):
    """Start a run; its output is read from pipes."""
    words = ["merge", "--adapter", adapter, "--base", base, "--out", out, "--quiet", *options]
    program = ["-c", HEAD + prelude + TAIL] if prelude else ["-m", "lora_export"]
    return subprocess.Popen(
        [sys.executable, *program, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )


def ran(*arguments, prelude="", timeout=60):
    """Run to the end; return the exit code and what was written to stderr."""
    with started(*arguments, prelude=prelude) as process:
        _, errors = process.communicate(timeout=timeout)
    return process.returncode, errors


# ---------------------------------------------------------------- killed while it publishes

PLACES = (
    "os.rename", "os.replace", "os.mkdir", "os.open", "os.fsync", "os.unlink", "os.rmdir",
    "io.open", "publishing._exchange", "publishing._publish", "publishing._remove",
)  # fmt: skip
NAMES = {"os": os, "io": io, "signal": signal, "publishing": publishing}


def write(out, kind, text):
    """Write a file, a graph with its data, or a folder."""
    if kind == "folder":
        out.mkdir()
        (out / "one").write_text(text)
    else:
        out.write_text(text)
    if kind == "graph":
        out.with_name(out.name + ".data").write_text(text)


def shown(out):
    """What stands under the names that `write` writes to."""
    return tree(out), tree(out.with_name(out.name + ".data"))


def publish(out, kind, overwrite, prelude):
    """Publish in a process of its own; return its exit code."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    exec(prelude, dict(NAMES))
    with publishing.staged(out, overwrite=overwrite) as file:
        write(file, kind, "new")
    os._exit(0)


def kills(folder, kind, exchange, is_old):
    """Kill a publish at every call that changes the disk; return how often it was killed."""
    if not exchange:
        publishing._exchange = lambda *_: False
    write(folder / "reference", kind, "new")
    after, count, work = shown(folder / "reference"), 0, folder / "work"
    for name, before in itertools.product(PLACES, (True, False)):
        for call in itertools.count(1):
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            out = work / "out"
            if is_old:
                write(out, kind, "old")
            earlier = shown(out)
            code = publish(out, kind, is_old, died_at(name, call, before))
            if code == 0:
                break
            assert code == -signal.SIGKILL, (name, call, code)
            count += 1
            at_once = kind == "file" or (kind == "folder" and (exchange or not is_old))
            assert not at_once or shown(out) in (earlier, after), (name, call)
            look(out, earlier, after, (name, call, before))
    return count


def look(out, earlier, after, where):
    """Look at what a kill left, and at what the next run makes of it."""
    with contextlib.suppress(ZeroDivisionError), publishing.staged(out, overwrite=True) as file:
        assert shown(out) in (earlier, after), where
        assert not list(file.parent.iterdir()), where
        _ = 1 / 0
    assert shown(out) in (earlier, after), where
    assert {path.name for path in out.parent.iterdir()} <= {"out", "out.data"}, where


if __name__ == "__main__":
    count = kills(Path(sys.argv[1]), sys.argv[2], *(word == "yes" for word in sys.argv[3:]))
    sys.stdout.write(f"{count}\n")
