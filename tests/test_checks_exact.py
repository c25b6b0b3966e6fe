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
