"""The action's steps are run under bash, with commands that stand in for those they call."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import click
import pytest
import yaml

from lora_export.cli import run as run_command

ROOT = Path(__file__).parent.parent
FILE = ROOT / ".github" / "actions" / "parity" / "action.yml"
WORKFLOW = ROOT / ".github" / "workflows" / "parity.yml"
ACTION = FILE.read_text("utf-8")
GIVEN = {"adapter": "a.safetensors"}
# Stands in for `lora-export run`: notes its words, writes a certificate and exits.
WRITES = (
    'mkdir -p "$OUT"; sleep 0.02; echo "# told" > "$OUT/report.md"; touch "$OUT/certificate.json"'
)


def script(folder, name, body):
    file = folder / "bin" / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" > "$NOTES/{name}"\n{body}\n')
    file.chmod(0o755)


def filled(text, values):
    return re.sub(r"\$\{\{ ([\w.-]+) \}\}", lambda found: values.get(found[1], ""), text)


def holds(condition, values, failed):
    """Evaluate a step's `if`: terms with && between; without always() no step follows a failure."""
    terms = condition.strip("${ }").split(" && ")
    if failed and "always()" not in terms:
        return False
    for term in terms:
        if term in ("always()", "success()"):
            continue
        left, sign, right = term.split(" ")
        if (values.get(left, "") == right.strip("'")) != (sign == "=="):
            return False
    return True


class Job:
    """What became of an action: codes of the steps that ran, outputs, summary, words, uploads."""

    def __init__(self, folder, given, body, text=ACTION):
        action = yaml.safe_load(text)
        script(folder, "lora-export", body)
        script(folder, "python", "")
        self.folder, self.codes, self.uploaded = folder, {}, None
        summary, output = folder / "summary", folder / "output"
        summary.touch()
        known = {name: about.get("default", "") for name, about in action["inputs"].items()}
        values = {f"inputs.{name}": value for name, value in (known | given).items()}
        for step in action["runs"]["steps"]:
            name, failed = step.get("name", step.get("uses")), any(self.codes.values())
            if not holds(step.get("if", "success()"), values, failed):
                continue
            if "uses" in step:
                self.codes[name] = 0
                if name == "Upload":
                    self.uploaded = filled(step["with"]["path"], values).split()
                continue
            output.write_text("")
            env = {key: filled(value, values) for key, value in step["env"].items()}
            surroundings = {
                "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
                "NOTES": str(folder),
                "GITHUB_OUTPUT": str(output),
                "GITHUB_STEP_SUMMARY": str(summary),
                "GITHUB_ACTION_PATH": str(FILE.parent),
            }
            done = subprocess.run(
                ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]],
                env=surroundings | env, cwd=folder, capture_output=True, text=True, check=False,
            )  # fmt: skip
            self.codes[name] = done.returncode
            pairs = [line.split("=", 1) for line in output.read_text().splitlines()]
            values |= {f"steps.{step.get('id')}.outputs.{key}": value for key, value in pairs}
        self.failed = any(self.codes.values())
        self.summary = summary.read_text()
        self.outputs = {n: filled(o["value"], values) for n, o in action["outputs"].items()}

    def words(self, name="lora-export"):
        return (self.folder / name).read_text().splitlines()


# ---------------------------------------------------------------- what a run ends with


def test_a_proof_passes_is_shown_and_uploaded(tmp_path):
    job = Job(tmp_path, GIVEN, WRITES)
    assert not job.failed
    assert job.outputs == {"ok": "true", "certificate": "run/certificate.json"}
    assert job.summary == "# told\n"
    assert job.uploaded == ["run/certificate.json", "run/report.*"]


@pytest.mark.parametrize("code", [1, 2, 3, 4, 5, 130])
def test_a_job_fails_with_the_exit_code_and_is_shown_and_uploaded(tmp_path, code):
    job = Job(tmp_path, GIVEN, f"{WRITES}; exit {code}")
    assert job.codes["Prove"] == code
    assert job.outputs == {"ok": "false", "certificate": "run/certificate.json"}
    assert job.summary == "# told\n"
    assert job.uploaded


def test_a_refusal_says_that_nothing_is_proven(tmp_path):
    job = Job(tmp_path, GIVEN, "exit 3")
    assert job.codes["Prove"] == 3
    assert job.outputs == {"ok": "false", "certificate": ""}
    assert "NOT proven" in job.summary
    assert job.uploaded is None


@pytest.mark.parametrize("code", [0, 2])
@pytest.mark.parametrize("stale", [False, True])
def test_a_certificate_of_another_run_is_no_proof(tmp_path, code, stale):
    if stale:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "certificate.json").touch()
        (tmp_path / "run" / "report.md").write_text("# proven")
    job = Job(tmp_path, GIVEN, f"exit {code}")  # as with --help, or where the output exists
    assert job.codes["Prove"] == (code or 1)
    assert job.outputs == {"ok": "false", "certificate": ""}
    assert "NOT proven" in job.summary
    assert job.uploaded is None


def test_the_summary_can_be_left_out(tmp_path):
    job = Job(tmp_path, GIVEN | {"report": "false"}, WRITES)
    assert (job.failed, job.summary) == (False, "")


@pytest.mark.parametrize(
    ("old", "new", "codes", "told"),
    [
        ('exit "$code"', "exit 0", {"Prove": 0, "Report": 0}, True),
        ("|| code=$?", "|| true", {"Prove": 0, "Report": 0}, True),
        ("always() && inputs.report", "inputs.report", {"Prove": 5}, False),
    ],
)
def test_an_action_that_hides_a_failure_would_be_seen(tmp_path, old, new, codes, told):
    assert ACTION.count(old) == 1
    job = Job(tmp_path, GIVEN, f"{WRITES}; exit 5", ACTION.replace(old, new))
    assert {name: job.codes[name] for name in codes} == codes
    assert bool(job.summary) == told


# ---------------------------------------------------------------- what it calls


def parsed(words):
    assert words[0] == "run"
    return run_command.command.make_context("run", words[1:]).params


def test_every_input_becomes_an_option_that_exists(tmp_path):
    given = {"adapter": "a b", "base": "b", "data": "d.tsv", "out": "o", "formats": "onnx pt2",
             "arguments": "--seed 7\n--tied untie"}  # fmt: skip
    found = parsed(Job(tmp_path, given, "").words())
    wanted = {"adapter": Path("a b"), "base": "b", "data": Path("d.tsv"), "out": Path("o"),
              "formats": ("onnx", "pt2"), "seed": 7, "tied": "untie"}  # fmt: skip
    assert wanted.items() <= found.items()


def test_what_is_not_given_is_left_to_the_command(tmp_path):
    assert Job(tmp_path, GIVEN, "").words() == ["run", "--adapter", "a.safetensors", "--out", "run"]


def test_an_option_that_does_not_exist_would_be_found(tmp_path):
    words = Job(tmp_path, GIVEN, "", ACTION.replace("--adapter", "--adaptor")).words()
    with pytest.raises(click.NoSuchOption, match="--adaptor"):
        parsed(words)


def test_nothing_in_an_input_is_run_or_expanded(tmp_path):
    hostile = "$(touch owned) `touch owned` ; touch owned * \"'"
    given = dict.fromkeys(("adapter", "base", "data", "out", "formats", "arguments"), hostile)
    words = Job(tmp_path, given, "").words()
    assert not (tmp_path / "owned").exists()
    assert words.count(hostile) == 4
    assert words.count("*") == 2


def test_a_version_and_extras_are_installed(tmp_path):
    job = Job(tmp_path, GIVEN | {"version": "0.1.0", "extras": "demo,report"}, WRITES)
    assert job.words("python")[-1] == "lora-export[demo,report]==0.1.0"


def test_the_actions_own_package_is_installed_beside_the_torch_of_the_readme(tmp_path):
    torch, package = Job(tmp_path, GIVEN, WRITES).words("python")[-2:]
    assert f"pip install -q {torch} " in (ROOT / "README.md").read_text("utf-8")
    assert Path(package).resolve() == ROOT


# ---------------------------------------------------------------- how it is written


def faults(text):
    """Return what is wrong with an action: inputs, expressions in scripts, shells that go on."""
    action = yaml.safe_load(text)
    used = set(re.findall(r"inputs\.([\w-]+)", text))
    found = [f"{name} is not used or not declared" for name in used ^ set(action["inputs"])]
    for step in action["runs"]["steps"]:
        if "${{" in step.get("run", ""):
            found.append("an expression in a script")
        if "run" in step and not step["run"].startswith("set -euo pipefail\n"):
            found.append("a script that goes on after a fault")
    return found


def test_the_action_is_well_written():
    assert faults(ACTION) == []


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("  adapter:\n", "  unused: {}\n  adapter:\n", "unused is not used or not declared"),
        ("{{ inputs.data }}", "{{ inputs.date }}", "date is not used or not declared"),
        ('--adapter "$ADAPTER"', "--adapter ${{ inputs.adapter }}", "an expression in a script"),
        ("set -euo pipefail", "set -u", "a script that goes on after a fault"),
    ],
)
def test_a_badly_written_action_would_be_found(old, new, fault):
    assert old in ACTION
    assert fault in faults(ACTION.replace(old, new))


def test_its_document_has_its_inputs():
    text = (FILE.parent / "README.md").read_text("utf-8")
    rows = re.findall(r"^\| `([\w-]+)` \| (?:`([^`]*)` |[^|]*)\|", text, re.M)
    inputs = yaml.safe_load(ACTION)["inputs"]
    assert [name for name, _ in rows] == list(inputs)
    stated = [(name, default) for name, default in rows if default and name != "formats"]
    assert stated == [
        (name, about["default"]) for name, about in inputs.items() if about.get("default")
    ]


def test_the_example_uses_what_the_action_has_and_may_write_in_one_job_only(tmp_path):
    found = yaml.safe_load(WORKFLOW.read_text("utf-8"))
    used = next(s for s in found["jobs"]["prove"]["steps"] if s.get("id") == "parity")
    action = yaml.safe_load(ACTION)
    required = {name for name, about in action["inputs"].items() if about.get("required")}
    assert required <= set(used["with"]) <= set(action["inputs"])
    assert parsed(Job(tmp_path, used["with"], "").words())["adapter"].name == "sst2.safetensors"
    assert (ROOT / used["with"]["adapter"]).is_file()
    assert found["permissions"] == {"contents": "read"}
    assert "permissions" not in found["jobs"]["prove"]
    assert found["jobs"]["comment"]["permissions"] == {"pull-requests": "write"}
    assert not [s for s in found["jobs"]["comment"]["steps"] if "checkout" in s.get("uses", "")]


@pytest.mark.parametrize(
    "words",
    [("actionlint",), ("zizmor", "--offline", "--min-severity", "medium", "--no-config")],
    ids=lambda words: words[0],
)
def test_the_linters_that_are_here_find_nothing(words):
    if shutil.which(words[0]) is None:
        pytest.skip(f"{words[0]} is not installed")
    files = [WORKFLOW] if words[0] == "actionlint" else [WORKFLOW, FILE]
    done = subprocess.run([*words, *files], capture_output=True, text=True, check=False)
    found = [line for line in done.stdout.splitlines() if line.startswith(("error", "warning"))]
    assert [line for line in found if "unpinned-uses" not in line] == []
