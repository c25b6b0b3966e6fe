import math

import pytest
from hand_made import artifact, evidence, placement

from lora_export.checks import weights
from lora_export.records import Status

FLIPPED = placement("layer.1.key.weight", differing=1, largest=0.5)


def _judge(*placements, **changes):
    (verdict,) = weights.judge(evidence(placements=placements, **changes))
    return verdict


def test_tensors_that_are_all_inside_pass():
    (verdict,) = weights.judge(evidence())
    assert (verdict.status, verdict.measured, verdict.compared) == (Status.PASS, 0, 2)
    assert verdict.note == "2 of 2 tensors are there bit for bit"
    assert verdict.where == ()


def test_what_is_transposed_or_joined_passes_and_is_counted():
    verdict = _judge(placement(how="transposed"), placement("b", how="rows 0 to 8"), placement("c"))
    assert verdict.status is Status.PASS
    assert verdict.note == "3 of 3 tensors are there bit for bit, 2 of them in another form"


def test_what_has_eight_bits_is_not_called_equal():
    verdict = _judge(placement(how="in eight bits", largest=0.1), placement("b"))
    assert verdict.status is Status.PASS
    assert "1 of 2 tensors are there bit for bit; 1 in eight bits" in verdict.note


def test_what_is_in_unknown_integers_is_counted_apart():
    unknown = placement("b", found=(), how="in integers")
    verdict = _judge(placement(), unknown)
    assert (verdict.status, verdict.compared) == (Status.PASS, 1)
    assert "; 1 more are in integers, which `fidelity` judges" in verdict.note
    assert _judge(unknown).status is Status.NOT_RUN


def test_one_element_that_differs_fails_and_is_named():
    verdict = _judge(placement(), FLIPPED)
    assert (verdict.status, verdict.measured, verdict.compared) == (Status.FAIL, 1, 2)
    assert verdict.where == ("layer.1.key.weight",)
    assert "layer.1.key.weight: 1 of 64 elements differ, by up to 0.5, in model." in verdict.note


def test_a_zero_of_the_other_sign_fails():
    assert _judge(placement(differing=1, largest=0.0)).status is Status.FAIL


def test_an_element_that_is_no_number_fails():
    assert _judge(placement(differing=1, largest=math.inf)).status is Status.FAIL


def test_eight_bits_beyond_half_a_step_fails():
    assert _judge(placement(how="in eight bits", differing=1)).status is Status.FAIL


@pytest.mark.parametrize("differing", [64, 0])
def test_a_tensor_that_is_not_there_fails(differing):
    verdict = _judge(placement(), placement("b", found=(), how="missing", differing=differing))
    assert (verdict.status, verdict.where) == (Status.FAIL, ("b",))
    assert "b is not there" in verdict.note


def test_every_artifact_is_judged_by_its_own_tensors():
    both = (artifact(), artifact("pt2"))
    found = weights.judge(evidence(artifacts=both, placements=(placement(), FLIPPED)))
    assert [(v.subject, v.status) for v in found] == [
        ("onnx", Status.FAIL),
        ("pt2", Status.NOT_RUN),
    ]


def test_tensors_of_no_elements_are_no_pass():
    assert _judge(placement(elements=0)).status is Status.FAIL


def test_nobody_having_looked_is_not_run():
    assert _judge().status is Status.NOT_RUN


def test_no_artifact_is_not_run():
    (verdict,) = weights.judge(evidence(artifacts=()))
    assert verdict.status is Status.NOT_RUN
