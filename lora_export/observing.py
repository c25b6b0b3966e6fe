"""What a run looks at beside the answers: how a model behaves, and what its files say.

Like the stages, these functions act and record, and judge nothing.
"""

from collections.abc import Sequence

import numpy as np

from lora_export import inputs, stages
from lora_export.records import Alone, Batch, Signature
from lora_export.runners import Runner

# Of each source of batches this many with several rows, and of each of them as many rows, are
# passed once more, row by row.
ALONE_BATCHES = 3
ALONE_ROWS = 3


def alone(runner: Runner, batches: Sequence[Batch], signature: Signature) -> tuple[Alone, ...]:
    """Return what `runner` answers to some rows of `batches`, each without the other rows."""
    found = []
    for index in _with_others(batches):
        for row in _from_short_to_long(batches[index]):
            given = inputs.alone(batches[index], row, signature)
            (outputs,) = stages.record(runner, [given]).outputs
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
