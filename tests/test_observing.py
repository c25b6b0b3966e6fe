"""What is observed of real small models, and what the checks make of it."""

import copy
import dataclasses

import families
import numpy as np
import pytest

from lora_export import calling, inputs, observing, stages
from lora_export.checks import batch_invariant
from lora_export.records import MERGED, REFERENCE, Evidence, Status
from lora_export.runners.eager import EagerRunner


def made(family, **options):
    """A small model, how it is called, and runners for it in float64 and in float32."""
    model = families.build(family)
    interface = calling.interface_of(model, families.tokens_of(model), **options)
    exact = interface.bind(copy.deepcopy(model).double())
    runners = [
        EagerRunner(REFERENCE, exact, interface.signature),
        EagerRunner(MERGED, interface.bind(model), interface.signature),
    ]
    return model, interface, runners


def recorded(family):
    """Evidence of a small model on the grid of shapes, without an artifact."""
    _, interface, runners = made(family)
    batches = inputs.grid_batches(interface.signature, 3)
    return runners[1], Evidence(
        signature=interface.signature,
        batches=batches,
        recordings={runner.name: stages.record(runner, batches) for runner in runners},
        floor=MERGED,
    )


class Leaking:
    """A runner whose answer to a row depends on the other rows."""

    def __init__(self, runner):
        self.runner, self.name, self.precision = runner, runner.name, runner.precision

    def run(self, arrays):
        found = self.runner.run(arrays)
        return {n: a + np.float32(1e-2) * a.mean(0, keepdims=True) for n, a in found.items()}


# ---------------------------------------------------------------- a row alone and among others


ALONE = ["bert", "bert-choices", "llama", "gpt2-cls", "t5", "vit"]


@pytest.mark.parametrize(
    "family",
    [f if f in ALONE else pytest.param(f, marks=pytest.mark.slow) for f in families.FAMILIES],
)
def test_a_model_answers_a_row_alone_as_among_others(family):
    runner, evidence = recorded(family)
    alone = observing.alone(runner, evidence.batches, evidence.signature)
    assert len({row.batch for row in alone}) == observing.ALONE_BATCHES
    assert len(alone) > 2 * observing.ALONE_BATCHES
    (verdict,) = batch_invariant.judge(dataclasses.replace(evidence, alone=alone))
    assert (verdict.status, verdict.where) == (Status.PASS, ()), verdict.note
    sizes = [evidence.signature.sizes(evidence.batches[row.batch].arrays) for row in alone]
    assert verdict.compared > len(sizes)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_an_answer_that_depends_on_the_other_rows_fails(family):
    runner, evidence = recorded(family)
    leaking = Leaking(runner)
    wrong = {**evidence.recordings, MERGED: stages.record(leaking, evidence.batches)}
    alone = observing.alone(leaking, evidence.batches, evidence.signature)
    floor = dataclasses.replace(evidence.recordings[MERGED], runner="floor")
    (verdict,) = batch_invariant.judge(
        dataclasses.replace(
            evidence, recordings=wrong | {"floor": floor}, floor="floor", alone=alone
        )
    )
    assert verdict.status is Status.FAIL
    assert len(verdict.where) > 3


def test_a_row_alone_has_only_the_padding_that_it_needs():
    _, interface, _ = made("bert")
    ids = inputs.made(interface.signature, 3, 8, "right", 1)
    batch = dataclasses.replace(inputs.grid_batches(interface.signature, 0)[0], arrays=ids)
    for row in range(3):
        count = int(ids["attention_mask"][row].sum())
        found = inputs.alone(batch, row, interface.signature)
        assert {array.shape for array in found.arrays.values()} == {(1, count)}
        np.testing.assert_array_equal(found.arrays["input_ids"][0], ids["input_ids"][row, :count])


@pytest.mark.parametrize(
    ("padding", "cache", "lengths"),
    [("left", True, [8, 6, 5]), ("left", False, [8, 8, 8]), ("hole", True, [8, 8, 8])],
)
def test_padding_from_the_left_goes_where_positions_follow_the_mask(padding, cache, lengths):
    _, interface, _ = made("llama", cache=cache)
    arrays = inputs.made(interface.signature, 3, 8, padding, 1)
    batch = dataclasses.replace(inputs.grid_batches(interface.signature, 0)[0], arrays=arrays)
    found = [inputs.alone(batch, row, interface.signature).mask.shape[-1] for row in range(3)]
    assert found == lengths


def test_padding_beside_cached_tokens_stays():
    _, interface, _ = made("llama")
    arrays = inputs.made(interface.signature, 3, 2, "left", 1, past=6)
    batch = dataclasses.replace(inputs.grid_batches(interface.signature, 0)[0], arrays=arrays)
    found = inputs.alone(batch, 2, interface.signature)
    assert found.arrays["attention_mask"].shape == (1, 8)
    assert found.arrays["input_ids"].shape == (1, 2)
    assert found.arrays["past_key_values.0.key"].shape[2] == 6
