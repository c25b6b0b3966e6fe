"""The commands that read what a run left behind: report, verify without an adapter, compare."""

import dataclasses
import json
import shutil
import subprocess
import sys
from xml.etree import ElementTree

import pytest
from hand_made import evidence, moved, write_run

from lora_export import judging, merging, report, storage
from lora_export.errors import InputError
from lora_export.report import _plots

LEFT = {"certificate.json", "report.md", "report.xml", "report.html"}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run folder in which everything is as it should be; its page has no plots."""
    monkeypatch.setattr(_plots, "plots", lambda evidence: [])
    (tmp_path / "run").mkdir()
    assert write_run(tmp_path / "run", evidence()).ok
    return tmp_path / "run"


@pytest.fixture
def merged(tmp_path):
    """A merged folder as `lora-export merge` writes it down, of two files that are no model."""
    folder = tmp_path / "merged"
    folder.mkdir()
    for name in ("model.safetensors", "config.json"):
        (folder / name).write_text(name)
    digests = {name: storage.digest(folder / name).digest for name in ("model.safetensors",)}
    beside = {"config.json": storage.digest(folder / "config.json").digest}
    storage.write_json(folder / "lora_export.json", {"files": digests, "companions": beside})
    return folder


# ---------------------------------------------------------------- what a run leaves behind


def test_a_run_leaves_every_report_of_the_same_certificate(run):
    assert {file.name for file in run.iterdir()} - {"merged", "model.onnx", "evidence"} == LEFT
    for name, kind in judging.REPORTS.items():
        found = judging.certificates.read(run)
        assert (run / name).read_text("utf-8") == report.render(kind, found)


def test_a_check_that_fails_is_in_every_report(run):
    (run / "model.onnx").write_text("another model")
    assert not judging.check_run(run).ok
    assert (run / "report.md").read_text().startswith("# NOT proven")
    assert "NOT proven" in (run / "report.html").read_text()
    assert ElementTree.parse(run / "report.xml").find(".//failure") is not None


def test_without_the_extra_the_page_is_left_out_and_an_older_one_is_removed(run, monkeypatch):
    from lora_export.report import html

    def missing(*arguments):
        raise InputError("html needs jinja2: pip install 'lora-export[report]'")

    monkeypatch.setattr(html, "render", missing)
    (run / "model.onnx").write_text("another model")
    told = []
    assert not judging.check_run(run, say=told.append).ok
    assert not (run / "report.html").exists()
    assert (run / "report.md").read_text().startswith("# NOT proven")
    assert told[-1].startswith("report.html is left out: html needs jinja2: pip install")


# ---------------------------------------------------------------- report


@pytest.mark.parametrize("kind", report.names())
def test_a_report_is_printed(call, run, kind):
    code, out, err = call("report", "--run", run, "--format", kind)
    name = next(name for name, known in judging.REPORTS.items() if known == kind)
    assert (code, out, err) == (0, (run / name).read_text("utf-8"), "")


def test_a_report_is_drawn_from_the_evidence(call, run, monkeypatch):
    asked = []
    monkeypatch.setattr(_plots, "plots", lambda evidence: asked.append(evidence) or [])
    call("report", "--run", run, "--format", "html")
    assert asked[0].recordings.keys() == evidence().recordings.keys()


def test_a_report_of_a_certificate_without_evidence(call, run):
    shutil.rmtree(run / "evidence")
    assert call("report", "--run", run, "--format", "html")[0] == 0


def test_a_report_is_written_to_a_file_once(call, run, tmp_path):
    words = ("report", "--run", run, "--out", "out.md")
    assert call(*words)[:2] == (0, "")
    assert (tmp_path / "out.md").read_text() == (run / "report.md").read_text()
    code, _, err = call(*words)
    assert code == 2
    assert "exists" in err
    assert call(*words, "--overwrite")[0] == 0


def test_a_report_judges_nothing_and_writes_nothing(call, run):
    (run / "model.onnx").write_text("another model")
    before = storage.digest_tree(run)
    code, out, _ = call("report", "--run", run)
    assert code == 0
    assert out.startswith("# proven")
    assert storage.digest_tree(run) == before


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "certificate.json").unlink(), "cannot read"),
        (lambda run: (run / "certificate.json").write_text("{}"), "has schema None"),
        (lambda run: (run / "evidence" / "evidence.json").write_text("{}"), "has schema None"),
    ],
)
def test_a_report_of_a_damaged_run_is_refused(call, run, damage, message):
    damage(run)
    code, out, err = call("report", "--run", run)
    assert (code, out) == (2, "")
    assert message in err


# ---------------------------------------------------------------- verify without an adapter


def failed(call, folder):
    """The exit code of `verify`, and the files it names."""
    code, out, _ = call("verify", folder, "--quiet", "--json")
    (verdict,) = json.loads(out)["verdicts"]
    assert verdict["check"] == "intact"
    return code, verdict["where"], verdict["note"]


def test_a_run_is_as_it_was(call, run):
    code, out, err = call("verify", run)
    assert code == 0
    assert "proven: 1 of 1" in out
    assert "hashing" in err


def test_a_merged_model_is_as_it_was(call, merged):
    assert call("verify", merged, "--quiet")[0] == 0


def test_verify_writes_nothing(call, run):
    before = storage.digest_tree(run)
    call("verify", run)
    assert storage.digest_tree(run) == before


def test_reports_may_be_made_anew_and_deleted(call, run):
    (run / "report.md").write_text("for people")
    (run / "report.html").unlink()
    assert failed(call, run)[0] == 0


@pytest.mark.parametrize(
    "name", ["model.onnx", "evidence/evidence.json", "merged/model.safetensors"]
)
def test_a_changed_file_of_a_run_fails(call, run, name):
    with (run / name).open("a") as file:
        file.write(" ")
    assert failed(call, run) == (5, [name], f"changed since: {name}")


@pytest.mark.parametrize("name", ["model.onnx", "evidence/evidence.safetensors"])
def test_a_missing_file_of_a_run_fails(call, run, name):
    (run / name).unlink()
    assert failed(call, run) == (5, [name], f"changed since: {name} (missing)")


@pytest.mark.parametrize(
    "name", ["merged/pytorch_model.bin", "merged/adapter_config.json", "a.json"]
)
def test_a_new_file_that_a_loader_would_read_fails(call, run, name):
    (run / name).write_text("{}")
    assert failed(call, run) == (5, [name], f"changed since: {name} (new)")


@pytest.mark.parametrize("name", ["merged/notes.txt", "plots/a.json", "README.md"])
def test_a_new_file_that_no_loader_reads_is_no_fault(call, run, name):
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).write_text("{}")
    assert failed(call, run)[0] == 0


@pytest.mark.parametrize(
    ("name", "content", "how"),
    [
        ("model.safetensors", "other", ""),
        ("config.json", "other", ""),
        ("config.json", None, " (missing)"),
        ("pytorch_model.bin", "x", " (new)"),
        ("certificate.txt", "x", None),
    ],
)
def test_the_files_of_a_merged_model(call, merged, name, content, how):
    (merged / name).unlink(missing_ok=True)
    if content:
        (merged / name).write_text(content)
    expected = (0, [], "every file has its recorded digest")
    if how is not None:
        expected = (5, [name], f"changed since: {name}{how}")
    assert failed(call, merged) == expected


def test_what_has_no_record_is_refused(call, tmp_path):
    code, _, err = call("verify", tmp_path)
    assert code == 2
    assert "neither certificate.json nor lora_export.json" in err


def test_a_damaged_record_is_refused(call, run, merged):
    (run / "certificate.json").write_text('{"schema": 3}')
    assert call("verify", run)[0] == 2
    (merged / "lora_export.json").write_text("{}")
    assert call("verify", merged)[0] == 2


@pytest.mark.parametrize(
    "words", [("--base", "x"), ("--dtype", "keep"), ("--alpha", "3"), ("--allow-base-mismatch",)]
)
def test_an_option_that_needs_an_adapter_is_refused_without_one(call, merged, words):
    code, _, err = call("verify", merged, *words)
    assert code == 2
    assert f"{words[0]} is of use with --adapter only" in err


# ---------------------------------------------------------------- compare


@pytest.fixture
def worse(run, tmp_path):
    """A second run, in which one answer is off."""
    (tmp_path / "worse").mkdir()
    assert not write_run(tmp_path / "worse", moved(evidence(), "onnx", 0, (0, 0), 0.5)).ok
    return tmp_path / "worse"


def test_a_run_compared_with_itself_has_not_changed(call, run):
    code, out, _ = call("compare", run, run / "certificate.json")
    assert code == 0
    assert out == "nothing changed\nno verdict got worse\n"


def test_a_verdict_that_got_worse_exits_with_5(call, run, worse):
    code, out, _ = call("compare", run, worse)
    assert code == 5
    assert "parity: onnx" in out
    assert "WORSE: 1 verdict(s)" in out
    assert call("compare", worse, run)[0] == 0


def test_compare_prints_one_json_object(call, run, worse):
    code, out, _ = call("compare", run, worse, "--json")
    found = json.loads(out)
    assert (code, found["ok"], found["schema"]) == (5, False, 1)
    (change,) = [change for change in found["verdicts"] if change["worse"]]
    assert change["name"] == "parity: onnx"
    assert (change["before"]["status"], change["after"]["status"]) == ("pass", "fail")
    assert change["ratio"] == change["after"]["measured"] / change["before"]["measured"]


def test_every_kind_of_change_is_in_the_table(call, run, worse):
    found = judging.certificates.read(worse)
    changed = dataclasses.replace(
        found,
        verdicts=found.verdicts[1:],
        measurements=found.measurements[1:],
        settings={**found.settings, "seed": 8},
        environment={**found.environment, "threads": 4},
        inputs=(),
    )
    (worse / "certificate.json").write_text(report.render("json", changed))
    code, out, _ = call("compare", run, worse)
    assert code == 5
    for word in ("verdict", "measurement", "setting", "environment", "input", "seed", "threads"):
        assert f" {word} " in out
    assert found.verdicts[0].check in out  # it is gone


@pytest.mark.parametrize("content", ["{}", "x", '{"schema": 2}'])
def test_a_damaged_certificate_is_refused(call, run, tmp_path, content):
    (tmp_path / "old.json").write_text(content)
    assert call("compare", tmp_path / "old.json", run)[0] == 2
    assert call("compare", run, tmp_path / "old.json")[0] == 2


# ---------------------------------------------------------------- without torch


def test_reading_certificates_loads_no_torch(run, merged):
    program = (
        "import sys\nfrom lora_export import cli\n"
        "for words in (['report', '--run', 'run', '--format', 'html'], ['verify', 'run'],\n"
        "              ['verify', 'merged'], ['compare', 'run', 'run']):\n"
        "    try:\n        cli.main(words)\n    except SystemExit as ended: assert not ended.code\n"
        "print('LOADED', *sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=run.parent
    )
    loaded = set(done.stdout.partition("LOADED")[2].split())
    assert {"jinja2", "jsonschema"} <= loaded
    assert not loaded & {"torch", "transformers", "onnx", "onnxruntime", "openvino"}


def test_the_files_that_a_merge_writes_down_are_those_that_verify_reads(merged):
    assert {file.name for file in merging.recorded_files(merged)} == {
        "model.safetensors", "config.json",
    }  # fmt: skip
