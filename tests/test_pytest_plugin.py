"""The plugin in sessions of its own: no verdict but a pass is green, nobody else is disturbed."""

import importlib
import sys
import tomllib
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hand_made import certificate, verdict
from test_public import loaded_after

from lora_export import judging, pytest_plugin
from lora_export.records import FileDigest, Status

pytest_plugins = "pytester"
BAD = [status for status in Status if status is not Status.PASS]
WHERE = ("layer.0.query.weight", "layer.1.value.weight")
FILES = (FileDigest("model.onnx", 9, "sha256:" + "b" * 64),)


@pytest.fixture
def session(pytester, monkeypatch):
    """Make `session(*words)`: run pytest with the plugin, whether or not it is installed."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")

    def run(*words):
        return pytester.runpytest_inprocess("-p", pytest_plugin.__name__, *words)

    return run


@pytest.fixture
def write(pytester):
    """Make `write(*verdicts)`: put their certificate into the folder `proof`."""

    def write(*verdicts):
        folder = pytester.path / "proof"
        folder.mkdir()
        made = certificate(*verdicts, inputs=FILES, outputs=FILES)
        judging.write_certificate(made, folder)
        return folder / judging.CERTIFICATE

    return write


def three():
    """Two passes, and a parity that fails at two places."""
    bad = verdict(Status.FAIL, subject="onnx", measured=9.26, limit=8.0, note="worst at batch 8",
                  where=WHERE)  # fmt: skip
    return verdict(subject="torchscript"), bad, verdict(check="intact", subject="files")


def test_each_verdict_is_a_test_with_an_id_of_its_own(session, write):
    write(*three())
    found = session("--lora-certificate", "proof", "--collect-only", "-q")
    found.stdout.fnmatch_lines_random([
        "lora-certificate::parity[[]torchscript[]]",
        "lora-certificate::parity[[]onnx[]]",
        "lora-certificate::intact[[]files[]]",
    ])  # fmt: skip


def test_passes_are_green(session, write):
    write(verdict(), verdict(subject="torchscript"))
    found = session("--lora-certificate", "proof")
    found.assert_outcomes(passed=2)
    assert found.ret == pytest.ExitCode.OK


@pytest.mark.parametrize("status", BAD)
def test_whatever_is_no_pass_fails(session, write, status):
    write(verdict(), verdict(status, subject="torchscript", compared=0))
    found = session("--lora-certificate", "proof")
    found.assert_outcomes(passed=1, failed=1)
    assert found.ret == pytest.ExitCode.TESTS_FAILED
    found.stdout.fnmatch_lines([f"{status}: as it should be"])


def test_a_failure_says_what_was_measured_and_where(session, write):
    write(*three())
    found = session("--lora-certificate", "proof")
    found.assert_outcomes(passed=2, failed=1)
    found.stdout.fnmatch_lines([
        "fail: worst at batch 8",
        "measured 9.26, limit 8 abs",
        "a limit of 9.26 would have passed",
        *WHERE,
        "FAILED lora-certificate::parity[[]onnx[]]*",
    ])  # fmt: skip
    found.stdout.no_fnmatch_line("*Traceback*")


def test_a_certificate_without_verdicts_fails(session, write):
    write()
    found = session("--lora-certificate", "proof")
    found.assert_outcomes(failed=1)
    found.stdout.fnmatch_lines(["FAILED lora-certificate::certificate*no verdicts*"])


def test_a_missing_certificate_is_a_usage_error(session, pytester):
    pytester.makepyfile("def test_ordinary(): pass")
    found = session("--lora-certificate", "nowhere")
    assert found.ret == pytest.ExitCode.USAGE_ERROR
    found.stderr.fnmatch_lines(["ERROR: --lora-certificate:*nowhere*"])
    found.stdout.no_fnmatch_line("*passed*")


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('"schema": ', '"schema": 9', "has schema"),
        ('"ok": false', '"ok": true', "damaged at /ok"),
        ('"compared": 10', '"compared": "ten"', "damaged at /verdicts/0/compared"),
        ("{", "", "not JSON"),
    ],
)
def test_a_damaged_certificate_is_a_usage_error(session, write, old, new, told):
    file = write(*three())
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    found = session("--lora-certificate", "proof")
    assert found.ret == pytest.ExitCode.USAGE_ERROR
    found.stderr.fnmatch_lines([f"ERROR: --lora-certificate:*{told}*"])


@pytest.mark.parametrize(
    ("words", "outcomes"),
    [
        ((), {"passed": 3, "failed": 1}),
        (("-k", "onnx"), {"failed": 1, "deselected": 3}),
        (("-k", "not parity"), {"passed": 2, "deselected": 2}),
        (("-k", "ordinary"), {"passed": 1, "deselected": 3}),
        (("-p", "xdist", "-n", "2"), {"passed": 3, "failed": 1}),
    ],
)
def test_verdicts_stand_beside_ordinary_tests(session, write, pytester, words, outcomes):
    write(*three())
    pytester.makepyfile("def test_ordinary(): pass")
    session("--lora-certificate", "proof", *words).assert_outcomes(**outcomes)


def test_junit_has_a_case_for_each_verdict(session, write, pytester):
    write(*three())
    session("--lora-certificate", "proof", "--junitxml", "report.xml")
    cases = ElementTree.parse(pytester.path / "report.xml").getroot().iter("testcase")
    found = {(case.get("classname"), case.get("name")): case.find("failure") for case in cases}
    node = "lora-certificate"
    assert set(found) == {
        (node, "parity[torchscript]"), (node, "parity[onnx]"), (node, "intact[files]")
    }  # fmt: skip
    failures = [failure for failure in found.values() if failure is not None]
    assert [failure.get("message").splitlines()[0] for failure in failures] == [
        "Failed: fail: worst at batch 8"
    ]


def test_without_the_option_a_session_is_as_it_was(session, write, pytester):
    write(*three())
    pytester.makepyfile("def test_ordinary(): pass")
    session().assert_outcomes(passed=1)


def test_a_test_may_ask_for_the_certificate(session, write, pytester):
    write(*three())
    pytester.makepyfile("""
        def test_speed(lora_certificate):
            assert not lora_certificate.ok
            assert lora_certificate.measurements[0].value < 3
    """)
    session("--lora-certificate", "proof", "-k", "speed").assert_outcomes(passed=1, deselected=3)


def test_a_test_that_asks_for_a_certificate_fails_without_one(session, pytester):
    pytester.makepyfile("def test_speed(lora_certificate): pass")
    found = session()
    found.assert_outcomes(errors=1)
    found.stdout.fnmatch_lines(["no certificate: run pytest with --lora-certificate DIR"])


def test_loading_the_plugin_is_nearly_free():
    found = loaded_after("import pytest, lora_export.pytest_plugin")
    ours = {name for name in found if name.startswith("lora_export.")}
    assert ours == {"lora_export.pytest_plugin"}
    assert not found & {"numpy", "torch", "jsonschema", "click", "rich"}


def test_reading_a_certificate_at_import_would_be_seen():
    assert "numpy" in loaded_after("import lora_export.pytest_plugin, lora_export.certificates")


def test_pytest_finds_the_plugin_where_the_package_is_installed():
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text("utf-8")
    found = tomllib.loads(text)["project"]["entry-points"]["pytest11"]
    assert [importlib.import_module(name) for name in found.values()] == [
        sys.modules[pytest_plugin.__name__]
    ]
