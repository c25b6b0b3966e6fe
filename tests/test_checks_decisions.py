import dataclasses

import numpy as np
import pytest
from hand_made import (
    LOGITS,
    NOISE,
    TEXTS,
    artifact,
    batches,
    evidence,
    moved,
    per_token,
    recording,
    recordings,
    with_answer,
    with_recording,
)  # fmt: skip

from lora_export.checks import decisions
from lora_export.records import MERGED, REFERENCE, UNMERGED, Status

FLIP = 4.0  # more than any margin between the two classes


def _judge(found, name="onnx"):
    (verdict,) = [verdict for verdict in decisions.judge(found) if verdict.subject == name]
    return verdict


def _with_margin(margin):
    """A first sentence whose classes lie `margin` apart, and an artifact that decides it wrongly.

    All others lie at the noise floor or closer, as ever.
    """
    reference = [LOGITS[0].copy(), LOGITS[1]]
    reference[0][0] = (0.5, 0.5 + margin)
    found = evidence(recordings=recordings(reference))
    answer = found.recordings["onnx"].outputs[0]["logits"].copy()
    answer[0] = answer[0, ::-1]
    return with_answer(found, "onnx", 0, answer)


def test_the_same_decisions_pass_for_the_merged_model_and_the_artifact():
    found = [(v.subject, v.status, v.compared) for v in decisions.judge(evidence())]
    assert found == [(MERGED, Status.PASS, 3), ("onnx", Status.PASS, 3)]


def test_a_flip_above_the_noise_floor_fails_and_its_text_is_shown():
    verdict = _judge(moved(evidence(), "onnx", 0, (1, 1), FLIP))
    assert (verdict.status, verdict.measured) == (Status.FAIL, 1)
    assert "2 of 3 decisions agree" in verdict.note
    assert f"{TEXTS[1]!r} (margin 3.0e+00)" in verdict.note


def test_a_flip_just_above_the_noise_floor_fails():
    assert _judge(_with_margin(2 * NOISE)).status is Status.FAIL


@pytest.mark.parametrize("margin", [NOISE, NOISE / 2])
def test_a_flip_within_the_noise_floor_is_excused_and_counted(margin):
    verdict = _judge(_with_margin(margin))
    assert (verdict.status, verdict.measured) == (Status.PASS, 0)
    assert "2 of 3 decisions agree; 1 excused" in verdict.note


def test_a_flip_of_the_merged_model_fails_it_alone():
    found = moved(evidence(), MERGED, 0, (1, 1), FLIP)
    assert _judge(found, MERGED).status is Status.FAIL
    assert _judge(found, "onnx").status is Status.PASS


def test_three_texts_at_most_are_shown():
    four = np.tile(LOGITS[0][:1], (4, 1))
    arrays = {"attention_mask": np.ones((4, 2), np.int64)}
    texts = ("first", "second", "third", "fourth")
    batch = dataclasses.replace(batches()[0], arrays=arrays, texts=texts, labels=())
    found = {name: recording(name, [four]) for name in (REFERENCE, UNMERGED)}
    found["onnx"] = recording("onnx", [-four])
    verdict = _judge(evidence(batches=(batch,), recordings=found))
    assert verdict.measured == 4
    assert "third" in verdict.note
    assert "fourth" not in verdict.note


def test_only_sentences_are_judged():
    found = moved(evidence(), "onnx", 1, (0, 1), FLIP)
    assert _judge(found).status is Status.PASS


def test_nan_fails():
    verdict = _judge(moved(evidence(), "onnx", 0, (0, 0), np.nan))
    assert (verdict.status, verdict.measured) == (Status.FAIL, 1)


def test_nan_fails_even_where_the_decision_is_a_close_one():
    found = moved(_with_margin(NOISE), "onnx", 0, (0, 0), np.nan)
    assert _judge(found).status is Status.FAIL


def test_infinity_fails_even_where_the_decision_agrees():
    assert _judge(moved(evidence(), "onnx", 0, (0, 1), np.inf)).status is Status.FAIL


@pytest.mark.parametrize("runner", [REFERENCE, UNMERGED])
def test_a_reference_without_a_noise_floor_is_not_run(runner):
    found = moved(evidence(), runner, 0, (0, 0), np.nan)
    assert [v.status for v in decisions.judge(found)] == [Status.NOT_RUN]


def test_an_answer_of_another_shape_fails():
    found = with_answer(evidence(), "onnx", 0, np.zeros((3, 3), np.float32))
    assert _judge(found).status is Status.FAIL


def test_an_answer_that_is_missing_fails():
    found = with_recording(evidence(), "onnx", recording("onnx", LOGITS[:1]))
    assert _judge(found).status is Status.FAIL


def test_a_flip_at_a_padded_token_passes():
    found = moved(per_token(), "onnx", 0, (1, 3, 1), FLIP)
    assert (_judge(found).status, _judge(found).compared) == (Status.PASS, 9)


def test_a_flip_at_an_attended_token_fails():
    assert _judge(moved(per_token(), "onnx", 0, (1, 2, 1), FLIP)).status is Status.FAIL


def test_a_model_with_a_single_output_has_no_decision_that_could_pass():
    single = [logits[:, :1] for logits in LOGITS]
    statuses = {v.status for v in decisions.judge(evidence(recordings=recordings(single)))}
    assert statuses == {Status.NOT_RUN}


def test_a_regression_is_not_asked_for_decisions_but_a_classifier_is():
    single = [logits[:, :1] for logits in LOGITS]
    assert not decisions.applies(evidence(recordings=recordings(single)))
    assert decisions.applies(evidence())
    assert decisions.applies(evidence(recordings={}))


def test_a_flip_fails_beside_an_output_that_decides_nothing():
    found = moved(evidence(), "onnx", 0, (1, 1), FLIP)
    scored = {
        name: dataclasses.replace(
            old,
            outputs=tuple({**out, "score": out["logits"][:, :1]} for out in old.outputs),
        )
        for name, old in found.recordings.items()
    }
    assert _judge(dataclasses.replace(found, recordings=scored)).status is Status.FAIL


@pytest.mark.parametrize("missing", [REFERENCE, UNMERGED, "onnx"])
def test_a_missing_recording_is_not_run(missing):
    found = decisions.judge(with_recording(evidence(), missing, None))
    assert [v.status for v in found] == [Status.NOT_RUN]


def test_a_run_without_sentences_is_not_run():
    grid = tuple(dataclasses.replace(batch, source="grid") for batch in batches())
    assert [v.status for v in decisions.judge(evidence(batches=grid))] == [Status.NOT_RUN]


def test_a_run_without_candidates_is_not_run():
    found = with_recording(evidence(artifacts=()), MERGED, None)
    assert [v.status for v in decisions.judge(found)] == [Status.NOT_RUN]


def test_each_artifact_is_judged_on_its_own():
    found = evidence(
        artifacts=(artifact("onnx"), artifact("torchscript")),
        recordings=recordings() | {"torchscript": recording("torchscript", [-x for x in LOGITS])},
    )
    assert [v.status for v in decisions.judge(found)] == [Status.PASS, Status.PASS, Status.FAIL]


def test_a_noisy_output_beside_does_not_excuse_a_flip():
    """Each output has a floor of its own: a noisy one would excuse every margin of the other."""
    found = moved(evidence(), "onnx", 0, (1, 1), FLIP)
    noisy = {
        name: dataclasses.replace(
            old,
            outputs=tuple(
                {**out, "hidden": np.full_like(out["logits"], 1000.0 if name == UNMERGED else 0.0)}
                for out in old.outputs
            ),
        )
        for name, old in found.recordings.items()
    }
    assert _judge(dataclasses.replace(found, recordings=noisy)).status is Status.FAIL
