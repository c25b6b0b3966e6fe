"""Does an artifact that takes text make of it what the tokenizer makes, and the label that follows?

The tokenizer inside is held against Hugging Face's on texts made to find faults and on real
sentences, token by token. What comes out behind it is judged by `parity` and `decisions`.
"""

import numpy as np

from lora_export import checks
from lora_export.compare import differing, probabilities
from lora_export.errors import listed
from lora_export.records import PROBABILITIES, Array, Evidence, Reply, Signature, Verdict

SCOPES = (checks.EXPORT, checks.QUICK, checks.RUN)
# A softmax in float32 over what the logits in float32 say.
LIMIT = 1e-5


def applies(evidence: Evidence) -> bool:
    """Return whether there is an artifact with the tokenizer inside."""
    return any(artifact.takes_text for artifact in evidence.artifacts)


def judge(evidence: Evidence) -> list[Verdict]:
    """Fail on a text with other ids or another mask, and on a label that the logits do not say."""
    signature = evidence.signature
    if not evidence.replies or signature is None:
        return [checks.not_run("text", "tokens", "no text went in")]
    found = [_tokens(evidence.replies)]
    if signature.labels:
        found.append(_labels(evidence.replies, signature))
    return found


def _tokens(replies: tuple[Reply, ...]) -> Verdict:
    wrong = [
        reply.texts[row]
        for reply in replies
        for row in differing(reply.expected, reply.found, len(reply.texts))
    ]
    count = sum(len(reply.texts) for reply in replies)
    note = f"ids and mask of {count - len(wrong)} of {count} texts are the tokenizer's"
    if wrong:
        note = listed(note, (repr(text[:40]) for text in wrong))
    return checks.counted("text", "tokens", len(wrong), count, "texts", note, wrong)


def _labels(replies: tuple[Reply, ...], signature: Signature) -> Verdict:
    wrong, count = [], 0
    for reply in replies:
        if not reply.answers:
            continue
        count += len(reply.texts)
        logits: Array = reply.answers["logits"]
        shares = probabilities(logits)
        chosen = tuple(signature.labels[index] for index in logits.argmax(-1))
        near = np.abs(shares - reply.answers[PROBABILITIES]).max(axis=-1) <= LIMIT
        wrong += [
            text
            for row, text in enumerate(reply.texts)
            if reply.labels[row : row + 1] != chosen[row : row + 1] or not near[row]
        ]
    note = f"{count - len(wrong)} of {count} labels and probabilities follow from the logits"
    if wrong:
        note = listed(note, (repr(text[:40]) for text in wrong))
    return checks.counted("text", "labels", len(wrong), count, "texts", note, wrong)
