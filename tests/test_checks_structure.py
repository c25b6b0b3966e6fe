import dataclasses

import pytest
from hand_made import artifact, evidence, signature, with_recording

from lora_export.checks import structure
from lora_export.records import Placement, Status

INPUTS, OUTPUTS = signature().inputs, signature().outputs
METADATA = {"labels": ["negative", "positive"]}


def _judge(**changes):
    (verdict,) = structure.judge(evidence(artifacts=(artifact(**changes),)))
    return verdict


def _with(specs, **changes):
    return (dataclasses.replace(specs[0], **changes), *specs[1:])


def test_the_declared_interface_passes():
    verdict = _judge()
    assert (verdict.status, verdict.compared) == (Status.PASS, 4)


def test_the_summary_names_files_size_and_opset():
    assert _judge().note == "1 file(s), 2.0 MB, opset 20"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"inputs": _with(INPUTS, name="ids")}, "inputs are ids, attention_mask"),
        ({"inputs": INPUTS[::-1]}, "inputs are token_type_ids, attention_mask, input_ids"),
        ({"inputs": INPUTS[:2]}, "inputs are input_ids, attention_mask"),
        ({"inputs": ()}, "inputs are none"),
        ({"outputs": _with(OUTPUTS, name="scores")}, "outputs are scores"),
        ({"outputs": OUTPUTS * 2}, "outputs are logits, logits"),
        ({"inputs": _with(INPUTS, dtype="int32")}, "input_ids is int32"),
        ({"outputs": _with(OUTPUTS, dtype="float16")}, "logits is float16"),
        ({"inputs": _with(INPUTS, axes=("batch", 7))}, "['batch', 7], expected"),
        ({"inputs": _with(INPUTS, axes=(2, "sequence"))}, "[2, 'sequence'], expected"),
        ({"outputs": _with(OUTPUTS, axes=("batch", 3))}, "['batch', 3], expected"),
        ({"facts": {"opset": 17, "metadata": METADATA}}, "opset 17, expected at least 18"),
        ({"facts": {"opset": 20}}, "no provenance"),
        ({"facts": {"opset": 20, "metadata": {}}}, "no provenance"),
        ({"leaked_paths": ("/home/me/model.py",)}, "mentions /home/me/model.py"),
    ],
)
def test_an_artifact_with_one_fault_fails_and_names_it(changes, said):
    verdict = _judge(**changes)
    assert (verdict.status, verdict.measured) == (Status.FAIL, 1)
    assert said in verdict.note


def test_all_faults_are_named_at_once():
    verdict = _judge(inputs=_with(INPUTS, dtype="int32"), leaked_paths=("/a", "/b"), facts={})
    assert verdict.measured == 4
    assert all(x in verdict.note for x in ("int32", "mentions /a", "mentions /b", "provenance"))


def test_the_oldest_accepted_opset_passes():
    assert _judge(facts={"opset": structure.LEAST_OPSET, "metadata": METADATA}).passed


def test_a_format_without_opsets_passes():
    assert _judge(facts={"metadata": METADATA}).passed


def test_a_format_that_declares_no_dtypes_and_axes_passes_by_its_names():
    bare = tuple(dataclasses.replace(spec, dtype="", axes=()) for spec in INPUTS)
    assert _judge(inputs=bare).passed


def test_names_fails_even_where_dtypes_and_axes_are_left_out():
    bare = tuple(dataclasses.replace(spec, dtype="", axes=()) for spec in INPUTS)
    assert _judge(inputs=bare[::-1]).status is Status.FAIL


def test_each_artifact_has_its_own_verdict():
    both = (artifact("onnx"), artifact("torchscript", leaked_paths=("/tmp/x",)))
    found = structure.judge(evidence(artifacts=both))
    assert [(v.subject, v.status) for v in found] == [
        ("onnx", Status.PASS),
        ("torchscript", Status.FAIL),
    ]


@pytest.mark.parametrize("missing", [{"artifacts": ()}, {"signature": None}])
def test_nothing_to_compare_with_is_not_run(missing):
    assert [v.status for v in structure.judge(evidence(**missing))] == [Status.NOT_RUN]


# ---------------------------------------------------------------- shapes and size


def _silent_at(index, why):
    found = evidence()
    answers = found.recordings["onnx"]
    outputs = tuple({} if i == index else out for i, out in enumerate(answers.outputs))
    errors = tuple(why if i == index else "" for i in range(len(outputs)))
    return with_recording(
        found, "onnx", dataclasses.replace(answers, outputs=outputs, errors=errors)
    )


def test_a_shape_that_it_does_not_run_at_fails_whatever_it_declares():
    (verdict,) = structure.judge(_silent_at(1, "Got: 2 Expected: 3"))
    assert verdict.status is Status.FAIL
    assert verdict.where == (
        "does not run at batch 2, length 3, padding right: Got: 2 Expected: 3",
    )


@pytest.mark.parametrize(("size", "status"), [(130_000_000, "pass"), (140_000_000, "fail")])
def test_a_file_that_holds_its_weights_twice_fails(size, status):
    own = dataclasses.replace(artifact().files[0], size_bytes=size)
    held = Placement("onnx", "weight", ("weight",), "as it is", 25_000_000, 0, 0.0)
    (verdict,) = structure.judge(evidence(artifacts=(artifact(files=(own,)),), placements=(held,)))
    assert verdict.status == status
    assert ("MB for 100.0 MB of weights" in verdict.note) == (status == "fail")
