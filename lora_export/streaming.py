"""Carry out a plan: read the base once, compute, write once, with all cores and little memory.

A worker takes a tensor, and reads, computes, hashes and writes it block by block, with one
arithmetic thread. What is not changed the kernel copies. Tensors are independent of each other, so
nothing waits, and the bytes depend on nothing but the inputs: not on workers, blocks, or a run that
was resumed.
"""

import contextlib
import errno
import itertools
import json
import os
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import threadpoolctl
from blake3 import blake3

from lora_export import blocks, rounding
from lora_export.arithmetic import scratch
from lora_export.blocks import BLOCK_BYTES, OutputFile
from lora_export.environment import cores
from lora_export.errors import InputError
from lora_export.plan import MergePlan, Step
from lora_export.records import Adapter, Array, FileDigest
from lora_export.storage import (
    Checkpoint,
    TensorInfo,
    file_digest,
    hash_of,
    read_header,
    read_into,
)

MOST_WORKERS = 16
COPY_BYTES = 2**24  # hashed, and then copied, at a time
# What tells that the kernel cannot copy between these two files.
_NO_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM)
Advance = Callable[[int, int], None]  # takes bytes written, and bytes in all


@dataclass(frozen=True)
class Written:
    """What was read and written, with digests that were taken on the way."""

    base: tuple[FileDigest, ...]  # the base's shards
    files: tuple[FileDigest, ...]  # the output's
    tensors: Mapping[str, str]  # digest of every tensor of the output
    seconds: Mapping[str, float]  # of reading, computing and writing; of waiting for the disk


def write(
    plan: MergePlan,
    adapter: Adapter,
    checkpoint: Checkpoint,
    files: tuple[OutputFile, ...],
    folder: Path,
    *,
    journal: Path | None = None,
    advance: Advance = lambda done, total: None,
) -> Written:
    """Write `files`, what `blocks.layout` returned for the plan, into `folder`, and sync them.

    Args:
        plan: From `lora_export.plan.plan`.
        adapter: What the plan was made for.
        checkpoint: What the plan was made for.
        files: To write.
        folder: An existing directory.
        journal: A file that says which tensors an interrupted run of the same job has written,
            and where this run writes it down; what it says is held against the bytes on disk.
        advance: Called as bytes are written.

    Raises:
        InputError: a merged weight is not finite or overflows its dtype (names tensor and count),
            the base changes while it is read, or the disk has too little room.
    """
    with threadpoolctl.threadpool_limits(1):
        return _Stream(plan, adapter, checkpoint, files, folder, journal, advance).run()


@dataclass(frozen=True)
class _Task:
    """One tensor of the output."""

    step: Step
    source: TensorInfo | None
    file: OutputFile
    offset: int  # in that file


@dataclass
class _Output:
    """An output file while it is written. Writers take turns: the system would make them spin."""

    handle: int
    left: int  # bytes
    lock: threading.Lock


class _Stream:
    """One run over all tensors."""

    def __init__(
        self,
        plan: MergePlan,
        adapter: Adapter,
        checkpoint: Checkpoint,
        files: tuple[OutputFile, ...],
        folder: Path,
        journal: Path | None,
        advance: Advance,
    ) -> None:
        self.plan, self.adapter, self.checkpoint = plan, adapter, checkpoint
        self.files, self.folder, self.advance = files, folder, advance
        self.known = _journaled(journal)
        self.journal = journal
        self.base: dict[str, int] = {}
        self.outputs: dict[str, _Output] = {}
        self.base_digests: dict[str, str] = {}
        self.digests: dict[str, str] = {}
        self.failure: BaseException | None = None
        self.syncing: list[Future[None]] = []
        self.lock = threading.Lock()
        self.done, self.total = 0, sum(file.size for file in files)

    def run(self) -> Written:
        self._refuse_full_disk()
        begun = time.perf_counter()
        try:
            with ThreadPoolExecutor(1) as self.syncer:
                self._open()
                opened = [_identity(os.fstat(handle)) for handle in self.base.values()]
                self._refuse_other_headers()
                self._refuse_other_files(opened)
                self._work_in_threads()
                self._refuse_other_files(opened)
                base = tuple(
                    file_digest(self.checkpoint.root / name, self.base_digests)
                    for name in self.checkpoint.shards
                )
                files = tuple(file_digest(self.folder / f.name, self.digests) for f in self.files)
                streamed = time.perf_counter()
                for future in self.syncing:
                    future.result()
            seconds = {"streaming": streamed - begun, "sync": time.perf_counter() - streamed}
            return Written(base, files, self.digests, seconds)
        finally:
            for handle in (*self.base.values(), *(o.handle for o in self.outputs.values())):
                os.close(handle)

    def _open(self) -> None:
        for name in self.checkpoint.shards:
            self.base[name] = os.open(self.checkpoint.root / name, os.O_RDONLY)
        for file in self.files:
            handle = os.open(self.folder / file.name, os.O_RDWR | os.O_CREAT, 0o666)
            self.outputs[file.name] = _Output(handle, file.size, threading.Lock())
            if os.fstat(handle).st_size > file.size:
                os.ftruncate(handle, file.size)
            _reserve(handle, file.size)
            self._write(file, 0, np.frombuffer(file.header, np.uint8))

    def _refuse_other_headers(self) -> None:
        """Raise unless the base still has the headers that the plan was made from."""
        found: dict[str, TensorInfo] = {}
        with contextlib.suppress(InputError):  # damaged, or gone
            for name in self.base:
                found |= read_header(self.checkpoint.root / name)[0]
        if found != self.checkpoint.tensors:
            raise self._changed()

    def _refuse_other_files(self, opened: "list[_Identity]") -> None:
        """Raise unless the base's names stand for the files that were opened, as they were."""
        try:
            now = [_identity((self.checkpoint.root / name).stat()) for name in self.base]
        except OSError as error:
            raise self._changed() from error
        if now != opened:
            raise self._changed()

    def _changed(self) -> InputError:
        return InputError(f"{self.checkpoint.root} changed while it was read")

    # ------------------------------------------------------------ workers

    def _tasks(self) -> Iterator[_Task | TensorInfo]:
        """Return all tasks, files in turn, so that workers mostly write to different ones.

        What the output does not use of the base is a task as well: it is hashed.
        """
        tensors = self.checkpoint.tensors
        rows: list[list[_Task | TensorInfo]] = [
            [
                _Task(step, tensors[step.source] if step.source else None, file, offset)
                for step, offset in file.places
            ]
            for file in self.files
        ]
        used = {step.source for step in self.plan.steps}
        rows.append([info for name, info in tensors.items() if name not in used])
        for tasks in itertools.zip_longest(*rows):
            yield from filter(None, tasks)

    def _work_in_threads(self) -> None:
        tasks: queue.SimpleQueue[_Task | TensorInfo] = queue.SimpleQueue()
        for task in self._tasks():
            tasks.put(task)
        count = min(cores(), MOST_WORKERS)
        threads = [threading.Thread(target=self._work, args=(tasks,)) for _ in range(count)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        except BaseException as error:  # Ctrl-C arrives here
            self.failure = error
        # No file may be closed while a thread writes to it. One that is yet to begin sees at once
        # that there is nothing to do.
        while running := [thread for thread in threads if thread.is_alive()]:
            try:
                running[0].join()
            except BaseException as error:  # Ctrl-C again
                self.failure = error
        if self.failure is not None:
            raise self.failure

    def _work(self, tasks: "queue.SimpleQueue[_Task | TensorInfo]") -> None:
        with contextlib.suppress(queue.Empty):
            while self.failure is None:
                try:
                    self._do(tasks.get_nowait())
                except queue.Empty:
                    raise
                except BaseException as error:
                    self.failure = self.failure or error

    def _stop_where_another_failed(self) -> None:
        if self.failure is not None:
            raise self.failure

    def _do(self, task: _Task | TensorInfo) -> None:
        if isinstance(task, TensorInfo):
            self.base_digests[task.name] = self._hash_of_base(task)
        elif self._is_done(task):
            self._wrote(task.file, task.step.size)
        else:
            made = blocks.computed(task.step, self.plan, self.adapter, self.checkpoint)
            if made is not None:
                self._compute(task, made)
            else:
                assert task.source is not None
                self._copy(task.source, task)
            self._note(task, task.step)

    def _copy(self, source: TensorInfo, task: _Task) -> None:
        """Hash the tensor, and have the kernel copy it, by reference where the file system can."""
        size, read = task.step.size, blake3()
        for first in range(0, size, COPY_BYTES):  # what was just read is still in memory
            last = min(first + COPY_BYTES, size)
            for place in range(first, last, BLOCK_BYTES):
                self._stop_where_another_failed()
                end = min(place + BLOCK_BYTES, last)
                read.update(self._read(source, source.start + place, end - place).data)
            done = first
            while done < last:
                done += self._copy_some(source, task.file, done, task.offset, last - done)
        self.base_digests[source.name] = self.digests[task.step.name] = read.hexdigest()

    def _copy_some(
        self, source: TensorInfo, file: OutputFile, place: int, offset: int, most: int
    ) -> int:
        """Copy up to `most` bytes from `place` in the tensor on; return how many."""
        output, count = self.outputs[file.name], 0
        try:
            with output.lock:
                count = os.copy_file_range(
                    self.base[source.file.name],
                    output.handle,
                    most,
                    source.start + place,
                    offset + place,
                )
        except AttributeError:  # no such call on this system
            pass
        except OSError as error:
            if error.errno not in _NO_COPY:
                raise
        if count == 0:  # by hand
            block = self._read(source, source.start + place, min(most, BLOCK_BYTES))
            self._put(output, offset + place, block)
            count = len(block)
        self._wrote(file, count)
        return count

    def _compute(self, task: _Task, made: blocks.Computed) -> None:
        read, written, bad = blake3(), blake3(), 0
        for block in made.blocks:
            self._stop_where_another_failed()
            raw = None
            if block.source is not None and made.source is not None:
                start, stop = block.source
                raw = self._read(made.source, start, stop - start)
                read.update(raw.data)
            data, count = block.make(raw)
            data = data.reshape(-1).view(np.uint8)
            bad += count
            written.update(data.data)
            self._write(task.file, task.offset + block.start, data)
        step = made.step
        if bad:
            size = int(np.prod(step.shape))
            raise InputError(f"{step.name}: {rounding.not_finite(bad, size, step.dtype)}")
        if made.source is not None:
            self.base_digests[made.source.name] = read.hexdigest()
        self.digests[step.name] = written.hexdigest()

    # ------------------------------------------------------------ bytes

    def _read(self, info: TensorInfo, start: int, size: int) -> Array:
        """Return bytes of the base, in memory that this thread's next call uses again."""
        view = scratch("read", size, np.uint8)
        read_into(view, self.base[info.file.name], start)
        return view

    def _hash_of_base(self, info: TensorInfo) -> str:
        return hash_of(self.base[info.file.name], info.start, info.end)

    def _write(self, file: OutputFile, offset: int, data: Array) -> None:
        self._put(self.outputs[file.name], offset, data)
        self._wrote(file, len(data))

    def _put(self, output: _Output, offset: int, data: Array) -> None:
        done = 0
        with output.lock:
            while done < len(data):
                done += os.pwrite(output.handle, data[done:].data, offset + done)

    def _wrote(self, file: OutputFile, size: int) -> None:
        """Count `size` bytes; while we go on, a file that is complete goes to the disk."""
        output = self.outputs[file.name]
        with self.lock:
            self.done += size
            output.left -= size
            if output.left == 0:
                self.syncing.append(self.syncer.submit(os.fsync, output.handle))
            self.advance(self.done, self.total)

    def _refuse_full_disk(self) -> None:
        there = [self.folder / file.name for file in self.files]
        needed = self.total - sum(f.stat().st_blocks * 512 for f in there if f.is_file())
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise InputError(
                f"the output needs {needed / 1e9:.2f} GB, and its disk has {free / 1e9:.2f} GB free"
            )

    # ------------------------------------------------------------ going on after a kill

    def _note(self, task: _Task, step: Step) -> None:
        """Write down that a tensor is complete."""
        if self.journal is None:
            return
        base = self.base_digests[task.source.name] if task.source is not None else None
        line = json.dumps([step.name, base, self.digests[step.name]]) + "\n"
        with self.lock, self.journal.open("a", encoding="utf-8") as stream:
            stream.write(line)

    def _is_done(self, task: _Task) -> bool:
        """Return whether the journal knows the tensor, and it and its source are as it says."""
        name, source = task.step.name, task.source
        if name not in self.known:
            return False
        base, digest = self.known[name]
        now = self._hash_of_base(source) if source is not None else None
        handle, end = self.outputs[task.file.name].handle, task.offset + task.step.size
        try:
            written = hash_of(handle, task.offset, end)
        except InputError:  # it was not written so far
            return False
        if (now, written) != (base, digest):
            return False
        if source is not None:
            self.base_digests[source.name] = str(now)
        self.digests[name] = written
        return True


_Identity = tuple[int, int, int, int]


def _identity(stat: os.stat_result) -> _Identity:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def _reserve(handle: int, size: int) -> None:
    """Have the file system set the room aside at once: quicker, and a full disk shows now."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(handle, 0, size)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise


def _journaled(journal: Path | None) -> dict[str, tuple[Any, Any]]:
    """Return the digests of source and output of the tensors that the journal knows, by name."""
    found: dict[str, tuple[Any, Any]] = {}
    if journal is None or not journal.is_file():
        return found
    for line in journal.read_text("utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, TypeError):  # the last line may be cut off
            name, base, digest = json.loads(line)
            found[str(name)] = (base, digest)
    return found
