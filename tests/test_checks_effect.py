import numpy as np
import pytest
from hand_made import LIMIT, LOGITS, NOISE, evidence, moved, recording, with_recording

from lora_export.checks import effect
from lora_export.records import IDLE, REFERENCE, UNMERGED, Status


def _judge(found):
    (verdict,) = effect.judge(found)
    return verdict


def _idle(by):
    outputs = [logits + by for logits in LOGITS]
    return _judge(with_recording(evidence(), IDLE, recording(IDLE, outputs)))


def test_an_adapter_that_moves_the_outputs_passes():
    verdict = _judge(evidence())
    assert (verdict.status, verdict.measured, verdict.compared) == (Status.PASS, 1.0, 10)


def test_an_effect_just_above_the_tolerance_passes():
    assert _idle(LIMIT + NOISE).status is Status.PASS


def test_an_effect_within_the_tolerance_fails():
    assert _idle(LIMIT).status is Status.FAIL


def test_an_effect_downwards_counts_as_well():
    assert _idle(-1.0).status is Status.PASS


def test_an_adapter_that_does_nothing_fails():
    verdict = _idle(0.0)
    assert (verdict.status, verdict.measured) == (Status.FAIL, 0.0)


def test_an_adapter_lost_in_the_noise_fails():
    assert _idle(NOISE).status is Status.FAIL


@pytest.mark.parametrize("runner", [IDLE, REFERENCE, UNMERGED])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_value_that_is_no_number_fails(runner, bad):
    assert _judge(moved(evidence(), runner, 0, (0, 0), bad)).status is Status.FAIL


def test_a_recording_of_too_few_batches_fails():
    found = with_recording(evidence(), IDLE, recording(IDLE, LOGITS[:1]))
    assert _judge(found).status is Status.FAIL


def test_an_adapter_that_does_nothing_fails_where_the_model_answers_zero_everywhere():
    zeros = [0 * logits for logits in LOGITS]
    found = {name: recording(name, zeros) for name in (REFERENCE, UNMERGED, IDLE)}
    assert _judge(evidence(recordings=found)).status is Status.FAIL


@pytest.mark.parametrize("missing", [IDLE, REFERENCE, UNMERGED])
def test_a_missing_recording_is_not_run(missing):
    assert _judge(with_recording(evidence(), missing, None)).status is Status.NOT_RUN
