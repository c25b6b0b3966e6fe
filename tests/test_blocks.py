"""What a plan makes of each tensor: files, blocks of rows, and what becomes of a block.

Plans are made by hand here. What is expected is computed from whole tensors in float64, by the
formulas of the papers.
"""

import dataclasses
import gc
import json
import math

import ml_dtypes
import numpy as np
import on_disk
import pytest
from on_disk import factors, numbers

from lora_export import blocks, storage, streaming
from lora_export.errors import InputError
from lora_export.plan import BIAS, COPY, MERGE, PLACE, ROWS, MergePlan, Part, Step
from lora_export.records import CONV, EMBEDDING, EXPERTS, Adapter, Factors, Rows
from lora_export.storage import Checkpoint

BF16 = np.dtype(ml_dtypes.bfloat16)
KINDS = {"BF16": BF16, "F16": np.dtype("<f2"), "F32": np.dtype("<f4"), "F64": np.dtype("<f8")}


def plan_of(*steps, variant="lora", dropped=()):
    return MergePlan("", tuple(steps), dict.fromkeys(dropped, "not needed"), {}, variant, ())


def copies(checkpoint, **changes):
    """A step for each tensor of the base, in file order; `changes` to each of them."""
    order = sorted(checkpoint.tensors.values(), key=lambda t: (t.file.name, t.start))
    return [
        dataclasses.replace(Step(COPY, i.name, i.file.name, i.dtype, i.shape, i.name), **changes)
        for i in order
    ]


def sharded(folder, *shards, metadata=None):
    """Write a base in shards, and open it."""
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        on_disk.save(folder / name, tensors, {"format": "pt"} if metadata is None else metadata)
        weight_map |= dict.fromkeys(tensors, name)
    (folder / storage.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return Checkpoint.open(folder)


# ---------------------------------------------------------------- layout


@pytest.fixture
def two_shards(tmp_path):
    return sharded(
        tmp_path / "base",
        {"b": numbers(4, 4), "a": numbers(3), "n": np.array([5])},
        {"z": numbers(2, 2, dtype=BF16), "y": numbers(0, 4)},
        metadata={"format": "pt", "made": "by hand"},
    )


def test_the_files_are_the_bases_own(two_shards):
    files = blocks.layout(plan_of(*copies(two_shards)), two_shards)
    assert tuple(file.name for file in files) == two_shards.shards
    for file in files:
        own = two_shards.root / file.name
        assert file.header == storage.raw_header(own)
        assert file.size == own.stat().st_size
        for step, offset in file.places:
            assert offset == two_shards.tensors[step.name].start
    assert [step.name for step, _ in files[0].places] == ["b", "a", "n"]


@pytest.mark.parametrize("spaces", [0, 3, 800])
def test_a_header_written_by_another_tool_is_kept_byte_for_byte(tmp_path, spaces):
    """Other spaces, another order of keys, other padding; the same tensors."""
    base = on_disk.bases(tmp_path, {"b": numbers(4, 4), "a": numbers(3)})
    entries = {
        "a": {"shape": [3], "data_offsets": [64, 76], "dtype": "F32"},
        "b": {"data_offsets": [0, 64], "dtype": "F32", "shape": [4, 4]},
        "__metadata__": {"format": "pt"},
    }
    text = json.dumps(entries, indent=1).encode() + b" " * spaces
    data = (tmp_path / storage.SINGLE).read_bytes()[-76:]
    head = len(text).to_bytes(8, "little") + text
    (tmp_path / storage.SINGLE).write_bytes(head + data)
    base = Checkpoint.open(tmp_path)
    (file,) = blocks.layout(plan_of(*copies(base)), base)
    assert file.header == head
    assert [offset for _, offset in file.places] == [base.tensors[n].start for n in "ba"]
    assert file.size == len(head) + 76


@pytest.mark.parametrize(
    "change", [{"dtype": "BF16"}, {"shape": (2, 2)}, {"name": "other"}], ids=lambda c: next(iter(c))
)
def test_a_file_with_another_tensor_gets_a_header_of_its_own(two_shards, change):
    steps = copies(two_shards)
    steps[0] = dataclasses.replace(steps[0], **change)
    first, second = blocks.layout(plan_of(*steps), two_shards)
    assert first.header != storage.raw_header(two_shards.root / first.name)
    assert second.header == storage.raw_header(two_shards.root / second.name)
    found = json.loads(first.header[8:])
    assert found.pop("__metadata__") == {"format": "pt", "made": "by hand"}
    assert list(found) == [step.name for step, _ in first.places]
    assert len(first.header) % 8 == 0
    for step, offset in first.places:
        start, end = found[step.name]["data_offsets"]
        assert (offset, end - start) == (len(first.header) + start, step.size)
    assert first.size == len(first.header) + sum(step.size for step, _ in first.places)


def test_a_base_without_metadata_gets_the_format_that_readers_ask_for(tmp_path):
    base = sharded(tmp_path, {"a": numbers(3)}, metadata={})
    (file,) = blocks.layout(plan_of(*copies(base)), base)
    assert json.loads(file.header[8:])["__metadata__"] == {"format": "pt"}


def test_a_shard_of_which_nothing_is_left_is_not_written(two_shards):
    steps = [step for step in copies(two_shards) if step.name in "zy"]
    (file,) = blocks.layout(plan_of(*steps, dropped="ban"), two_shards)
    assert file.name == two_shards.shards[1]


def test_shards_are_packed_in_order_and_as_full_as_they_go(tmp_path):
    sizes = [3, 4, 2, 9, 1, 1, 20, 5, 5]
    base = on_disk.bases(tmp_path, {f"t{i}": numbers(n) for i, n in enumerate(sizes)})
    files = blocks.layout(plan_of(*copies(base)), base, 40)
    held = [[int(step.name[1:]) for step, _ in file.places] for file in files]
    assert held == [[0, 1, 2], [3, 4], [5], [6], [7, 8]]
    assert [file.name for file in files] == [
        f"model-{i:05d}-of-00005.safetensors" for i in range(1, 6)
    ]
    for file in files:
        assert sum(step.size for step, _ in file.places) <= 40 or len(file.places) == 1
        assert json.loads(file.header[8:])["__metadata__"] == {"format": "pt"}


@pytest.mark.parametrize(("most", "count"), [(1, 3), (12, 3), (23, 3), (24, 2), (36, 1), (99, 1)])
def test_a_limit_is_reached_and_not_passed(tmp_path, most, count):
    base = on_disk.bases(tmp_path, {name: numbers(3) for name in "abc"})
    files = blocks.layout(plan_of(*copies(base)), base, most)
    assert len(files) == count
    if count == 1:
        assert [file.name for file in files] == [storage.SINGLE]
        assert files[0].header != storage.raw_header(tmp_path / storage.SINGLE)  # no metadata there
    else:
        assert all(f"-of-{count:05d}" in file.name for file in files)


@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_tensor_beyond_the_limit_gets_a_shard_of_its_own(tmp_path, position):
    sizes = [2, 2]
    sizes.insert(position, 50)
    base = on_disk.bases(tmp_path, {f"t{i}": numbers(n) for i, n in enumerate(sizes)})
    files = blocks.layout(plan_of(*copies(base)), base, 16)
    (large,) = [file for file in files if any(step.size > 16 for step, _ in file.places)]
    assert len(large.places) == 1
    assert sorted(s.name for f in files for s, _ in f.places) == ["t0", "t1", "t2"]


def test_one_shard_of_a_sharded_base_is_a_single_file(two_shards):
    (file,) = blocks.layout(plan_of(*copies(two_shards)), two_shards, 10**9)
    assert file.name == storage.SINGLE
    assert [step.name for step, _ in file.places] == ["b", "a", "n", "z", "y"]
    assert json.loads(file.header[8:])["__metadata__"]["made"] == "by hand"


# ---------------------------------------------------------------- every kind of update

NAME = "w"


@dataclasses.dataclass
class Case:
    """One tensor of a base and what is to become of it."""

    base: np.ndarray  # float64, held by every dtype
    parts: tuple
    adapter: Adapter
    expected: np.ndarray | None  # float64
    is_whole: bool = False
    start: np.ndarray | None = None  # in place of `expected`: what training began with
    update: np.ndarray | None = None

    def step(self, dtype):
        return Step(MERGE, NAME, storage.SINGLE, dtype, self.base.shape, NAME, parts=self.parts)


def weights(*shape):
    """Numbers that every float dtype holds."""
    return np.random.default_rng(shape).integers(-127, 128, shape) / 64


def pair_of(out, width, **changes):
    """Factors with a scale that no float holds, so that every sum has to be rounded."""
    return factors(out, width, **{"scale": 2 / 3, **changes})


def adapted(variant="lora", rows=None, **modules):
    return Adapter(modules, {}, variant, rows=rows or {})


def update_of(pair, expert=0):
    """Scale B diag(d) A of one expert, (out, in)."""
    if pair.kind == EXPERTS:
        a, b = pair.a[expert], pair.b[expert]
    else:
        a, b = pair.a.reshape(pair.rank, -1), pair.b.reshape(-1, pair.rank)
    d = np.ones(pair.rank) if pair.diagonal is None else pair.diagonal.astype(np.float64)
    return pair.scale * (b.astype(np.float64) @ (d[:, None] * a.astype(np.float64)))


def dora(weight, pair):
    """m (W + dW) / ||W + dW||, all of them (out, in)."""
    total = weight + update_of(pair)
    magnitude, length = pair.magnitude.astype(np.float64), np.linalg.norm(total, axis=1)
    return (magnitude / length)[:, None] * total


def plain():
    base, pair = weights(24, 20), pair_of(24, 20)
    return Case(base, (Part("m"),), adapted(m=pair), base + update_of(pair))


def wide():
    """Tiles, and what is left over beside them."""
    base, pair = weights(50, 77), pair_of(50, 77, rank=5)
    return Case(base, (Part("m"),), adapted(m=pair), base + update_of(pair))


def transposed():
    base, pair = weights(45, 33), pair_of(33, 45, rank=3)
    return Case(base, (Part("m", transposed=True),), adapted(m=pair), base + update_of(pair).T)


def embedding():
    base, pair = weights(40, 6), pair_of(6, 40, kind=EMBEDDING)
    return Case(base, (Part("m", transposed=True),), adapted(m=pair), base + update_of(pair).T)


def diagonal():
    base, pair = weights(24, 20), pair_of(24, 20, rank=3, diagonal=numbers(3, seed=8))
    return Case(base, (Part("m"),), adapted("kasa-like", m=pair), base + update_of(pair))


def experts_of(count, out, width):
    return Factors(
        numbers(count, 2, width), numbers(count, out, 2, seed=1), 4.0, 2 / 3, kind=EXPERTS
    )


def experts():
    base, pair = weights(3, 10, 8), experts_of(3, 10, 8)
    exact = base + np.stack([update_of(pair, e) for e in range(3)])
    return Case(base, (Part("m"),), adapted(m=pair), exact)


def experts_transposed():
    base, pair = weights(3, 8, 10), experts_of(3, 10, 8)
    exact = base + np.stack([update_of(pair, e).T for e in range(3)])
    return Case(base, (Part("m", transposed=True),), adapted(m=pair), exact)


def one_expert_stored_alone():
    base, pair = weights(10, 8), experts_of(3, 10, 8)
    part = Part("m", experts=(1, 2), outs=(0, 10), box=((0, 1), (0, 10), (0, 8)))
    return Case(base, (part,), adapted(m=pair), base + update_of(pair, 1))


def two_of_five_experts():
    base, pair = weights(5, 10, 8), experts_of(4, 10, 8)
    part = Part("m", experts=(1, 3), outs=(2, 6), box=((3, 5), (5, 9), (0, 8)))
    exact = base.copy()
    exact[3, 5:9] += update_of(pair, 1)[2:6]
    exact[4, 5:9] += update_of(pair, 2)[2:6]
    return Case(base, (part,), adapted(m=pair), exact)


def fused_rows():
    """Query and value in one tensor; the key between them is left alone."""
    base, q, v = weights(30, 20), pair_of(12, 20, rank=3), pair_of(10, 20, seed=5)
    exact = base.copy()
    exact[:12] += update_of(q)
    exact[20:] += update_of(v)
    parts = (
        Part("v", outs=(0, 10), box=((0, 1), (20, 30), (0, 20))),
        Part("q", outs=(0, 12), box=((0, 1), (0, 12), (0, 20))),
    )
    return Case(base, parts, adapted(q=q, v=v), exact)


def fused_columns():
    """The same, stored as (in, out)."""
    base, q, v = weights(20, 90), pair_of(40, 20, rank=3), pair_of(33, 20, seed=5)
    exact = base.copy()
    exact[:, :40] += update_of(q).T
    exact[:, 57:] += update_of(v).T
    parts = (
        Part("q", transposed=True, outs=(0, 40), box=((0, 1), (0, 20), (0, 40))),
        Part("v", transposed=True, outs=(0, 33), box=((0, 1), (0, 20), (57, 90))),
    )
    return Case(base, parts, adapted(q=q, v=v), exact)


def some_rows_of_an_update():
    base, pair = weights(8, 20), pair_of(24, 20)
    part = Part("m", outs=(8, 16), box=((0, 1), (0, 8), (0, 20)))
    return Case(base, (part,), adapted(m=pair), base + update_of(pair)[8:16])


def some_columns_of_an_update():
    base, pair = weights(24, 50), pair_of(24, 60)
    part = Part("m", ins=(13, 53), box=((0, 1), (0, 24), (7, 47)))
    exact = base.copy()
    exact[:, 7:47] += update_of(pair)[:, 13:53]
    return Case(base, (part,), adapted(m=pair), exact)


def convolution():
    base = weights(12, 3, 3, 2)
    pair = Factors(numbers(2, 3, 3, 2), numbers(12, 2, 1, 1, seed=1), 4.0, 2 / 3, kind=CONV)
    return Case(base, (Part("m"),), adapted(m=pair), base + update_of(pair).reshape(base.shape))


def convolution_of_one_axis():
    """Three axes, and no experts."""
    base = weights(12, 3, 5)
    pair = Factors(numbers(2, 3, 5), numbers(12, 2, 1, seed=1), 4.0, 2 / 3, kind=CONV)
    return Case(base, (Part("m"),), adapted(m=pair), base + update_of(pair).reshape(base.shape))


def bias():
    base, pair = weights(24), pair_of(24, 20, bias=numbers(24, seed=3))
    exact = base + pair.scale * pair.bias.astype(np.float64)
    return Case(base, (Part("m", BIAS),), adapted(m=pair), exact)


def rows():
    base, trained = weights(40, 6), Rows((7, 0, 39), numbers(3, 6, seed=2) / np.float32(3))
    exact = base.copy()
    exact[[7, 0, 39]] = trained.values
    return Case(base, (Part("m", ROWS),), adapted(rows={"m": trained}), exact)


def with_magnitude(out, width, **changes):
    return pair_of(out, width, magnitude=np.abs(numbers(out, seed=9)), **changes)


def dora_plain():
    base, pair = weights(24, 20), with_magnitude(24, 20)
    return Case(base, (Part("m"),), adapted("dora", m=pair), dora(base, pair))


def dora_of_a_convolution():
    base = weights(12, 3, 3, 2)
    pair = Factors(
        numbers(2, 3, 3, 2), numbers(12, 2, 1, 1, seed=1), 4.0, 2 / 3, kind=CONV,
        magnitude=np.abs(numbers(12)),
    )  # fmt: skip
    exact = dora(base.reshape(12, -1), pair).reshape(base.shape)
    return Case(base, (Part("m"),), adapted("dora", m=pair), exact)


def dora_in_fused_rows():
    base, q = weights(30, 20), with_magnitude(14, 20)
    part = Part("q", outs=(2, 14), box=((0, 1), (10, 22), (0, 20)))
    exact = base.copy()
    mine = dataclasses.replace(q, b=q.b[2:14], magnitude=q.magnitude[2:14])
    exact[10:22] = dora(base[10:22], mine)
    return Case(base, (part,), adapted("dora", q=q), exact)


def dora_transposed():
    base, pair = weights(20, 24), with_magnitude(24, 20)
    exact = dora(base.T, pair).T
    return Case(base, (Part("m", transposed=True),), adapted("dora", m=pair), exact, is_whole=True)


RESIDUAL = ("pissa", "olora", "kasa")


def residual(name):
    def case():
        base, pair = weights(24, 20), pair_of(24, 20, rank=3)
        if name == "kasa":
            pair = dataclasses.replace(pair, diagonal=numbers(3, seed=8))
        if name == "olora":
            q, r = np.linalg.qr(base)
            start = base - pair.scale * (q[:, :3] @ r[:3])
        else:
            u, s, v = np.linalg.svd(base, full_matrices=False)
            s = np.where(np.arange(20) < 3, 0, s) if name == "pissa" else s * (np.arange(20) < 17)
            start = (u * s) @ v
        adapter = adapted(name, m=pair)
        return Case(base, (Part("m"),), adapter, None, True, start, update_of(pair))

    return case


CASES = {
    function.__name__.replace("_", " "): function
    for function in (
        plain, wide, transposed, embedding, diagonal, experts, experts_transposed,
        one_expert_stored_alone, two_of_five_experts, fused_rows, fused_columns,
        some_rows_of_an_update, some_columns_of_an_update, convolution, convolution_of_one_axis,
        bias, rows, dora_plain, dora_of_a_convolution, dora_in_fused_rows, dora_transposed,
    )
} | {name: residual(name) for name in RESIDUAL}  # fmt: skip
EVERY = pytest.mark.parametrize("case", CASES)


def rounded(exact, dtype):
    """Round float64 once: by way of whole multiples of the spacing."""
    bits, least = {"BF16": (7, -126), "F16": (10, -14), "F32": (23, -126)}[dtype]
    spacing = np.ldexp(1.0, np.maximum(np.frexp(exact)[1] - 1, least) - bits)
    return (np.rint(exact / spacing) * spacing).astype(np.float32).astype(KINDS[dtype])


def computed(case, folder, kept, dtype):
    checkpoint = on_disk.bases(folder, {NAME: case.base.astype(np.float32).astype(KINDS[kept])})
    step = case.step(dtype)
    variant = case.adapter.variant.replace("kasa-like", "lora")
    plan = plan_of(step, variant=variant)
    return blocks.computed(step, plan, case.adapter, checkpoint), checkpoint


def carried_out(made, checkpoint):
    """The tensor's bytes, block after block; each byte is read and written once."""
    info = checkpoint.tensors[NAME]
    data = info.file.read_bytes()
    read, found = info.start, bytearray()
    for block in made.blocks:
        start, stop = block.source
        assert start == read <= stop
        assert block.start == len(found)
        raw = np.frombuffer(data[start:stop], np.uint8).copy()
        array, bad = block.make(raw)
        assert bad == 0
        assert raw.tobytes() == data[start:stop]
        found += array.tobytes()
        read = stop
    assert read == info.end
    assert len(found) == made.step.size
    return bytes(found)


@EVERY
@pytest.mark.parametrize(
    ("kept", "dtype"), [("F32", "F32"), ("BF16", "BF16"), ("F16", "F16"), ("F32", "BF16")]
)
def test_blocks_of_any_size_make_the_same_bytes_and_those_are_the_formulas(
    case, kept, dtype, tmp_path, monkeypatch
):
    case_ = CASES[case]()
    expected = case_.expected
    if case in RESIDUAL:  # which the base's dtype holds
        expected = rounded(case_.start, kept).astype(np.float64) + case_.update
    found, counts = set(), []
    for size in (2**20, 1000, 64, 1):
        monkeypatch.setattr(blocks, "BLOCK_BYTES", size)
        made, checkpoint = computed(case_, tmp_path / str(size), kept, dtype)
        found.add(carried_out(made, checkpoint))
        counts.append(len(made.blocks))
    width = math.prod(case_.base.shape[1:]) if "convol" in case else case_.base.shape[-1]
    width = 1 if case == "bias" else width
    assert counts[0] == 1
    assert counts[-1] == (1 if case_.is_whole else case_.base.size // width)
    (data,) = found
    array = np.frombuffer(data, KINDS[dtype]).reshape(case_.base.shape)
    np.testing.assert_array_equal(array, rounded(expected, dtype))


@pytest.mark.parametrize("size", [1, 64, 79, 80, 81, 160, 400, 1919, 1920, 1921])
def test_blocks_are_whole_rows_of_nearly_one_size(size, tmp_path, monkeypatch):
    """24 rows of 80 bytes."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", size)
    made, _ = computed(plain(), tmp_path, "F32", "BF16")
    lengths = [stop - start for start, stop in (block.source for block in made.blocks)]
    assert sum(lengths) == 1920
    assert all(length % 80 == 0 and 0 < length <= max(size, 80) for length in lengths)
    assert max(lengths) - min(lengths) <= 80
    starts = [block.start for block in made.blocks]
    assert starts == [sum(lengths[:i]) // 2 for i in range(len(lengths))]


def test_one_long_row_is_one_block(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 64)
    base, pair = weights(1, 5000), pair_of(1, 5000)
    case = Case(base, (Part("m"),), adapted(m=pair), base + update_of(pair))
    made, checkpoint = computed(case, tmp_path, "F32", "F32")
    assert len(made.blocks) == 1
    np.testing.assert_array_equal(
        np.frombuffer(carried_out(made, checkpoint), np.float32)[None],
        rounded(case.expected, "F32"),
    )


@EVERY
def test_nothing_of_a_tensor_outlives_its_blocks(case, tmp_path):
    """A cycle would keep its factors until Python looks for one, which may be never."""
    case_ = CASES[case]()
    gc.collect()
    gc.disable()
    try:
        made, checkpoint = computed(case_, tmp_path, "F32", "BF16")
        carried_out(made, checkpoint)
        del made, checkpoint
        assert gc.collect() == 0
    finally:
        gc.enable()


# ---------------------------------------------------------------- what is not computed


def test_a_tensor_that_nothing_changes_is_copied(tmp_path):
    base = on_disk.bases(tmp_path, {NAME: numbers(4, 4), "n": np.array([1, 2])})
    for step in copies(base):
        assert blocks.computed(step, plan_of(step), adapted(), base) is None


@pytest.mark.parametrize("side", ["a", "b", "scale"])
def test_an_update_of_zero_is_a_copy(tmp_path, side):
    case = plain()
    pair = case.adapter.modules["m"]
    value = 0.0 if side == "scale" else getattr(pair, side) * -0.0
    adapter = adapted(m=dataclasses.replace(pair, **{side: value}))
    made, _ = computed(dataclasses.replace(case, adapter=adapter), tmp_path, "F32", "F32")
    assert made is None


@pytest.mark.parametrize(
    "shape", [(), (0, 4), (4, 0), (2, 0, 3), (0,), (3,), (2, 3, 4), (1, 1, 2, 2)]
)
@pytest.mark.parametrize("size", [2**20, 4])
def test_a_tensor_of_any_shape_is_converted(tmp_path, shape, size, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", size)
    value = numbers(*shape) / np.float32(3)
    base = on_disk.bases(tmp_path, {NAME: value})
    (step,) = copies(base, dtype="BF16")
    made = blocks.computed(step, plan_of(step), adapted(), base)
    assert carried_out(made, base) == rounded(value.astype(np.float64), "BF16").tobytes()


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_the_adapters_own_tensor_is_placed_and_updated(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 64)
    case = plain()
    base = on_disk.bases(tmp_path, {"other": numbers(2)})
    own = case.base.astype(np.float32)
    adapter = dataclasses.replace(case.adapter, replaced={"mine": own})
    for parts, exact in ((case.parts, case.expected), ((), case.base)):
        step = Step(PLACE, NAME, storage.SINGLE, dtype, own.shape, None, "mine", parts)
        made = blocks.computed(step, plan_of(step), adapter, base)
        assert made.source is None
        assert all(block.source is None for block in made.blocks)
        found = b"".join(block.make(None)[0].tobytes() for block in made.blocks)
        assert found == rounded(exact, dtype).tobytes()
    assert own.tobytes() == case.base.astype(np.float32).tobytes()  # and stays as it was


def test_the_adapters_own_integers_are_placed_as_they_are(tmp_path):
    base = on_disk.bases(tmp_path, {"other": numbers(2)})
    own = np.arange(12).reshape(3, 4)[:, ::2]  # not contiguous
    step = Step(PLACE, NAME, storage.SINGLE, "I64", own.shape, None, "mine")
    adapter = dataclasses.replace(adapted(), replaced={"mine": own})
    made = blocks.computed(step, plan_of(step), adapter, base)
    (block,) = made.blocks
    assert block.make(None)[0].tobytes() == np.ascontiguousarray(own).tobytes()


# ---------------------------------------------------------------- what does not fit its dtype


def overflowing(kept, elements):
    """A base in which some elements leave float16 when the update comes."""
    base = np.ones((24, 20))
    base[tuple(np.array(elements).T)] = 65000
    pair = Factors(np.full((1, 20), 30, np.float32), np.full((24, 1), 40, np.float32), 1, 1.0)
    return Case(base, (Part("m"),), adapted(m=pair), base), KINDS[kept]


@pytest.mark.parametrize("kept", ["F16", "F32"])
@pytest.mark.parametrize("size", [2**20, 64, 200])
def test_an_overflow_names_the_tensor_and_counts_in_all_blocks(tmp_path, monkeypatch, kept, size):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", size)
    case, kind = overflowing(kept, [(0, 0), (3, 19), (12, 7), (23, 18), (23, 19)])
    base = on_disk.bases(tmp_path / "base", {NAME: case.base.astype(kind)})
    plan = plan_of(case.step("F16"))
    files = blocks.layout(plan, base)
    (tmp_path / "out").mkdir()
    message = f"{NAME}: 5 of 480 merged weights are not finite in F16"
    with pytest.raises(InputError, match=message):
        streaming.write(plan, case.adapter, base, files, tmp_path / "out")


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_what_the_base_holds_that_is_not_finite_is_counted(tmp_path, value, dtype):
    case = wide()
    case.base[3, 4] = case.base[49, 76] = value
    made, checkpoint = computed(case, tmp_path, dtype, dtype)
    data = checkpoint.tensors[NAME].read()
    counts = [block.make(np.frombuffer(data, np.uint8).copy())[1] for block in made.blocks]
    assert counts == [2]


@pytest.mark.parametrize("kind", ["rows", "bias", "dora plain", "dora transposed", "experts"])
def test_overflow_is_counted_in_every_kind_of_update(tmp_path, kind):
    case = CASES[kind]()
    case.base[...] = 60000
    modules = {
        name: dataclasses.replace(
            pair, scale=1e6, magnitude=None if pair.magnitude is None else pair.magnitude * 1e6
        )
        for name, pair in case.adapter.modules.items()
    }
    trained = {name: Rows(r.indices, r.values * 1e9) for name, r in case.adapter.rows.items()}
    case.adapter = dataclasses.replace(case.adapter, modules=modules, rows=trained)
    made, checkpoint = computed(case, tmp_path, "F16", "F16")
    data = np.frombuffer(checkpoint.tensors[NAME].read(), np.uint8).copy()
    (block,) = made.blocks
    array, bad = block.make(data)
    assert bad == (~np.isfinite(array.astype(np.float64))).sum() > 0
    if kind == "rows":
        assert bad == 18


def test_an_infinity_beside_the_region_is_left_as_it_is(tmp_path):
    """It is the base's, as it would be in a tensor that is copied; narrowing counts it."""
    case = fused_rows()
    case.base[15, 3] = np.inf
    for dtype, expected in (("F32", 0), ("BF16", 1)):
        made, checkpoint = computed(case, tmp_path / dtype, "F32", dtype)
        data = np.frombuffer(checkpoint.tensors[NAME].read(), np.uint8).copy()
        (block,) = made.blocks
        array, bad = block.make(data)
        assert bad == expected
        assert array[15, 3] == np.inf
