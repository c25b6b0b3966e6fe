"""The artifacts of a run, run again against what was saved."""

import dataclasses
import json
import shutil
import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from lora_export import codec, pipeline, replaying, timing
from lora_export.errors import InputError
from lora_export.records import Evidence, Policy, Status


@pytest.fixture(scope="module")
def finished(tiny_base, tiny_adapter, tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setattr(timing, "LEAST_ROUNDS", 10)
    patch.setattr(timing, "MOST_ROUNDS", 10)
    folder = tmp_path_factory.mktemp("replay")
    path, _ = tiny_adapter(folder, str(tiny_base))
    pipeline.run(path, out=folder / "run", policy=Policy(slowest=1e9))
    patch.undo()
    return folder / "run"


@pytest.fixture
def run(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def test_what_runs_without_torch_is_run_and_judged(finished):
    found = replaying.replay(finished)
    assert found.ok
    assert {v.subject for v in found.verdicts if v.check == "parity"} == {"onnx"}
    assert found.settings["notes"] == ["torchscript needs torch: not run"]


def test_it_imports_neither_torch_nor_transformers(finished):
    code = (
        "import sys\nfrom lora_export.cli import main\n"
        "for name in ('torch', 'transformers'): sys.modules[name] = None\n"
        f"main(['check', '--replay', '--json', '--run', {str(finished)!r}])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ok"] is True


def test_a_weight_that_changed_fails_by_what_it_answers(run):
    path = run / "model.onnx"
    model = onnx.load(path)
    (bias,) = (t for t in model.graph.initializer if t.name.endswith("classifier.bias"))
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32(0.1), bias.name))
    onnx.save(model, path)
    failed = {v.check for v in replaying.replay(run).verdicts if v.status is Status.FAIL}
    assert {"parity", "intact"} <= failed


def test_what_was_recorded_then_is_not_taken_for_what_is_answered_now(run):
    """The old answers of the artifact are no evidence of what it does here."""
    evidence = codec.load(Evidence, run / "evidence", "evidence")
    wrong = dataclasses.replace(
        evidence.recordings["onnx"],
        outputs=tuple({"logits": o["logits"] + 1} for o in evidence.recordings["onnx"].outputs),
    )
    damaged = dataclasses.replace(evidence, recordings={**evidence.recordings, "onnx": wrong})
    codec.save(damaged, run / "evidence", "evidence")
    found = replaying.replay(run)
    failed = {(v.check, v.subject) for v in found.verdicts if not v.passed}
    assert failed == {("intact", "evidence")}


def test_limits_that_were_loosened_later_fail(run):
    evidence = codec.load(Evidence, run / "evidence", "evidence")
    codec.save(
        dataclasses.replace(evidence, policy=Policy(tolerance=1e9)), run / "evidence", "evidence"
    )
    failed = {(v.check, v.subject) for v in replaying.replay(run).verdicts if not v.passed}
    assert failed == {("intact", "evidence")}


def test_nothing_in_the_run_is_written(run):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    replaying.replay(run, out=run.with_name("again"))
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert (run.with_name("again") / "certificate.json").is_file()


def test_a_run_without_such_an_artifact_is_refused(run):
    evidence = codec.load(Evidence, run / "evidence", "evidence")
    script = tuple(a for a in evidence.artifacts if a.format == "torchscript")
    codec.save(dataclasses.replace(evidence, artifacts=script), run / "evidence", "evidence")
    with pytest.raises(InputError, match="none is onnx or openvino"):
        replaying.replay(run)
