"""Safetensors files read lazily and written in one pass; digests.

All reading of untrusted tensor files goes through here.
No torch: a tensor is its bytes, its dtype's name and its shape.
Source of the file layout: the safetensors format description (8-byte little-endian header length,
JSON header, then the tensors' bytes).
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from blake3 import blake3

from lora_export.errors import InputError, listed
from lora_export.records import Array, FileDigest, Fingerprint

# safetensors' name -> bytes per element
DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
_NUMPY = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2",
    "I8": "i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?",
}  # fmt: skip
_NAMES = {np.dtype(code): name for name, code in _NUMPY.items()}
_NAMES[np.dtype(ml_dtypes.bfloat16)] = "BF16"
MOST_HEADER_BYTES = 100_000_000  # the limit of the reference implementation
MOST_AXES = 32  # of a numpy array
LFS_POINTER = b"version https://git-lfs"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_PIECE = 2**20  # bytes hashed at a time
TENSORS = "blake3-tensors"  # name of the digest of a safetensors file


# ---------------------------------------------------------------- reading


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor's bytes lie."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    def read(self, start: int = 0, stop: int | None = None) -> bytes:
        """Return the tensor's bytes, or those from `start` to `stop`."""
        end = self.end if stop is None else self.start + stop
        with self.file.open("rb") as stream:
            stream.seek(self.start + start)
            return stream.read(end - self.start - start)

    def array(self) -> Array:
        """Return the tensor as a numpy array; bfloat16 is widened to float32, which is exact."""
        if self.dtype == "BF16":
            wide = self._raw("<u2").astype("<u4") << np.uint32(16)
            return wide.view("<f4")
        return self.stored()

    def stored(self) -> Array:
        """Return the tensor as a numpy array of its own dtype."""
        if self.dtype == "BF16":
            return self._raw("<u2").view(ml_dtypes.bfloat16)
        if self.dtype not in _NUMPY:
            raise InputError(f"{self.name}: cannot compute with tensors of dtype {self.dtype}")
        return self._raw(_NUMPY[self.dtype])

    def part(self, start: int, stop: int) -> Array:
        """Return elements `start` to `stop`, in one row, as `array` would."""
        size = DTYPE_BYTES[self.dtype]
        place = (self.start + start * size, self.start + stop * size)
        return TensorInfo(self.name, self.dtype, (stop - start,), self.file, *place).array()

    def _raw(self, code: str) -> Array:
        count = math.prod(self.shape)
        return np.fromfile(self.file, code, count, offset=self.start).reshape(self.shape)


def dtype_name(array: Array) -> str:
    """Return safetensors' name of the dtype of `array`."""
    return _NAMES[array.dtype]


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Return the tensors of the safetensors file at `path`, and its metadata.

    Raises:
        InputError: there is no such file, or it is not a complete safetensors file.
    """
    refuse_pointer(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            head = stream.read(8)
            length = int.from_bytes(head, "little")
            if len(head) < 8 or length > min(size - 8, MOST_HEADER_BYTES):
                raise InputError(f"{path} is not a safetensors file, or it is truncated")
            header = json.loads(
                stream.read(length),
                object_pairs_hook=_once,
                parse_int=_within_range,
                parse_float=_no_number,
                parse_constant=_no_number,
            )
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(
            isinstance(text, str) for text in metadata.values()
        ):
            raise InputError(f"{path}: the safetensors metadata is damaged")
        tensors = {
            name: _tensor_info(path, name, entry, 8 + length) for name, entry in header.items()
        }
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: the safetensors header is damaged") from error
    _check_extent(path, tensors.values(), 8 + length, size)
    return tensors, metadata


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object; a key that comes twice is no valid header."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key comes twice")
    for name in found:
        name.encode()  # raises where half a character stands alone
    return found


def _within_range(text: str) -> int:
    number = int(text)
    if abs(number) >= 2**63:
        raise ValueError(f"{text[:40]} is out of range")
    return number


def _no_number(text: str) -> float:
    raise ValueError(f"{text[:40]} is no number that a header holds")


def _tensor_info(path: Path, name: str, entry: Mapping[str, Any], data: int) -> TensorInfo:
    start, end = entry["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (start, end, *entry["shape"])):
        raise InputError(f"{path}: {name} has a shape or a place that is no whole number")
    if len(entry["shape"]) > MOST_AXES or math.prod(n or 1 for n in entry["shape"]) >= 2**63:
        raise InputError(f"{path}: {name} has a shape that no array can have")
    info = TensorInfo(name, entry["dtype"], tuple(entry["shape"]), path, data + start, data + end)
    if info.dtype not in DTYPE_BYTES:
        raise InputError(f"{path}: {name} has the unknown dtype {info.dtype}")
    if info.end - info.start != math.prod(info.shape) * DTYPE_BYTES[info.dtype]:
        raise InputError(f"{path}: the length of {name} does not fit its shape and dtype")
    return info


def _check_extent(path: Path, tensors: Iterable[TensorInfo], start: int, size: int) -> None:
    """Raise unless the tensors cover the rest of the file without a gap or an overlap."""
    for info in sorted(tensors, key=lambda info: (info.start, info.end)):
        if info.start != start:
            raise InputError(f"{path}: {info.name} overlaps its neighbour or leaves a gap")
        start = info.end
    if start != size:
        raise InputError(f"{path} is truncated or too long: {size} bytes, expected {start}")


@dataclass(frozen=True)
class Checkpoint:
    """A directory of safetensors shards, headers read, bytes left on disk."""

    root: Path
    tensors: Mapping[str, TensorInfo]
    shards: tuple[str, ...]  # file names, in the order of the index
    metadata: Mapping[str, Mapping[str, str]]  # of each shard's header

    @classmethod
    def open(cls, root: Path) -> "Checkpoint":
        """Read the headers of the checkpoint in the directory `root`."""
        weight_map = _weight_map(root)
        shards = tuple(sorted(set(weight_map.values()))) or (SINGLE,)
        tensors: dict[str, TensorInfo] = {}
        metadata = {}
        for shard in shards:
            found, metadata[shard] = read_header(root / shard)
            if twice := tensors.keys() & found.keys():
                raise InputError(listed(f"{root}: in two shards at once", twice))
            tensors |= found
        if absent := [n for n, shard in weight_map.items() if _is_absent(tensors, n, shard)]:
            raise InputError(listed(f"{root}: in the index, and not in the shard it names", absent))
        return cls(root, tensors, shards, metadata)


def _is_absent(tensors: Mapping[str, TensorInfo], name: str, shard: str) -> bool:
    return name not in tensors or tensors[name].file.name != shard


def _weight_map(root: Path) -> dict[str, str]:
    """Return the shard of every tensor, or nothing where one file holds them all."""
    if (root / SINGLE).is_file():
        return {}
    index = root / INDEX
    if not index.is_file():
        pickled = sorted(file.name for file in root.glob("pytorch_model*.bin"))
        hint = f"; save {pickled[0]} as safetensors with save_pretrained first" if pickled else ""
        raise InputError(f"{root} has neither {SINGLE} nor {INDEX}{hint}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index} has no weight_map")
    found = {name: str(shard) for name, shard in weight_map.items()}
    if outside := {shard for shard in found.values() if Path(shard).name != shard}:
        raise InputError(listed(f"{index} names files outside of its directory", outside))
    return found


def refuse_pointer(path: Path) -> None:
    """Raise `InputError` where Git LFS left a pointer in place of the file, or there is none."""
    try:
        with path.open("rb") as stream:
            found = stream.read(len(LFS_POINTER))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # a name that no file can have
        raise InputError(f"cannot read {str(path)!r}: {error}") from error
    if found == LFS_POINTER:
        raise InputError(f"{path} is a Git LFS pointer, not the file; run `git lfs pull`")


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in the file at `path`; raises `InputError`."""
    value = _json(path)
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no JSON object")
    return value


def read_json_list(path: Path) -> list[dict[str, Any]]:
    """Return the list of JSON objects in the file at `path`; raises `InputError`."""
    value = _json(path)
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise InputError(f"{path} holds no list of JSON objects")
    return value


def _json(path: Path) -> Any:
    refuse_pointer(path)
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from error


# ---------------------------------------------------------------- digests


def sha256(path: Path) -> str:
    """Return the SHA-256 of the file at `path`, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_of(*files: Path) -> str:
    """Return one digest over several files, in the given order."""
    return hashlib.sha256("\n".join(map(sha256, files)).encode()).hexdigest()


def read_into(view: Array, handle: int, start: int) -> None:
    """Fill `view` with the bytes of an open file from `start` on.

    Raises:
        InputError: the file ends before that.
    """
    done = 0
    while done < len(view):
        count = os.preadv(handle, [view[done:].data], start + done)
        if count == 0:
            raise InputError("a file became shorter while it was read")
        done += count


def hash_of(handle: int, start: int, end: int) -> str:
    """Return the BLAKE3 hash of bytes `start` to `end` of an open file, in hexadecimal.

    Raises:
        InputError: the file ends before that.
    """
    found, buffer = blake3(), np.empty(min(_PIECE, end - start), np.uint8)
    for place in range(start, end, _PIECE):
        view = buffer[: end - place]
        read_into(view, handle, place)
        found.update(view.data)
    return str(found.hexdigest())


def digest(path: Path, name: str | None = None) -> FileDigest:
    """Return name, size and digest of the file at `path`.

    A safetensors file has the digest that `file_digest` describes, anything else its SHA-256.
    """
    if path.suffix == ".safetensors":
        with contextlib.suppress(InputError):  # damaged: then all of it counts
            tensors, _ = read_header(path)
            with path.open("rb") as stream, ThreadPoolExecutor() as pool:
                handle = stream.fileno()
                hashes = pool.map(lambda t: hash_of(handle, t.start, t.end), tensors.values())
                found = file_digest(path, dict(zip(tensors, hashes, strict=True)))
            return dataclasses.replace(found, name=name or path.name)
    return FileDigest(name or path.name, path.stat().st_size, f"sha256:{sha256(path)}")


def file_digest(path: Path, tensors: Mapping[str, str]) -> FileDigest:
    """Return the digest of the safetensors file at `path` from those of its `tensors`.

    It is the BLAKE3 hash over a line for the header and one for each tensor in the order of the
    file, each the BLAKE3 hash of its bytes. Cores share the work, a merge that copies a tensor
    hashes it once, and BLAKE3 is several times faster than SHA-256.
    """
    infos, _ = read_header(path)
    order = sorted(infos.values(), key=lambda info: (info.start, info.end))
    lines = [blake3(raw_header(path)).hexdigest(), *(tensors[info.name] for info in order)]
    found = blake3("\n".join(lines).encode()).hexdigest()
    return FileDigest(path.name, path.stat().st_size, f"{TENSORS}:{found}")


def digest_tree(root: Path, prefix: str = "") -> tuple[FileDigest, ...]:
    """Return the digests of all files below `root`, named by `prefix` and their relative path."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return tuple(digest(path, prefix + path.relative_to(root).as_posix()) for path in files)


def fingerprint(tensors: Iterable[tuple[str, str, Sequence[int], bytes]]) -> Fingerprint:
    """Return the digest over the sorted (name, dtype, shape, sha256 of bytes) of `tensors`."""
    lines, dtypes = [], set()
    for name, dtype, shape, data in tensors:
        lines.append(json.dumps([name, dtype, list(shape), hashlib.sha256(data).hexdigest()]))
        dtypes.add(dtype)
    text = "\n".join(sorted(lines))
    dtype_of_all = dtypes.pop() if len(dtypes) == 1 else None
    return Fingerprint(hashlib.sha256(text.encode()).hexdigest(), len(lines), dtype_of_all)


# ---------------------------------------------------------------- writing


@dataclass(frozen=True)
class NewTensor:
    """A tensor to write; `read` is called once, when its turn comes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], bytes]

    @classmethod
    def of(cls, name: str, array: Array) -> "NewTensor":
        """Return the tensor `name` with the value and dtype of `array`."""
        return cls(
            name, dtype_name(array), array.shape, lambda: np.ascontiguousarray(array).tobytes()
        )


def write_safetensors(path: Path, tensors: Sequence[NewTensor], metadata: Mapping[str, str]) -> int:
    """Write `tensors` in the given order, one in memory at a time; return their size in bytes.

    The same tensors and metadata give the same bytes.
    """
    entries = header_entries([(t.name, t.dtype, t.shape) for t in tensors])
    size = 0
    with path.open("wb") as stream:
        stream.write(header_bytes(entries, metadata))
        for tensor in tensors:
            data = tensor.read()
            start, size = entries[tensor.name]["data_offsets"]
            assert len(data) == size - start, tensor.name
            stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    return size


def header_entries(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> dict[str, Any]:
    """Return the header's entries for (name, dtype, shape), the tensors one after the other."""
    entries: dict[str, Any] = {}
    offset = 0
    for name, dtype, shape in tensors:
        end = offset + math.prod(shape) * DTYPE_BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    return entries


def header_bytes(entries: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    """Return the first bytes of a safetensors file, up to the data."""
    header = {"__metadata__": dict(sorted(metadata.items())), **entries}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # readers map the file and want aligned data
    return len(text).to_bytes(8, "little") + text


def raw_header(path: Path) -> bytes:
    """Return the first bytes of the safetensors file at `path`, up to the data."""
    with path.open("rb") as stream:
        head = stream.read(8)
        return head + stream.read(int.from_bytes(head, "little"))


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write `value` as indented JSON, keys in the given order."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    try:
        data = text.encode()
    except UnicodeEncodeError:  # half a character stands alone, and has to stay escaped
        data = (json.dumps(value, indent=2) + "\n").encode()
    path.write_bytes(data)
