"""A merge is a transaction: what the output's name shows is old or new, whatever happens."""

import contextlib
import errno
import fcntl
import io
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import on_disk
import pytest
import transactions
from transactions import SLOW, beside, died_at, ran, started, tree

from lora_export import merged_files, publishing, storage, streaming
from lora_export.errors import InputError

SEED = 20_261  # of the moments at which runs are killed
KILLS = 300
FULL_DISKS = 50
INPUTS = ["adapter", "base"]
KILLED = -signal.SIGKILL
BESIDE = {"tokenizer_config": "{}", "generation_config": "{}"}  # of a base
TENSORS = 9
# Killed when six tensors are written; when all files are, and nothing is published.
PARTLY = died_at("streaming._Stream._note", 6, before=False)
WRITTEN = died_at("storage.write_json", 3, before=False)


class Stop(BaseException):
    """What stands for Ctrl-C and SIGTERM."""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base of 9 tensors, two adapters, and what merging each of them gives."""
    folder = tmp_path_factory.mktemp("made")
    transactions.base(folder / "base", **BESIDE)
    for name, seed in (("adapter", 0), ("other", 50)):
        transactions.adapter(folder / name, seed=seed)
        merged_files.merge_files(
            folder / name, base=str(folder / "base"), out=folder / f"merged of {name}"
        )
    return folder


@pytest.fixture
def place(made, tmp_path):
    """A folder with the inputs; `merged` is the output that the tests write."""
    for name in INPUTS:
        shutil.copytree(made / name, tmp_path / name)
    yield tmp_path
    for name in INPUTS:
        if name not in _CHANGED.get(tmp_path, ()):
            assert tree(tmp_path / name) == tree(made / name), "an input was harmed"


_CHANGED = {}


def change(place, name):
    """Say that a test itself changes an input."""
    _CHANGED[place] = (*_CHANGED.get(place, ()), name)
    return place / name


@pytest.fixture
def old(made, place):
    """An older output in the place of the new one; its digests."""
    shutil.copytree(made / "merged of other", place / "merged")
    return tree(place / "merged")


@pytest.fixture
def new(made):
    return tree(made / "merged of adapter")


def merge(place, **options):
    return merged_files.merge_files(
        place / "adapter", base=str(place / "base"), out=place / "merged", **options
    )


def run(place, *options, prelude=""):
    return ran(place / "adapter", place / "base", place / "merged", *options, prelude=prelude)


def killed(place, *options, prelude):
    code, errors = run(place, *options, prelude=prelude)
    assert code == KILLED, errors


def interrupted(made, place, prelude=WRITTEN):
    """Bring to `place` what a killed run left; it is killed once for all tests."""
    kept = made / f"left by {abs(hash(prelude))}"
    if not kept.exists():
        kept.mkdir()
        for name in INPUTS:
            (kept / name).symlink_to(made / name)
        killed(kept, "--resume", prelude=prelude)
        assert tree(kept / "merged") is None
    for staging in stagings(kept):
        shutil.copytree(staging, place / staging.name)


def stagings(place, name="merged"):
    return sorted(place.glob(f".{name}.staging-*"))


class Computed(list):
    """The names of the tensors that a run made; the others it took from a killed one."""

    def __init__(self, monkeypatch):
        super().__init__()
        note = streaming._Stream._note

        def noted(stream, task, step):
            self.append(step.name)
            note(stream, task, step)

        monkeypatch.setattr(streaming._Stream, "_note", noted)


# ---------------------------------------------------------------- a call fails


def _creates(flags):
    return bool(flags & os.O_CREAT)


CALLS = {
    "pwrite": (os, lambda *_: True),
    "copy_file_range": (os, lambda *_: True),
    "posix_fallocate": (os, lambda *_: True),
    "preadv": (os, lambda *_: True),
    "fsync": (os, lambda *_: True),
    "mkdir": (os, lambda *_: True),
    "rename": (os, lambda *_: True),
    "replace": (os, lambda *_: True),
    "open": (os, lambda _path, flags, *_: _creates(flags)),
    "io.open": (io, lambda _path, mode="r", *_: mode[0] in "wax"),
    "copyfile": (shutil, lambda *_: True),
    "_exchange": (publishing, lambda *_: True),
    "_put_back": (publishing, lambda *_: True),
}  # fmt: skip


def failing(monkeypatch, name, call, error):
    """Have one call of a function raise; return a list that then has one entry."""
    module, counts = CALLS[name]
    real, calls, raised = getattr(module, name.rpartition(".")[2]), itertools.count(1), []
    lock = threading.Lock()

    def function(*args, **kwargs):
        if counts(*args):
            with lock:
                number = next(calls)
            if number == call:
                raised.append(number)
                raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name.rpartition(".")[2], function)
    return raised


ERRORS = {
    "no space": OSError(errno.ENOSPC, "No space left on device"),
    "a failing disk": OSError(errno.EIO, "Input/output error"),
    "an interruption": Stop(),
}


# Whether there is an older output, and whether the disk can exchange two names.
CASES = {"new": (False, False), "exchange": (True, True), "renames": (True, False)}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("name", CALLS)
def test_whatever_call_fails_the_output_is_old_or_new_and_nothing_is_left(
    place, made, new, name, error, case
):
    is_old, exchange = CASES[case]
    before = tree(made / "merged of other") if is_old else None
    for call in itertools.count(1):
        if is_old:
            shutil.rmtree(place / "merged", ignore_errors=True)
            shutil.copytree(made / "merged of other", place / "merged")
        with pytest.MonkeyPatch.context() as patch:
            if not exchange:  # before it is made to fail
                patch.setattr(publishing, "_exchange", lambda *_: False)
            raised = failing(patch, name, call, ERRORS[error])
            fault = None
            try:
                merge(place, overwrite=is_old)
            except (InputError, Stop) as caught:
                fault = caught
        found = tree(place / "merged")
        assert found in (before, new), (call, fault)
        if fault is None:
            assert found == new, call
        elif isinstance(fault, InputError):
            assert found == before, (call, fault)
            assert "\n" not in str(fault)
        assert beside(place / "merged") == INPUTS or name == "_put_back", call
        if not raised:
            break
        if not is_old:
            shutil.rmtree(place / "merged", ignore_errors=True)
    assert fault is None
    assert beside(place / "merged") == INPUTS


def _count(monkeypatch, seen, name, module, counts):
    short = name.rpartition(".")[2]
    real = getattr(module, short)

    def counted(*args, **kwargs):
        seen[name] += counts(*args)
        return real(*args, **kwargs)

    monkeypatch.setattr(module, short, counted)


def test_the_calls_that_fail_above_are_the_calls_that_a_merge_makes(place, monkeypatch, old):
    seen = Counter()
    for name, (module, counts) in CALLS.items():
        _count(monkeypatch, seen, name, module, counts)
    merge(place, overwrite=True)
    assert [name for name in CALLS if not seen[name]] == ["rename", "replace"]  # it exchanges
    assert seen["copy_file_range"] == 5
    assert seen["posix_fallocate"] == 1


def test_a_disk_that_is_too_small_is_foreseen(place, monkeypatch, old):
    usage = shutil.disk_usage(place)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(os, "posix_fallocate", lambda *_: pytest.fail("it was written to"))
    with pytest.raises(InputError, match=r"needs 0\.00 GB, and its disk has 0\.00 GB free"):
        merge(place, overwrite=True)
    assert tree(place / "merged") == old
    assert beside(place / "merged") == INPUTS


def test_what_a_killed_run_wrote_needs_no_room_again(made, place, monkeypatch, new):
    interrupted(made, place)
    usage = shutil.disk_usage(place)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    merge(place, resume=True)
    assert tree(place / "merged") == new


def test_a_disk_without_reservations_is_written_to_all_the_same(place, monkeypatch, new):
    def unknown(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    for name in ("posix_fallocate", "copy_file_range"):
        monkeypatch.setattr(os, name, unknown)
    merge(place)
    assert tree(place / "merged") == new


def test_a_short_write_and_a_short_copy_go_on(place, monkeypatch, new):
    pwrite, copy = os.pwrite, os.copy_file_range
    monkeypatch.setattr(os, "pwrite", lambda to, data, at: pwrite(to, data[:1000], at))
    monkeypatch.setattr(
        os, "copy_file_range", lambda a, b, size, *at: copy(a, b, min(size, 999), *at)
    )
    merge(place)
    assert tree(place / "merged") == new


def test_a_shard_that_holds_no_bytes_is_written(place):
    base = change(place, "base")
    index = {"model.norm.weight": "model-2.safetensors"}
    held = storage.Checkpoint.open(base).tensors
    on_disk.save(base / "model-2.safetensors", {"model.norm.weight": on_disk.numbers(0)})
    index |= dict.fromkeys(held, "model-1.safetensors")
    (base / "model.safetensors").rename(base / "model-1.safetensors")
    (base / storage.INDEX).write_text(json.dumps({"weight_map": index}))
    assert merge(place).ok
    tensors, _ = storage.read_header(place / "merged" / "model-2.safetensors")
    assert [(info.name, info.shape) for info in tensors.values()] == [("model.norm.weight", (0,))]


def test_no_file_is_closed_while_a_thread_writes_to_it(place, monkeypatch):
    """Its number would then be another file's."""
    inside, pwrite = [], os.pwrite
    join, joins = threading.Thread.join, []

    def slow(*args):
        inside.append(1)
        time.sleep(0.01)
        done = pwrite(*args)
        inside.pop()
        return done

    def interrupted(thread, *args):
        if len(joins) < 5:
            joins.append(thread)
            raise KeyboardInterrupt
        return join(thread, *args)

    close, closed = os.close, []

    def checked(handle):
        closed.append(len(inside))
        close(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", slow)
        patch.setattr(os, "close", checked)
        patch.setattr(threading.Thread, "join", interrupted)
        with pytest.raises(KeyboardInterrupt):
            merge(place)
    assert len(joins) == 5
    assert closed
    assert not any(closed)
    assert beside(place / "merged") == INPUTS


def test_a_thread_stops_within_its_tensor_when_another_fails(tmp_path, monkeypatch):
    """Or Ctrl-C would take as long as the largest tensor."""
    size = {"layers": 1, "width": 1024, "rows": 8}  # 16 blocks each
    transactions.base(tmp_path / "base", **size)
    transactions.adapter(tmp_path / "adapter", **size)
    write, after = streaming._Stream._write, []

    def failing_late(stream, file, offset, data):
        if stream.failure is not None:
            after.append(offset)
        write(stream, file, offset, data)
        if offset > len(file.header):
            stream.failure = stream.failure or Stop()

    monkeypatch.setattr(streaming._Stream, "_write", failing_late)
    with pytest.raises(Stop):
        merge(tmp_path)
    assert len(after) <= streaming.cores()
    assert beside(tmp_path / "merged") == INPUTS


# ---------------------------------------------------------------- what is left behind


def leave(place, name=".merged.staging-0123abcd", files=("merged/model.safetensors",)):
    """Make a staging directory as a run leaves it that was killed."""
    staging = place / name
    for file in files:
        (staging / "files" / file).parent.mkdir(parents=True, exist_ok=True)
        (staging / "files" / file).write_text("half")
    (staging / "lock").touch()
    (staging / "journal").write_text("")
    return staging


@pytest.mark.parametrize("resume", [True, False])
def test_what_a_dead_run_left_is_removed(place, new, resume):
    leave(place)
    leave(place, ".merged.staging-00000000")
    (place / ".merged.staging-11111111").mkdir()  # killed before it had locked it
    merge(place, resume=resume)
    assert tree(place / "merged") == new
    assert beside(place / "merged") == INPUTS


def test_what_another_run_is_writing_is_left_alone(place, new):
    staging = leave(place)
    before = tree(staging)
    with (staging / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        merge(place)
        assert tree(staging) == before
    merge(place, overwrite=True)
    assert tree(place / "merged") == new
    assert beside(place / "merged") == INPUTS


FOREIGN = (
    ".merged.staging-notes", ".merged.staging-0123abcd.old", ".merged.staging-0123ABCD",
    ".merged.staging-", ".merged.2.staging-0123abcd", ".merge.staging-0123abcd",
    "merged.staging-0123abcd", ".merged.staging-x.staging-0123abcd", "merged.data",
)  # fmt: skip


@pytest.mark.parametrize("is_empty", [True, False])
def test_a_directory_of_a_similar_name_is_not_ours(place, is_empty):
    for name in FOREIGN:
        (place / name).mkdir() if is_empty else leave(place, name)
    before = {name: tree(place / name) for name in FOREIGN}
    for _ in range(2):
        merge(place, overwrite=True)
    assert {name: tree(place / name) for name in FOREIGN} == before
    assert beside(place / "merged") == sorted([*INPUTS, *FOREIGN])


def test_what_has_the_name_and_no_lock_is_not_ours(place):
    (place / ".merged.staging-0123abcd").mkdir()
    (place / ".merged.staging-0123abcd" / "diary").write_text("dear")
    merge(place)
    assert tree(place / ".merged.staging-0123abcd").keys() == {"diary"}


def test_a_link_to_a_staging_directory_is_not_followed(place):
    elsewhere = leave(place / "elsewhere", "kept")
    before = tree(elsewhere)
    (place / ".merged.staging-0123abcd").symlink_to(elsewhere)
    merge(place)
    assert tree(elsewhere) == before


def test_a_disk_that_knows_no_locks_is_written_to(place, monkeypatch, new):
    def unknown(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unknown)
    staging = leave(place)
    merge(place)
    assert tree(place / "merged") == new
    assert stagings(place) == [staging]  # nothing tells whether it is in use


def test_a_directory_that_vanishes_while_it_is_looked_at_is_passed_over(place, new, monkeypatch):
    """Two runs find the same leftover: one removes it, and then the other gets the lock."""
    staging = leave(place)
    flock = fcntl.flock

    def late(lock, operation):
        if staging.exists() and os.path.samestat(os.fstat(lock), (staging / "lock").stat()):
            shutil.rmtree(staging)
        flock(lock, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    merge(place, resume=True)
    assert tree(place / "merged") == new
    assert beside(place / "merged") == INPUTS


def test_a_refused_run_keeps_no_lock(place, old):
    leave(place)
    with (
        pytest.raises(InputError, match="exists"),
        publishing.staged(place / "merged"),
    ):
        pytest.fail("the block ran")
    merge(place, overwrite=True)
    assert beside(place / "merged") == INPUTS


# ---------------------------------------------------------------- killed while it publishes


@pytest.mark.parametrize(
    ("kind", "exchange", "is_old"),
    [("folder", True, True)]
    + [(kind, False, is_old) for kind in ("file", "graph", "folder") for is_old in (True, False)],
)
def test_a_publish_that_is_killed_anywhere_is_put_right_by_the_next_run(
    tmp_path, kind, exchange, is_old
):
    words = [str(tmp_path), kind, *("yes" if option else "no" for option in (exchange, is_old))]
    found = subprocess.run(
        [sys.executable, transactions.__file__, *words], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    assert int(found.stdout) > 20


@pytest.mark.parametrize("call", [1, 2])
def test_a_merge_that_is_killed_between_two_renames_is_put_right(place, old, new, call):
    no_exchange = "publishing._exchange = lambda *_: False\n"
    killed(place, "--overwrite", prelude=no_exchange + died_at("os.rename", call, before=False))
    if call == 1:
        assert tree(place / "merged") is None
    # The old one is back before anything else is decided.
    with pytest.raises(InputError, match="exists"), publishing.staged(place / "merged"):
        pytest.fail("the block ran")
    assert tree(place / "merged") == (old if call == 1 else new)
    assert run(place, "--overwrite")[0] == 0
    assert tree(place / "merged") == new
    assert beside(place / "merged") == INPUTS


def test_what_cannot_be_put_back_at_once_is_kept_for_the_next_run(place, old, new, monkeypatch):
    """The disk fails after the old output was moved aside, and stays so until the run is over."""
    rename, calls = os.rename, itertools.count(1)

    def failing_from_the_second_on(*names):
        if next(calls) > 1:
            raise OSError(errno.EIO, "Input/output error")
        rename(*names)

    with monkeypatch.context() as patch:
        patch.setattr(publishing, "_exchange", lambda *_: False)
        patch.setattr(os, "rename", failing_from_the_second_on)
        with pytest.raises(InputError, match="Input/output error"):
            merge(place, overwrite=True)
    assert tree(place / "merged") is None
    with pytest.raises(InputError, match="exists"), publishing.staged(place / "merged"):
        pytest.fail("the block ran")
    assert tree(place / "merged") == old
    merge(place, overwrite=True)
    assert tree(place / "merged") == new
    assert beside(place / "merged") == INPUTS


@pytest.mark.parametrize("resume", [True, False])
def test_a_merge_that_is_killed_after_the_exchange_is_put_right(place, old, new, resume):
    killed(place, "--overwrite", prelude=died_at("publishing._exchange", 1, before=False))
    assert tree(place / "merged") == new
    (staging,) = stagings(place)
    assert tree(staging / "files" / "merged") == old
    merge(place, overwrite=True, resume=resume)
    assert tree(place / "merged") == new
    assert beside(place / "merged") == INPUTS


def test_what_was_replaced_long_ago_is_not_put_back(place, new):
    """A run was killed while it cleaned up, and another one goes on in what it left."""
    staging = leave(place, files=("../replaced/merged/one",))
    for name in ("files", "placed"):
        (staging / name).mkdir(exist_ok=True)
    killed(place, "--resume", prelude=PARTLY)
    assert stagings(place) == [staging]
    merge(place, resume=True)
    assert tree(place / "merged") == new
    assert beside(place / "merged") == INPUTS


@pytest.mark.parametrize("call", [1, 2])
def test_a_resumed_run_takes_nothing_of_an_output_that_was_replaced(place, new, call):
    """It lies where the killed run wrote; other files may have links to it, too."""
    transactions.base(place / "sharded", shards=3, tokenizer="{}")
    merged_files.merge_files(place / "adapter", base=str(place / "sharded"), out=place / "merged")
    (place / "merged" / "notes").mkdir()
    shutil.copytree(place / "merged", place / "linked", copy_function=os.link)
    (place / "linked.safetensors").write_text("mine")
    (place / "merged" / "model.safetensors").symlink_to(place / "linked.safetensors")
    linked = tree(place / "linked")
    killed(place, "--overwrite", prelude=died_at("publishing._exchange", 1, before=call == 1))
    merge(place, overwrite=True, resume=True)
    assert tree(place / "merged") == new
    assert tree(place / "linked") == linked
    assert (place / "linked.safetensors").read_text() == "mine"
    assert not stagings(place)


# ---------------------------------------------------------------- two runs at once


def both(place, *options, adapters=("adapter", "adapter")):
    runs = [
        started(place / name, place / "base", place / "merged", *options, prelude=SLOW)
        for name in adapters
    ]
    errors = [process.communicate(timeout=60)[1] for process in runs]
    return [process.returncode for process in runs], errors


def test_of_two_runs_with_one_output_one_wins(made, place, new):
    shutil.copytree(made / "other", place / "other")
    codes, errors = both(place, adapters=("adapter", "other"))
    assert sorted(codes) == [0, 2], errors
    winner = "adapter" if codes[0] == 0 else "other"
    assert tree(place / "merged") == tree(made / f"merged of {winner}")
    loser = errors[codes.index(2)]
    assert loser.count("\n") == 1
    assert "exists; choose another name, or pass --overwrite" in loser
    assert beside(place / "merged") == [*INPUTS, "other"]


@pytest.mark.parametrize("is_old", [True, False])
@pytest.mark.parametrize("options", [(), ("--resume",)])
def test_two_runs_that_overwrite_do_not_mix(made, place, is_old, options):
    shutil.copytree(made / "other", place / "other")
    if is_old:
        shutil.copytree(made / "merged of other", place / "merged")
    codes, errors = both(place, "--overwrite", *options, adapters=("adapter", "other"))
    assert codes == [0, 0], errors
    results = [tree(made / f"merged of {name}") for name in ("adapter", "other")]
    assert tree(place / "merged") in results
    assert beside(place / "merged") == [*INPUTS, "other"]


@pytest.mark.parametrize("overwrite", [True, False])
def test_another_run_that_is_quicker_by_a_moment_does_not_mix(
    made, place, new, monkeypatch, overwrite
):
    replace = os.replace

    def late(*names):
        shutil.copytree(made / "merged of other", place / "merged")
        replace(*names)

    monkeypatch.setattr(os, "replace", late)
    with contextlib.nullcontext() if overwrite else pytest.raises(InputError, match="exists"):
        merge(place, overwrite=overwrite)
    assert tree(place / "merged") == (new if overwrite else tree(made / "merged of other"))
    assert beside(place / "merged") == INPUTS


# ---------------------------------------------------------------- resumed


def test_a_resumed_run_gives_the_same_bytes_and_computes_less(made, place, new, monkeypatch):
    interrupted(made, place, PARTLY)
    assert tree(place / "merged") is None
    computed = Computed(monkeypatch)
    merge(place, resume=True)
    assert tree(place / "merged") == new
    assert 1 <= len(computed) <= TENSORS - 6
    assert beside(place / "merged") == INPUTS


def test_a_run_that_was_killed_without_resume_is_resumed_as_well(place, new, monkeypatch):
    killed(place, prelude=PARTLY)
    computed = Computed(monkeypatch)
    merge(place, resume=True)
    assert tree(place / "merged") == new
    assert len(computed) <= TENSORS - 6


def test_without_resume_everything_is_computed(made, place, new, monkeypatch):
    interrupted(made, place, PARTLY)
    computed = Computed(monkeypatch)
    merge(place)
    assert tree(place / "merged") == new
    assert len(computed) == TENSORS


def test_it_is_killed_and_resumed_until_it_is_done(place, new):
    """Each run makes one tensor more."""
    prelude = died_at("streaming._Stream._note", 2, before=False)
    codes = [run(place, "--resume", prelude=prelude)[0] for _ in range(5)]
    assert codes[0] == KILLED
    assert codes[-1] == 0
    assert tree(place / "merged") == new
    assert beside(place / "merged") == INPUTS


EARLY = {
    "in the middle of reserving room": died_at("os.posix_fallocate", 1, before=False),
    "before it reserved room": died_at("os.posix_fallocate", 1),
    "before any journal line": died_at("streaming._Stream._note", 1),
    "at the first byte": died_at("os.pwrite", 1),
    "when all is written": died_at("storage.write_json", 1),
    "at its last file": died_at("storage.write_json", 3, before=False),
    "before it made a lock": died_at("os.mkdir", 2, before=False),
    "before it published": died_at("publishing._publish", 1),
}


@pytest.mark.parametrize("moment", EARLY)
def test_a_run_is_resumed_that_was_killed(place, new, moment, monkeypatch):
    killed(place, "--resume", prelude=EARLY[moment])
    computed = Computed(monkeypatch)
    merge(place, resume=True)
    assert tree(place / "merged") == new
    if moment == "at its last file":
        assert computed == []
    assert beside(place / "merged") == INPUTS


def other_adapter(place, made):
    shutil.rmtree(change(place, "adapter"))
    shutil.copytree(made / "other", place / "adapter")


def other_scale(place, made):
    config = change(place, "adapter") / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 4', '"lora_alpha": 8'))


def other_base(place, made):
    shutil.rmtree(change(place, "base"))
    transactions.base(place / "base", seed=1, **BESIDE)


def other_shards(place, made):
    shutil.rmtree(change(place, "base"))
    transactions.base(place / "base", shards=2, **BESIDE)


def no_tokenizer(place, made):
    (change(place, "base") / "tokenizer_config.json").unlink()


def other_tokenizer(place, made):
    (change(place, "base") / "tokenizer_config.json").write_text('{"a": 1}')


def other_dtype(place, made):
    return {"dtype": "float32"}


def other_size(place, made):
    return {"shard_size": "50KB"}


def other_alpha(place, made):
    return {"alpha": 2.0}


@pytest.mark.parametrize(
    ("changed", "kept"),
    [
        (other_adapter, 0),
        (other_scale, 0),
        (other_base, 0),
        (other_shards, 0),
        (other_dtype, 0),
        (other_size, 0),
        (no_tokenizer, TENSORS),
        (other_tokenizer, TENSORS),
    ],
)
def test_nothing_of_another_job_is_used_though_the_names_are_the_same(
    place, made, changed, kept, monkeypatch
):
    interrupted(made, place)
    options = changed(place, made) or {}
    computed = Computed(monkeypatch)
    merge(place, resume=True, **options)
    assert len(computed) == TENSORS - kept
    found = tree(place / "merged")
    merge(place, overwrite=True, **options)
    assert found == tree(place / "merged")
    assert not stagings(place)


def test_one_tensor_of_the_base_that_changed_is_made_again(made, place, monkeypatch):
    interrupted(made, place)
    checkpoint = storage.Checkpoint.open(change(place, "base"))
    name = "model.layers.2.self_attn.q_proj.weight"
    _flip(checkpoint.tensors[name].file, checkpoint.tensors[name].start + 7)
    computed = Computed(monkeypatch)
    merge(place, resume=True)
    assert computed == [name]
    found = tree(place / "merged")
    merge(place, overwrite=True)
    assert found == tree(place / "merged")


def _flip(file, offset):
    with file.open("r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)[0]
        stream.seek(offset)
        stream.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("step", ["q_proj", "k_proj"], ids=["computed", "copied"])
def test_a_tensor_that_was_damaged_in_between_is_made_again(made, place, new, monkeypatch, step):
    interrupted(made, place)
    (staging,) = stagings(place)
    name = f"model.layers.1.self_attn.{step}.weight"
    info = storage.Checkpoint.open(staging / "files" / "merged").tensors[name]
    _flip(info.file, info.end - 1)
    computed = Computed(monkeypatch)
    merge(place, resume=True)
    assert computed == [name]
    assert tree(place / "merged") == new


def shorten(file):
    os.truncate(file, file.stat().st_size - 1000)


def lengthen(file):
    os.truncate(file, file.stat().st_size + 1000)


def empty(file):
    os.truncate(file, 0)


def remove(file):
    file.unlink()


def spoil_header(file):
    _flip(file, 9)


@pytest.mark.parametrize("spoilt", [shorten, lengthen, empty, remove, spoil_header])
def test_a_file_that_was_damaged_in_between_is_made_whole(made, place, new, spoilt):
    interrupted(made, place)
    (staging,) = stagings(place)
    spoilt(staging / "files" / "merged" / "model.safetensors")
    merge(place, resume=True)
    assert tree(place / "merged") == new


JOURNALS = {
    "cut off": lambda text: text[:-20],
    "gone": lambda text: "",
    "zeros": lambda text: "\0" * len(text),
    "not text": lambda text: "\udcff\udcfe" + text,
    "other values": lambda text: '7\n{"a": 1}\n["x"]\n[1, 2, 3]\nnull\n"abc"\n[[], {}, 0]\n' + text,
    "lines in another order": lambda text: "\n".join(reversed(text.splitlines())) + "\n",
    "all say the same": lambda text: "\n".join(
        line.partition(",")[0] + "," + text.splitlines()[0].partition(",")[2]
        for line in text.splitlines()
    ),
}


@pytest.mark.parametrize("damage", JOURNALS)
@pytest.mark.parametrize("file", ["journal", "journal.key"])
def test_a_damaged_journal_is_survived(made, place, new, file, damage):
    interrupted(made, place)
    (staging,) = stagings(place)
    text = (staging / file).read_text()
    changed = JOURNALS[damage](text).encode("utf-8", "surrogateescape")
    (staging / file).write_bytes(changed)
    merge(place, resume=True)
    assert tree(place / "merged") == new
    assert beside(place / "merged") == INPUTS


def test_a_run_of_other_options_that_is_killed_leaves_nothing_for_the_first(made, place, new):
    interrupted(made, place)
    killed(
        place,
        "--resume",
        "--dtype",
        "float32",
        prelude=died_at("streaming._Stream._note", 5, before=False),
    )
    merge(place, resume=True)
    assert tree(place / "merged") == new


# ---------------------------------------------------------------- Ctrl-C and SIGTERM

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


def stopped(place, number, *options, times=1):
    """Send a signal when one tensor is written; return the exit code and stderr."""
    # A shell that runs the tests in the background has its children ignore Ctrl-C.
    prelude = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n{SLOW}"
    process = started(
        place / "adapter", place / "base", place / "merged", *options, prelude=prelude
    )
    with process:
        assert process.stdout.readline().startswith("one")
        for _ in range(times):
            process.send_signal(number)
            time.sleep(0.02)
        _, errors = process.communicate(timeout=60)
    return process.returncode, errors


@pytest.mark.parametrize("number", CODES)
def test_an_impatient_stop_harms_nothing_either(place, old, new, number):
    """The second signal may come while it cleans up, the third when Python no longer listens."""
    code, _ = stopped(place, number, "--overwrite", times=3)
    assert code in (CODES[number], -number)
    assert tree(place / "merged") == old
    merge(place, overwrite=True)
    assert tree(place / "merged") == new
    assert beside(place / "merged") == INPUTS


@pytest.mark.parametrize("number", CODES)
def test_a_polite_stop_leaves_nothing(place, old, number):
    code, errors = stopped(place, number, "--overwrite")
    assert code == CODES[number]
    assert "Traceback" not in errors
    assert tree(place / "merged") == old
    assert beside(place / "merged") == INPUTS


@pytest.mark.parametrize("number", CODES)
def test_a_polite_stop_of_a_run_to_be_resumed_leaves_what_it_did(place, new, number, monkeypatch):
    code, errors = stopped(place, number, "--resume")
    assert code == CODES[number]
    assert "Traceback" not in errors
    assert tree(place / "merged") is None
    assert len(stagings(place)) == 1
    computed = Computed(monkeypatch)
    merge(place, resume=True)
    assert len(computed) < TENSORS
    assert tree(place / "merged") == new
    assert beside(place / "merged") == INPUTS


# ---------------------------------------------------------------- odd places


def test_a_folder_that_was_made_for_the_output_goes_with_it(place, monkeypatch):
    failing(monkeypatch, "pwrite", 3, ERRORS["no space"])
    with pytest.raises(InputError, match="No space left on device"):
        merged_files.merge_files(
            place / "adapter", base=str(place / "base"), out=place / "a" / "b" / "merged"
        )
    assert not (place / "a").exists()


def test_an_output_that_is_a_link_is_replaced_and_what_it_points_to_is_not(place, made, new):
    shutil.copytree(made / "merged of other", place / "store")
    (place / "merged").symlink_to(place / "store")
    before = tree(place / "store")
    merge(place, overwrite=True)
    assert not (place / "merged").is_symlink()
    assert tree(place / "merged") == new
    assert tree(place / "store") == before
    assert beside(place / "merged") == [*INPUTS, "store"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_read_only_is_an_input_error(place):
    (place / "shut").mkdir(mode=0o555)
    with pytest.raises(InputError, match=r"cannot write .*Permission denied"):
        merged_files.merge_files(
            place / "adapter", base=str(place / "base"), out=place / "shut" / "merged"
        )
    assert not list((place / "shut").iterdir())


def test_an_older_output_with_folders_in_it_is_replaced_whole(place, old, new):
    (place / "merged" / "a" / "b").mkdir(parents=True)
    merge(place, overwrite=True)
    assert tree(place / "merged") == new
    assert beside(place / "merged") == INPUTS


# ---------------------------------------------------------------- many kills, full disks


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """A base of about 60 MB, whose merge takes about a second, and an older, small output."""
    folder = tmp_path_factory.mktemp("big")
    transactions.base(folder / "base", layers=7, width=1024, **BESIDE)
    transactions.adapter(folder / "adapter", layers=2, width=1024)
    transactions.base(folder / "small", shards=2, tokenizer="{}")
    transactions.adapter(folder / "other")
    merged_files.merge_files(folder / "other", base=str(folder / "small"), out=folder / "old")
    begun = time.monotonic()
    assert ran(folder / "adapter", folder / "base", folder / "new")[0] == 0
    return folder, time.monotonic() - begun


def _tell(counts):
    """Say what was done; `pytest -rP` shows it."""
    sys.stdout.write(f"{counts}\n")


@pytest.mark.slow
def test_of_300_kills_at_random_moments_each_leaves_the_old_or_the_new(big, tmp_path):
    folder, seconds = big
    dice = random.Random(SEED)
    old, new = tree(folder / "old"), tree(folder / "new")
    inputs = {name: tree(folder / name) for name in INPUTS}
    out, seen = tmp_path / "merged", Counter()
    for turn in itertools.count():
        is_over = turn % 3 == 0
        # Runs with --resume follow each other, so that one goes on where another came to.
        options = ["--overwrite"] * is_over + ["--resume"] * (turn // 15 % 2)
        if is_over and tree(out) != old:
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(folder / "old", out)
        elif not is_over:
            shutil.rmtree(out, ignore_errors=True)
        with started(folder / "adapter", folder / "base", out, *options) as process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=dice.uniform(0, seconds))
            process.kill()
        found = tree(out)
        state = "new" if found == new else "old" if found == old else found and "mixed"
        assert state in (("old", "new") if is_over else (None, "new")), (turn, found)
        assert {name: tree(folder / name) for name in INPUTS} == inputs, turn
        if process.returncode != KILLED:
            assert (process.returncode, state) == (0, "new"), turn
            seen["came too late"] += 1
            continue
        where = "staging" if stagings(tmp_path) else "no staging"
        seen[f"{where}, {state}"] += 1
        seen["kills"] += 1
        if seen["kills"] == KILLS:
            break
    _tell(f"seed {SEED}, {seconds:.2f} s a run: {dict(seen)}")
    code, errors = ran(folder / "adapter", folder / "base", out, "--overwrite")
    assert code == 0, errors
    assert tree(out) == new
    assert beside(out) == []
    assert seen["staging, None"] + seen["staging, old"] > KILLS / 2


NO_CHECK = "streaming._Stream._refuse_full_disk = lambda self: None\n"
NO_ROOM_SET_ASIDE = NO_CHECK + "streaming._reserve = lambda *_: None\n"
PRELUDES = ("", NO_CHECK, NO_ROOM_SET_ASIDE, NO_ROOM_SET_ASIDE)


@pytest.fixture
def disk(tmp_path):
    """A file system in memory; what it returns sets its size."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(*options):
        found = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(place)],
            capture_output=True,
            text=True,
        )
        if found.returncode:
            pytest.skip(f"nothing can be mounted here: {found.stderr.strip()}")
        mounted.append(place)

    def unmount():
        while mounted:
            subprocess.run(["umount", str(mounted.pop())], check=True)

    mounted = []
    yield place, mount, unmount
    unmount()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mount") is None, reason="nothing can be mounted here")
def test_of_50_full_disks_none_leaves_what_looks_finished(big, disk):
    folder, _ = big
    place, mount, unmount = disk
    dice = random.Random(SEED)
    old, new = tree(folder / "old"), tree(folder / "new")
    inputs = {name: tree(folder / name) for name in INPUTS}
    room_of_old, needed = _pages(folder / "old"), _pages(folder / "new")
    seen = Counter()
    for turn in range(FULL_DISKS):
        is_over, prelude = turn % 3 == 0, PRELUDES[turn % len(PRELUDES)]
        pages, files = dice.randrange(1, needed), 1000
        if turn % 10 == 9:  # the last, small files are too many
            pages = needed - dice.randrange(9)
        if turn % 10 == 8:  # so are files of any size
            pages, files = 2 * needed, dice.randrange(2, 9)
        if is_over:
            pages, files = pages + room_of_old, files + len(old) + 1
        mount(f"size={4096 * pages}", f"nr_inodes={files}")
        out = place / "merged"
        if is_over:
            shutil.copytree(folder / "old", out)
        options = ["--overwrite"] * is_over + ["--resume"] * (turn % 2)
        code, errors = ran(folder / "adapter", folder / "base", out, *options, prelude=prelude)
        found = tree(out)
        assert found == (old if is_over else None), (turn, code, errors)
        assert code == 2, (turn, errors)
        assert errors.startswith("Error: "), errors
        assert errors.count("\n") == 1, errors
        assert beside(out) == [], turn
        assert {name: tree(folder / name) for name in INPUTS} == inputs, turn
        seen["foreseen" if "needs" in errors else "survived"] += 1
        unmount()
    _tell(f"seed {SEED}: {dict(seen)}")
    assert seen["survived"] > FULL_DISKS / 2
    mount(f"size={4096 * 2 * needed}")
    assert ran(folder / "adapter", folder / "base", place / "merged")[0] == 0
    assert tree(place / "merged") == new


def _pages(folder):
    """How many pages of memory the files of a folder take."""
    return sum(-(-file.stat().st_size // 4096) for file in folder.iterdir())


WRITES = ("os.pwrite", "os.copy_file_range", "os.posix_fallocate", "os.fsync", "os.mkdir",
          "os.open", "os.rename", "os.unlink", "os.rmdir")  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("options", [("--overwrite",), ("--overwrite", "--resume")])
def test_a_merge_that_is_killed_at_every_call_is_old_or_new(made, place, new, options):
    before, kills = tree(made / "merged of other"), Counter()
    for name in WRITES:
        for call in itertools.count(1):
            if tree(place / "merged") != before:
                shutil.rmtree(place / "merged", ignore_errors=True)
                shutil.copytree(made / "merged of other", place / "merged")
            code, errors = run(place, *options, prelude=died_at(name, call))
            assert tree(place / "merged") in (before, new), (name, call)
            if code == 0:
                break
            assert code == KILLED, errors
            kills[name] += 1
    _tell(str(dict(kills)))
    shutil.rmtree(place / "merged")
    merge(place)
    assert tree(place / "merged") == new
    assert beside(place / "merged") == INPUTS
