"""Write aside, then publish in one step: an output is what it was before, or complete.

Everything that this package writes for its user goes through here.
"""

import contextlib
import errno
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from lora_export.errors import InputError

STAGING = ".staging-"
# A directory is replaced only where one of these says that we wrote it.
MARKS = ("lora_export.json", "certificate.json")
# What an exporter may leave beside its file; gone with the file that it belonged to.
COMPANION = ".data"
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


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
def staged(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a path beside `out` to write a file or directory to; rename it to `out` at the end.

    When the block raises, what was written is removed and `out` is as it was, byte for byte.
    Whatever else the block leaves beside the staged path is published too: the data file of an
    ONNX graph. The data file of a replaced graph goes with it.

    Raises:
        InputError: `out` exists and `overwrite` is false, its parent cannot be written, or the
            disk is full.
    """
    refuse_existing(out, overwrite=overwrite)
    with _as_input_error(out):
        parent = out.parent.resolve()
        staging = parent / f".{out.name}{STAGING}{secrets.token_hex(4)}"
        made = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    try:
        with _as_input_error(out):
            staging.mkdir(parents=True)
        try:
            yield staging / out.name
        except OSError as error:
            if error.errno in _DISK_ERRORS:
                raise InputError(f"cannot write {out}: {error.strerror}") from error
            raise
        with _as_input_error(out):
            _publish(staging, parent / out.name, overwrite=overwrite)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        _remove_empty(made)


def _publish(staging: Path, out: Path, *, overwrite: bool) -> None:
    """Move every entry of `staging` beside `out`, the one named like `out` last.

    What stands there is put aside first, and put back where a move fails.
    """
    entries = sorted(staging.iterdir(), key=lambda entry: (entry.name == out.name, entry.name))
    targets = [out.parent / entry.name for entry in entries]
    for target in targets:
        refuse_existing(target, overwrite=overwrite)
    if len(entries) == 1 and not out.is_dir() and not _companion(out).exists():
        entries[0].replace(out)  # a single file needs no instant without one
        return
    aside = staging / f"{STAGING}replaced"
    aside.mkdir()
    replaced, placed = [], []
    try:
        for target in {*targets, _companion(out)} if overwrite else ():
            if _exists(target):
                target.rename(aside / target.name)
                replaced.append(target)
        for entry, target in zip(entries, targets, strict=True):
            entry.rename(target)
            placed.append((entry, target))
    except OSError:
        for entry, target in placed:
            target.rename(entry)
        for target in replaced:
            (aside / target.name).rename(target)
        raise


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
