from hand_made import artifact, evidence, repeat

from lora_export.checks import reproducible
from lora_export.records import FileDigest, Status

OTHER = (FileDigest("model.onnx", 2_000_000, "sha256:cc"),)


def judged(**changes):
    (verdict,) = reproducible.judge(evidence(repeats=(repeat(**changes),)))
    return verdict


def test_the_same_digests_pass():
    verdict = judged()
    assert (verdict.status, verdict.compared) == (Status.PASS, 1)


def test_another_digest_fails_and_names_what_differs():
    verdict = judged(second=OTHER, differing=("Add: 2 and 3", "metadata labels"))
    assert verdict.status is Status.FAIL
    assert verdict.where == ("Add: 2 and 3", "metadata labels", "model.onnx")


def test_a_file_too_many_fails():
    more = (*artifact().files, FileDigest("model.onnx.data", 5, "sha256:dd"))
    assert judged(second=more).where == ("model.onnx.data",)


def test_an_export_that_was_made_only_once_is_not_run():
    (verdict,) = reproducible.judge(evidence(repeats=()))
    assert verdict.status is Status.NOT_RUN
