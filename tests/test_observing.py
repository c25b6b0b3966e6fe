"""What is observed of real small models, and what the checks make of it."""

import copy
import dataclasses

import families
import numpy as np
import pytest

from lora_export import LoraConfig, calling, inject, inputs, merged_files, observing, stages
from lora_export.checks import batch_invariant, generation, plain, reproducible
from lora_export.records import MERGED, REFERENCE, Batch, Evidence, Modules, Status
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


# ---------------------------------------------------------------- what a model writes


class Forgetful:
    """A runner that loses the oldest cached token."""

    def __init__(self, runner):
        self.runner, self.name, self.precision = runner, runner.name, runner.precision

    def run(self, arrays):
        lost = {n: a.copy() for n, a in arrays.items()}
        for name, array in lost.items():
            if name.startswith("past_key_values."):
                array[:, :, :1] = 0
        return self.runner.run(lost)


def spoken(family, change=lambda runner: runner):
    """What is judged of the text that a small model writes."""
    _, interface, (reference, runner) = made(family)
    signature = interface.signature
    arrays = inputs.made(signature, 3, 9, "right", 1)
    text = Batch("text", "sentences", arrays, ("a", "b", "c"))
    batches = (text, *inputs.grid_batches(signature, 3)[1:4])
    texts = [
        observing.written(r, signature, batches, cached=cached)
        for r in (reference, change(runner))
        for cached in (True, False)
    ]
    recordings = {r.name: stages.record(r, batches) for r in (reference, runner)}
    (verdict,) = generation.judge(
        Evidence(
            signature=signature,
            batches=batches,
            recordings=recordings,
            floor=MERGED,
            written=tuple(texts),
        )
    )
    return texts, verdict


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_a_model_writes_what_the_reference_writes_with_its_cache_and_without(family):
    texts, verdict = spoken(family)
    assert {text.tokens.shape for text in texts} == {(3, observing.NEW_TOKENS)}
    assert {text.margins.dtype for text in texts} == {np.dtype("float64")}
    assert all((text.margins >= 0).all() for text in texts)
    assert (verdict.status, verdict.where) == (Status.PASS, ()), verdict.note


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_a_cache_that_forgets_fails(family):
    _, verdict = spoken(family, Forgetful)
    assert verdict.status is Status.FAIL
    assert all("with cache" in place for place in verdict.where)


def test_the_margin_is_the_least_change_of_a_logit_that_decides_otherwise():
    _, interface, (runner, _) = made("llama")
    text = Batch("text", "", inputs.made(interface.signature, 3, 9, "right", 1), ("a", "b", "c"))
    found = observing.written(runner, interface.signature, [text], cached=True)
    logits = runner.run({n: a[:1] for n, a in text.arrays.items()})["logits"][0, -1]
    best = np.sort(logits)[-2:]
    assert found.tokens[0, 0] == logits.argmax()
    assert found.margins[0, 0] == pytest.approx((best[1] - best[0]) / 2)


# ---------------------------------------------------------------- a second export


@pytest.fixture(scope="module")
def subject(tiny_base, tiny_adapter, tmp_path_factory):
    folder = tmp_path_factory.mktemp("observed")
    path, _ = tiny_adapter(folder, str(tiny_base))
    merged_files.merge_files(path, out=folder / "merged")
    return stages.load_subject(folder / "merged")


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("pt2", "openvino")]


@pytest.mark.parametrize("name", ["onnx", "torchscript", *SLOW])
def test_a_second_export_gives_the_same_digests(subject, tmp_path, name):
    if name == "openvino":
        pytest.importorskip("openvino")
    artifact = stages.export_stage(name, subject, tmp_path)
    found = observing.repeat(subject, artifact, tmp_path)
    assert found.differing == ()
    assert sum(found.operators.values()) > 50
    evidence = Evidence(artifacts=(artifact,), repeats=(found,), modules=Modules({}, {}, ()))
    (verdict,) = reproducible.judge(evidence)
    assert verdict.status is Status.PASS, verdict.note
    assert plain.judge(evidence)[-1].status is Status.PASS


def test_the_export_of_another_model_fails_and_says_what_differs(subject, tmp_path):
    """As if the file were that of a model with the adapter still beside it."""
    artifact = stages.export_stage("torchscript", subject, tmp_path)
    live = copy.deepcopy(subject.model)
    inject(live, LoraConfig(rank=2, alpha=4.0))
    other = dataclasses.replace(subject, model=live)
    found = observing.repeat(other, artifact, tmp_path)
    assert any(text.startswith("aten::linear: ") for text in found.differing)
    assert any("lora_A" in text for text in found.differing)
    evidence = Evidence(artifacts=(artifact,), repeats=(found,), modules=Modules({}, {}, ()))
    (verdict,) = reproducible.judge(evidence)
    assert (verdict.status, "model.pt" in verdict.where) == (Status.FAIL, True)
    assert plain.judge(evidence)[-1].status is Status.FAIL
