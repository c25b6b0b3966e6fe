import dataclasses

import numpy as np
import pytest
from hand_made import LOGITS, NOISE, evidence, graphs

from lora_export.checks import graph
from lora_export.records import Evidence, ModuleOutput, Status


def _judge(answers, **changes):
    (verdict,) = graph.judge(evidence(graphs=answers, **changes))
    return verdict


def _with(place, **changes):
    """Sound answers, one of them changed."""
    answers = list(graphs())
    answers[place] = dataclasses.replace(answers[place], **changes)
    return tuple(answers)


def test_a_graph_within_what_float32_costs_passes():
    verdict = _judge(graphs())
    assert verdict.status is Status.PASS
    assert (verdict.measured, verdict.limit, verdict.compared) == (NOISE / 4, NOISE, 10)


def test_a_deviation_at_the_limit_passes():
    assert _judge(graphs(by=NOISE)).status is Status.PASS


@pytest.mark.parametrize("by", [1.01 * NOISE, -1.01 * NOISE, 1.0])
def test_a_deviation_above_the_limit_fails(by):
    assert _judge(graphs(by=by)).status is Status.FAIL


def test_a_deviation_that_parity_lets_through_fails():
    """The tolerance of a runtime is eight noise floors."""
    assert _judge(graphs(by=4 * NOISE)).status is Status.FAIL


def test_one_element_that_is_not_a_number_fails():
    wrong = LOGITS[1].copy()
    wrong[0, 1] = np.nan
    verdict = _judge(_with(1, found={"logits": wrong}))
    assert verdict.status is Status.FAIL
    assert "NaN" in verdict.note


def test_an_output_that_the_graph_lacks_fails():
    assert _judge(_with(0, found={})).status is Status.FAIL


def test_an_output_of_another_shape_fails():
    assert _judge(_with(0, found={"logits": LOGITS[0][:2]})).status is Status.FAIL


def test_answers_without_an_element_are_no_pass():
    empty = {"logits": np.zeros((0, 2))}
    found = dataclasses.replace(graphs()[0], expected={}, found={}, rounded={})
    assert not _judge((found,)).passed
    found = dataclasses.replace(found, expected=empty, found=empty, rounded=empty)
    batch = evidence().batches[0]
    nobody = dataclasses.replace(batch, arrays={n: a[:0] for n, a in batch.arrays.items()})
    assert not _judge((found,), batches=(nobody,)).passed


def test_a_graph_that_could_not_be_evaluated_is_no_pass():
    verdict = _judge(_with(0, error="an operator that nobody knows"))
    assert verdict.status is Status.NOT_RUN
    assert verdict.note == "an operator that nobody knows"


@pytest.mark.parametrize("batch", [-1, 2])
def test_an_answer_to_a_batch_that_is_not_there_is_no_pass(batch):
    assert _judge(_with(0, batch=batch)).status is Status.NOT_RUN


def test_padded_positions_are_not_compared():
    from hand_made import per_token

    found = per_token()
    spread = [found.recordings["reference"].outputs[i]["logits"] for i in range(2)]
    wrong = spread[0].copy()
    wrong[2, 3, 0] += 1  # of the last sentence two tokens of four count
    answers = [
        dataclasses.replace(
            answer,
            expected={"logits": logits},
            found={"logits": wrong if answer.batch == 0 else logits},
            rounded={"logits": (logits - NOISE).astype(np.float32)},
        )
        for answer, logits in zip(graphs(), spread, strict=True)
    ]
    assert graph.judge(dataclasses.replace(found, graphs=tuple(answers)))[0].passed
    wrong[2, 1, 0] += 1
    assert not graph.judge(dataclasses.replace(found, graphs=tuple(answers)))[0].passed


def test_a_model_without_noise_is_held_to_one_rounding_of_its_answer():
    eps = float(np.finfo(np.float32).eps)
    assert _judge(graphs(by=0.0, rounding=0.0)).limit == 3 * eps


def test_every_artifact_has_its_own_verdict():
    found = graph.judge(evidence(graphs=(*graphs("onnx"), *graphs("pt2", by=1.0))))
    assert [(v.subject, v.status) for v in found] == [("onnx", Status.PASS), ("pt2", Status.FAIL)]


def test_the_module_at_which_they_part_is_named():
    modules = (
        ModuleOutput("pt2", "other", "", 1.0, 1.0, 1e-6, "Linear"),
        ModuleOutput("onnx", "layer.0.query", "x", 0.0, 1.0, 1e-6, "Linear"),
        ModuleOutput("onnx", "layer.0.value", "y", 1.0, 1.0, 1e-6, "Linear"),
    )
    verdict = _judge(graphs(by=1.0), modules_compared=modules)
    assert verdict.where == ("layer.0.value",)
    assert verdict.note.endswith("parts at layer.0.value")
    assert _judge(graphs(), modules_compared=modules).where == ()


def test_it_is_asked_where_a_graph_was_evaluated():
    assert graph.applies(evidence())
    assert not graph.applies(Evidence())
