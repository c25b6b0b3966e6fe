"""Write aside, then publish in one step: an output is what it was before, or complete.

Everything that this package writes for its user goes through here. A run writes into a staging
directory beside its output and holds a lock on it. The lock goes with the process, so that the
next run can tell what a killed one left behind from what another one is writing right now.
"""

import contextlib
import ctypes
import errno
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

from lora_export.errors import InputError

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # no locks there: what a killed run left behind stays
    fcntl = None

STAGING = ".staging-"
LOCK = "lock"
FILES = "files"  # what is to be published
REPLACED = "replaced"  # what stood where the output goes
PLACED = "placed"  # an empty file for each entry of FILES that may have been moved out
# A directory is replaced only where one of these says that we wrote it.
MARKS = ("lora_export.json", "certificate.json", "tuning.json")
# What an exporter may leave beside its file; gone with the file that it belonged to.
COMPANION = ".data"
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
_HERE = -100  # AT_FDCWD
_EXCHANGE = 2  # RENAME_EXCHANGE on Linux, RENAME_SWAP on macOS


def check_output(
    out: Path, *, overwrite: bool, directory: bool, inputs: Iterable[Path] = ()
) -> None:
    """Raise where writing `out` would destroy something that is not an earlier output.

    Raises:
        InputError: `out` has no name of its own, exists without `overwrite`, is of the other kind
            (file or directory), is a directory that this package did not write, or is or contains
            one of `inputs`.
    """
    if out.name in ("", ".."):
        raise InputError(f"the output {str(out)!r} needs a name of its own")
    refuse_existing(out, overwrite=overwrite)
    if not _exists(out):
        return
    if directory != out.is_dir():
        raise InputError(f"{out} is {'a file' if directory else 'a directory'}; remove it first")
    if directory and not any((out / mark).is_file() for mark in MARKS):
        raise InputError(f"{out} was not written by lora-export, so it is not replaced")
    place = out.resolve()
    for given in inputs:
        if place in (given.resolve(), *given.resolve().parents):
            raise InputError(f"{out} holds the input {given.name}, so it is not replaced")


def refuse_existing(out: Path, *, overwrite: bool) -> None:
    """Raise `InputError` when `out` exists and may not be replaced."""
    if not overwrite and _exists(out):
        raise InputError(f"{out} exists; choose another name, or pass --overwrite")


@contextlib.contextmanager
def staged(out: Path, *, overwrite: bool = False, resume: bool = False) -> Iterator[Path]:
    """Give a path to write a file or directory to; bring it to `out` at the end.

    The path lies in a folder `files` of a staging directory beside `out`. When the block raises,
    all of it is removed and `out` is as it was, byte for byte. Whatever else the block leaves in
    `files` is published too: the data file of an ONNX graph. The data file of a replaced graph
    goes with it. What a killed run left behind is removed first; with `resume` its staging
    directory is used again, with what lies in it, and an interrupted run leaves its own.

    Raises:
        InputError: `out` exists and `overwrite` is false, its parent cannot be written, or the
            disk is full or fails.
    """
    with _as_input_error(out):
        parent = out.parent.resolve()
        made = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    staging, lock, is_kept = None, None, False
    left: list[tuple[Path, int]] = []
    try:
        with _as_input_error(out):
            left.extend(_left_behind(parent, out.name))
        refuse_existing(out, overwrite=overwrite)
        with _as_input_error(out):
            parent.mkdir(parents=True, exist_ok=True)
            staging, lock = left.pop() if left and resume else _new_staging(parent, out.name)
            while left:
                _remove(*left.pop())
            files = staging / FILES
            files.mkdir(exist_ok=True)
        try:
            yield files / out.name
            with _as_input_error(out):
                _sync(files)
        except OSError as error:
            if error.errno in _DISK_ERRORS:
                raise InputError(f"cannot write {out}: {error.strerror}") from error
            raise
        except BaseException as error:  # Ctrl-C and SIGTERM are no Exception
            is_kept = resume and not isinstance(error, Exception)
            raise
        with _as_input_error(out):
            # Once the old output may lie in `files`, no later run may go on from there.
            for entry in staging.iterdir():
                if entry.name not in (LOCK, FILES):
                    remove(entry)
            _publish(files, parent / out.name, overwrite=overwrite)
            _sync_folder(parent)
    finally:
        for _, other in left:
            os.close(other)
        if lock is not None and is_kept:
            os.close(lock)
        elif staging is not None and lock is not None:
            _remove(staging, lock)
        _remove_empty(made)


def journal_of(path: Path) -> Path:
    """Return where a run that got `path` from `staged` can write down how far it came."""
    return path.parent.parent / "journal"


# ---------------------------------------------------------------- staging directories


def _new_staging(parent: Path, name: str) -> tuple[Path, int]:
    """Make a staging directory; return it with the lock on it."""
    while True:
        staging = parent / f".{name}{STAGING}{secrets.token_hex(4)}"
        staging.mkdir()
        try:
            lock = os.open(staging / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # another run took it for a leftover
            continue
        except BaseException:
            staging.rmdir()
            raise
        if _locked(lock) is not False and os.fstat(lock).st_nlink:
            return staging, lock
        os.close(lock)


def _left_behind(parent: Path, name: str) -> Iterator[tuple[Path, int]]:
    """Lock and return the staging directories of runs that are gone; put back what they moved."""
    if fcntl is None or not parent.is_dir():
        return
    ours = re.compile(re.escape(f".{name}{STAGING}") + "[0-9a-f]{8}")
    for staging in sorted(parent.iterdir()):
        if not ours.fullmatch(staging.name) or staging.is_symlink() or not staging.is_dir():
            continue
        with contextlib.suppress(OSError):
            staging.rmdir()  # killed before it had written anything
            continue
        try:
            lock = os.open(staging / LOCK, os.O_RDWR | os.O_NOFOLLOW)
        except OSError:
            continue  # not one of ours
        # Another run may be writing, or have removed it just now.
        if not _locked(lock) or not os.fstat(lock).st_nlink:
            os.close(lock)
            continue
        try:
            _put_back(staging)
        except BaseException:
            os.close(lock)
            raise
        yield staging, lock


def _locked(lock: int) -> bool | None:
    """Return whether the lock is ours now; None where this disk knows no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _put_back(staging: Path) -> None:
    """Undo what a failed or killed run moved, unless it was done: the output itself comes last."""
    files, replaced, placed = (staging / name for name in (FILES, REPLACED, PLACED))
    parent, name = staging.parent, staging.name[1:].rpartition(STAGING)[0]
    if not replaced.is_dir():
        return
    if _exists(files / name):
        for mark in placed.iterdir():
            if not _exists(files / mark.name) and _exists(parent / mark.name):
                (parent / mark.name).rename(files / mark.name)
        for old in replaced.iterdir():
            if not _exists(parent / old.name):
                old.rename(parent / old.name)
    shutil.rmtree(replaced, ignore_errors=True)


def _remove(staging: Path, lock: int) -> None:
    """Remove a staging directory; its lock last, or others would not know it for one."""
    try:
        with contextlib.suppress(OSError):
            _put_back(staging)
            for entry in staging.iterdir():
                if entry.name != LOCK:
                    remove(entry)
            (staging / LOCK).unlink()
            staging.rmdir()
    finally:
        os.close(lock)


def remove(path: Path) -> None:
    """Remove a file, or a directory and all in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


# ---------------------------------------------------------------- one step


def _publish(files: Path, out: Path, *, overwrite: bool) -> None:
    """Move every entry of `files` beside `out`, the one named like `out` last.

    One entry takes one step. Where it takes several, what stands there is put aside first, and
    `_put_back` undoes them unless all of them were taken.
    """
    entries = sorted(files.iterdir(), key=lambda entry: (entry.name == out.name, entry.name))
    targets = [out.parent / entry.name for entry in entries]
    for target in targets:
        refuse_existing(target, overwrite=overwrite)
    is_folder = any(entry.name == out.name and entry.is_dir() for entry in entries)
    beside = [] if is_folder else [_companion(out)]  # what stands beside a folder is not its own
    if len(entries) == 1 and not any(map(_exists, beside)):
        if _moved(entries[0], out):
            return
        refuse_existing(out, overwrite=overwrite)
        if _exchange(entries[0], out):
            return
    aside, placed = files.parent / REPLACED, files.parent / PLACED
    placed.mkdir()
    for entry in entries:
        (placed / entry.name).touch()
    aside.mkdir()
    for target in sorted({*targets, *beside}) if overwrite else ():
        if _exists(target):
            target.rename(aside / target.name)
    for entry, target in zip(entries, targets, strict=True):
        entry.rename(target)


def _moved(entry: Path, out: Path) -> bool:
    """Move `entry` to `out` unless a directory stands there; return whether it was moved."""
    if out.is_dir():
        return False
    try:
        entry.replace(out)
    except OSError:
        if out.is_dir():  # another run was quicker
            return False
        raise
    return True


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths change places in one step; return whether this system and disk can."""
    library = ctypes.CDLL(None)
    names = os.fsencode(one), os.fsencode(other)
    if sys.platform == "linux" and hasattr(library, "renameat2"):
        return bool(library.renameat2(_HERE, names[0], _HERE, names[1], _EXCHANGE) == 0)
    if sys.platform == "darwin" and hasattr(library, "renamex_np"):
        return bool(library.renamex_np(*names, _EXCHANGE) == 0)
    return False


def _sync(folder: Path) -> None:
    """Wait until everything below `folder` is on the disk: a rename must not overtake it."""
    for place, _, names in os.walk(folder):
        for name in names:
            handle = os.open(Path(place) / name, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        _sync_folder(Path(place))


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # some systems cannot sync a directory
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _companion(out: Path) -> Path:
    return out.with_name(out.name + COMPANION)


def _exists(path: Path) -> bool:
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise InputError(f"cannot use {path.name[:60]}: {error.strerror}") from error
    return True


@contextlib.contextmanager
def _as_input_error(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror or error}") from error


def _remove_empty(folders: Iterable[Path]) -> None:
    """Remove those of `folders`, innermost first, that were made for nothing."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()
