import dataclasses

import numpy as np
import pytest
from hand_made import LABELS, LOGITS, artifact, batches, evidence, per_token, recording, timing

from lora_export.measurements import measure
from lora_export.records import UNMERGED, Evidence, FileDigest, Timing


def _named(found, name):
    return {m.subject: m for m in measure(found) if m.name == name}


def test_no_evidence_gives_no_measurement():
    assert measure(Evidence()) == ()


def test_the_median_latency_is_in_milliseconds_and_names_its_shape():
    samples = {UNMERGED: (3.0, 1.0, 2.0), "onnx": (1.0, 1.0, 10.0)}
    found = _named(evidence(timings=(Timing(8, 32, 2, samples),)), "latency median")
    assert found["unmerged, batch 8, length 32"].value == 2.0
    assert found["onnx, batch 8, length 32"].value == 1.0
    assert {(m.unit, m.samples) for m in found.values()} == {("ms", 3)}


def test_nine_tenths_of_the_samples_are_at_most_the_p90_latency():
    samples = {UNMERGED: tuple(float(i) for i in range(101))}
    found = _named(evidence(timings=(Timing(1, 32, 2, samples),)), "latency p90")
    assert found["unmerged, batch 1, length 32"].value == 90.0


def test_every_shape_is_measured():
    both = (timing(), dataclasses.replace(timing(), batch=8))
    assert len(_named(evidence(timings=both), "latency median")) == 2


def test_the_accuracy_is_the_share_of_labels_that_were_hit():
    half = [LOGITS[0].copy(), LOGITS[1]]
    half[0][0] = half[0][0, ::-1]
    found = evidence()
    wrong = {**found.recordings, "onnx": recording("onnx", half)}
    accuracy = _named(dataclasses.replace(found, recordings=wrong), "accuracy")
    assert accuracy["reference"].value == 1.0
    assert accuracy["onnx"].value == pytest.approx(2 / 3)
    assert accuracy["onnx"].samples == len(LABELS)


def test_only_labelled_batches_count_towards_the_accuracy():
    twice = (*batches(), batches()[0])
    found = evidence(
        batches=twice, recordings={"onnx": recording("onnx", [LOGITS[0], LOGITS[1], -LOGITS[0]])}
    )
    accuracy = _named(found, "accuracy")["onnx"]
    assert (accuracy.value, accuracy.samples) == (0.5, 6)


def test_sentences_without_labels_have_no_accuracy():
    bare = tuple(dataclasses.replace(batch, labels=()) for batch in batches())
    assert _named(evidence(batches=bare), "accuracy") == {}


def test_an_answer_per_token_has_no_accuracy():
    assert _named(per_token(), "accuracy") == {}


def test_a_model_with_a_single_output_has_no_accuracy():
    single = [logits[:, :1] for logits in LOGITS]
    found = evidence(recordings={"onnx": recording("onnx", single)})
    assert _named(found, "accuracy") == {}


def test_a_recording_that_lacks_a_batch_has_no_accuracy():
    # The checks fail such a recording; the certificate that says so has to be written all the same.
    short = {**evidence().recordings, "onnx": recording("onnx", [])}
    assert set(_named(evidence(recordings=short), "accuracy")) == {
        "reference", "unmerged", "merged", "idle",
    }  # fmt: skip


def test_a_shape_without_a_single_round_has_no_latency():
    found = evidence(timings=(Timing(1, 32, 2, {UNMERGED: (), "onnx": ()}),))
    assert _named(found, "latency median") == {}


def test_the_size_of_an_artifact_is_that_of_all_its_files():
    files = (FileDigest("m.onnx", 1_000_000, "a"), FileDigest("m.onnx.data", 1_500_000, "b"))
    (size,) = _named(evidence(artifacts=(artifact(files=files),)), "size").values()
    assert (size.subject, size.value, size.unit) == ("onnx", 2.5, "MB")


def test_values_are_plain_numbers_that_json_can_carry():
    assert {type(m.value) for m in measure(evidence())} == {float}
    assert all(np.isfinite(m.value) for m in measure(evidence()))
