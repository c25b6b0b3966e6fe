import dataclasses

import numpy as np
import pytest
from hand_made import LIMIT, NOISE, TOKENS, evidence, writing

from lora_export.checks import generation
from lora_export.records import MERGED, REFERENCE, Status


def judged(found):
    return {verdict.subject: verdict for verdict in generation.judge(found)}


def other(place, runner="onnx", cached=True, margin=1.0):
    """What was written, but for one token; the reference's margin there is `margin`."""
    changed = []
    for text in writing().written:
        tokens, margins = text.tokens.copy(), text.margins.copy()
        margins[place] = margin
        if (text.runner, text.cached) == (runner, cached):
            tokens[place] += 1
        changed.append(dataclasses.replace(text, tokens=tokens, margins=margins))
    return writing(written=tuple(changed))


def test_texts_that_are_the_references_pass():
    found = judged(writing())
    assert {name: (v.status, v.compared) for name, v in found.items()} == {
        MERGED: (Status.PASS, 3 * TOKENS.size),
        "onnx": (Status.PASS, 3 * TOKENS.size),
    }
    assert "100% of the tokens are the reference's with cache, 100% without" in found["onnx"].note


def test_a_model_without_a_cache_is_not_asked():
    assert not generation.applies(evidence())
    assert generation.applies(writing())


@pytest.mark.parametrize("cached", [True, False])
def test_another_token_fails_and_is_named(cached):
    found = judged(other((1, 2), cached=cached))
    assert found[MERGED].passed
    how = "with cache" if cached else "without cache"
    both = "with cache and without: text 2, token 3"
    assert found["onnx"].status is Status.FAIL
    assert found["onnx"].where == tuple(sorted((both, f"{how}: text 2, token 3")))


def test_what_follows_the_first_difference_is_not_compared():
    verdict = judged(other((1, 0), cached=False))["onnx"]
    assert (verdict.measured, verdict.compared) == (2.0, TOKENS.size + 2 * (4 + 1))


@pytest.mark.parametrize(("margin", "status"), [(LIMIT, Status.PASS), (LIMIT + NOISE, Status.FAIL)])
def test_a_token_that_a_change_within_the_tolerance_decides_is_excused(margin, status):
    verdict = judged(other((0, 1), margin=margin))["onnx"]
    assert verdict.status is status
    assert ("2 texts part" in verdict.note) == verdict.passed


def test_a_margin_that_is_no_number_excuses_nothing_and_fails():
    assert judged(other((0, 1), margin=np.nan))["onnx"].status is Status.FAIL


def test_a_text_of_another_length_fails():
    texts = [
        dataclasses.replace(text, tokens=text.tokens[:, :3]) if text.runner == "onnx" else text
        for text in writing().written
    ]
    assert judged(writing(written=tuple(texts)))["onnx"].status is Status.FAIL


@pytest.mark.parametrize(("margin", "status"), [(2 * NOISE, Status.PASS), (LIMIT, Status.FAIL)])
def test_reduced_precision_is_excused_by_what_it_costs(margin, status):
    found = other((0, 1), margin=margin)
    (own,) = found.artifacts
    narrow = dataclasses.replace(found, artifacts=(dataclasses.replace(own, precision="int8"),))
    assert judged(narrow)["onnx"].status is status


@pytest.mark.parametrize("gone", [(REFERENCE, True), ("onnx", True), ("onnx", False)])
def test_what_was_not_written_is_not_run(gone):
    texts = tuple(t for t in writing().written if (t.runner, t.cached) != gone)
    assert judged(writing(written=texts))["onnx"].status is Status.NOT_RUN
