"""How good answers are: of a classifier, and of a model that writes text. The extra `recipes`.

A metric that the answers leave undefined, such as a Matthews correlation over one class, is never
a number: in its place stands a measurement "NAME undefined", the count of the samples.
"""

import math
import sys
from collections.abc import Sequence

import numpy as np

from lora_export.errors import InputError
from lora_export.records import Array, Measurement

EXTRA = "pip install 'lora-export[recipes]'"
_LONGEST = math.log(sys.float_info.max)  # nats a token, above which a perplexity is no float64


def classification(
    references: Sequence[int] | Array, predictions: Sequence[int] | Array, subject: str = "dev"
) -> tuple[Measurement, ...]:
    """Return accuracy, F1 and the Matthews correlation of classes, counted from 0.

    "F1" is that of class 1 where no class is above 1, undefined where neither side has that class.
    Of more classes it is "macro F1": the mean over those that either side has. The Matthews
    correlation, from -1 to 1, is undefined where a side has a single class.

    Raises:
        InputError: there is nothing to compare, the lengths differ, a class is below 0, or
            scikit-learn is not installed.
    """
    try:
        from sklearn import metrics
    except ImportError as error:
        raise InputError(f"scikit-learn is not installed; {EXTRA}") from error
    count = _pairs(references, predictions)
    sides = np.asarray(references), np.asarray(predictions)
    if min(side.min() for side in sides) < 0:
        raise InputError("a class is below 0; classes are counted from 0")
    two = max(side.max() for side in sides) < 2
    f1 = metrics.f1_score(*sides, average="binary" if two else "macro", zero_division=math.nan)
    varied = all(len(np.unique(side)) > 1 for side in sides)
    matthews = metrics.matthews_corrcoef(*sides) if varied else math.nan
    return (
        _measured("accuracy", subject, metrics.accuracy_score(*sides), "share", count),
        _measured("F1" if two else "macro F1", subject, f1, "share", count),
        _measured("Matthews correlation", subject, matthews, "share", count),
    )


def generation(
    references: Sequence[str], predictions: Sequence[str], subject: str = "dev"
) -> tuple[Measurement, ...]:
    """Return BLEU (points, 0 to 100), ROUGE-1, ROUGE-2, ROUGE-L and exact match (shares) of texts.

    BLEU is sacrebleu's of the corpus, with its default settings, undefined where no prediction has
    four words. ROUGE is rouge_score's F-measure without stemming, the mean over the pairs in which
    a side has a word (ROUGE-2: two of them). Space at the ends of a text does not count as a
    mismatch.

    Raises:
        InputError: there is nothing to compare, the lengths differ, or sacrebleu or rouge_score is
            not installed.
    """
    try:
        import sacrebleu
        from rouge_score import rouge_scorer, tokenizers
    except ImportError as error:
        raise InputError(f"sacrebleu or rouge_score is not installed; {EXTRA}") from error
    count = _pairs(references, predictions)
    pairs = list(zip(references, predictions, strict=True))
    bleu = sacrebleu.corpus_bleu(list(predictions), [list(references)])
    found = [
        _measured("BLEU", subject, bleu.score if bleu.totals[-1] else math.nan, "points", count)
    ]
    tokenizer = tokenizers.DefaultTokenizer(use_stemmer=False)
    words = [max(len(tokenizer.tokenize(text)) for text in pair) for pair in pairs]
    for kind, least in (("1", 1), ("2", 2), ("L", 1)):
        scorer = rouge_scorer.RougeScorer([f"rouge{kind}"], tokenizer=tokenizer)
        long = [pair for pair, most in zip(pairs, words, strict=True) if most >= least]
        shares = [scorer.score(*pair)[f"rouge{kind}"].fmeasure for pair in long]
        mean = sum(shares) / len(shares) if shares else math.nan
        found.append(_measured(f"ROUGE-{kind}", subject, mean, "share", len(shares) or count))
    same = sum(reference.strip() == prediction.strip() for reference, prediction in pairs)
    return (*found, _measured("exact match", subject, same / count, "share", count))


def perplexity(nats: float, tokens: int, subject: str = "dev") -> Measurement:
    """Return exp(`nats` / `tokens`), from the sum of -log p over the tokens and their number.

    Raises:
        InputError: there are no tokens, or the sum gives no finite perplexity.
    """
    if tokens < 1:
        raise InputError("a perplexity of no tokens is undefined")
    if not 0 <= nats / tokens <= _LONGEST:
        raise InputError(f"{nats} nat over {tokens} tokens give no finite perplexity of at least 1")
    return _measured("perplexity", subject, math.exp(nats / tokens), "per token", tokens)


def _pairs(references: Sequence[object] | Array, predictions: Sequence[object] | Array) -> int:
    """Return how many answers there are to compare."""
    if len(references) != len(predictions):
        raise InputError(f"{len(references)} references, but {len(predictions)} predictions")
    if not len(references):
        raise InputError("there are no answers to compare")
    return len(references)


def _measured(name: str, subject: str, value: float, unit: str, samples: int) -> Measurement:
    if math.isfinite(value):
        return Measurement(name, subject, float(value), unit, samples)
    return Measurement(f"{name} undefined", subject, float(samples), "count", samples)
