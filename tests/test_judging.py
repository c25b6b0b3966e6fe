import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
from hand_made import (
    SETTINGS,
    artifact,
    evidence,
    moved,
    recording,
    recordings,
    with_recording,
    write_run,
)

from lora_export import checks, codec, judging, storage
from lora_export.errors import InputError
from lora_export.records import Evidence, Status
from lora_export.report import _plots


@pytest.fixture(autouse=True)
def _without_plots(monkeypatch):
    """They are looked at in test_report_html.py, and take longer than all the rest."""
    monkeypatch.setattr(_plots, "plots", lambda evidence: [])


@pytest.fixture
def run(tmp_path):
    """A run folder in which everything is as it should be."""
    assert write_run(tmp_path, evidence()).ok
    return tmp_path


def _status(certificate, check):
    (status,) = {v.status for v in certificate.verdicts if v.check == check}
    return status


# ---------------------------------------------------------------- certify


def test_a_certificate_holds_verdicts_measurements_and_what_was_given():
    given = evidence().files[:1]
    made = judging.certify(evidence(), checks.RUN, "the command", given, SETTINGS, 3)
    assert made.verdicts == checks.judge(evidence(), checks.RUN)
    assert {m.name for m in made.measurements} >= {"size", "accuracy", "latency median"}
    assert (made.command, made.inputs) == ("the command", given)
    assert made.settings == {**SETTINGS, "scope": "run"}
    assert made.outputs == evidence().files
    assert made.environment["threads"] == 3


def test_only_the_checks_of_the_scope_are_in_the_certificate():
    made = judging.certify(evidence(), checks.MERGE, "", (), {}, 1)
    assert made.verdicts == checks.judge(evidence(), checks.MERGE)


def test_no_evidence_makes_no_proof():
    assert not judging.certify(Evidence(), checks.RUN, "", (), {}, 1).ok


def test_only_files_that_are_still_there_have_a_digest(tmp_path):
    (tmp_path / "model.onnx").write_text("x")
    (found,) = judging.digests_now(evidence().files, tmp_path)
    assert found == storage.digest(tmp_path / "model.onnx", "model.onnx")


# ---------------------------------------------------------------- a run, judged again


def test_an_untouched_run_passes_again(run):
    assert judging.check_run(run).ok


def test_an_untouched_run_gets_the_same_certificate_again(run):
    before = (run / judging.CERTIFICATE).read_bytes()
    judging.check_run(run)
    assert (run / judging.CERTIFICATE).read_bytes() == before


def test_a_run_named_by_a_string_is_judged_as_well(run):
    assert judging.check_run(str(run)).ok


def test_a_changed_file_fails(run):
    (run / "model.onnx").write_text("another model")
    found = judging.check_run(run)
    assert not found.ok
    assert [v.check for v in found.verdicts if not v.passed] == ["intact"]
    assert "model.onnx" in next(v.note for v in found.verdicts if not v.passed)


def test_a_missing_file_fails(run):
    (run / "merged" / "model.safetensors").unlink()
    assert _status(judging.check_run(run), "intact") is Status.FAIL


def test_a_file_that_became_a_folder_fails(run):
    (run / "model.onnx").unlink()
    (run / "model.onnx").mkdir()
    assert _status(judging.check_run(run), "intact") is Status.FAIL


def test_a_failed_check_is_written_down(run):
    (run / "model.onnx").write_text("another model")
    judging.check_run(run)
    assert json.loads((run / judging.CERTIFICATE).read_text())["ok"] is False
    assert (run / judging.REPORT).read_text().startswith("# NOT proven")


def test_a_file_that_was_put_back_passes_again(run):
    (run / "model.onnx").write_text("another model")
    judging.check_run(run)
    (run / "model.onnx").write_text("model.onnx")
    assert judging.check_run(run).ok


def test_evidence_is_judged_again_and_the_old_certificate_not_believed(tmp_path):
    write_run(tmp_path, evidence())
    place = tmp_path / judging.EVIDENCE
    worse = moved(codec.load(Evidence, place, judging.EVIDENCE), "onnx", 0, (0, 0), 0.5)
    codec.save(worse, place, judging.EVIDENCE)
    assert _status(judging.check_run(tmp_path), "parity") is Status.FAIL


def test_evidence_that_was_rewritten_fails_even_where_it_would_pass(run):
    place = run / judging.EVIDENCE
    found = codec.load(Evidence, place, judging.EVIDENCE)
    codec.save(dataclasses.replace(found, batches=found.batches), place, judging.EVIDENCE)
    assert judging.check_run(run).ok  # the same content has the same bytes
    better = dataclasses.replace(found, timings=found.timings * 2)
    codec.save(better, place, judging.EVIDENCE)
    failed = [(v.check, v.subject) for v in judging.check_run(run).verdicts if not v.passed]
    assert failed == [("intact", "evidence")]


def test_a_verdict_that_was_there_and_is_gone_fails(run):
    """An artifact that is left out of the evidence must not make the rest look whole."""
    place = run / judging.EVIDENCE
    found = codec.load(Evidence, place, judging.EVIDENCE)
    codec.save(dataclasses.replace(found, artifacts=()), place, judging.EVIDENCE)
    failed = {(v.check, v.subject) for v in judging.check_run(run).verdicts if not v.passed}
    assert {("plain", "onnx"), ("intact", "evidence")} <= failed


def test_what_was_given_and_where_it_ran_are_kept(run):
    first = json.loads((run / judging.CERTIFICATE).read_text())
    found = judging.check_run(run)
    assert found.command == "lora-export run"
    assert found.settings == {**SETTINGS, "scope": "run"}
    assert found.environment == first["environment"]
    assert [file.name for file in found.inputs] == ["sst2.safetensors"]


def test_the_stages_are_told(run):
    told = []
    judging.check_run(run, say=told.append)
    assert told == ["judging recorded evidence"]


def test_a_run_whose_artifact_answered_nan_fails_and_is_written_down(tmp_path):
    found = write_run(tmp_path, moved(evidence(), "onnx", 0, (0, 0), np.nan))
    assert not found.ok
    assert _status(judging.check_run(tmp_path), "parity") is Status.FAIL


def test_a_run_whose_artifact_lacks_a_batch_fails_and_is_written_down(tmp_path):
    found = write_run(tmp_path, with_recording(evidence(), "onnx", recording("onnx", [])))
    assert not found.ok
    assert _status(judging.check_run(tmp_path), "parity") is Status.FAIL


def test_a_run_that_failed_fails_again(tmp_path):
    more = recordings() | {"torchscript": recordings()["idle"]}
    found = evidence(artifacts=(artifact("onnx"), artifact("torchscript")), recordings=more)
    assert not write_run(tmp_path, found).ok
    assert not judging.check_run(tmp_path).ok


# ---------------------------------------------------------------- no run, or half of one


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no run in .*nowhere: run `lora-export run` first"):
        judging.check_run(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "name", ["evidence/evidence.json", "evidence/evidence.safetensors", judging.CERTIFICATE]
)
def test_a_run_without_one_of_its_records_is_refused(run, name):
    (run / name).unlink()
    with pytest.raises(InputError, match=f"cannot read .*{name}"):
        judging.check_run(run)


@pytest.mark.parametrize("field", ["inputs", "command", "settings", "environment"])
def test_a_certificate_that_lacks_a_field_is_refused(run, field):
    file = run / judging.CERTIFICATE
    old = json.loads(file.read_text())
    del old[field]
    file.write_text(json.dumps(old))
    with pytest.raises(InputError, match=rf"certificate\.json is damaged.*{field}"):
        judging.check_run(run)


@pytest.mark.parametrize(
    ("field", "value"),
    [("inputs", {}), ("inputs", [1]), ("settings", 3), ("environment", ["python"])],
)
def test_a_certificate_with_a_damaged_field_is_refused(run, field, value):
    file = run / judging.CERTIFICATE
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with pytest.raises(InputError, match=r"certificate\.json is damaged"):
        judging.check_run(run)


def test_a_refused_run_is_left_as_it_was(run):
    (run / "evidence" / "evidence.json").write_text("{}")
    before = storage.digest_tree(run)
    with pytest.raises(InputError, match="has schema None"):
        judging.check_run(run)
    assert storage.digest_tree(run) == before


# ---------------------------------------------------------------- without a model


def test_judging_imports_no_torch():
    program = (
        "import sys; import lora_export.judging as j; from lora_export.records import Evidence; "
        "j.certify(Evidence(), 'run', '', (), {}, 1); "
        "print(sorted({'torch', 'transformers', 'onnx', 'onnxruntime'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
