import pytest
from hand_made import audit, evidence

from lora_export.checks import exact
from lora_export.records import Status


def _judge(*audits):
    return exact.judge(evidence(weights=audits))


def test_correctly_rounded_weights_that_moved_pass():
    assert [v.status for v in _judge(audit(), audit("b"))] == [Status.PASS, Status.PASS]


def test_the_elements_of_all_tensors_are_counted():
    assert [v.compared for v in _judge(audit(), audit("b", elements=6))] == [70, 70]


def test_a_misrounded_element_fails():
    rounding, motion = _judge(audit(), audit("worst", misrounded=1, largest_ulp=0.75))
    assert (rounding.status, motion.status) == (Status.FAIL, Status.PASS)
    assert "0.750 ulp, in worst" in rounding.note


def test_a_weight_that_stood_still_fails():
    rounding, motion = _judge(audit(unmoved=2), audit("b", unmoved=3))
    assert (rounding.status, motion.status, motion.measured) == (Status.PASS, Status.FAIL, 5)


def test_the_tensor_that_lost_most_of_its_update_is_named():
    _, motion = _judge(audit(), audit("thin", lost_share=0.25))
    assert "2.50e-01 of an update lost in rounding, in thin" in motion.note


def test_tensors_without_elements_fail():
    assert [v.status for v in _judge(audit(elements=0))] == [Status.FAIL, Status.FAIL]


def test_no_audits_is_not_run():
    assert [v.status for v in _judge()] == [Status.NOT_RUN]


def test_a_sample_is_counted_as_what_it_is_and_said_to_be_one():
    for verdict in _judge(audit(of=1000), audit("b")):
        assert (verdict.status, verdict.compared) == (Status.PASS, 128)
        note = "; derived 128 of 1,064 elements; `lora-export verify` derives all"
        assert verdict.note.endswith(note)


def test_what_was_derived_in_full_is_not_said_to_be_a_sample():
    assert not any("derived" in verdict.note for verdict in _judge(audit(), audit("b")))


def test_a_misrounded_element_of_a_sample_fails():
    rounding, _ = _judge(audit(of=1000, misrounded=1))
    assert (rounding.status, rounding.measured) == (Status.FAIL, 1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"misrounded": 1}, "worst (1 of 1,000 elements)"),
        ({"misrounded": 999, "applied": 2.0}, "worst (2 times its update)"),
        ({"misrounded": 999, "applied": 0.25}, "worst (0.25 times its update)"),
        ({"misrounded": 999, "applied": 0.0}, "worst (its update is missing)"),
        ({"misrounded": 999, "applied": 0.0, "strange": 1.0}, "something else than its update"),
        ({"misrounded": 999, "applied": 0.5, "strange": 0.7}, "0.5 times its update, and 70%"),
    ],
)
def test_what_a_wrong_tensor_holds_is_said(changes, said):
    rounding, _ = _judge(audit(), audit("worst", elements=1000, **changes))
    assert said in rounding.note
    assert rounding.where == ("worst",)
