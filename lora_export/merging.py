"""Merge: a plan into a directory that loads without any mention of LoRA."""

import dataclasses
import hashlib
from collections.abc import Mapping, Set
from importlib import metadata
from pathlib import Path
from typing import Any

from lora_export import blocks, companions, publishing, storage, streaming
from lora_export.companions import PROVENANCE
from lora_export.errors import InputError
from lora_export.plan import MERGE, MergePlan
from lora_export.records import Adapter, FileDigest
from lora_export.rounding import DTYPES
from lora_export.storage import Checkpoint
from lora_export.streaming import Advance, Written


def write_merged(
    plan: MergePlan,
    adapter: Adapter,
    checkpoint: Checkpoint,
    settings: Mapping[str, Any],
    out: Path,
    *,
    beside: Mapping[str, Path] | None = None,
    options: Mapping[str, Any] | None = None,
    shard_bytes: int | None = None,
    journal: Path | None = None,
    advance: Advance = lambda done, total: None,
) -> Written:
    """Carry out `plan`; return the digests of what was read and written.

    Shards keep names, order and metadata. The same inputs give the same bytes.

    Args:
        plan: From `lora_export.plan.plan`.
        adapter: What the plan was made for.
        checkpoint: What the plan was made for.
        settings: Fields of config.json that differ from the base's: architecture, labels, sizes.
        out: The directory to make.
        beside: Files that a user of the model needs beside the weights, by name; None takes the
            base's.
        options: What the caller chose, to be written down beside the digests.
        shard_bytes: Cut the weights into shards of at most this size; None keeps the base's.
        journal: See `streaming.write`.
        advance: See `streaming.write`.

    Raises:
        InputError: see `streaming.write`.
    """
    out.mkdir(exist_ok=journal is not None)
    files = blocks.layout(plan, checkpoint, shard_bytes)
    if journal is not None:
        job = (plan, adapter.sha256, options, [file.header for file in files])
        _for_this_job(journal, out, job, {file.name for file in files})
    written = streaming.write(
        plan, adapter, checkpoint, files, out, journal=journal, advance=advance
    )
    others = ["config.json"]
    if tuple(file.name for file in files) != (storage.SINGLE,):
        others.append(storage.INDEX)
        weight_map = {step.name: file.name for file in files for step, _ in file.places}
        total = sum(step.size for step in plan.steps)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        storage.write_json(out / storage.INDEX, index)
    dtypes = {DTYPES[step.dtype].name for step in plan.of(MERGE)}
    dtype = dtypes.pop() if len(dtypes) == 1 else None
    config = companions.config_json(checkpoint.root, settings, dtype)
    storage.write_json(out / "config.json", config)
    if (found := beside) is None:
        found = companions.companions_of(checkpoint.root, architecture=plan.architecture)
    for name, file in found.items():
        companions.copy(file, out / name)
    beside_weights = tuple(storage.digest(out / name, name) for name in (*others, *found))
    known = _provenance(plan, adapter, written, options or {})
    storage.write_json(out / PROVENANCE, {**known, "companions": _by_name(beside_weights)})
    files_of_all = (*written.files, *beside_weights, storage.digest(out / PROVENANCE))
    return dataclasses.replace(written, files=files_of_all)


def _for_this_job(journal: Path, out: Path, job: tuple[Any, ...], kept: Set[str]) -> None:
    """Remove from `out` what is not in `kept`; all, and `journal`, where they are another job's."""
    key = hashlib.sha256(repr((_version(), *job)).encode()).hexdigest()
    mark = journal.with_suffix(".key")
    same = mark.is_file() and mark.read_text("utf-8", errors="replace") == key
    if not same:
        journal.unlink(missing_ok=True)
    for entry in out.iterdir():
        if not same or entry.name not in kept:
            publishing.remove(entry)
    if not same:
        mark.write_text(key, "utf-8")


def _version() -> str:
    from lora_export import __version__

    return __version__


def _by_name(files: tuple[FileDigest, ...]) -> dict[str, str]:
    return {file.name: file.digest for file in files}


def _provenance(
    plan: MergePlan, adapter: Adapter, written: Written, options: Mapping[str, Any]
) -> Mapping[str, Any]:
    mark = adapter.base.fingerprint
    return {
        "schema": 2,
        "tool": f"lora-export {_version()}",
        "versions": {name: metadata.version(name) for name in ("numpy", "ml_dtypes", "blake3")},
        "architecture": plan.architecture,
        "base": {
            "id": adapter.base.public_id,
            "revision": adapter.base.revision,
            "fingerprint": mark.sha256 if mark else None,
            "files": _by_name(written.base),
        },
        "adapter": {
            "sha256": adapter.sha256,
            "format": adapter.format,
            "variant": adapter.variant,
            "merged_as": plan.variant,
            "labels": list(adapter.labels),
        },
        "merged": {
            step.name: {
                name: {"rank": adapter.modules[name].rank, "scale": adapter.modules[name].scale}
                for name in step.modules
                if name in adapter.modules
            }
            for step in plan.steps
            if step.parts
        },
        "tensors": {
            step.name: {"operation": step.operation, "blake3": written.tensors[step.name]}
            for step in plan.steps
        },
        "rows": {path: list(rows.indices) for path, rows in adapter.rows.items()},
        "dropped": dict(plan.dropped),
        "ignored": dict(plan.ignored),
        "notes": [*plan.notes, *adapter.notes],
        "options": dict(options),
        "files": _by_name(written.files),
    }


def recorded_files(folder: Path) -> tuple[FileDigest, ...]:
    """Return the digests of the files in `folder` as the merge wrote them down."""
    known = storage.read_json(folder / PROVENANCE)
    written, beside = known.get("files"), known.get("companions")
    if not isinstance(written, dict) or not written or not isinstance(beside, dict):
        raise InputError(f"{folder / PROVENANCE} names no files")
    return tuple(
        FileDigest(name, _size(folder / name), str(digest))
        for name, digest in (written | beside).items()
    )


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0
