"""What files say of themselves beside what is so: provenance, configs, labels, tokenizers.

No torch, no model. `checks.provenance` judges.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lora_export import registry, storage
from lora_export.companions import OF_THEIR_PLACE, PROCESSOR, PROVENANCE
from lora_export.opening import Job
from lora_export.plan import MERGE
from lora_export.records import MERGED, Artifact, Claim, FileDigest
from lora_export.rounding import DTYPES

ABSENT = "absent"
# Fields of config.json that say nothing of the model: told by the labels; a place; who wrote it.
_LEFT_OUT = ("num_labels", "_name_or_path", "transformers_version")


def of_merged(
    job: Job, folder: Path, shards: Iterable[FileDigest] | None = None
) -> tuple[Claim, ...]:
    """Return what the merged model in `folder` says of itself, beside what `job` put into it.

    That is who was merged into what (`shards` are the base's, where they were hashed already),
    every field of config.json, and the files of the tokenizer or the processor.
    """
    if shards is None:
        shards = [storage.digest(job.base / name) for name in job.checkpoint.shards]
    mark, base = job.adapter.base.fingerprint, job.adapter.base
    expected = {
        "adapter sha256": job.adapter.sha256,
        "adapter labels": list(job.adapter.labels),
        "base id": base.public_id,
        "base revision": base.revision,
        "base fingerprint": mark.sha256 if mark else None,
        "base files": {shard.name: shard.digest for shard in shards},
    }
    said = storage.read_json(folder / PROVENANCE) if (folder / PROVENANCE).is_file() else {}
    if not said:  # merged by others, who say nothing of it
        expected = {}
    found = {}
    for name in expected:
        part, _, entry = name.partition(" ")
        section = said.get(part)
        found[name] = section.get(entry, ABSENT) if isinstance(section, dict) else ABSENT
    wanted = {f"config.json {k}": v for k, v in _config(job).items()}
    fields = _flat(_read(folder / "config.json"))
    config = {f"config.json {k}": v for k, v in fields.items() if k not in _LEFT_OUT}
    if not said:  # others write defaults out, and leave them out
        config = {name: value for name, value in config.items() if name in wanted}
        wanted = {name: value for name, value in wanted.items() if name in config}
    files = {name: _content(file) for name, file in job.beside().items()}
    own = {*files, *(name for name in PROCESSOR if (folder / name).is_file())}
    there = {name: _content(folder / name) for name in own}
    return _claims(MERGED, expected | wanted | files, found | config | there)


def of_artifact(
    artifact: Artifact, about: Mapping[str, str], merged: Path, folder: Path
) -> tuple[Claim, ...]:
    """Return what `artifact`, in `folder`, says of itself, beside what is so of the merged model.

    `about` is what the merged model in `merged` is now, as `stages.about` says; the files of its
    tokenizer or processor are held against those beside the artifact.
    """
    expected = {**about, registry.PRECISION: json.dumps(artifact.precision)}
    found = dict(artifact.facts.get("metadata", {}))
    files = {name: _content(merged / name) for name in PROCESSOR if (merged / name).is_file()}
    beside = {Path(file.name).name: _content(folder / file.name) for file in artifact.beside}
    return _claims(
        artifact.format,
        {**expected, **files},
        {name: found.get(name, ABSENT) for name in expected} | beside,
    )


def _claims(
    subject: str, expected: Mapping[str, Any], found: Mapping[str, Any]
) -> tuple[Claim, ...]:
    def text(side: Mapping[str, Any], name: str) -> str:
        value = side.get(name, ABSENT)
        return value if isinstance(value, str) else json.dumps(value, sort_keys=True)

    names = sorted(expected.keys() | found.keys())
    return tuple(Claim(subject, name, text(expected, name), text(found, name)) for name in names)


def _config(job: Job) -> dict[str, Any]:
    """Return every field that the merged config.json should have, by its path.

    The base's, but for what the plan changes and the labels that the adapter brings.
    """
    settings = json.loads(json.dumps(dict(job.settings_of_model)))
    if job.adapter.labels:
        settings["id2label"] = {str(i): label for i, label in enumerate(job.adapter.labels)}
        settings["label2id"] = {label: i for i, label in enumerate(job.adapter.labels)}
    merged = {DTYPES[step.dtype].name for step in job.plan.of(MERGE)}
    if len(merged) == 1:
        settings |= dict.fromkeys(("dtype", "torch_dtype"), *merged)
    fields = _flat(storage.read_json(job.base / "config.json"))
    found = {}
    for path, value in fields.items():
        level, _, name = path.rpartition(".")
        if name in settings and level in ("", "text_config"):
            found[path] = settings[name]
        elif path not in _LEFT_OUT:
            found[path] = value
    for name in settings.keys() - {"dtype", "torch_dtype"}:
        if f"text_config.{name}" not in fields:
            found[name] = settings[name]
    return found


def _flat(fields: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Return `fields` with those of the configs inside beside them; labels are one value."""
    found: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, dict) and name.endswith("_config"):
            found |= _flat(value, f"{path}{name}.")
        else:
            found[path + name] = value
    return found


def _read(file: Path) -> dict[str, Any]:
    return storage.read_json(file) if file.is_file() else {}


def _content(file: Path) -> str:
    """Return the digest of a file, whatever place it says that it was loaded from."""
    if not file.is_file():
        return ABSENT
    if file.name == "tokenizer_config.json":
        fields = {k: v for k, v in storage.read_json(file).items() if k not in OF_THEIR_PLACE}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    return storage.sha256(file)
