import dataclasses

from hand_made import FUSIONS, evidence

from lora_export.checks import fusions
from lora_export.records import Status


def judged(**changes):
    first, *others = FUSIONS
    made = (dataclasses.replace(first, **changes), *others)
    (verdict,) = fusions.judge(evidence(fusions=made))
    return verdict


def test_what_is_fused_passes():
    verdict = judged()
    assert (verdict.subject, verdict.status, verdict.compared) == ("onnx", Status.PASS, 7)


def test_a_layer_that_is_not_fused_fails_and_is_named():
    verdict = judged(found=4, note="4 LayerNormalization")
    assert (verdict.status, verdict.measured, verdict.where) == (Status.FAIL, 1.0, ("LayerNorm",))
    assert "4 of 5 LayerNorm (4 LayerNormalization)" in verdict.note


def test_nothing_fused_at_all_fails():
    assert judged(found=0, note="").measured == 5.0


def test_where_nothing_is_expected_it_is_not_asked():
    assert not fusions.applies(evidence(fusions=()))
    (verdict,) = fusions.judge(evidence(fusions=()))
    assert verdict.status is Status.NOT_RUN
