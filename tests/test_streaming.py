"""A plan is carried out in one pass: the same bytes however it is read, written and shared out."""

import errno
import json
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import on_disk
import pytest
import torch
import transformers
from on_disk import delta, factors, numbers

from lora_export import arithmetic, blocks, merged_files, storage, streaming
from lora_export.errors import InputError
from lora_export.plan import COPY, MERGE, PLACE, MergePlan, Part, Step
from lora_export.records import Adapter
from lora_export.storage import Checkpoint

MERGED = [f"layers.{i}.weight" for i in range(6)]
LONG_AGO = 10**18  # a time of writing that no other one equals


def base_of(folder):
    """Three shards with tensors of every kind, and one that the model does not need."""
    folder.mkdir()
    shards = [
        {name: numbers(40, 33, seed=i) / np.float32(3) for i, name in enumerate(MERGED[:4])},
        {
            "embed": numbers(300, 50),
            MERGED[4]: numbers(70, 64, seed=4),
            "count": np.arange(7),
            "scalar": np.float32(3.5),
            "nothing": numbers(0, 4),
            "dropped": numbers(90, 10, seed=9),
        },
        {
            MERGED[5]: numbers(9, 8, seed=5),
            "half": numbers(5, 5, dtype=on_disk.BF16),
            "flags": np.array([True, False]),
            "dropped as well": numbers(3, seed=1),
        },
    ]
    weight_map = {}
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05}-of-00003.safetensors"
        on_disk.save(folder / name, tensors, {"format": "pt"})
        os.utime(folder / name, ns=(LONG_AGO, LONG_AGO))
        weight_map |= dict.fromkeys(tensors, name)
    (folder / storage.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return Checkpoint.open(folder)


class Job:
    """A base, an adapter and a plan; what to expect of every tensor."""

    def __init__(self, folder):
        self.folder, self.checkpoint = folder, base_of(folder / "base")
        pairs = {
            name: factors(*self.checkpoint.tensors[name].shape, seed=i, scale=2 / 3)
            for i, name in enumerate(MERGED)
        }
        head = numbers(4, 50, seed=7)
        self.adapter = Adapter(pairs, {"head": head}, "lora")
        steps, self.expected = [], {}
        for info in self.checkpoint.tensors.values():
            if "dropped" in info.name:
                continue
            parts = (Part(info.name),) if info.name in MERGED else ()
            kind = MERGE if parts else COPY
            where = (info.file.name, info.dtype, info.shape, info.name)
            steps.append(Step(kind, info.name, *where, parts=parts))
            self.expected[info.name] = info.read()
            if parts:
                exact = info.array().astype(np.float64) + delta(pairs[info.name])[0]
                self.expected[info.name] = exact.astype(np.float32).tobytes()
        # one of the base's tensors under two names, and one that is copied and merged
        embed, layer = self.checkpoint.tensors["embed"], self.checkpoint.tensors[MERGED[4]]
        for name, info in (("tied", embed), ("as it was", layer)):
            steps.append(
                Step(COPY, name, self.checkpoint.shards[1], info.dtype, info.shape, info.name)
            )
            self.expected[name] = info.read()
        last = self.checkpoint.shards[-1]
        steps.append(Step(PLACE, "head", last, "F32", head.shape, None, "head"))
        self.expected["head"] = head.tobytes()
        dropped = dict.fromkeys(("dropped", "dropped as well"), "not needed")
        self.plan = MergePlan("", tuple(steps), dropped, {}, "lora", ())

    def write(self, name="out", shard_bytes=None, **options):
        out = self.folder / name
        out.mkdir()
        files = blocks.layout(self.plan, self.checkpoint, shard_bytes)
        return streaming.write(self.plan, self.adapter, self.checkpoint, files, out, **options)

    def check(self, written, name="out"):
        """The tensors are those expected, and the digests those of the files."""
        out = self.folder / name
        found = {}
        for file in out.iterdir():
            tensors, _ = storage.read_header(file)
            found |= {key: info.read() for key, info in tensors.items()}
        assert found.keys() == self.expected.keys()
        assert [key for key in found if found[key] != self.expected[key]] == []
        assert written.files == storage.digest_tree(out)
        assert written.base == tuple(
            file for file in storage.digest_tree(self.checkpoint.root) if "index" not in file.name
        )
        assert written.tensors.keys() == found.keys()
        return {file.name: file.read_bytes() for file in out.iterdir()}


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path)


def handles():
    return len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").is_dir() else 0


# ---------------------------------------------------------------- the same bytes


def test_every_tensor_and_every_digest_is_as_expected(job):
    written = job.write()
    job.check(written)
    assert written.seconds.keys() == {"streaming", "sync"}


@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_the_number_of_workers_changes_no_byte(job, count, monkeypatch):
    plain = job.check(job.write())
    monkeypatch.setattr(streaming, "cores", lambda: count)
    assert job.check(job.write("again"), "again") == plain


@pytest.mark.parametrize("size", [1, 64, 1000, 2**22])
def test_the_size_of_a_block_changes_no_byte(job, size, monkeypatch):
    plain = job.check(job.write())
    monkeypatch.setattr(blocks, "BLOCK_BYTES", size)
    monkeypatch.setattr(streaming, "BLOCK_BYTES", size)
    assert job.check(job.write("again"), "again") == plain


@pytest.mark.parametrize("most", [300, 10_000, 10**9])
def test_the_shards_that_are_asked_for_hold_the_same_tensors(job, most):
    written = job.write(shard_bytes=most)
    job.check(written)


def refusing(number):
    def copy(*args):
        raise OSError(number, os.strerror(number))

    return copy


@pytest.mark.parametrize("number", ["EXDEV", "EINVAL", "ENOSYS", "EOPNOTSUPP", "EPERM"])
def test_where_the_kernel_does_not_copy_we_do(job, number, monkeypatch):
    monkeypatch.setattr(os, "copy_file_range", refusing(getattr(errno, number)), raising=False)
    job.check(job.write())


def test_so_we_do_where_there_is_no_such_call(job, monkeypatch):
    monkeypatch.delattr(os, "copy_file_range", raising=False)
    job.check(job.write())


def test_so_we_do_where_it_copies_nothing(job, monkeypatch):
    monkeypatch.setattr(os, "copy_file_range", lambda *args: 0, raising=False)
    job.check(job.write())


@pytest.mark.skipif(not hasattr(os, "copy_file_range"), reason="no such call here")
@pytest.mark.parametrize("then", [0, 1000, errno.EXDEV])
def test_the_kernel_may_copy_a_part_and_leave_the_rest(job, then, monkeypatch):
    """It copies 1000 bytes at a time, or those of the first call only."""
    real, seen = os.copy_file_range, set()

    def copy(source, target, count, start, offset):
        if (source, start - offset) in seen and then != 1000:
            return 0 if then == 0 else refusing(then)()
        seen.add((source, start - offset))
        return real(source, target, min(count, 1000), start, offset)

    monkeypatch.setattr(os, "copy_file_range", copy)
    job.check(job.write())


@pytest.mark.parametrize("number", ["EIO", "ENOSPC"])
def test_an_error_of_the_disk_is_no_reason_to_copy_by_hand(job, number, monkeypatch):
    monkeypatch.setattr(os, "copy_file_range", refusing(getattr(errno, number)), raising=False)
    with pytest.raises(OSError, match=os.strerror(getattr(errno, number))):
        job.write()


@pytest.mark.parametrize("most", [1000, 77])
def test_the_system_may_read_and_write_less_than_it_was_asked(job, most, monkeypatch):
    read, write = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda f, to, at: read(f, [memoryview(to[0])[:most]], at))
    monkeypatch.setattr(os, "pwrite", lambda f, data, at: write(f, data[:most], at))
    monkeypatch.delattr(os, "copy_file_range", raising=False)
    job.check(job.write())


def test_without_a_call_that_reserves_room_it_goes_on(job, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", refusing(errno.EOPNOTSUPP), raising=False)
    job.check(job.write())


def test_every_file_is_synced_whole(job, monkeypatch):
    """After its last byte was written."""
    sizes, real = {}, os.fsync

    def sync(handle):
        sizes[Path(f"/proc/self/fd/{handle}").readlink().name] = writes.count(handle)
        real(handle)

    writes, write = [], os.pwrite
    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "pwrite", lambda f, *rest: (write(f, *rest), writes.append(f))[0])
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("no way to see which file a handle is of")
    written = job.write()
    assert sizes.keys() == {file.name for file in written.files}
    assert sum(sizes.values()) == len(writes)


# ---------------------------------------------------------------- what is nearly nothing


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (), (1,)])
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_a_file_with_one_tensor_of_any_size(tmp_path, shape, dtype):
    base = on_disk.bases(tmp_path / "base", {"t": numbers(*shape)})
    step = Step(COPY, "t", storage.SINGLE, dtype, shape, "t")
    plan, seen = MergePlan("", (step,), {}, {}, "lora", ()), []
    files = blocks.layout(plan, base)
    (tmp_path / "out").mkdir()
    written = streaming.write(
        plan,
        Adapter({}, {}, "lora"),
        base,
        files,
        tmp_path / "out",
        advance=lambda *at: seen.append(at),
    )
    assert written.files == storage.digest_tree(tmp_path / "out")
    found = Checkpoint.open(tmp_path / "out").tensors["t"]
    assert (found.dtype, found.shape) == (dtype, shape)
    assert found.array().tobytes() == numbers(*shape).tobytes()
    assert seen[-1] == (files[0].size, files[0].size)


def test_a_plan_that_drops_all_of_a_shard_hashes_it_all_the_same(job):
    steps = tuple(step for step in job.plan.steps if step.shard != job.checkpoint.shards[0])
    gone = dict.fromkeys(MERGED[:4], "not needed")
    job.plan = MergePlan("", steps, {**job.plan.dropped, **gone}, {}, "lora", ())
    for name in gone:
        del job.expected[name]
    written = job.write()
    job.check(written)
    assert len(written.base) == 3
    assert len(written.files) == 2


def test_what_lay_in_the_folder_before_is_written_over(job):
    """A longer file would keep its end."""
    out = job.folder / "out"
    out.mkdir()
    for shard in job.checkpoint.shards:
        (out / shard).write_bytes(b"x" * 10**6)
    files = blocks.layout(job.plan, job.checkpoint)
    job.check(streaming.write(job.plan, job.adapter, job.checkpoint, files, out))


# ---------------------------------------------------------------- progress


@pytest.mark.parametrize("count", [1, 7])
def test_progress_only_grows_and_ends_with_all(job, count, monkeypatch):
    monkeypatch.setattr(streaming, "cores", lambda: count)
    seen = []
    written = job.write(advance=lambda done, total: seen.append((done, total)))
    total = sum(file.size_bytes for file in written.files)
    assert {known for _, known in seen} == {total}
    done = [at for at, _ in seen]
    assert done == sorted(done)
    assert done[-1] == total == max(done)
    assert len(seen) >= len(job.plan.steps)


# ---------------------------------------------------------------- a base that does not hold still


def during(job, act):
    """Return an `advance` that does `act` once, when a quarter of the bytes is written."""
    waiting = [act]

    def advance(done, total):
        if done > total / 4 and waiting:
            waiting.pop()()

    return advance


@pytest.mark.parametrize("shard", [0, 1, 2])
def test_a_base_that_is_written_to_while_it_is_read_is_an_error(job, shard):
    file = job.checkpoint.root / job.checkpoint.shards[shard]

    def change():
        with file.open("r+b") as stream:
            stream.seek(-1, os.SEEK_END)
            stream.write(b"\x01")

    with pytest.raises(InputError, match="changed while it was read"):
        job.write(advance=during(job, change))


@pytest.mark.parametrize("shard", [0, 1, 2])
@pytest.mark.parametrize("copies", ["by the kernel", "by hand"])
def test_a_base_that_shrinks_while_it_is_read_is_an_error(job, shard, copies, monkeypatch):
    if copies == "by hand":
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    file = job.checkpoint.root / job.checkpoint.shards[shard]
    with pytest.raises(InputError, match=r"changed while it was read|became shorter"):
        job.write(advance=during(job, lambda: os.truncate(file, file.stat().st_size - 11)))


def test_a_base_that_grows_while_it_is_read_is_an_error(job):
    file = job.checkpoint.root / job.checkpoint.shards[0]
    with pytest.raises(InputError, match="changed while it was read"):
        job.write(advance=during(job, lambda: os.truncate(file, file.stat().st_size + 8)))


@pytest.mark.parametrize("shard", [0, 1, 2])
def test_a_base_that_shrank_before_it_was_read_is_an_error(job, shard):
    """After its headers were read: the last tensor of two shards is one that is dropped."""
    file = job.checkpoint.root / job.checkpoint.shards[shard]
    os.truncate(file, file.stat().st_size - 4)
    with pytest.raises(InputError, match=r"changed while it was read"):
        job.write()


def with_longer_header(file):
    """Rewrite a shard: the same tensors, 8 bytes further on. Readers see no difference."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    head, rest = data[8 : 8 + length], data[8 + length :]
    new = file.with_name("new")
    new.write_bytes((length + 8).to_bytes(8, "little") + head + b" " * 8 + rest)
    new.replace(file)


def test_a_base_that_was_replaced_after_its_headers_were_read_is_an_error(job):
    with_longer_header(job.checkpoint.root / job.checkpoint.shards[0])
    with pytest.raises(InputError):
        job.write()


@pytest.mark.parametrize("how", ["replaced", "removed"])
def test_a_base_that_is_replaced_while_it_is_read_is_an_error(job, how):
    file = job.checkpoint.root / job.checkpoint.shards[0]
    act = file.unlink if how == "removed" else lambda: with_longer_header(file)
    with pytest.raises(InputError):
        job.write(advance=during(job, act))


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("count", [1, 2, 7])
def test_an_error_in_one_worker_stops_all_and_is_raised(job, count, monkeypatch):
    monkeypatch.setattr(streaming, "cores", lambda: count)
    real, begun = blocks.computed, []

    def computed(step, *rest):
        begun.append(step.name)
        if len(begun) == 3:
            raise ZeroDivisionError("the third")
        time.sleep(0.005)
        return real(step, *rest)

    monkeypatch.setattr(blocks, "computed", computed)
    before = threading.active_count(), handles()
    with pytest.raises(ZeroDivisionError, match="the third"):
        job.write()
    assert len(begun) <= 3 + count
    assert (threading.active_count(), handles()) == before


def test_a_tensor_that_overflows_stops_the_run_and_is_named(job):
    pair = job.adapter.modules[MERGED[2]]
    pair.b[5] = 3e38
    with pytest.raises(
        InputError, match=rf"{MERGED[2]}: \d+ of 1320 merged weights are not finite"
    ):
        job.write()


@pytest.mark.parametrize("error", [KeyboardInterrupt, InputError("stop")])
def test_an_interruption_from_outside_ends_the_run(job, error):
    def interrupt():
        raise error

    before = threading.active_count(), handles()
    with pytest.raises(type(error) if isinstance(error, Exception) else error):
        job.write(advance=during(job, interrupt))
    assert (threading.active_count(), handles()) == before


def test_a_disk_that_cannot_sync_is_an_error(job, monkeypatch):
    monkeypatch.setattr(os, "fsync", refusing(errno.EIO))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        job.write()


def test_a_disk_without_room_is_found_out_before_anything_is_written(job, monkeypatch):
    monkeypatch.setattr(
        streaming.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})
    )
    with pytest.raises(InputError, match=r"the output needs .* GB, and its disk has .* GB free"):
        job.write()
    assert not list((job.folder / "out").iterdir())


# ---------------------------------------------------------------- memory

PEAK = """
import re, sys
from pathlib import Path
from lora_export import blocks, streaming
from lora_export.plan import COPY, MERGE, MergePlan, Part, Step
from lora_export.records import Adapter, Factors
from lora_export.storage import Checkpoint
import numpy as np

folder, dtype = Path(sys.argv[1]), sys.argv[2]
base = Checkpoint.open(folder)
pairs, steps = {}, []
dice = np.random.default_rng(0)
for n, info in enumerate(base.tensors.values()):
    out, width = info.shape
    parts = ()
    if n % 4:
        a, b = dice.normal(size=(8, width)), dice.normal(size=(out, 8))
        pairs[info.name] = Factors(a.astype(np.float32), b.astype(np.float32), 8, 1.0)
        parts = (Part(info.name),)
    kind = MERGE if parts else COPY
    steps.append(Step(kind, info.name, info.file.name, dtype, info.shape, info.name, parts=parts))
plan = MergePlan("", tuple(steps), {}, {}, "lora", ())
(folder / "out").mkdir()
streaming.write(plan, Adapter(pairs, {}, "lora"), base, blocks.layout(plan, base), folder / "out")
adapter = sum(p.a.nbytes + p.b.nbytes for p in pairs.values())
peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
print(peak, adapter)
"""


def peak_of(folder, count, shape, dtype):
    """Peak memory of a merge into `count` tensors, in a process of its own, less the adapter's."""
    folder.mkdir()
    entries = storage.header_entries([(f"t{i}", "BF16", shape) for i in range(count)])
    head = storage.header_bytes(entries, {"format": "pt"})
    (folder / storage.SINGLE).write_bytes(head)
    os.truncate(folder / storage.SINGLE, len(head) + count * 2 * math.prod(shape))  # all zeros
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(folder), dtype],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    peak, adapter = map(int, done.stdout.split())
    return peak - adapter


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from /proc")
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_memory_does_not_grow_with_the_checkpoint(tmp_path, dtype):
    """100 MB and 400 MB: of more tensors, and of larger ones, whose factors are larger too."""
    small = peak_of(tmp_path / "small", 25, (2048, 1024), dtype)
    many = peak_of(tmp_path / "many", 100, (2048, 1024), dtype)
    assert many < 1.1 * small, (small, many)
    large = peak_of(tmp_path / "large", 4, (4096, 12288), dtype)
    assert large < small + 20e6, (small, large)


# ---------------------------------------------------------------- whole models


def written_bits(exact, dtype):
    """Float64 rounded once, to nearest, ties to even: the bits, with no cast that rounds."""
    bits, least = {"bfloat16": (7, -126), "float16": (10, -14)}[dtype]
    spacing = np.ldexp(1.0, np.maximum(np.frexp(exact)[1] - 1, least) - bits)
    value = np.rint(exact / spacing) * spacing
    if dtype == "float16":
        return value.astype(np.float16).view(np.uint16)
    return (value.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


@pytest.fixture(scope="module", params=["bfloat16", "float16"])
def llama(request, tmp_path_factory):
    """A Llama of 60 million weights in two bytes each, a LoRA on all its linears, the merge."""
    folder = tmp_path_factory.mktemp(request.param)
    config = transformers.LlamaConfig(
        vocab_size=32_000, hidden_size=512, intermediate_size=1376, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).to(getattr(torch, request.param))
    linears = [n for n, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)]
    sizes = {name: model.get_submodule(name).weight.shape for name in linears}
    model.save_pretrained(folder / "base", max_shard_size="40MB")
    dice, pairs = np.random.default_rng(1), {}
    for name, (out, width) in sizes.items():
        a, b = dice.normal(size=(16, width)) / width**0.5, dice.normal(size=(out, 16)) * 0.02
        pairs[name] = (a.astype(np.float32), b.astype(np.float32))
    on_disk.peft_folder(folder / "adapter", on_disk.keyed(pairs), r=16, lora_alpha=20)
    certificate = merged_files.merge_files(
        folder / "adapter", base=str(folder / "base"), out=folder / "merged", full_audit=True
    )
    return folder, request.param, pairs, certificate


@pytest.mark.slow
def test_no_weight_of_a_whole_model_is_rounded_wrongly(llama):
    folder, dtype, pairs, certificate = llama
    assert certificate.ok
    base, found = (Checkpoint.open(folder / name).tensors for name in ("base", "merged"))
    assert base.keys() == found.keys()
    assert len(Checkpoint.open(folder / "base").shards) > 1
    looked_at = moved = 0
    for name, info in base.items():
        held = np.frombuffer(found[name].read(), np.uint16).reshape(info.shape)
        before = np.frombuffer(info.read(), np.uint16).reshape(info.shape)
        pair = pairs.get(name.removesuffix(".weight"))
        expected = before
        if pair is not None:
            a, b = (side.astype(np.float64) for side in pair)
            expected = written_bits(info.array().astype(np.float64) + 20 / 16 * (b @ a), dtype)
            moved += int((held != before).sum())
        assert int((held != expected).sum()) == 0, name
        looked_at += held.size
    assert looked_at > 50e6
    assert moved > 20e6


@pytest.mark.slow
def test_a_whole_model_has_the_same_bytes_without_the_kernel_and_with_other_blocks(
    llama, monkeypatch
):
    folder = llama[0]
    monkeypatch.setattr(arithmetic, "kernel", None)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 2**20 + 12345)
    monkeypatch.setattr(streaming, "cores", lambda: 3)
    monkeypatch.delattr(os, "copy_file_range", raising=False)
    merged_files.merge_files(folder / "adapter", base=str(folder / "base"), out=folder / "again")
    for name, info in Checkpoint.open(folder / "merged").tensors.items():
        assert Checkpoint.open(folder / "again").tensors[name].read() == info.read(), name
