import pytest
from hand_made import account, evidence

from lora_export.checks import accounted
from lora_export.records import Account, Status


def _judge(**changes):
    return accounted.judge(evidence(account=account(**changes)))


def test_an_account_without_faults_passes_on_both_sides():
    assert [v.status for v in _judge()] == [Status.PASS, Status.PASS]


def test_what_passes_counts_the_tensors_of_its_side():
    assert [v.compared for v in _judge()] == [3, 3]


def test_an_adapter_tensor_left_over_fails():
    adapter, base = _judge(adapter_left=("layer.9.query.lora_A",))
    assert (adapter.status, base.status) == (Status.FAIL, Status.PASS)
    assert "layer.9.query.lora_A" in adapter.note


@pytest.mark.parametrize("group", ["base_damaged", "unexplained"])
def test_a_base_tensor_in_a_group_of_faults_fails(group):
    adapter, base = _judge(**{group: ("pooler.bias",)})
    assert (adapter.status, base.status) == (Status.PASS, Status.FAIL)
    assert "pooler.bias" in base.note


def test_every_fault_is_counted():
    _, base = _judge(base_damaged=("a", "b"), unexplained=("c",))
    assert base.measured == 3


def test_faults_are_among_the_tensors_that_were_compared():
    adapter, base = _judge(adapter_left=("x",), base_damaged=("a", "b"), unexplained=("c",))
    assert (adapter.compared, base.compared) == (4, 6)


def test_an_account_of_nothing_fails():
    empty = Account((), (), (), (), (), {}, (), ())
    statuses = [v.status for v in accounted.judge(evidence(account=empty))]
    assert statuses == [Status.FAIL, Status.FAIL]


def test_a_base_that_was_dropped_whole_fails():
    _, base = _judge(base_changed=(), base_identical=(), base_dropped={"a": "not needed"})
    assert base.status is Status.FAIL


def test_no_account_is_not_run():
    assert [v.status for v in accounted.judge(evidence(account=None))] == [Status.NOT_RUN]


def test_a_sample_is_called_one():
    (_, whole), (_, sample) = _judge(), _judge(is_sample=True)
    assert "sample" not in whole.note
    assert "identical in a sample of their bytes" in sample.note
