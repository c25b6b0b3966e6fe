"""What a run looks at beside the answers: how a model behaves, and what its files say.

Like the stages, these functions act and record, and judge nothing.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lora_export import exporters, inputs, stages
from lora_export.generating import generate
from lora_export.recording import record
from lora_export.records import (
    PLAIN,
    Alone,
    Array,
    Artifact,
    Batch,
    Form,
    Repeat,
    Signature,
    Written,
)
from lora_export.runners import Runner
from lora_export.stages import Subject

# Of each source of batches this many with several rows, and of each of them as many rows, are
# passed once more, row by row.
ALONE_BATCHES = 3
ALONE_ROWS = 3
# Text that is written on: so many sentences, so many of their tokens, and so many new ones.
PROMPTS = 3
PROMPT_LENGTH = 16
NEW_TOKENS = 16


def alone(runner: Runner, batches: Sequence[Batch], signature: Signature) -> tuple[Alone, ...]:
    """Return what `runner` answers to some rows of `batches`, each without the other rows."""
    found = []
    for index in _with_others(batches):
        for row in _from_short_to_long(batches[index]):
            given = inputs.alone(batches[index], row, signature)
            (outputs,) = record(runner, [given]).outputs
            found.append(Alone(runner.name, index, row, outputs))
    return tuple(found)


def _with_others(batches: Sequence[Batch]) -> list[int]:
    """Return the indices of a few batches of several rows."""
    several = [i for i, batch in enumerate(batches) if _rows(batch) > 1]
    sources = dict.fromkeys(batches[i].source for i in several)
    chosen = {s: [i for i in several if batches[i].source == s][:ALONE_BATCHES] for s in sources}
    return [index for indices in chosen.values() for index in indices]


def _rows(batch: Batch) -> int:
    return len(next(iter(batch.arrays.values())))


def _from_short_to_long(batch: Batch) -> list[int]:
    """Return a few rows of `batch`, by the number of their tokens."""
    rows = np.arange(_rows(batch))
    if "attention_mask" in batch.arrays:
        rows = batch.mask.reshape(len(rows), -1).sum(axis=1).argsort(kind="stable")
    places = np.linspace(0, len(rows) - 1, min(ALONE_ROWS, len(rows))).astype(int)
    return [int(rows[place]) for place in places]


def written(
    runner: Runner, signature: Signature, batches: Sequence[Batch], *, cached: bool
) -> Written:
    """Return what `runner` writes after the first sentences of `batches`, as `generate` does.

    The signature is one with a cache. Where it is not `cached`, all of the text goes in again for
    every token, beside an empty cache.
    """
    listener = _Listener(runner)
    ids, mask = _prompts(signature, next(batch for batch in batches if batch.texts))
    count = min(NEW_TOKENS, signature.max_length // 2)
    tokens = generate(listener, signature, ids, mask, max_new_tokens=count, cached=cached)
    best = np.sort(np.stack(listener.heard, axis=1).astype(np.float64), axis=-1)[..., -2:]
    return Written(runner.name, cached, tokens, np.diff(best, axis=-1)[..., 0] / 2)


def _prompts(signature: Signature, batch: Batch) -> tuple[Array, Array]:
    """Return token ids and mask of a few sentences; those of a decoder are padded on the left."""
    longest = min(PROMPT_LENGTH, signature.max_length // 2)
    rows = zip(batch.arrays["input_ids"], batch.mask.astype(bool), strict=True)
    texts = [ids[mask][:longest] for ids, mask in list(rows)[:PROMPTS]]
    length = max(map(len, texts))
    ids = np.full((len(texts), length), signature.pad_token_id, np.int64)
    mask = np.zeros_like(ids)
    for row, text in enumerate(texts):
        places = slice(len(text)) if signature.has_target else slice(length - len(text), length)
        ids[row, places], mask[row, places] = text, 1
    return ids, mask


class _Listener:
    """A runner that keeps the logits of the last token of each answer."""

    def __init__(self, runner: Runner) -> None:
        self.runner, self.name, self.precision = runner, runner.name, runner.precision
        self.heard: list[Array] = []

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return what the runner answers."""
        found = self.runner.run(inputs)
        self.heard.append(found["logits"][:, -1])
        return found


def repeat(
    subject: Subject,
    artifact: Artifact,
    folder: Path,
    form: Form = PLAIN,
    examples: Sequence[str] = (),
) -> Repeat:
    """Return what comes of exporting `subject` once more, as it was for `artifact` in `folder`.

    `form` and `examples` are those of that export; raises as `stages.export_stage` does.
    """
    file = artifact.files[0].name
    first = exporters.load(artifact.format).inspect(folder / file)
    with tempfile.TemporaryDirectory(prefix="lora_export-") as place:
        # Under the same name, which some files hold.
        second = stages.export_stage(artifact.format, subject, Path(place), file, form, examples)
        again = exporters.load(artifact.format).inspect(Path(place) / file)
    return Repeat(
        artifact.format,
        artifact.files,
        second.files,
        tuple(_differing(first, again)),
        artifact.operators,
        second.operators,
    )


def _differing(first: exporters.Contents, second: exporters.Contents) -> list[str]:
    """Return what of two artifacts differs inside, by name."""
    counts = (first.operators, second.operators)
    found = [
        f"{kind}: {counts[0].get(kind, 0)} and {counts[1].get(kind, 0)}"
        for kind in sorted(counts[0].keys() | counts[1].keys())
        if counts[0].get(kind, 0) != counts[1].get(kind, 0)
    ]
    found += sorted(set(first.names) ^ set(second.names))
    said = (first.facts["metadata"], second.facts["metadata"])
    keys = sorted(said[0].keys() | said[1].keys())
    return [*found, *(f"metadata {key}" for key in keys if said[0].get(key) != said[1].get(key))]
