"""Write text with an exported decoder or encoder-decoder that takes and gives its cache.

The first call passes the whole prompt; each further call passes the last token and the cache. The
tokens are those that `generate` of transformers gives for the same settings and seed.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from lora_export.errors import InputError
from lora_export.records import PAST, PRESENT, Array, Signature
from lora_export.runners import Runner


@dataclass(frozen=True)
class Sampling:
    """Draw tokens instead of taking the likeliest, as transformers does by the same names."""

    temperature: float = 1.0
    top_k: int = 50  # 0 for all
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature > 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise InputError(f"{self}: temperature > 0, top_k >= 0 and 0 < top_p <= 1 are needed")


def generate(
    runner: Runner,
    signature: Signature,
    input_ids: Array,
    attention_mask: Array,
    *,
    max_new_tokens: int = 20,
    end: Iterable[int] = (),
    sampling: Sampling | None = None,
    cached: bool = True,
) -> Array:
    """Return the new tokens of every row, int64, (batch, at most `max_new_tokens`).

    Args:
        runner: Of an artifact that takes and gives its cache.
        signature: Of that artifact.
        input_ids: int64, (batch, sequence); of a decoder padded on the left.
        attention_mask: int64, (batch, sequence).
        max_new_tokens: Where to stop.
        end: Tokens that end a row, which is padded from there on.
        sampling: How to draw; None takes the likeliest token.
        cached: Whether each call takes the cache of the one before; else all of the text goes in.

    Raises:
        InputError: the artifact has no cache, or a row of a decoder's prompt ends in padding.
    """
    if not signature.has_cache:
        raise InputError("the artifact takes no cache: export it without --no-cache")
    if not signature.has_target and not attention_mask[:, -1].all():
        raise InputError("a prompt ends in padding; a decoder's prompts are padded on the left")
    arrays = _first(signature, input_ids, attention_mask)
    choose = _likeliest if sampling is None else _drawing(sampling)
    stops = np.asarray(list(end), np.int64)
    ended = np.zeros(len(input_ids), bool)
    written: list[Array] = []
    while not ended.all() and len(written) < max_new_tokens:
        found = runner.run(arrays)
        token = np.where(ended, signature.pad_token_id, choose(found["logits"][:, -1]))
        written.append(token)
        ended |= np.isin(token, stops)
        step = _next if cached else _again
        arrays = step(signature, arrays, found, token)
    return np.stack(written, axis=1)


def _first(signature: Signature, ids: Array, mask: Array) -> dict[str, Array]:
    """Return the inputs of the first call: the prompt, and empty caches."""
    rows = len(ids)
    known = {
        "input_ids": ids,
        "attention_mask": mask,
        "decoder_input_ids": np.full((rows, 1), signature.start_token_id, np.int64),
    }
    empty = {"batch": rows, "past": 0, "target_past": 0}
    caches = {
        spec.name: np.zeros([empty[a] if isinstance(a, str) else a for a in spec.axes], spec.dtype)
        for spec in signature.inputs
        if spec.name.startswith(f"{PAST}.")
    }
    return {spec.name: (known | caches)[spec.name] for spec in signature.inputs}


def _next(
    signature: Signature, arrays: dict[str, Array], found: dict[str, Array], token: Array
) -> dict[str, Array]:
    """Return the inputs of the next call: the last token, and the caches that came out."""
    mask = arrays["attention_mask"]
    if signature.has_target:  # the source is in the cache
        told = {"input_ids": arrays["input_ids"][:, :0], "attention_mask": mask}
        told["decoder_input_ids"] = token[:, None]
    else:
        longer = np.concatenate([mask, np.ones_like(mask[:, :1])], axis=1)
        told = {"input_ids": token[:, None], "attention_mask": longer}
    caches = {
        name.replace(PRESENT, PAST, 1): array
        for name, array in found.items()
        if name.startswith(f"{PRESENT}.")
    }
    return told | caches


def _again(
    signature: Signature, arrays: dict[str, Array], _: dict[str, Array], token: Array
) -> dict[str, Array]:
    """Return the inputs of the next call without a cache: those of this one, and the last token."""
    longer = dict(arrays)
    name = "decoder_input_ids" if signature.has_target else "input_ids"
    longer[name] = np.concatenate([arrays[name], token[:, None]], axis=1)
    if not signature.has_target:
        mask = arrays["attention_mask"]
        longer["attention_mask"] = np.concatenate([mask, np.ones_like(mask[:, :1])], axis=1)
    return longer


def _likeliest(logits: Array) -> Array:
    found: Array = logits.argmax(-1)
    return found


def _drawing(sampling: Sampling) -> Callable[[Array], Array]:
    """Return what draws a token for each row of logits, (batch, vocabulary).

    torch draws, because its random numbers are those of transformers.
    """
    import torch

    dice = torch.Generator().manual_seed(sampling.seed)

    def draw(logits: Array) -> Array:
        scores = torch.from_numpy(logits).float() / sampling.temperature
        if 0 < sampling.top_k < scores.shape[-1]:
            least = scores.topk(sampling.top_k).values[:, -1:]
            scores = scores.masked_fill(scores < least, -torch.inf)
        if sampling.top_p < 1:
            ordered, places = scores.sort(descending=False)
            unlikely = ordered.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
            unlikely[:, -1] = False
            scores = scores.masked_fill(unlikely.scatter(1, places, unlikely), -torch.inf)
        drawn: Array = torch.multinomial(scores.softmax(-1), 1, generator=dice)[:, 0].numpy()
        return drawn

    return draw
