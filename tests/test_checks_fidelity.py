import dataclasses

import numpy as np
import pytest
from hand_made import LOGITS, evidence, moved, recordings, reduced, signature, with_recording

from lora_export.checks import decisions, fidelity, parity
from lora_export.records import REFERENCE, Status, TensorSpec

FLIP = 8.0


def judged(found):
    return {verdict.subject: verdict for verdict in fidelity.judge(found)}


def test_an_artifact_that_decides_as_the_reference_does_passes():
    found = judged(reduced())
    assert {subject: (v.status, v.compared) for subject, v in found.items()} == {
        "onnx, decisions": (Status.PASS, 3),
        "onnx, probabilities": (Status.PASS, 3),
    }


def test_full_precision_is_not_asked():
    assert not fidelity.applies(evidence())
    assert fidelity.applies(reduced())
    (verdict,) = fidelity.judge(evidence())
    assert verdict.status is Status.NOT_RUN


def test_reduced_precision_is_not_held_to_the_noise_of_full_precision():
    """A deviation of a thousand times the noise floor that flips nothing."""
    found = moved(reduced(), "onnx", 0, (0, 0), 2.0**-10)
    assert not parity.applies(found)
    assert [v.subject for v in decisions.judge(found)] == ["merged"]
    assert all(verdict.passed for verdict in fidelity.judge(found))


def test_a_decision_that_is_lost_fails():
    verdict = judged(moved(reduced(), "onnx", 0, (1, 1), FLIP))["onnx, decisions"]
    assert verdict.status is Status.FAIL
    assert verdict.measured == pytest.approx(1 / 3)
    assert "1 of 3 decisions differ" in verdict.note


def _close_call(margin):
    reference = [LOGITS[0].copy(), LOGITS[1]]
    reference[0][0] = (0.5, 0.5 + margin)
    found = reduced(recordings=recordings(reference))
    return moved(found, "onnx", 0, (0, 0), 2 * margin)


def test_a_toss_of_a_coin_is_no_loss():
    verdict = judged(_close_call(0.1))["onnx, decisions"]  # probabilities 0.525 and 0.475
    assert verdict.passed
    assert "1 more where the reference tosses a coin" in verdict.note


def test_a_margin_above_a_coins_counts():
    assert not judged(_close_call(0.25))["onnx, decisions"].passed


def test_probabilities_that_drift_fail_without_a_flip():
    verdict = judged(moved(reduced(), "onnx", 0, (1, 1), 2.0))["onnx, probabilities"]
    assert verdict.status is Status.FAIL
    assert verdict.measured > fidelity.MOST_DIVERGENCE


def _embedding():
    spec = TensorSpec("sentence_embedding", "float32", ("batch", 2))
    found = reduced(signature=signature(outputs=(spec,)))
    renamed = {
        name: dataclasses.replace(
            old, outputs=tuple({"sentence_embedding": out["logits"]} for out in old.outputs)
        )
        for name, old in found.recordings.items()
    }
    return dataclasses.replace(found, recordings=renamed)


def _scores(factor):
    """One value per text, which the artifact gives `factor` times as large."""
    spec = TensorSpec("logits", "float32", ("batch", 1))
    found = reduced(signature=signature(outputs=(spec,)))
    renamed = {
        name: dataclasses.replace(
            old,
            outputs=tuple(
                {"logits": out["logits"][:, :1] * (factor if name == "onnx" else 1)}
                for out in old.outputs
            ),
        )
        for name, old in found.recordings.items()
    }
    return dataclasses.replace(found, recordings=renamed)


@pytest.mark.parametrize(("factor", "status"), [(1.01, Status.PASS), (7.0, Status.FAIL)])
def test_a_score_is_judged_by_its_value(factor, status):
    """It has no options to decide among, and its direction is only a sign."""
    (verdict,) = fidelity.judge(_scores(factor))
    assert (verdict.subject, verdict.status) == ("onnx, logits", status)


def test_a_score_that_is_always_the_same_is_no_pass():
    found = _scores(1.0)
    flat = {
        name: dataclasses.replace(
            old, outputs=tuple({"logits": out["logits"] * 0 + 3} for out in old.outputs)
        )
        for name, old in found.recordings.items()
    }
    (verdict,) = fidelity.judge(dataclasses.replace(found, recordings=flat))
    assert verdict.status is Status.FAIL


def test_an_embedding_is_judged_by_its_direction():
    (verdict,) = fidelity.judge(_embedding())
    assert (verdict.subject, verdict.status) == ("onnx, sentence_embedding", Status.PASS)


def test_an_embedding_that_turns_fails():
    found = _embedding()
    old = found.recordings["onnx"]
    turned = [{n: a[:, ::-1] for n, a in out.items()} for out in old.outputs]
    wrong = with_recording(found, "onnx", dataclasses.replace(old, outputs=tuple(turned)))
    (verdict,) = fidelity.judge(wrong)
    assert verdict.status is Status.FAIL


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_fails(bad):
    (verdict,) = fidelity.judge(moved(reduced(), "onnx", 0, (0, 0), bad))
    assert (verdict.status, verdict.compared) == (Status.FAIL, 0)
    assert "NaN or infinite" in verdict.note


@pytest.mark.parametrize("name", [REFERENCE, "onnx"])
def test_a_missing_recording_is_no_pass(name):
    (verdict,) = fidelity.judge(with_recording(reduced(), name, None))
    assert verdict.status is Status.NOT_RUN
