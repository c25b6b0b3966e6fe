import dataclasses

import numpy as np
import pytest
from hand_made import (
    LIMIT,
    LOGITS,
    NOISE,
    TEXTS,
    alone,
    evidence,
    per_token,
    recording,
    reduced,
    with_recording,
)

from lora_export.checks import batch_invariant
from lora_export.records import MERGED, REFERENCE, Alone, Status


def judged(found):
    return {verdict.subject: verdict for verdict in batch_invariant.judge(found)}


def changed(by, runner="onnx", batch=0):
    """What the runners answer alone, but for one row that one of them answers otherwise."""
    return tuple(
        dataclasses.replace(row, outputs={"logits": row.outputs["logits"] + np.float32(by)})
        if (row.runner, row.batch) == (runner, batch)
        else row
        for row in alone()
    )


def test_a_row_that_is_answered_alone_as_among_others_passes():
    found = judged(evidence())
    assert {name: (v.status, v.compared) for name, v in found.items()} == {
        MERGED: (Status.PASS, 4),
        "onnx": (Status.PASS, 4),
    }


def test_a_row_that_depends_on_its_neighbours_fails_and_is_named():
    found = judged(evidence(alone=changed(2 * LIMIT)))
    assert found[MERGED].passed
    assert (found["onnx"].status, found["onnx"].where) == (Status.FAIL, (repr(TEXTS[1]),))
    assert found["onnx"].measured == pytest.approx(2 * LIMIT)


def test_a_row_without_a_text_is_named_by_its_batch():
    verdict = judged(evidence(alone=changed(2 * LIMIT, batch=1)))["onnx"]
    assert verdict.where == ("batch 2, length 3, padding right, row 2",)


def test_the_limit_is_the_tolerance_of_the_output():
    for by, status in ((LIMIT, Status.PASS), (LIMIT + NOISE, Status.FAIL)):
        assert judged(evidence(alone=changed(by)))["onnx"].status is status


def test_an_answer_that_is_no_number_fails():
    verdict = judged(evidence(alone=changed(np.nan)))["onnx"]
    assert (verdict.status, verdict.where) == (Status.FAIL, (repr(TEXTS[1]),))


def test_other_outputs_or_another_shape_fail():
    (first, *others) = alone()
    for outputs in ({}, {"scores": first.outputs["logits"]}, {"logits": np.zeros((1, 3))}):
        row = dataclasses.replace(first, outputs=outputs)
        assert judged(evidence(alone=(row, *others)))[MERGED].status is Status.FAIL


def test_the_padding_that_a_row_had_is_not_compared():
    """The second row has three tokens of four, and alone it has three."""
    found = per_token()
    logits = found.recordings["onnx"].outputs[0]["logits"]
    rows = [Alone(name, 0, 1, {"logits": logits[1:2, :3]}) for name in (MERGED, "onnx")]
    verdict = judged(dataclasses.replace(found, alone=tuple(rows)))["onnx"]
    assert (verdict.status, verdict.compared) == (Status.PASS, 6)
    whole = dataclasses.replace(rows[1], outputs={"logits": logits[1:2]})
    assert not judged(dataclasses.replace(found, alone=(rows[0], whole)))["onnx"].passed


def test_reduced_precision_may_change_by_twice_what_it_costs():
    """Its distance from the reference is twice the noise."""
    for by, status in ((4 * NOISE, Status.PASS), (5 * NOISE, Status.FAIL)):
        assert judged(reduced(alone=changed(by)))["onnx"].status is status


def test_a_runner_that_answered_no_row_alone_is_not_run():
    found = judged(evidence(alone=alone([MERGED])))
    assert found["onnx"].status is Status.NOT_RUN


def test_where_neither_was_answered_it_fails():
    """A runner that raises at every call leaves nothing to compare."""
    found = evidence(alone=tuple(dataclasses.replace(row, outputs={}) for row in alone()))
    silent = dataclasses.replace(found.recordings["onnx"], outputs=({}, {}))
    verdict = judged(with_recording(found, "onnx", silent))["onnx"]
    assert (verdict.status, verdict.compared) == (Status.FAIL, 0)
    assert "there is no logits" in verdict.note


def test_reduced_precision_that_costs_nothing_may_not_change():
    exact = [logits.astype(np.float32) for logits in LOGITS]
    found = with_recording(reduced(), "onnx", recording("onnx", exact))
    same = alone(["onnx"], {"onnx": recording("onnx", exact)})
    assert judged(dataclasses.replace(found, alone=same))["onnx"].passed
    assert not judged(dataclasses.replace(found, alone=changed(NOISE)))["onnx"].passed


def test_a_model_that_depends_on_the_others_itself_is_held_to_its_answers_alone():
    """The reference gives the second sentence another answer alone, and so does the artifact."""

    def alone_in(by, runner):
        return tuple(row for row in changed(by, runner) if row.runner == runner)

    exact = alone([REFERENCE])
    moved_on = dataclasses.replace(
        exact[0], outputs={"logits": exact[0].outputs["logits"] + 2 * LIMIT}
    )
    rows = (moved_on, exact[1], *alone_in(2 * LIMIT, MERGED), *alone_in(4 * LIMIT, "onnx"))
    found = judged(evidence(alone=rows))
    assert found[MERGED].passed
    assert "1 as the reference answers them alone" in found[MERGED].note
    assert (found["onnx"].status, found["onnx"].where) == (Status.FAIL, (repr(TEXTS[1]),))
    right = (exact[0], *rows[1:])  # the reference does not depend on the others
    assert not judged(evidence(alone=right))[MERGED].passed


def test_rows_of_a_batch_that_is_gone_are_no_pass():
    found = evidence()
    nothing = {n: dataclasses.replace(r, outputs=()) for n, r in found.recordings.items()}
    gone = dataclasses.replace(found, batches=(), recordings=nothing)
    assert {v.status for v in batch_invariant.judge(gone)} == {Status.NOT_RUN}
