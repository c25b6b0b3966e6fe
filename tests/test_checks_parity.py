import dataclasses

import numpy as np
import pytest
from hand_made import (
    LIMIT,
    LOGITS,
    NOISE,
    artifact,
    evidence,
    moved,
    per_token,
    recording,
    recordings,
    with_answer,
    with_recording,
)  # fmt: skip

from lora_export.checks import parity
from lora_export.records import REFERENCE, UNMERGED, Status

# (batch, row, position): the last sentence of three has two tokens of four.
PADDED, ATTENDED = (0, (2, 3, 0)), (0, (2, 1, 0))


def _judge(found):
    (verdict,) = parity.judge(found)
    return verdict


def _answers(*outputs):
    return _judge(with_recording(evidence(), "onnx", recording("onnx", outputs)))


# ---------------------------------------------------------------- values


def test_an_artifact_within_the_noise_passes():
    verdict = _judge(evidence())
    assert verdict.status is Status.PASS
    assert (verdict.measured, verdict.limit, verdict.compared) == (2 * NOISE, LIMIT, 10)


def test_a_deviation_at_the_limit_passes():
    verdict = _answers(*(logits + LIMIT for logits in LOGITS))
    assert (verdict.status, verdict.measured) == (Status.PASS, LIMIT)


def test_a_deviation_just_above_the_limit_fails():
    assert _answers(*(logits + LIMIT + NOISE for logits in LOGITS)).status is Status.FAIL


def test_a_deviation_downwards_fails_as_well():
    assert _answers(*(logits - LIMIT - NOISE for logits in LOGITS)).status is Status.FAIL


def test_a_wrong_scale_fails():
    assert _answers(*(1.001 * logits for logits in LOGITS)).status is Status.FAIL


def test_a_single_wrong_element_fails_and_its_batch_is_named():
    verdict = _judge(moved(evidence(), "onnx", 1, (1, 0), 0.5))
    assert verdict.status is Status.FAIL
    assert "largest at batch 2, length 3, padding right" in verdict.note


def test_rows_in_another_order_fails():
    assert _answers(LOGITS[0][::-1], LOGITS[1]).status is Status.FAIL


def test_the_note_says_which_tolerance_would_have_passed():
    verdict = _answers(*(logits + 16 * NOISE for logits in LOGITS))
    assert "16.00 times the noise floor 9.54e-07" in verdict.note


# ---------------------------------------------------------------- defects


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("runner", ["onnx", REFERENCE, UNMERGED])
def test_a_value_that_is_no_number_fails_whoever_answered_it(runner, bad):
    verdict = _judge(moved(evidence(), runner, 1, (0, 1), bad))
    assert verdict.status is Status.FAIL
    assert "logits has 1 values that are NaN or infinite" in verdict.note


def test_the_same_infinity_on_both_sides_fails():
    found = evidence()
    for runner in (REFERENCE, UNMERGED, "onnx"):
        found = moved(found, runner, 0, (0, 0), np.inf)
    assert _judge(found).status is Status.FAIL


def test_an_output_of_nothing_but_nan_fails():
    assert _answers(*(logits * np.nan for logits in LOGITS)).status is Status.FAIL


@pytest.mark.parametrize("shape", [(2, 3), (3, 1), (1, 2), (6,), (3, 2, 1), (1, 3, 2), (0, 2)])
def test_an_output_of_another_shape_fails(shape):
    verdict = _judge(with_answer(evidence(), "onnx", 0, np.zeros(shape, np.float32)))
    assert verdict.status is Status.FAIL
    assert f"logits has shape {shape}, expected (3, 2)" in verdict.note


@pytest.mark.parametrize("names", [("scores",), (), ("logits", "hidden")])
def test_outputs_of_other_names_fails(names):
    own = evidence().recordings["onnx"]
    first = dict.fromkeys(names, own.outputs[0]["logits"])
    new = dataclasses.replace(own, outputs=(first, own.outputs[1]))
    verdict = _judge(with_recording(evidence(), "onnx", new))
    assert verdict.status is Status.FAIL
    assert f"outputs {sorted(names)}, expected ['logits']" in verdict.note


def test_a_batch_that_was_not_answered_fails():
    verdict = _answers(LOGITS[0])
    assert (verdict.status, verdict.compared) == (Status.FAIL, 0)
    assert "1 of 2 batches" in verdict.note


def test_a_batch_too_many_fails():
    assert _answers(*LOGITS, LOGITS[0]).status is Status.FAIL


@pytest.mark.parametrize("short", [REFERENCE, UNMERGED])
def test_a_reference_that_lacks_a_batch_fails(short):
    found = evidence()
    fewer = dataclasses.replace(
        found.recordings[short], outputs=found.recordings[short].outputs[:1]
    )
    assert _judge(with_recording(found, short, fewer)).status is Status.FAIL


def test_no_batches_at_all_fails():
    empty = {name: recording(name, ()) for name in (REFERENCE, UNMERGED, "onnx")}
    verdict = _judge(evidence(batches=(), recordings=empty))
    assert verdict.status is Status.FAIL
    assert verdict.note == "nothing was compared"


@pytest.mark.parametrize("missing", ["onnx", REFERENCE, UNMERGED])
def test_a_missing_recording_is_not_run(missing):
    assert _judge(with_recording(evidence(), missing, None)).status is Status.NOT_RUN


def test_no_artifacts_is_not_run():
    assert _judge(evidence(artifacts=())).status is Status.NOT_RUN


# ---------------------------------------------------------------- padding


def test_a_fully_masked_row_fails_and_is_refused():
    found = evidence()
    arrays = {name: array.copy() for name, array in found.batches[1].arrays.items()}
    arrays["attention_mask"][1] = 0
    batch = dataclasses.replace(found.batches[1], arrays=arrays)
    verdict = _judge(dataclasses.replace(found, batches=(found.batches[0], batch)))
    assert verdict.status is Status.FAIL
    assert "no attended token" in verdict.note


def test_a_difference_at_a_padded_position_passes():
    found = per_token()
    for runner in ("onnx", UNMERGED):
        found = moved(found, runner, *PADDED, 100.0)
    assert _judge(found).status is Status.PASS


def test_a_difference_at_an_attended_position_fails():
    assert _judge(moved(per_token(), "onnx", *ATTENDED, 0.5)).status is Status.FAIL


def test_padded_positions_are_not_counted():
    assert _judge(per_token()).compared == 2 * (4 + 3 + 2 + 3 + 2)


# ---------------------------------------------------------------- the noise floor


def test_a_model_without_noise_allows_roundings_of_its_precision():
    found = evidence(
        recordings=recordings()
        | {UNMERGED: recording(UNMERGED, LOGITS), "onnx": recording("onnx", LOGITS)}
    )
    verdict = _judge(found)
    assert verdict.status is Status.PASS
    assert verdict.limit == 8 * 2.0**-23 * 3.0  # float32's epsilon, times the largest logit


def test_a_deviation_fails_where_the_model_has_no_noise():
    silent = recordings() | {UNMERGED: recording(UNMERGED, LOGITS)}
    found = moved(evidence(recordings=silent), "onnx", 0, (0, 0), 1e-5)
    assert _judge(found).status is Status.FAIL


def test_a_noisier_model_allows_a_larger_deviation():
    noisy = recordings() | {UNMERGED: recording(UNMERGED, [x + 4 * NOISE for x in LOGITS])}
    found = moved(evidence(recordings=noisy), "onnx", 0, (0, 0), 16 * NOISE)
    assert _judge(found).status is Status.PASS
    assert _judge(found).limit == 4 * LIMIT


def test_the_floor_is_that_of_the_recording_the_evidence_names():
    noisy = recordings() | {"merged": recording("merged", [x + 4 * NOISE for x in LOGITS])}
    assert _judge(evidence(recordings=noisy, floor="merged")).limit == 4 * LIMIT


def _all_zero(runner_off_by):
    zeros = [0 * logits for logits in LOGITS]
    found = {name: recording(name, zeros) for name in (REFERENCE, UNMERGED)}
    found["onnx"] = recording("onnx", [z + runner_off_by for z in zeros])
    return _judge(evidence(recordings=found))


def test_a_model_that_answers_zero_everywhere_is_still_judged():
    verdict = _all_zero(0.0)
    assert (verdict.measured, verdict.compared) == (0.0, 10)


def test_a_deviation_fails_where_the_model_answers_zero_everywhere():
    assert _all_zero(1e-3).status is Status.FAIL


# ---------------------------------------------------------------- many artifacts


def test_each_artifact_is_judged_on_its_own():
    found = evidence(
        artifacts=(artifact("onnx"), artifact("torchscript")),
        recordings=recordings() | {"torchscript": recording("torchscript", [-x for x in LOGITS])},
    )
    assert [(v.subject, v.status) for v in parity.judge(found)] == [
        ("onnx", Status.PASS),
        ("torchscript", Status.FAIL),
    ]


def test_a_small_output_fails_beside_a_large_one():
    # Rounding of the large output must not be the tolerance of the small one.
    found = evidence()
    both = {
        name: dataclasses.replace(
            old,
            outputs=tuple(
                {**out, "hidden": np.full((2, 3), 1e4, out["logits"].dtype)} for out in old.outputs
            ),
        )
        for name, old in found.recordings.items()
    }
    off = both["onnx"].outputs[0]["logits"] + np.float32(5e-3)
    first = {**both["onnx"].outputs[0], "logits": off}
    both["onnx"] = dataclasses.replace(both["onnx"], outputs=(first, both["onnx"].outputs[1]))
    assert _judge(dataclasses.replace(found, recordings=both)).status is Status.FAIL
