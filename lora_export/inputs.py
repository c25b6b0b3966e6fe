"""What the models are run on: real sentences, and a grid of shapes made to find faults."""

import csv
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from lora_export.errors import InputError
from lora_export.records import Array, Batch, Signature, TensorSpec

TEXT_BATCH = 16
CHOICES = 2  # sentences that make up one text of a multiple-choice model
PICTURES = 32
LONGEST = 512  # tokens of the longest generated input, where the model would take more
# Outputs of a language model are wide: batches are left out beyond this many values an output.
MOST_VALUES = 20_000_000
# (batch, length, where the padding lies). The traced example has batch 2 and length 7; the grid
# differs from it in each of batch, length and padding. 0 stands for the model's longest sequence,
# up to LONGEST. With a cache, the length is that of all tokens, and some are in the cache.
GRID = (
    (1, 1, "none"), (1, 2, "none"), (1, 17, "none"), (2, 3, "right"), (3, 8, "left"),
    (4, 16, "hole"), (5, 33, "right"), (8, 64, "left"), (32, 9, "right"), (2, 24, "all but one"),
    (2, 0, "right"),
)  # fmt: skip
EXAMPLE = (2, 7, "right")
ODD = (3, 12, "right")  # of inputs made of few tokens
TIMED = ((1, 32), (8, 32))  # (batch, length) of the latency measurement
QUICK = 320  # tokens of all rows, up to which a quick look takes a shape
HARD_CHARACTERS = 0x3000  # of every tokenizer in a graph all below this are tried, some above


def read_texts(path: Path | None) -> tuple[list[str], list[int]]:
    """Return sentences and their labels: of `path`, or the set that ships with this package.

    A `.tsv` file has a header with `sentence` or `text`, and perhaps `label` (a class index);
    a folder is read as its dev.tsv; any other file has one sentence a line. Labels are empty
    where there are none.

    Raises:
        InputError: no such file, no sentences, or labels that are no indices.
    """
    if path is None:
        text = _shipped("sentences.txt")
        return [line for line in text.splitlines() if line.strip()], []
    texts, labels = _read(*files([path]))
    return [text.strip() for text in texts], labels


def read_labelled(path: Path) -> tuple[list[str], list[int]]:
    """Return sentences, as they stand there, and labels (class indices) of a `.tsv` file.

    Raises:
        InputError: as `read_texts`, or there are no labels.
    """
    texts, labels = _read(path)
    if not labels:
        raise InputError(f"{path} needs a header with a column 'label'")
    return texts, labels


def _shipped(name: str) -> str:
    return resources.files("lora_export").joinpath(f"data/{name}").read_text("utf-8")


def files(paths: Iterable[Path]) -> list[Path]:
    """Return the file that is read for each of `paths`: of a folder, its dev.tsv."""
    return [path / "dev.tsv" if path.is_dir() else path for path in paths]


def within_budget(batches: Sequence[Batch], signature: Signature) -> tuple[Batch, ...]:
    """Return `batches`, fewer where the outputs are wide: half of the room is for the grid."""
    kept: list[Batch] = []
    room = dict.fromkeys((batch.source for batch in batches), MOST_VALUES / 2)
    for batch in batches:
        sizes = signature.sizes(batch.arrays)
        values = sum(
            math.prod(axis if isinstance(axis, int) else sizes[axis] for axis in spec.axes)
            for spec in signature.outputs
        )
        first = not any(other.source == batch.source for other in kept)
        if first or values <= room[batch.source]:
            kept.append(batch)
            room[batch.source] -= values
    return tuple(kept)


def fewer(batches: Sequence[Batch]) -> tuple[Batch, ...]:
    """Return the first batch of texts or pictures, and the shapes of at most `QUICK` tokens."""
    real = [batch for batch in batches if batch.source != "grid"][:1]
    grid = [batch for batch in batches if batch.source == "grid"]
    small = [b for b in grid if "attention_mask" not in b.arrays or b.mask.size <= QUICK]
    return (*real, *small)


def summary(batches: Sequence[Batch]) -> str:
    """Return what a run compares on, in words."""
    texts = sum(len(batch.texts) for batch in batches)
    pictures = sum(len(b.arrays["pixel_values"]) for b in batches if b.source == "image")
    shapes = sum(batch.source == "grid" for batch in batches)
    counts = {"sentences": texts, "made pictures": pictures, "shapes": shapes}
    return " and ".join(f"{count} {what}" for what, count in counts.items() if count)


def _read(file: Path) -> tuple[list[str], list[int]]:
    try:
        content = file.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read {file}: {why}") from error
    if file.suffix == ".tsv":
        texts, labels = _parse(content, file)
    else:  # not splitlines, which cuts at U+2028 and others as well
        texts, labels = content.removesuffix("\n").split("\n"), []
    if not any(text.strip() for text in texts):
        raise InputError(f"{file} holds no sentences")
    if empty := [number for number, text in enumerate(texts, start=1) if not text.strip()]:
        raise InputError(f"{file}: sentence {empty[0]} of {len(texts)} is empty")
    return texts, labels


def _parse(text: str, file: Path) -> tuple[list[str], list[int]]:
    try:
        lines = io.StringIO(text, newline="")
        reader = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        names, rows = reader.fieldnames or (), list(reader)
    except csv.Error as error:
        raise InputError(f"cannot read {file}: {error}") from error
    column = next((name for name in ("sentence", "text") if name in names), None)
    if column is None:
        raise InputError(f"{file} needs a header with a column 'sentence' or 'text'")
    labels = []
    for number, row in enumerate(rows, start=1):
        if row[column] is None:
            raise InputError(f"{file}: row {number} has no {column}")
        if "label" in names:
            try:
                labels.append(int(row["label"]))
            except (TypeError, ValueError) as error:
                label = row["label"] or "none"
                raise InputError(
                    f"{file}: labels are class indices; that of row {number} is {label}"
                ) from error
    return [row[column] for row in rows], labels


def text_batches(
    tokens: Any, signature: Signature, texts: Sequence[str], labels: Sequence[int]
) -> tuple[Batch, ...]:
    """Return `texts`, tokenized and padded, in batches of 16 in the given order.

    A multiple-choice model gets them in pairs, without their labels. A cache is empty.
    """
    if any("choices" in spec.axes for spec in signature.inputs):
        texts = [*texts, *texts[: -len(texts) % CHOICES]]
        labels = ()
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
        rows, length = encoded["input_ids"].shape
        arrays = made(signature, rows, length, "none", 0)
        for spec in signature.inputs:
            if spec.name in encoded:
                found = np.asarray(encoded[spec.name], np.int64)
                if "choices" in spec.axes:
                    found = found.reshape(-1, CHOICES, length)
                arrays[spec.name] = found
            elif "choices" in spec.axes:
                arrays[spec.name] = arrays[spec.name][: rows // CHOICES]
        if "decoder_input_ids" in arrays:
            arrays["decoder_input_ids"][:] = signature.start_token_id
        note = f"sentences {start + 1} to {start + len(chosen)}"
        kept = tuple(labels[start : start + TEXT_BATCH])
        batches.append(Batch("text", note, arrays, tuple(chosen), kept))
    return tuple(batches)


def hard_batches(tokens: Any, signature: Signature) -> tuple[Batch, ...]:
    """Return texts made to find what a copy of the tokenizer `tokens` does otherwise.

    Among them are its own special tokens, texts longer than the model takes, and characters of all
    kinds. NUL, at which onnxruntime ends a text, is left out; and U+0085, a control character that
    the byte-level BPE of onnxruntime-extensions takes for no white space.
    """
    hard = json.loads(_shipped("hard_texts.json"))
    codes = [*range(1, HARD_CHARACTERS), *range(HARD_CHARACTERS, 0xD800, 101)]
    codes += range(0xE000, 0x20000, 101)
    signs = [f"a{chr(c)} {chr(c)}1{chr(c)}" for c in codes if c != 0x85]
    lines = [" ".join(signs[start : start + 4]) for start in range(0, len(signs), 4)]
    own = [
        f"in{space}{token}{space}Xx{token}yy"
        for token in tokens.get_added_vocab()
        for space in ("", " ", "\n ")
    ]
    counts = (signature.max_length // 2 - 1, signature.max_length)
    long = ["good film " * count for count in counts]
    return tuple(
        replace(batch, source="hard")
        for texts in ([*hard, *own, *long, *lines], ["alone"])
        for batch in text_batches(tokens, signature, texts, ())
    )


def picture_batches(signature: Signature, seed: int) -> tuple[Batch, ...]:
    """Return made pictures: patches of colour, which is more than noise and less than photos."""
    dice = np.random.default_rng(seed)
    batches = []
    for start in range(0, PICTURES, TEXT_BATCH):
        arrays = made(signature, TEXT_BATCH, 0, "none", seed + start)
        noise = arrays["pixel_values"]
        *_, height, width = noise.shape
        coarse = dice.normal(0, 1, (*noise.shape[:2], 4, 4)).astype(np.float32)
        patches = coarse.repeat(-(-height // 4), axis=2).repeat(-(-width // 4), axis=3)
        arrays["pixel_values"] = patches[:, :, :height, :width] + noise / 8
        note = f"made pictures {start + 1} to {start + TEXT_BATCH}"
        batches.append(Batch("image", note, arrays))
    return tuple(batches)


def grid_batches(
    signature: Signature, seed: int, special: Sequence[int] = (), types: int = 0
) -> tuple[Batch, ...]:
    """Return random inputs at the shapes of `GRID` that the model accepts, and odd ones.

    With a cache, the tokens are in turn all new, the last one new, and half of them new; a decoder
    beside an encoder has its source in turn new and cached. The odd ones are a single token over
    and over, rows of the tokens `special`, and the last of several `types` of tokens; of pictures,
    all zero, and far too bright.
    """
    batches = []
    for number, (batch, length, padding) in enumerate(GRID):
        size = min(length or LONGEST, signature.max_length)
        note = f"batch {batch}"
        if size:
            note += f", length {size}, padding {padding}"
        elif length == 0:
            continue  # the longest sequence of a model that takes none
        more = {}
        if signature.has_cache and signature.has_target:
            past = size * (number % 2)
            more = {"past": past, "target": 1 + number % 5, "target_past": number * (number % 2)}
        elif signature.has_cache:
            more["past"] = (0, size - 1, size // 2)[number % 3]
        if more:
            note += f", {more['past']} cached"
        arrays = made(signature, batch, size - more.get("past", 0), padding, seed + number, **more)
        batches.append(Batch("grid", note, arrays))
    return (*batches, *_odd_batches(signature, seed, special, types))


def _odd_batches(
    signature: Signature, seed: int, special: Sequence[int], types: int
) -> Iterator[Batch]:
    names = {spec.name for spec in signature.inputs}
    if "pixel_values" in names:
        for note, factor in (("pictures all zero", 0), ("pictures far too bright", 16)):
            arrays = made(signature, 2, 0, "none", seed)
            arrays["pixel_values"] *= factor
            yield Batch("grid", note, arrays)
    if "input_ids" not in names:
        return
    batch, length, padding = ODD
    size = min(length, signature.max_length)
    first = made(signature, 1, 1, "none", seed)["input_ids"].ravel()
    kinds = (("one token repeated", first), ("special tokens", np.asarray(special, np.int64)))
    for note, tokens in kinds:
        if tokens.size:
            arrays = made(signature, batch, size, padding, seed)
            row = np.resize(tokens, size)  # every row alike: some models count their end tokens
            counts = arrays["attention_mask"] == 1
            arrays["input_ids"] = np.where(counts, row, signature.pad_token_id)
            yield Batch("grid", f"{note}, batch {batch}, length {size}, padding {padding}", arrays)
    if "token_type_ids" in names and types > 1:
        arrays = made(signature, batch, size, padding, seed)
        arrays["token_type_ids"][..., size // 2 :] = types - 1
        note = f"two token types, batch {batch}, length {size}, padding {padding}"
        yield Batch("grid", note, arrays)


def alone(batch: Batch, row: int, signature: Signature) -> Batch:
    """Return one row of `batch` without the others, and without the padding that it has for them.

    Padding goes from the right; from the left where positions follow the mask, as in a decoder
    with its cache. Beside cached tokens it stays, because the cache has it too.
    """
    return replace(
        batch,
        note=f"{batch.note}, row {row + 1}",
        arrays=of_row(batch, row, batch.arrays, signature.inputs, signature),
        texts=batch.texts[row : row + 1],
        labels=batch.labels[row : row + 1],
    )


def of_row(
    batch: Batch,
    row: int,
    arrays: Mapping[str, Array],
    specs: Iterable[TensorSpec],
    signature: Signature,
) -> dict[str, Array]:
    """Return what one row of `batch` has in `arrays`, its inputs or outputs, cut as by `alone`."""
    window = slice(None)
    if "attention_mask" in batch.arrays and not signature.sizes(batch.arrays).get("past"):
        places = np.flatnonzero(batch.mask[row].reshape(-1, batch.mask.shape[-1]).any(axis=0))
        from_left = signature.has_cache and not signature.has_target
        if places.size:  # or the row is nothing but padding
            window = slice(places[0] if from_left else 0, places[-1] + 1)
    cuts = {"batch": slice(row, row + 1), "sequence": window, "total": window}
    axes = {spec.name: spec.axes for spec in specs}
    return {
        name: array[tuple(cuts.get(str(axis), slice(None)) for axis in axes[name])[: array.ndim]]
        for name, array in arrays.items()
        if name in axes
    }


def example(signature: Signature) -> dict[str, Array]:
    """Return the arrays that exporters trace on: no two of their dynamic axes are equally long."""
    batch, length, padding = EXAMPLE
    return made(signature, batch, length, padding, 0, past=3, target=5, target_past=4)


def made(
    signature: Signature,
    batch: int,
    length: int,
    padding: str,
    seed: int,
    *,
    past: int = 0,
    target: int = 1,
    target_past: int = 0,
) -> dict[str, Array]:
    """Return input arrays for `length` new tokens beside `past` cached ones, made from `seed`.

    Ids are random, int64, and no padding; the first row of the attention mask is full, and each
    other row is padded where `padding` says. Pixels, keys and values are standard normal, float32.
    """
    dice = np.random.default_rng(seed)
    sizes = {
        "batch": batch,
        "choices": CHOICES,
        "sequence": length,
        "past": past,
        "total": past + length,
        "target": target,
        "target_past": target_past,
    }
    shapes = {
        spec.name: tuple(sizes[a] if isinstance(a, str) else a for a in spec.axes)
        for spec in signature.inputs
    }
    arrays: dict[str, Array] = {}
    if "attention_mask" in shapes:
        *rows, total = shapes["attention_mask"]
        mask = _masks(math.prod(rows), total, padding)
        arrays["attention_mask"] = mask.reshape(shapes["attention_mask"])
    known = [i for i in range(signature.vocab_size) if i != signature.pad_token_id]
    for spec in signature.inputs:
        shape = shapes[spec.name]
        if spec.name.endswith("input_ids"):
            ids = dice.choice(np.asarray(known, np.int64), shape)
            if spec.name == "input_ids":
                mask = arrays["attention_mask"]
                counts = mask[..., mask.shape[-1] - shape[-1] :] == 1
                ids = np.where(counts, ids, signature.pad_token_id)
            arrays[spec.name] = ids
        elif spec.dtype == "int64":
            arrays.setdefault(spec.name, np.zeros(shape, np.int64))
        else:
            arrays[spec.name] = dice.standard_normal(shape, np.float32).astype(spec.dtype)
    return {spec.name: arrays[spec.name] for spec in signature.inputs}


def _masks(rows: int, length: int, padding: str) -> Array:
    masks = np.ones((rows, length), np.int64)
    for row in range(1, rows):
        empty = 1 + (row * length // (2 * rows))
        masks[row] = _mask(length, min(empty, length - 1), padding)
    return masks


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
