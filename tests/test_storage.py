import hashlib
import json

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from blake3 import blake3
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lora_export import storage
from lora_export.errors import InputError
from lora_export.records import FileDigest
from lora_export.storage import NewTensor

ARRAYS = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b.bias": np.array([1.5, -2.5], dtype=np.float16),
    "c.empty": np.zeros((0, 3), dtype=np.float32),
    "d.scalar": np.array(7, dtype=np.int64),
}


def _write(path, arrays=ARRAYS, metadata=None):
    storage.write_safetensors(path, [NewTensor.of(n, a) for n, a in arrays.items()], metadata or {})
    return path


def _file_of(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """The bytes of a small safetensors file, and a path to put damaged copies of it."""
    path = _write(tmp_path_factory.mktemp("storage") / "small.safetensors", metadata={"k": "v"})
    return path.read_bytes(), path.with_name("damaged.safetensors")


# ---------------------------------------------------------------- safetensors, there and back


def test_the_reference_implementation_reads_what_is_written(tmp_path):
    found = safetensors.numpy.load_file(_write(tmp_path / "x.safetensors"))
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_what_the_reference_implementation_writes_is_read(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(ARRAYS, path, metadata={"made": "elsewhere"})
    tensors, metadata = storage.read_header(path)
    assert metadata == {"made": "elsewhere"}
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(tensors[name].array(), array)


def test_bfloat16_is_widened_exactly(tmp_path):
    values = torch.tensor([[1.0, -0.0, 3.140625], [1e-39, float("inf"), -2.5e38]]).bfloat16()
    safetensors.torch.save_file({"w": values}, tmp_path / "x.safetensors")
    array = storage.read_header(tmp_path / "x.safetensors")[0]["w"].array()
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array.view(np.uint32), values.float().numpy().view(np.uint32))


def test_a_transposed_array_is_written_by_value(tmp_path):
    turned = ARRAYS["a.weight"].T
    found = safetensors.numpy.load_file(_write(tmp_path / "x.safetensors", {"t": turned}))
    np.testing.assert_array_equal(found["t"], turned)


def test_the_same_tensors_give_the_same_bytes(tmp_path):
    one = _write(tmp_path / "1", metadata={"b": "2", "a": "1"}).read_bytes()
    two = _write(tmp_path / "2", metadata={"a": "1", "b": "2"}).read_bytes()
    assert one == two


def test_the_data_begins_at_a_multiple_of_eight(tmp_path):
    for width in range(8):
        data = _write(tmp_path / "x", metadata={"k": "v" * width}).read_bytes()
        assert int.from_bytes(data[:8], "little") % 8 == 0


def test_writing_reports_the_size_of_the_tensors(tmp_path):
    tensors = [NewTensor.of(name, array) for name, array in ARRAYS.items()]
    written = storage.write_safetensors(tmp_path / "x", tensors, {})
    assert written == sum(array.nbytes for array in ARRAYS.values())


def test_one_tensor_at_a_time_is_asked_for_its_bytes(tmp_path):
    asked = []

    def reader(name):
        return lambda: asked.append(name) or bytes(4)

    tensors = [NewTensor(name, "F32", (1,), reader(name)) for name in ("z", "a")]
    assert asked == []
    storage.write_safetensors(tmp_path / "x", tensors, {})
    assert asked == ["z", "a"]


def test_a_tensor_of_an_8_bit_float_can_be_copied_but_not_computed_with(tmp_path):
    values = torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn)
    safetensors.torch.save_file({"w": values}, tmp_path / "x.safetensors")
    info = storage.read_header(tmp_path / "x.safetensors")[0]["w"]
    assert info.read() == values.view(torch.uint8).numpy().tobytes()
    with pytest.raises(InputError, match="cannot compute with tensors of dtype F8_E4M3"):
        info.array()


# ---------------------------------------------------------------- damage


def _use(path):
    """Read everything in the file at `path`, as a caller would."""
    tensors, metadata = storage.read_header(path)
    assert all(isinstance(key, str) for key in metadata)
    covered = 0
    for name, info in tensors.items():
        array = info.array()
        assert (info.name, array.shape) == (name, info.shape)
        covered += len(info.read())
    return covered


@given(at=st.integers(0, 10_000), mask=st.integers(1, 255))
@example(at=7, mask=128)
@example(at=0, mask=1)
@settings(deadline=None, max_examples=300)
def test_a_flipped_byte_is_refused_or_leaves_a_consistent_file(small, at, mask):
    good, path = small
    data = bytearray(good)
    at %= len(data)
    data[at] ^= mask
    path.write_bytes(data)
    try:
        covered = _use(path)
    except InputError as error:
        assert str(path) in str(error) or "cannot compute" in str(error)  # noqa: PT017
    else:
        header = int.from_bytes(data[:8], "little")
        assert covered == len(data) - 8 - header


@given(size=st.integers(0, 10_000))
@settings(deadline=None, max_examples=100)
def test_a_truncated_file_is_refused(small, size):
    good, path = small
    path.write_bytes(good[: size % len(good)])
    with pytest.raises(InputError, match=r"truncated|damaged|not a safetensors"):
        _use(path)


@pytest.mark.parametrize("extra", [b"\0", b"more"])
def test_a_file_that_is_too_long_is_refused(small, extra):
    good, path = small
    path.write_bytes(good + extra)
    with pytest.raises(InputError, match="truncated or too long"):
        _use(path)


def _one(**changes):
    return {"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24], **changes}}


@pytest.mark.parametrize(
    "content",
    [
        _file_of([]),
        _file_of("text"),
        _file_of(None),
        _file_of(b"\xff\xfe"),
        _file_of(b"[" * 100_000),
        _file_of({"w": 1}),
        _file_of({"w": {}}),
        _file_of(_one(dtype=["F32"]), bytes(24)),
        _file_of(_one(dtype="F33"), bytes(24)),
        _file_of(_one(shape=[2.0, 3]), bytes(24)),
        _file_of(_one(shape=[-2, -3]), bytes(24)),
        _file_of(_one(shape=6), bytes(24)),
        _file_of(_one(shape=[2, 4]), bytes(24)),
        _file_of(_one(data_offsets=[0, 24, 48]), bytes(24)),
        _file_of(_one(data_offsets=[-8, 16]), bytes(24)),
        _file_of(_one(data_offsets=[8, 32]), bytes(32)),
        _file_of(b'{"w":{"dtype":"F32","shape":[0],"data_offsets":[0,1e999]}}'),
        _file_of({"__metadata__": 5}),
        _file_of({"__metadata__": ["k"]}),
        _file_of({"a": _one()["w"], "b": _one()["w"]}, bytes(24)),
        (10**12).to_bytes(8, "little"),
        (2**64 - 1).to_bytes(8, "little") + b"{}",
        b"",
        b"PK\x03\x04 a zip file that is no tensor file",
    ],
    ids=[
        "list", "string", "null", "not utf-8", "deeply nested", "entry is a number",
        "entry is empty", "dtype is a list", "unknown dtype", "fractional shape", "negative shape",
        "shape is a number", "wrong length", "three offsets", "negative offset", "gap",
        "infinite offset", "metadata is a number", "metadata is a list", "overlap", "huge header",
        "largest header", "empty file", "zip file",
    ],
)  # fmt: skip
def test_a_malformed_file_is_an_input_error_and_nothing_else(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"x\.safetensors"):
        _use(path)


def test_a_git_lfs_pointer_is_named_as_such(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    with pytest.raises(InputError, match=r"Git LFS pointer.*git lfs pull"):
        storage.read_header(path)


def test_a_missing_file_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*nowhere: No such file"):
        storage.read_header(tmp_path / "nowhere")


def test_a_directory_is_no_tensor_file(tmp_path):
    with pytest.raises(InputError, match="cannot read"):
        storage.read_header(tmp_path)


# ---------------------------------------------------------------- checkpoints


def _sharded(root, weight_map, shards):
    for name, arrays in shards.items():
        _write(root / name, arrays)
    (root / storage.INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_a_single_file_is_a_checkpoint(tmp_path):
    _write(tmp_path / storage.SINGLE)
    found = storage.Checkpoint.open(tmp_path)
    assert found.shards == (storage.SINGLE,)
    assert found.tensors.keys() == ARRAYS.keys()


def test_shards_are_read_through_their_index(tmp_path):
    one, two = {"a": np.ones(2, np.float32)}, {"b": np.zeros(3, np.float32)}
    _sharded(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"},
             {"1.safetensors": one, "2.safetensors": two})  # fmt: skip
    found = storage.Checkpoint.open(tmp_path)
    assert found.shards == ("1.safetensors", "2.safetensors")
    np.testing.assert_array_equal(found.tensors["b"].array(), two["b"])


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    twice = {"a": np.ones(2, np.float32)}
    _sharded(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"},
             {"1.safetensors": twice, "2.safetensors": twice})  # fmt: skip
    with pytest.raises(InputError, match="in two shards at once: a"):
        storage.Checkpoint.open(tmp_path)


def test_a_tensor_that_the_index_promises_must_be_in_a_shard(tmp_path):
    _sharded(tmp_path, {"a": "1.safetensors", "lost": "1.safetensors"},
             {"1.safetensors": {"a": np.ones(2, np.float32)}})  # fmt: skip
    with pytest.raises(InputError, match="lost"):
        storage.Checkpoint.open(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    _sharded(tmp_path, {"a": "1.safetensors"}, {})
    with pytest.raises(InputError, match=r"cannot read .*1\.safetensors"):
        storage.Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    "shard", ["../other.safetensors", "/elsewhere/x.safetensors", "sub/x.safetensors"]
)
def test_an_index_may_not_name_files_elsewhere(tmp_path, shard):
    _sharded(tmp_path, {"a": shard}, {})
    with pytest.raises(InputError, match="names files outside of its directory"):
        storage.Checkpoint.open(tmp_path)


@pytest.mark.parametrize("weight_map", [{}, [], "a", None])
def test_an_index_without_a_weight_map_is_refused(tmp_path, weight_map):
    _sharded(tmp_path, weight_map, {})
    with pytest.raises(InputError, match="has no weight_map"):
        storage.Checkpoint.open(tmp_path)


def test_an_empty_directory_is_no_checkpoint(tmp_path):
    with pytest.raises(InputError, match=r"neither model\.safetensors nor"):
        storage.Checkpoint.open(tmp_path)


# ---------------------------------------------------------------- json


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON"),
        (b"", "is not JSON"),
        (b'{"a": "\x80"}', "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[1]", "holds no JSON object"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    ],
    ids=["cut", "empty", "not utf-8", "deeply nested", "list", "lfs pointer"],
)
def test_a_file_that_holds_no_json_object_is_an_input_error(tmp_path, content, message):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(InputError, match=message):
        storage.read_json(tmp_path / "x.json")


def test_json_is_written_in_the_given_order(tmp_path):
    storage.write_json(tmp_path / "x.json", {"b": 1, "a": "ä"})
    assert (tmp_path / "x.json").read_bytes() == '{\n  "b": 1,\n  "a": "ä"\n}\n'.encode()


# ---------------------------------------------------------------- digests


def test_the_sha256_is_the_known_one(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    found = storage.digest(tmp_path / "abc")
    assert (found.name, found.size_bytes) == ("abc", 3)
    assert found.digest == "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_the_digest_of_safetensors_is_one_over_header_and_tensors(tmp_path):
    file = tmp_path / "two.safetensors"
    tensors = [NewTensor.of("b", np.arange(3.0)), NewTensor.of("a", np.arange(2**20))]
    storage.write_safetensors(file, tensors, {"format": "pt"})
    data = file.read_bytes()
    header = data[: 8 + int.from_bytes(data[:8], "little")]
    parts = (header, np.arange(3.0).tobytes(), np.arange(2**20).tobytes())
    lines = "\n".join(blake3(part).hexdigest() for part in parts)
    expected = f"blake3-tensors:{blake3(lines.encode()).hexdigest()}"
    assert storage.digest(file) == FileDigest("two.safetensors", len(data), expected)
    hashes = dict(zip("ba", lines.split("\n")[1:], strict=True))
    assert storage.file_digest(file, hashes) == storage.digest(file)


@pytest.mark.parametrize("place", [0, -1], ids=["header", "data"])
def test_the_digest_of_safetensors_changes_with_every_byte(tmp_path, place):
    file = tmp_path / "x.safetensors"
    storage.write_safetensors(file, [NewTensor.of("a", np.arange(3.0))], {"format": "pt"})
    before, data = storage.digest(file).digest, bytearray(file.read_bytes())
    data[place or data.index(b"pt")] ^= 1  # the metadata, where it is the header
    file.write_bytes(data)
    assert storage.digest(file).digest != before


def test_a_damaged_safetensors_file_is_digested_whole(tmp_path):
    file = tmp_path / "x.safetensors"
    file.write_bytes(b"abc")
    expected = hashlib.sha256(b"abc").hexdigest()
    assert storage.digest(file).digest == f"sha256:{expected}"


def test_a_tree_is_digested_by_sorted_relative_names(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("z", "sub/b", "a"):
        (tmp_path / name).write_text(name)
    assert [file.name for file in storage.digest_tree(tmp_path)] == ["a", "sub/b", "z"]


def test_the_fingerprint_does_not_depend_on_the_order():
    tensors = [("a", "F32", (1,), b"1234"), ("b", "F32", (1,), b"5678")]
    assert storage.fingerprint(tensors) == storage.fingerprint(reversed(tensors))


@pytest.mark.parametrize(
    "other",
    [
        ("b", "F32", (1,), b"1234"),
        ("a", "I32", (1,), b"1234"),
        ("a", "F32", (1, 1), b"1234"),
        ("a", "F32", (1,), b"1235"),
    ],
    ids=["name", "dtype", "shape", "bytes"],
)
def test_the_fingerprint_changes_with_each_part_of_a_tensor(other):
    mark = storage.fingerprint([("a", "F32", (1,), b"1234")])
    assert storage.fingerprint([other]).sha256 != mark.sha256


def test_the_fingerprint_names_the_dtype_only_where_all_share_it():
    same = storage.fingerprint([("a", "F16", (1,), b"12"), ("b", "F16", (1,), b"12")])
    mixed = storage.fingerprint([("a", "F16", (1,), b"12"), ("b", "F32", (1,), b"1234")])
    assert (same.dtype, same.tensors, mixed.dtype) == ("F16", 2, None)
