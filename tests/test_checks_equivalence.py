import numpy as np
import pytest
from hand_made import LOGITS, evidence, moved, recording, with_recording

from lora_export.checks import equivalence
from lora_export.records import MERGED, REFERENCE, UNMERGED, Status


def _judge(found):
    (verdict,) = equivalence.judge(found)
    return verdict


def test_a_merged_model_within_the_noise_passes():
    verdict = _judge(evidence())
    assert (verdict.subject, verdict.status, verdict.compared) == (MERGED, Status.PASS, 10)


def test_a_merge_without_the_update_fails():
    answers = evidence().recordings["idle"]
    assert _judge(with_recording(evidence(), MERGED, answers)).status is Status.FAIL


def test_a_merge_with_a_wrong_scale_fails():
    doubled = recording(MERGED, [2 * logits for logits in LOGITS])
    assert _judge(with_recording(evidence(), MERGED, doubled)).status is Status.FAIL


def test_a_merged_model_that_answers_nan_fails():
    assert _judge(moved(evidence(), MERGED, 0, (0, 0), np.nan)).status is Status.FAIL


def test_an_artifact_far_off_does_not_matter():
    assert _judge(moved(evidence(), "onnx", 0, (0, 0), 1.0)).status is Status.PASS


@pytest.mark.parametrize("missing", [MERGED, REFERENCE, UNMERGED])
def test_a_missing_recording_is_not_run(missing):
    assert _judge(with_recording(evidence(), missing, None)).status is Status.NOT_RUN
