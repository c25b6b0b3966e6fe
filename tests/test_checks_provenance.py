import dataclasses

from hand_made import claims, evidence

from lora_export.checks import provenance
from lora_export.records import MERGED, Status


def judged(**changes):
    return {verdict.subject: verdict for verdict in provenance.judge(evidence(**changes))}


def test_what_is_so_passes():
    found = judged()
    assert {name: (v.status, v.compared) for name, v in found.items()} == {
        MERGED: (Status.PASS, 2),
        "onnx": (Status.PASS, 2),
    }


def test_a_label_that_changed_its_place_fails_and_is_named():
    found = judged(claims=claims(labels='["positive", "negative"]'))
    assert found[MERGED].passed
    assert (found["onnx"].status, found["onnx"].where) == (Status.FAIL, ("onnx: labels",))
    assert 'labels is ["positive", "negative"], expected ["neg' in found["onnx"].note


def test_an_artifact_that_says_nothing_is_not_run():
    only = tuple(claim for claim in claims() if claim.subject == MERGED)
    assert judged(claims=only)["onnx"].status is Status.NOT_RUN


def test_without_a_merge_only_the_artifact_is_asked():
    assert set(judged(account=None)) == {"onnx"}


def test_every_wrong_statement_counts():
    wrong = [dataclasses.replace(claim, found="") for claim in claims()]
    assert [v.measured for v in judged(claims=tuple(wrong)).values()] == [2.0, 2.0]
