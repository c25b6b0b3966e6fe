"""The files beside the weights: which of them a user needs, and how they come along."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_export import storage

PROVENANCE = "lora_export.json"
VOCABULARIES = (
    "tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model",
    "tokenizer.model", "spm.model", "sentencepiece.model", "bpe.codes", "source.spm",
)  # fmt: skip
TOKENIZER = (
    *VOCABULARIES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "merges.txt", "normalizer.json", "target.spm", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
PROCESSOR = (*TOKENIZER, "preprocessor_config.json", "processor_config.json")
_OTHERS = ("generation_config.json", *PROCESSOR, "video_preprocessor_config.json")
SENTENCE_MODULES = "modules.json"  # of sentence-transformers: what comes after the transformer
_OF_SENTENCES = (
    SENTENCE_MODULES, "config_sentence_transformers.json", "sentence_bert_config.json",
    "1_Pooling/config.json",
)  # fmt: skip
# Fields of tokenizer_config.json that tell where it once was loaded from.
OF_THEIR_PLACE = ("name_or_path", "tokenizer_file", "special_tokens_map_file")
_LOADED = (".safetensors", ".bin", ".json", ".py", ".model")


def is_loaded(name: str) -> bool:
    """Return whether a loader may read a file of this name, beside those that a merge wrote."""
    return name != PROVENANCE and "/" not in name and Path(name).suffix in _LOADED


def has_tokenizer(folder: Path) -> bool:
    """Return whether the directory `folder` holds a vocabulary."""
    return any((folder / name).is_file() for name in VOCABULARIES)


def companions_of(
    folder: Path, *, with_code: bool = False, architecture: str | None = None
) -> dict[str, Path]:
    """Return the files in `folder` that a user of the model needs beside the weights, by name.

    Code of the model is left behind unless it is asked for; and how sentence-transformers pools,
    where `architecture` has a head: it would be left out without a word.
    """
    names = [*_OTHERS, *(code_of(folder) if with_code else ())]
    if architecture is None or is_headless(architecture):
        names += _OF_SENTENCES
    return {name: folder / name for name in names if (folder / name).is_file()}


def is_headless(architecture: str) -> bool:
    """Return whether a class of transformers, by its name, gives hidden states: `BertModel`."""
    return architecture.endswith("Model")


def code_of(folder: Path) -> list[str]:
    """Return the names of the Python files in `folder`."""
    return sorted(file.name for file in folder.glob("*.py") if file.is_file())


def copy(source: Path, target: Path) -> None:
    """Copy a file that belongs to the base, without the place that it once was loaded from."""
    target.parent.mkdir(exist_ok=True)
    if source.name == "tokenizer_config.json":
        fields = storage.read_json(source)
        for name in OF_THEIR_PLACE:
            fields.pop(name, None)
        storage.write_json(target, fields)
    else:
        shutil.copyfile(source, target)


def config_json(base: Path, settings: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
    """Return the base's own config.json with what the adapter changes in it.

    Args:
        base: Directory of the base.
        settings: Fields that differ.
        dtype: Of the merged weights, as config.json spells it, where they share one.
    """
    fields = storage.read_json(base / "config.json")
    text = fields.get("text_config")
    inner: dict[str, Any] = text if isinstance(text, dict) else {}
    for name, value in settings.items():  # at every level that has the field
        if name in inner:
            inner[name] = value
        if name in fields or name not in inner:
            fields[name] = value
    for name in ("num_labels", "_name_or_path"):  # told by the labels; a place, perhaps a path
        fields.pop(name, None)
    if dtype is not None:
        for level in (fields, inner):
            level |= dict.fromkeys(level.keys() & {"dtype", "torch_dtype"}, dtype)
    return fields
