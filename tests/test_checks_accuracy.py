import dataclasses

import numpy as np
import pytest
from hand_made import LOGITS, TEXTS, evidence, moved, per_token, recordings, reduced, with_recording

from lora_export.checks import accuracy
from lora_export.records import MERGED, REFERENCE, Policy, Status

FLIP = 8.0


def judged(found):
    return {verdict.subject: verdict for verdict in accuracy.judge(found)}


@pytest.mark.parametrize("made", [evidence, reduced])
def test_what_chooses_the_labels_that_the_reference_chooses_passes(made):
    found = judged(made())
    assert {name: (v.status, v.measured, v.compared) for name, v in found.items()} == {
        MERGED: (Status.PASS, 0.0, 3),
        "onnx": (Status.PASS, 0.0, 3),
    }


@pytest.mark.parametrize("made", [evidence, reduced])
def test_accuracy_that_is_lost_fails_and_the_texts_are_named(made):
    verdict = judged(moved(made(), "onnx", 0, (1, 1), FLIP))["onnx"]
    assert (verdict.status, verdict.compared) == (Status.FAIL, 3)
    assert (verdict.measured, verdict.limit) == (pytest.approx(1 / 3), 0.005)
    assert verdict.where == (repr(TEXTS[1]),)
    assert "accuracy 0.6667 [0.2077, 0.9385], the reference's 1.0000 [0.4385, 1.0000]" in (
        verdict.note
    )
    assert "an allowed loss of 0.3333 would pass" in verdict.note


def test_the_allowed_loss_is_the_callers():
    found = moved(evidence(policy=Policy(allowed_loss=0.5)), "onnx", 0, (1, 1), FLIP)
    assert judged(found)["onnx"].status is Status.PASS


def test_an_answer_that_is_no_number_is_wrong_and_fails():
    assert judged(moved(evidence(), "onnx", 0, (0, 1), np.nan))["onnx"].status is Status.FAIL


def test_what_is_better_than_the_reference_passes():
    wrong = [LOGITS[0].copy(), LOGITS[1]]
    wrong[0][1] = wrong[0][1, ::-1]
    found = evidence(recordings=recordings(wrong))
    better = with_recording(found, "onnx", recordings()["onnx"])
    verdict = judged(better)["onnx"]
    assert (verdict.status, verdict.measured) == (Status.PASS, pytest.approx(-1 / 3))


def test_without_labels_or_with_an_answer_per_token_it_is_not_asked():
    bare = tuple(dataclasses.replace(batch, labels=()) for batch in evidence().batches)
    assert accuracy.applies(evidence())
    assert not accuracy.applies(evidence(batches=bare))
    assert not accuracy.applies(per_token())


@pytest.mark.parametrize("name", [REFERENCE, "onnx"])
def test_a_missing_recording_is_no_pass(name):
    verdict = judged(with_recording(evidence(), name, None))["onnx"]
    assert verdict.status is Status.NOT_RUN
