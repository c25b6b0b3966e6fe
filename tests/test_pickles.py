"""Old PyTorch files: tensors come out as they went in, and nothing else ever does."""

import collections
import contextlib
import pickle
import resource
import signal
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from on_disk import BF16, numbers

from lora_export import pickles
from lora_export.errors import InputError
from lora_export.refusals import TABLE

NAME = "layer.lora_A.weight"
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
WHOLE = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]


def save(folder, content, **options):
    torch.save(content, folder / "a.bin", **options)
    return folder / "a.bin"


def refuses(path, message=TABLE["pickle"].why):
    with pytest.raises(InputError) as caught:
        pickles.read(path)
    assert message in str(caught.value)


@pytest.fixture
def in_time():
    """Fail a test that hangs, instead of hanging the whole suite."""

    def stop(*_):
        raise AssertionError("still at it after three seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(3)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


# ---------------------------------------------------------------- what is read


@pytest.mark.parametrize("dtype", [*FLOATS, *WHOLE], ids=str)
def test_a_tensor_comes_out_with_its_dtype_shape_and_bits(tmp_path, dtype):
    value = torch.from_numpy(numbers(3, 4) * 8).to(dtype)
    found = pickles.read(save(tmp_path, {NAME: value}))[NAME]
    assert found.shape == (3, 4)
    if dtype == torch.bfloat16:
        assert found.dtype == BF16
        assert np.array_equal(found.astype(np.float32), value.float().numpy())
    else:
        assert found.dtype == value.numpy().dtype
        assert np.array_equal(found, value.numpy())


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (2, 3, 4, 5)])
def test_a_tensor_of_any_shape_comes_out(tmp_path, shape):
    found = pickles.read(save(tmp_path, {NAME: torch.zeros(shape)}))
    assert found[NAME].shape == shape


def test_views_of_one_storage_have_their_own_values(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    content = {"t": whole.T, "row": whole[1], "step": whole[:, ::2], "whole": whole}
    found = pickles.read(save(tmp_path, content))
    for name, value in content.items():
        assert np.array_equal(found[name], value.numpy()), name


def test_a_parameter_is_read_as_the_tensor_that_it_is(tmp_path):
    content = {NAME: torch.nn.Parameter(torch.ones(2, 2))}
    assert np.array_equal(pickles.read(save(tmp_path, content))[NAME], np.ones((2, 2)))


def test_an_ordered_mapping_is_read(tmp_path):
    content = collections.OrderedDict([("b", torch.ones(1)), ("a", torch.zeros(1))])
    assert pickles.read(save(tmp_path, content)).keys() == {"a", "b"}


@pytest.mark.parametrize("name", ["state_dict", "model_state_dict", "module"])
def test_the_tensors_may_lie_where_a_trainer_puts_them(tmp_path, name):
    content = {name: {NAME: torch.ones(2)}, "epoch": 3}
    assert pickles.read(save(tmp_path, content)).keys() == {NAME}


def test_wrappers_may_lie_in_wrappers(tmp_path):
    content = {"state_dict": {"module": {NAME: torch.ones(2)}}}
    assert pickles.read(save(tmp_path, content)).keys() == {NAME}


def test_what_was_read_may_be_changed_and_the_file_stays(tmp_path):
    path = save(tmp_path, {NAME: torch.ones(4)})
    before = path.read_bytes()
    pickles.read(path)[NAME][:] = 5
    assert path.read_bytes() == before


def test_no_torch_is_loaded_until_a_file_is_read():
    source = "import sys; from lora_export import pickles; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", source], check=True)


# ---------------------------------------------------------------- what is refused


class Planted:
    """Runs when it is unpickled."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return (exec, (f"open({str(self.place)!r}, 'w').close()",))


@pytest.mark.parametrize("where", ["value", "key", "whole", "beside"])
def test_code_is_never_run(tmp_path, where):
    planted = Planted(tmp_path / "ran")
    content = {
        "value": {NAME: planted},
        "key": {planted: torch.ones(1)},
        "whole": planted,
        "beside": {NAME: torch.ones(1), "notes": [planted]},
    }[where]
    refuses(save(tmp_path, content))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("value", [5, "text", None, [1.0], {"a": 1}, torch.float32])
def test_a_value_that_is_no_tensor_is_refused_by_its_name(tmp_path, value):
    refuses(save(tmp_path, {NAME: torch.ones(1), "other": value}), "a.bin: other")


@pytest.mark.parametrize("content", [{}, [], [torch.ones(1)], torch.ones(1), 5, "text", None])
def test_a_file_without_tensors_by_name_is_refused(tmp_path, content):
    refuses(save(tmp_path, content), "holds no tensors by name")


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.ones(2, dtype=torch.float8_e4m3fn),
        lambda: torch.ones(2, dtype=torch.complex64),
        lambda: torch.ones(2, device="meta"),
    ],
    ids=["sparse", "eight bits", "complex", "without values"],
)
def test_a_tensor_that_numpy_cannot_hold_as_numbers_is_refused(tmp_path, make):
    try:
        found = pickles.read(save(tmp_path, {NAME: make()}))[NAME]
    except InputError as error:
        assert NAME in str(error) or TABLE["pickle"].why in str(error)  # noqa: PT017
    else:
        assert found.dtype.kind == "c"  # which the reader of names refuses


def test_a_file_of_before_torch_1_6_is_refused(tmp_path):
    content = {NAME: torch.ones(2)}
    refuses(save(tmp_path, content, _use_new_zipfile_serialization=False))


@pytest.mark.parametrize("protocol", range(6))
def test_a_bare_pickle_is_refused(tmp_path, protocol):
    (tmp_path / "a.bin").write_bytes(pickle.dumps({NAME: [1.0]}, protocol))
    refuses(tmp_path / "a.bin")


@pytest.mark.parametrize("content", [b"", b"PK", b"PK\x03\x04", b"rubbish" * 100, b"\x80\x02}q."])
def test_rubbish_is_refused(tmp_path, content):
    (tmp_path / "a.bin").write_bytes(content)
    refuses(tmp_path / "a.bin")


@pytest.mark.parametrize("kept", [0, 1, 10, 100, -1, -30])
def test_a_truncated_file_is_refused(tmp_path, kept):
    path = save(tmp_path, {NAME: torch.ones(100)})
    path.write_bytes(path.read_bytes()[:kept])
    refuses(path)


def test_a_missing_file_is_refused(tmp_path):
    refuses(tmp_path / "nowhere.bin", "cannot read")


def test_a_pointer_of_lfs_is_refused_as_such(tmp_path):
    (tmp_path / "a.bin").write_text("version https://git-lfs.github.com/spec/v1\n")
    refuses(tmp_path / "a.bin", "Git LFS pointer")


def rewritten(path, **options):
    """The same archive, its members written again."""
    with zipfile.ZipFile(path) as old:
        members = [(info.filename, old.read(info)) for info in old.infolist()]
    with zipfile.ZipFile(path, "w", **options) as new:
        for name, data in members:
            new.writestr(name, data)
    return path


def test_a_compressed_archive_is_refused(tmp_path):
    """A few kilobytes could stand for any size."""
    path = save(tmp_path, {NAME: torch.zeros(10_000)})
    refuses(rewritten(path, compression=zipfile.ZIP_DEFLATED), "compressed")


def test_a_tensor_that_is_larger_than_its_storage_is_refused(tmp_path):
    """Strides of zero spread one number over any shape, and a copy would fill the memory."""
    wide = torch.ones(1).expand(1_000_000, 1_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refuses(save(tmp_path, {NAME: wide}), "spread out of")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # kilobytes
    assert grown < 500_000


def test_a_storage_that_the_archive_does_not_hold_is_refused(tmp_path):
    path = save(tmp_path, {NAME: torch.ones(1000)})
    with zipfile.ZipFile(path) as old:
        members = [(i.filename, old.read(i)) for i in old.infolist()]
    with zipfile.ZipFile(path, "w") as new:
        for name, data in members:
            new.writestr(name, data[:16] if "/data/" in name else data)
    with pytest.raises(InputError):
        pickles.read(path)


@pytest.mark.usefixtures("in_time")
@pytest.mark.parametrize("name", ["state_dict", "module"])
def test_a_mapping_that_holds_itself_does_not_hang(tmp_path, name):
    content = {}
    content[name] = content
    path = save(tmp_path, content)
    with pytest.raises(InputError):
        pickles.read(path)


@pytest.mark.usefixtures("in_time")
def test_deeply_nested_content_does_not_end_in_a_crash(tmp_path):
    content = {NAME: torch.ones(1)}
    for _ in range(300):
        content = {"state_dict": content}
    with contextlib.suppress(InputError):  # a limit to the depth is as good
        assert pickles.read(save(tmp_path, content)).keys() == {NAME}


@pytest.mark.usefixtures("in_time")
def test_many_damaged_files_end_in_an_input_error_or_in_arrays(tmp_path):
    path = save(tmp_path, {NAME: torch.ones(8), "b": torch.zeros(3, 2)})
    good, dice = path.read_bytes(), np.random.default_rng(0)
    for _ in range(200):
        bad = bytearray(good)
        for place in dice.integers(0, len(bad), 4):
            bad[place] = dice.integers(256)
        path.write_bytes(bytes(bad))
        try:
            found = pickles.read(path)
        except InputError:
            continue
        assert all(isinstance(value, np.ndarray) for value in found.values())
