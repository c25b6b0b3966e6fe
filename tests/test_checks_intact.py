import dataclasses

from hand_made import FILES, evidence

from lora_export.checks import intact
from lora_export.records import FileDigest, Status


def _judge(*now, files=FILES):
    (verdict,) = intact.judge(evidence(files=files, files_now=now))
    return verdict


def test_the_recorded_files_pass():
    verdict = _judge(*FILES)
    assert (verdict.status, verdict.compared) == (Status.PASS, 2)


def test_the_order_of_the_files_does_not_matter():
    assert _judge(*reversed(FILES)).status is Status.PASS


def test_a_changed_file_fails():
    verdict = _judge(dataclasses.replace(FILES[0], digest="sha256:ee"), FILES[1])
    assert (verdict.status, verdict.measured) == (Status.FAIL, 1)
    assert "merged/model.safetensors" in verdict.note


def test_a_missing_file_fails():
    verdict = _judge(FILES[0])
    assert verdict.status is Status.FAIL
    assert "model.onnx" in verdict.note


def test_a_new_file_fails():
    verdict = _judge(*FILES, FileDigest("model.onnx.data", 1, "sha256:ff"))
    assert verdict.status is Status.FAIL
    assert "model.onnx.data" in verdict.note


def test_each_file_is_named_with_what_became_of_it():
    new = FileDigest("model.onnx.data", 1, "sha256:ff")
    verdict = _judge(dataclasses.replace(FILES[0], digest="sha256:ee"), new)
    assert verdict.where == ("merged/model.safetensors", "model.onnx", "model.onnx.data")
    assert verdict.note == (
        "changed since: merged/model.safetensors; model.onnx (missing); model.onnx.data (new)"
    )


def test_two_files_that_swapped_their_content_fails_twice():
    swapped = [
        FileDigest(a.name, b.size_bytes, b.digest)
        for a, b in zip(FILES, reversed(FILES), strict=True)
    ]
    assert _judge(*swapped).measured == 2


def test_files_that_all_vanished_fails():
    assert _judge().status is Status.FAIL


def test_nothing_recorded_is_not_run():
    assert _judge(*FILES, files=()).status is Status.NOT_RUN
