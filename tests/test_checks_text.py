import dataclasses

import numpy as np
import pytest
from hand_made import evidence, reading

from lora_export.checks import text
from lora_export.records import Reply, Status

HARD, REAL = reading().replies


def _judge(**changes):
    """The verdicts on the tokens and on the labels, after `changes` to what the sentences gave."""
    return text.judge(reading(replies=(HARD, dataclasses.replace(REAL, **changes))))


def _moved(name, place, by):
    array = REAL.found[name].copy()
    array[place] += by
    return {**REAL.found, name: array}


def _answers(**arrays):
    return {**REAL.answers, **arrays}


def test_what_the_tokenizer_makes_passes_and_everything_is_counted():
    tokens, labels = text.judge(reading())
    assert (tokens.status, tokens.compared) == (Status.PASS, 5)
    assert (labels.status, labels.compared) == (Status.PASS, 3)


def test_it_is_asked_of_artifacts_that_take_text_alone():
    assert text.applies(reading())
    assert not text.applies(evidence())


@pytest.mark.parametrize("name", ["input_ids", "attention_mask"])
def test_one_other_token_fails_and_its_text_is_named(name):
    tokens, _ = _judge(found=_moved(name, (1, 0), 1))
    assert (tokens.status, tokens.measured) == (Status.FAIL, 1)
    assert repr(REAL.texts[1]) in tokens.note


def test_padding_to_another_length_fails_for_every_text():
    wide = {name: np.pad(array, ((0, 0), (0, 1))) for name, array in REAL.found.items()}
    assert _judge(found=wide)[0].measured == 3


def test_a_mask_that_is_missing_fails():
    assert _judge(found={"input_ids": REAL.found["input_ids"]})[0].status is Status.FAIL


def test_no_arrays_at_all_fails():
    assert _judge(found={}, expected={})[0].status is Status.FAIL


def test_another_label_than_the_logits_say_fails():
    (other,) = {"negative", "positive"} - {REAL.labels[1]}
    _, labels = _judge(labels=(REAL.labels[0], other, REAL.labels[2]))
    assert (labels.status, labels.measured) == (Status.FAIL, 1)
    assert repr(REAL.texts[1]) in labels.note


def test_a_label_that_is_missing_fails():
    assert _judge(labels=REAL.labels[:2])[1].measured == 1


@pytest.mark.parametrize("wrong", [1e-3, np.nan])
def test_a_probability_that_is_no_softmax_of_the_logits_fails(wrong):
    shares = REAL.answers["probabilities"] + np.float32([[0], [wrong], [0]])
    assert _judge(answers=_answers(probabilities=shares))[1].measured == 1


def test_a_classifier_of_which_no_label_was_asked_fails():
    """Hard texts alone say nothing about labels."""
    tokens, labels = text.judge(reading(replies=(HARD,)))
    assert (tokens.status, labels.status) == (Status.PASS, Status.FAIL)


@pytest.mark.parametrize("missing", [{"replies": ()}, {"signature": None}])
def test_no_text_is_not_run(missing):
    assert [v.status for v in text.judge(reading(**missing))] == [Status.NOT_RUN]


def test_a_model_without_classes_is_asked_for_its_tokens_alone():
    plain = dataclasses.replace(reading().signature, labels=())
    found = text.judge(reading(signature=plain, replies=(Reply(("a",), HARD.found, HARD.found),)))
    assert [v.subject for v in found] == ["tokens"]
