from hand_made import artifact, evidence, repeat

from lora_export.checks import plain
from lora_export.records import Modules, Status

TREE = {"": "Classifier", "layer.0.query": "Linear"}


def _merged(found, lora_names=()):
    merged, *_ = plain.judge(evidence(modules=Modules(TREE, found, lora_names)))
    return merged


def _artifact(**changes):
    (_, verdict, _) = plain.judge(evidence(artifacts=(artifact(**changes),)))
    return verdict


def test_the_architectures_own_modules_pass():
    verdict = _merged(TREE)
    assert (verdict.status, verdict.compared) == (Status.PASS, 2)


def test_a_module_of_another_class_fails():
    verdict = _merged(TREE | {"layer.0.query": "LoraLinear"})
    assert verdict.status is Status.FAIL
    assert "layer.0.query" in verdict.note


def test_a_module_too_many_fails():
    assert _merged(TREE | {"layer.0.query.lora_A": "Linear"}).status is Status.FAIL


def test_a_missing_module_fails():
    assert _merged({"": "Classifier"}).status is Status.FAIL


def test_a_root_of_another_class_fails_and_is_named():
    verdict = _merged(TREE | {"": "PeftModel"})
    assert verdict.status is Status.FAIL
    assert "(root)" in verdict.note


def test_a_parameter_named_after_lora_fails():
    assert _merged(TREE, ("layer.0.query.lora_A",)).status is Status.FAIL


def test_a_model_without_modules_fails():
    (verdict, *_) = plain.judge(evidence(modules=Modules({}, {}, ())))
    assert verdict.status is Status.FAIL


def test_an_artifact_without_a_trace_of_lora_passes():
    assert _artifact().status is Status.PASS


def test_an_artifact_with_a_lora_name_fails():
    verdict = _artifact(lora_names=("onnx::lora_B",))
    assert verdict.status is Status.FAIL
    assert "onnx::lora_B" in verdict.note


def test_an_artifact_without_files_fails():
    assert _artifact(files=()).status is Status.FAIL


def test_nothing_recorded_is_not_run():
    found = plain.judge(evidence(modules=None, artifacts=(), repeats=()))
    assert [v.status for v in found] == [Status.NOT_RUN]


def _operators(**changes):
    (*_, verdict) = plain.judge(evidence(repeats=(repeat(**changes),)))
    return verdict


def test_the_operators_of_a_plain_export_pass():
    verdict = _operators()
    assert (verdict.subject, verdict.status, verdict.compared) == (
        "onnx, operators", Status.PASS, 6,
    )  # fmt: skip


def test_operators_that_a_plain_export_lacks_fail():
    verdict = _operators(operators={"Gemm": 4, "Add": 3, "MatMul": 2})
    assert verdict.status is Status.FAIL
    assert verdict.where == ("2 MatMul, expected 0", "3 Add, expected 2")


def test_of_compiled_code_no_operators_are_known():
    assert len(plain.judge(evidence(repeats=(repeat(operators={}),)))) == 2
