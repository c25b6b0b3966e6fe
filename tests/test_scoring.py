"""Every metric against its formula in float64; what is undefined is said, never a number."""

import math
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_export import scoring
from lora_export.errors import InputError

SEATED, SITS = "the cat sat on the mat", "the cat is on the mat"


def by_name(measurements):
    assert len({one.name for one in measurements}) == len(measurements)
    assert all(math.isfinite(one.value) for one in measurements)
    return {one.name: one.value for one in measurements}


def f1_of(label, references, predictions):
    """Return 2 tp / (2 tp + fp + fn)."""
    hits = np.sum((references == label) & (predictions == label))
    return 2 * hits / (np.sum(references == label) + np.sum(predictions == label))


# ---------------------------------------------------------------- classes


@settings(deadline=None)  # scikit-learn is loaded by the first
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=40))
def test_two_classes_give_what_the_table_of_hits_and_misses_gives(pairs):
    references, predictions = np.array(pairs).T
    found = by_name(scoring.classification(references, predictions))
    assert found["accuracy"] == pytest.approx(np.mean(references == predictions), abs=1e-12)
    if references.any() or predictions.any():
        assert found["F1"] == pytest.approx(f1_of(1, references, predictions), abs=1e-12)
    else:
        assert found["F1 undefined"] == len(pairs)
    if references.std() and predictions.std():  # of two classes it is Pearson's correlation
        expected = np.corrcoef(references, predictions)[0, 1]
        assert found["Matthews correlation"] == pytest.approx(expected, abs=1e-12)
    else:
        assert found["Matthews correlation undefined"] == len(pairs)


def test_more_classes_give_the_mean_over_them():
    references = np.array([0, 0, 1, 1, 2, 2, 2, 3])
    predictions = np.array([0, 1, 1, 1, 2, 0, 2, 2])
    found = by_name(scoring.classification(references, predictions))
    expected = np.mean([f1_of(label, references, predictions) for label in range(4)])
    assert found["macro F1"] == pytest.approx(expected, abs=1e-12)
    assert "F1" not in found
    one_hot = [np.eye(4)[side] - np.eye(4)[side].mean(0) for side in (references, predictions)]
    across, of_references, of_predictions = (
        np.sum(a * b) for a, b in ((one_hot[0], one_hot[1]), *((x, x) for x in one_hot))
    )
    assert found["Matthews correlation"] == pytest.approx(
        across / math.sqrt(of_references * of_predictions), abs=1e-12
    )


def test_a_classifier_that_says_one_thing_only_has_no_matthews_correlation():
    found = by_name(scoring.classification([0, 1, 1], [1, 1, 1]))
    assert found == {
        "accuracy": pytest.approx(2 / 3),
        "F1": pytest.approx(0.8),
        "Matthews correlation undefined": 3,
    }


def test_the_worst_classifier_is_not_taken_for_an_undefined_one():
    found = by_name(scoring.classification([0, 1], [1, 0]))
    assert found == {"accuracy": 0, "F1": 0, "Matthews correlation": -1}


def test_classes_below_0_are_refused():
    with pytest.raises(InputError, match="below 0"):
        scoring.classification([0, -100], [0, 1])


# ---------------------------------------------------------------- texts


def grams(text, size):
    words = text.split()
    return Counter(zip(*(words[start:] for start in range(size)), strict=False))


def longest_common(a, b):
    table = np.zeros((len(a) + 1, len(b) + 1))
    for i, j in np.ndindex(len(a), len(b)):
        table[i + 1, j + 1] = (
            table[i, j] + 1 if a[i] == b[j] else max(table[i, j + 1], table[i + 1, j])
        )
    return table[-1, -1]


def bleu_of(references, predictions):
    """Return BLEU of a corpus by its formula (Papineni et al. 2002), without smoothing."""
    logs = []
    for size in range(1, 5):
        pairs = [
            (grams(r, size), grams(p, size)) for r, p in zip(references, predictions, strict=True)
        ]
        hits = sum((r & p).total() for r, p in pairs)
        logs.append(math.log(hits / sum(p.total() for _, p in pairs)))
    lengths = [sum(len(text.split()) for text in side) for side in (references, predictions)]
    return 100 * math.exp(sum(logs) / 4 + min(0, 1 - lengths[0] / lengths[1]))


def test_bleu_follows_its_formula_over_the_corpus():
    references = ["the cat sat on the red mat today", SEATED, "a dog ran"]
    predictions = ["the cat sat on the mat", SEATED + " now", "a dog"]
    found = by_name(scoring.generation(references, predictions))
    assert found["BLEU"] == pytest.approx(bleu_of(references, predictions), abs=1e-9)
    assert 0 < found["BLEU"] < 100


def test_rouge_follows_its_formula():
    references, predictions = [SEATED, "a dog"], [SITS, "the dog ran home"]
    found = by_name(scoring.generation(references, predictions))
    pairs = list(zip(references, predictions, strict=True))
    for size in (1, 2):
        shares = [
            2 * (grams(r, size) & grams(p, size)).total()
            / (grams(r, size).total() + grams(p, size).total())
            for r, p in pairs
        ]  # fmt: skip
        assert found[f"ROUGE-{size}"] == pytest.approx(np.mean(shares), abs=1e-12)
    shares = [
        2 * longest_common(r.split(), p.split()) / len(r.split() + p.split()) for r, p in pairs
    ]
    assert found["ROUGE-L"] == pytest.approx(np.mean(shares), abs=1e-12)


def test_texts_match_exactly_but_for_space_at_the_ends():
    found = by_name(scoring.generation([SEATED, SEATED, "A"], [f" {SEATED}\n", SITS, "a"]))
    assert found["exact match"] == pytest.approx(1 / 3)


def test_the_same_text_scores_full_marks_and_another_none():
    full = by_name(scoring.generation([SEATED], [SEATED]))
    assert full == pytest.approx(
        {"BLEU": 100, "ROUGE-1": 1, "ROUGE-2": 1, "ROUGE-L": 1, "exact match": 1}
    )
    none = by_name(scoring.generation([SEATED], ["a dog ran home"]))
    assert {none[name] for name in full if name != "BLEU"} == {0}
    assert none["BLEU"] < 10  # sacrebleu smooths counts of 0


def test_bleu_and_rouge_2_of_single_words_are_undefined():
    """Else a perfect classifier that answers in a word would score 0 points."""
    found = scoring.generation(["positive", "negative"], ["positive", "negative"])
    assert by_name(found) == {
        "BLEU undefined": 2, "ROUGE-1": 1, "ROUGE-2 undefined": 2, "ROUGE-L": 1, "exact match": 1,
    }  # fmt: skip


def test_rouge_of_nothing_against_nothing_is_left_out_of_the_mean():
    found = {one.name: one for one in scoring.generation(["", SEATED], ["", SEATED])}
    assert (found["ROUGE-1"].value, found["ROUGE-1"].samples) == (1, 1)
    assert found["exact match"].samples == 2


def test_silence_where_there_was_something_to_say_counts_as_a_miss():
    found = by_name(scoring.generation([SEATED, SEATED], ["", SEATED]))
    assert found["ROUGE-1"] == found["exact match"] == 0.5


# ---------------------------------------------------------------- perplexity


def test_perplexity_of_an_even_guess_is_the_number_of_choices():
    found = scoring.perplexity(nats=12 * math.log(50), tokens=12)
    assert found.value == pytest.approx(50, rel=1e-12)
    assert (found.unit, found.samples) == ("per token", 12)


@pytest.mark.parametrize("nats", [math.nan, math.inf, -1.0, 1e6])
def test_a_perplexity_that_is_no_number_is_refused(nats):
    with pytest.raises(InputError, match="no finite perplexity"):
        scoring.perplexity(nats, tokens=1)


def test_a_perplexity_of_no_tokens_is_refused():
    with pytest.raises(InputError, match="no tokens"):
        scoring.perplexity(0.0, tokens=0)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("score", [scoring.classification, scoring.generation])
def test_no_answers_and_unequal_numbers_of_them_are_refused(score):
    with pytest.raises(InputError, match="no answers"):
        score([], [])
    with pytest.raises(InputError, match="1 references, but 2 predictions"):
        score([1], [1, 0])


@pytest.mark.parametrize(
    ("score", "package"),
    [
        (scoring.classification, "sklearn"),
        (scoring.generation, "sacrebleu"),
        (scoring.generation, "rouge_score"),
    ],
)
def test_without_the_extra_it_says_what_to_install(score, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=r"lora-export\[recipes\]"):
        score(["a"], ["a"])
