"""What the models are run on: real sentences, and a grid of shapes made to find faults."""

import csv
import math
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from lora_export.errors import InputError
from lora_export.records import Array, Batch, Signature

TEXT_BATCH = 16
LONGEST = 512  # tokens of the longest generated input, where the model would take more
# Outputs of a language model are wide: batches are left out beyond this many values an output.
MOST_VALUES = 20_000_000
# (batch, length, where the padding lies). The traced example has batch 2 and length 7; the grid
# differs from it in each of batch, length and padding. 0 stands for the model's longest sequence,
# up to LONGEST.
GRID = (
    (1, 1, "none"), (1, 2, "none"), (1, 17, "none"), (2, 3, "right"), (3, 8, "left"),
    (4, 16, "hole"), (5, 33, "right"), (8, 64, "left"), (32, 9, "right"), (2, 24, "all but one"),
    (2, 0, "right"),
)  # fmt: skip
EXAMPLE = (2, 7, "right")
TIMED = ((1, 32), (8, 32))  # (batch, length) of the latency measurement


def read_texts(path: Path | None) -> tuple[list[str], list[int]]:
    """Return sentences and their labels: of `path`, or the set that ships with this package.

    A `.tsv` file has a header with `sentence` or `text`, and perhaps `label` (a class index);
    a folder is read as its dev.tsv; any other file has one sentence a line. Labels are empty
    where there are none.

    Raises:
        InputError: no such file, no sentences, or labels that are no indices.
    """
    if path is None:
        text = resources.files("lora_export").joinpath("data/sentences.txt").read_text("utf-8")
        return [line for line in text.splitlines() if line.strip()], []
    (file,) = files([path])
    try:
        text = file.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read {file}: {why}") from error
    texts, labels = _parse(text, file) if file.suffix == ".tsv" else (text.splitlines(), [])
    texts = [line.strip() for line in texts]
    if not all(texts) or not texts:
        raise InputError(f"{file} holds no sentences, or an empty one")
    return texts, labels


def files(paths: Iterable[Path]) -> list[Path]:
    """Return the file that is read for each of `paths`: of a folder, its dev.tsv."""
    return [path / "dev.tsv" if path.is_dir() else path for path in paths]


def within_budget(batches: Sequence[Batch], signature: Signature) -> tuple[Batch, ...]:
    """Return `batches`, fewer where the outputs are wide: half of the room is for text."""
    kept: list[Batch] = []
    room = {"text": MOST_VALUES / 2, "grid": MOST_VALUES / 2}
    for batch in batches:
        rows, length = batch.mask.shape
        sizes = {"batch": rows, "sequence": length}
        values = sum(
            math.prod(axis if isinstance(axis, int) else sizes[axis] for axis in spec.axes)
            for spec in signature.outputs
        )
        first = not any(other.source == batch.source for other in kept)
        if first or values <= room[batch.source]:
            kept.append(batch)
            room[batch.source] -= values
    return tuple(kept)


def summary(batches: Sequence[Batch]) -> str:
    """Return what a run compares on, in words."""
    texts = sum(len(batch.texts) for batch in batches)
    shapes = sum(batch.source == "grid" for batch in batches)
    return f"{texts} sentences and {shapes} shapes"


def _parse(text: str, file: Path) -> tuple[list[str], list[int]]:
    try:
        reader = csv.DictReader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)
        names, rows = reader.fieldnames or (), list(reader)
    except csv.Error as error:
        raise InputError(f"cannot read {file}: {error}") from error
    column = next((name for name in ("sentence", "text") if name in names), None)
    if column is None:
        raise InputError(f"{file} needs a header with a column 'sentence' or 'text'")
    if any(row[column] is None for row in rows):
        raise InputError(f"{file} has a row without a {column}")
    if "label" not in names:
        return [row[column] for row in rows], []
    try:
        return [row[column] for row in rows], [int(row["label"]) for row in rows]
    except (TypeError, ValueError) as error:
        raise InputError(f"{file}: labels are class indices; {error}") from error


def text_batches(
    tokens: Any, signature: Signature, texts: Sequence[str], labels: Sequence[int]
) -> tuple[Batch, ...]:
    """Return `texts`, tokenized and padded, in batches of 16 in the given order."""
    batches = []
    for start in range(0, len(texts), TEXT_BATCH):
        chosen = list(texts[start : start + TEXT_BATCH])
        encoded = tokens(
            chosen,
            padding=len(chosen) > 1,
            truncation=True,
            max_length=signature.max_length,
            return_tensors="np",
        )
        arrays = {spec.name: np.asarray(encoded[spec.name], np.int64) for spec in signature.inputs}
        note = f"sentences {start + 1} to {start + len(chosen)}"
        kept = tuple(labels[start : start + TEXT_BATCH])
        batches.append(Batch("text", note, arrays, tuple(chosen), kept))
    return tuple(batches)


def grid_batches(signature: Signature, seed: int) -> tuple[Batch, ...]:
    """Return random token ids at the shapes of `GRID` that the model accepts."""
    batches = []
    for number, (batch, length, padding) in enumerate(GRID):
        size = min(length or LONGEST, signature.max_length)
        arrays = made(signature, batch, size, padding, seed + number)
        batches.append(Batch("grid", f"batch {batch}, length {size}, padding {padding}", arrays))
    return tuple(batches)


def made(
    signature: Signature, batch: int, length: int, padding: str, seed: int
) -> dict[str, Array]:
    """Return input arrays of shape (batch, length), int64, with random ids that are no padding.

    The first row is full; each other row is padded where `padding` says.
    """
    dice = np.random.default_rng(seed)
    known = [i for i in range(signature.vocab_size) if i != signature.pad_token_id]
    ids = dice.choice(np.asarray(known, np.int64), (batch, length))
    mask = np.ones((batch, length), np.int64)
    for row in range(1, batch):
        empty = 1 + (row * length // (2 * batch))
        mask[row] = _mask(length, min(empty, length - 1), padding)
    arrays = {
        "input_ids": np.where(mask == 1, ids, signature.pad_token_id),
        "attention_mask": mask,
    }
    return {
        spec.name: arrays.get(spec.name, np.zeros((batch, length), np.int64))
        for spec in signature.inputs
    }


def _mask(length: int, empty: int, padding: str) -> Array:
    mask = np.ones(length, np.int64)
    if padding == "right":
        mask[length - empty :] = 0
    elif padding == "left":
        mask[:empty] = 0
    elif padding == "hole":
        middle = (length - empty) // 2
        mask[middle : middle + empty] = 0
    elif padding == "all but one":
        mask[1:] = 0
    return mask
