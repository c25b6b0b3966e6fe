"""The study: what is skipped, resumed and named as failed, its statistics, and what its page says.

The runs are those of `study_made.py`, a recipe that trains nothing.
"""

import csv
import importlib
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from study_made import ALL, SIZES, rows
from study_results import binomial, difference, mean_interval

from lora_export import InputError

ROOT = Path(__file__).parent.parent
MADE = f"{Path(__file__).parent}/study_made.py"
COMMAND = (
    f"{MADE} --data {{data}} --base {{base}} --method {{method}} --seed {{seed}} --out {{folder}}"
)
# What a shell runs: the study over a matrix of its own.
DRIVER = f"""
import sys
sys.path.insert(0, {str(ROOT / "recipes")!r})
import study
study.COMMANDS = {{"sst2": {COMMAND!r}}}
study.PRESETS = {{"quick": {{}}}}
study.MATRIX = (study.Setting("slow", "sst2", "lora", "--seconds 60", quick=1),
                study.Setting("full", "sst2", "full", quick=1))
study.report = print  # what is drawn is of no interest here
study.main()
"""


@pytest.fixture(scope="module")
def recipe():
    return importlib.import_module("study")


@pytest.fixture(scope="module")
def page():
    """The part that draws and writes."""
    return importlib.import_module("study_report")


@pytest.fixture
def data(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / "data" / name).write_text("sentence\tlabel\na film \t1\n")
    return tmp_path / "data"


@pytest.fixture
def study(recipe, page, data, tmp_path, monkeypatch):
    """`study(*settings, words=())` runs a matrix; a row is id, method, words, seeds, needs."""
    monkeypatch.setattr(page, "plots_of", lambda study: ())
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(*settings, words=()):
        made = [
            recipe.Setting(name, "sst2", method, more, quick=count, needs=needs)
            for name, method, more, count, needs in settings
        ]
        monkeypatch.setattr(recipe, "MATRIX", made)
        monkeypatch.setattr(recipe, "COMMANDS", {"sst2": COMMAND})
        monkeypatch.setattr(recipe, "PRESETS", {"quick": {}})
        monkeypatch.setattr(recipe, "POLL", 0.02)
        line = ["study.py", "--data", str(data), "--out", str(tmp_path / "out"), *words]
        monkeypatch.setattr(sys, "argv", line)
        recipe.main()
        return tmp_path / "out"

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def starts(out, run):
    return (out / "runs" / run / "starts").read_text().split()


def lines_of(out):
    lines = map(json.loads, (out / "study.jsonl").read_text().splitlines())
    return {line["id"]: line for line in lines}


BOTH = (("lora-8", "lora", "--accuracy 0.89", 1, ""), ("full", "full", "", 2, ""))
ONE = (("full", "full", "", 1, ""),)


# ---------------------------------------------------------------- runs


def test_it_runs_all_and_writes_small_results(study, tmp_path):
    out = study(*BOTH, words=("--jobs", "2"))
    assert {line["state"] for line in lines_of(out).values()} == {"finished"}
    small = {path for path in out.iterdir() if path.is_file()}
    names = {path.name for path in small}
    assert names >= {"about.json", "study.jsonl", "curves.json", "table.md", "table.csv"}
    assert names >= {"README.md", "index.html"}
    assert all(path.stat().st_size < 200_000 for path in small)
    assert not [path for path in small if str(tmp_path) in path.read_text()]


def test_what_is_finished_is_not_run_again(study):
    study(*ONE)
    out = study(*ONE)
    assert starts(out, "full-seed-0") == ["anew"]


def test_a_run_with_a_checkpoint_is_resumed(study):
    out = study(*BOTH)
    run = out / "runs" / "full-seed-1"
    (run / "run.json").unlink()
    (run / "checkpoint").mkdir()
    study(*BOTH)
    assert starts(out, "full-seed-1") == ["anew", "resumed"]
    assert starts(out, "full-seed-0") == ["anew"]


def test_half_a_run_without_a_checkpoint_begins_anew(study):
    out = study(*ONE)
    (out / "runs" / "full-seed-0" / "run.json").unlink()
    study(*ONE)
    assert starts(out, "full-seed-0") == ["anew"]
    assert (out / "runs" / "full-seed-0" / "run.json").is_file()


def test_a_run_of_other_settings_is_refused_and_left_alone(study):
    out = study(*BOTH)
    with pytest.raises(
        SystemExit, match="runs of other settings or data: full-seed-0, full-seed-1; name"
    ):
        study(BOTH[0], ("full", "full", "--accuracy 0.8", 2, ""))
    assert starts(out, "full-seed-1") == ["anew"]


def test_a_run_on_other_data_is_refused(study, data):
    out = study(*ONE)
    (data / "train.tsv").write_text("sentence\tlabel\nanother film \t0\n")
    with pytest.raises(SystemExit, match="runs of other settings or data: full-seed-0"):
        study(*ONE)
    shutil.rmtree(out / "runs" / "full-seed-0")  # as it says; its note stays
    study(*ONE)
    assert starts(out, "full-seed-0") == ["anew"]


def test_a_base_of_other_config_makes_another_run(recipe, tmp_path):
    def first():
        return recipe.jobs_of("quick", "data", str(tmp_path), tmp_path / "out")[0].identity

    (tmp_path / "config.json").write_text("{}")
    before = first()
    assert first() == before
    (tmp_path / "config.json").write_text('{"layers": 1}')
    assert first() != before


def test_what_needs_a_run_of_other_settings_is_another_run(study):
    after = ("full", "full", "", 1, "head-seed-0")
    out = study(("head", "head", "", 1, ""), after)
    shutil.rmtree(out / "runs" / "head-seed-0")
    with pytest.raises(SystemExit, match="other settings or data: full-seed-0;"):
        study(("head", "head", "--accuracy 0.8", 1, ""), after)


def test_a_corrected_command_is_not_blocked_by_the_run_that_failed(study, tmp_path):
    with pytest.raises(SystemExit, match="exit code 1"):
        study(("head", "head", "--fail", 1, ""))
    run = tmp_path / "out" / "runs" / "head-seed-0"
    (run / "checkpoint").mkdir()  # of the other settings: not to be gone on from
    study(("head", "head", "", 1, ""))
    assert starts(tmp_path / "out", "head-seed-0") == ["anew"]


def test_what_no_study_made_is_left_alone(study, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(SystemExit, match="holds files that are no study"):
        study(*ONE)
    assert {path.name for path in out.iterdir()} == {"thesis.txt"}
    (out / "thesis.txt").unlink()
    study(*ONE)
    foreign = out / "runs" / "full-seed-1"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    with pytest.raises(SystemExit, match="folders that no study made: full-seed-1; move them"):
        study(*BOTH)
    assert (foreign / "thesis.txt").is_file()


def test_further_commands_are_kept_beside_the_first(study):
    study(*ONE)
    out = study(*ONE, words=("--jobs", "2"))
    study(*ONE)
    about = json.loads((out / "about.json").read_text())
    assert about["command"].endswith("--out out")
    assert [command[-8:] for command in about["further"]] == ["--jobs 2"]
    assert "Gone on with by: `python recipes/study.py" in (out / "README.md").read_text()


def test_what_a_study_is_told_of_is_its_own_preset(study, recipe, monkeypatch, capsys):
    out = study(*ONE)
    about = json.loads((out / "about.json").read_text())
    (out / "about.json").write_text(json.dumps(about | {"preset": "full"}))
    asked = []
    jobs_of = recipe.jobs_of
    monkeypatch.setattr(
        recipe, "jobs_of", lambda preset, *more: asked.append(preset) or jobs_of("quick", *more)
    )
    study(*ONE, words=("--list",))
    study(*ONE, words=("--dry-run",))
    study(*ONE, words=("--list", "--quick"))
    assert asked == ["full", "full", "quick"]


def test_a_run_that_was_killed_is_not_quoted(recipe, tmp_path):
    job = recipe.jobs_of("quick", "data", "base", tmp_path)[0]
    job.folder.mkdir(parents=True)
    job.log.write_text("step 200/2106  loss 0.4012\n")
    for code, why in ((-9, "exit code -9"), (2, "exit code 2: step 200/2106  loss 0.4012")):
        recipe.write_json(job.note, {"identity": list(job.identity), "exit_code": code})
        assert recipe.results_of(job) == {"why": why}


def measured_at(step, name, value, subject="dev"):
    return {"name": name, "subject": subject, "value": value, "step": step}


def test_a_metric_of_an_earlier_evaluation_is_no_final_figure(recipe):
    rows = [
        measured_at(1, "loss", 0.7, "train"),
        measured_at(25, "accuracy", 0.85),
        measured_at(25, "Matthews correlation", 0.7),
        measured_at(50, "loss", 0.6, "train"),
        measured_at(50, "accuracy", 0.5),
        measured_at(50, "Matthews correlation undefined", 872),
        measured_at(50, "parameters", 10, "model"),
    ]
    found = {row["name"]: row["value"] for row in recipe.last_of(rows)}
    assert found == {
        "loss": 0.6, "accuracy": 0.5, "Matthews correlation undefined": 872, "parameters": 10,
    }  # fmt: skip
    again = [*rows[:-1], *rows[1:3], rows[-1]]  # with --patience: the best one is what is saved
    found = {row["name"]: row["value"] for row in recipe.last_of(again)}
    assert found == {"loss": 0.6, "accuracy": 0.85, "Matthews correlation": 0.7, "parameters": 10}
    assert recipe.curves_of(again)["accuracy"] == [(25, 0.85), (50, 0.5)]


def test_a_run_that_fails_is_named_and_the_others_go_on(study, tmp_path, capsys):
    bad = ("head", "head", "--fail", 1, "")
    with pytest.raises(SystemExit, match=r"(?s)head-seed-0: exit code 1.*not a number"):
        study(bad, *BOTH)
    out = tmp_path / "out"
    found = lines_of(out)
    assert found["head-seed-0"]["state"] == "failed"
    assert found["full-seed-1"]["state"] == "finished"
    assert found["head-seed-0"]["why"] == "exit code 1: Error: weights: the loss is not a number"
    assert "head-seed-0: failed (exit code 1: Error: weights" in (out / "README.md").read_text()
    assert "head-seed-0: FAILED, exit code 1" in capsys.readouterr().out


def test_a_run_that_failed_is_not_taken_for_one_that_was_stopped(study, tmp_path, capsys):
    settings = (("head", "head", "--fail", 1, ""),)
    with pytest.raises(SystemExit):
        study(*settings)
    checkpoint = tmp_path / "out" / "runs" / "head-seed-0" / "checkpoint"
    checkpoint.mkdir()
    for state, note in (("failed", {"exit_code": 1}), ("unfinished", {})):
        (tmp_path / "out" / "runs" / "head-seed-0.json").write_text(json.dumps(note))
        capsys.readouterr()
        study(*settings, words=("--list",))
        assert capsys.readouterr().out.split() == ["head-seed-0", state]


def test_what_needs_a_run_that_failed_is_not_run(study, tmp_path):
    with pytest.raises(SystemExit, match="full-seed-0: it needs head-seed-0, which is failed"):
        study(("head", "head", "--fail", 1, ""), ("full", "full", "", 1, "head-seed-0"))
    assert not (tmp_path / "out" / "runs" / "full-seed-0").exists()
    assert lines_of(tmp_path / "out")["full-seed-0"]["state"] == "not run"


def test_what_needs_a_run_comes_after_it(study):
    out = study(
        ("head", "head", "--seconds 0.5", 1, ""),
        ("full", "full", "", 1, "head-seed-0"),
        words=("--jobs", "2"),
    )
    begun, ended = out / "runs/full-seed-0/starts", out / "runs/head-seed-0/run.json"
    assert begun.stat().st_mtime_ns >= ended.stat().st_mtime_ns


def test_only_what_is_asked_for_is_run(study):
    out = study(*BOTH, words=("--only", "full*"))
    assert {n for n, line in lines_of(out).items() if line["state"] == "finished"} == {
        "full-seed-0", "full-seed-1",
    }  # fmt: skip
    with pytest.raises(SystemExit, match="--only nothing is none of: lora-8-seed-0, "):
        study(*BOTH, words=("--only", "nothing"))


def test_a_dry_run_prints_commands_and_runs_nothing(study, tmp_path, capsys):
    study(*BOTH, words=("--dry-run",))
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 3
    assert "--method full --seed 1" in printed[2]
    assert not (tmp_path / "out").exists()


def test_data_that_are_not_there_are_refused(study, data):
    (data / "train.tsv").write_text("sentence\na film \n")
    with pytest.raises(SystemExit, match=r"train.tsv needs a header with a column 'label'; README"):
        study(*BOTH)
    (data / "train.tsv").unlink()
    with pytest.raises(SystemExit, match=r"cannot read .*train.tsv: No such file.*'Get SST-2'"):
        study(*BOTH)


def test_a_report_of_nothing_is_refused(study):
    with pytest.raises(SystemExit, match="there is no study in"):
        study(*BOTH, words=("--report",))


def test_a_report_needs_only_the_small_files(study):
    out = study(*ONE)
    before = (out / "README.md").read_text()
    (out / "runs").rename(out.parent / "elsewhere")
    (out / "README.md").unlink()
    study(*ONE, words=("--report",))
    assert (out / "README.md").read_text() == before


@pytest.mark.slow
def test_a_stopped_study_ends_its_runs_and_goes_on(data, tmp_path):
    words = [sys.executable, "-c", DRIVER, "--data", str(data), "--out", str(tmp_path / "out")]
    run = tmp_path / "out" / "runs" / "slow-seed-0"
    first = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (run / "progress.json").exists():
        assert first.poll() is None
        time.sleep(0.05)
    second = subprocess.run(words, capture_output=True, text=True)
    assert "is in use by another study" in second.stderr
    first.send_signal(signal.SIGTERM)
    _, said = first.communicate(timeout=30)
    assert first.returncode == 1
    assert "stopped; the same command goes on from here" in said
    assert "exit_code" not in json.loads((run.parent / f"{run.name}.json").read_text())
    third = subprocess.run(words, capture_output=True, text=True)
    assert third.returncode == 0, third.stderr
    assert (run / "starts").read_text().split() == ["anew", "resumed"]


def test_the_matrix_of_every_preset_is_sound(recipe, tmp_path):
    for preset in recipe.PRESETS:
        jobs = recipe.jobs_of(preset, "data", "base", tmp_path)
        ids = [job.id for job in jobs]
        assert len({*ids}) == len(ids) > 3
        for job in jobs:
            assert bool(job.setting.needs) == (job.needs is not None), job.id
            assert not any(str(tmp_path) in word for word in job.identity)


def test_lora_and_full_have_three_seeds_in_quick_and_full(recipe, tmp_path):
    for preset in ("quick", "full"):
        ids = {job.id for job in recipe.jobs_of(preset, "data", "base", tmp_path)}
        assert {f"{name}-seed-{seed}" for name in ("lora-8", "full") for seed in range(3)} <= ids


@pytest.mark.slow
def test_the_tiny_preset_runs_the_real_recipes(tiny_base, tmp_path):
    (tmp_path / "data").mkdir()
    for name, times in (("train", 12), ("dev", 2)):
        text = "a great film \t1\nthe best cast \t1\na bad film \t0\ndull and boring \t0\n"
        (tmp_path / "data" / f"{name}.tsv").write_text("sentence\tlabel\n" + text * times)
    words = ["--preset", "tiny", "--data", "data", "--base", str(tiny_base), "--out", "out"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "recipes" / "study.py"), *words],
        cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    out = tmp_path / "out"
    assert {line["state"] for line in lines_of(out).values()} == {"finished"}
    assert {path.stem.partition("-")[0] for path in out.glob("*.svg")} == {
        "learning", "parameters", "cost", "latency", "generation",
    }  # fmt: skip
    small = [path for path in out.iterdir() if path.is_file()]
    assert not [path for path in small if str(tmp_path) in path.read_text()]
    cost = {one["name"]: one["value"] for one in lines_of(out)["memory-lora"]["measurements"]}
    assert cost["optimizer state"] == (
        8 * cost["trainable parameters"] + 4 * cost["trainable tensors"]
    )
    assert cost["peak memory growth"] > 0
    with (out / "table.csv").open() as file:
        for row in csv.DictReader(file):
            assert float(row["optimizer state bytes"]) == float(
                row["optimizer state bytes predicted"]
            )


# ---------------------------------------------------------------- statistics


def quantile(degrees):
    """The 97.5 % point of Student's t, by integrating its density and bisection."""
    grid = np.linspace(0, 60, 600_001)
    constant = (
        math.gamma((degrees + 1) / 2) / math.gamma(degrees / 2) / math.sqrt(degrees * math.pi)
    )
    density = constant * (1 + grid**2 / degrees) ** (-(degrees + 1) / 2)
    cumulated = 0.5 + np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2) * grid[1]])
    return float(np.interp(0.975, cumulated, grid))


@pytest.mark.parametrize("values", [(0.88, 0.89, 0.87), (1.0, 5.0, 2.0, 2.0, 9.0)])
def test_the_interval_of_a_mean_is_students(values):
    found = mean_interval(values)
    half = quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    assert found.value == pytest.approx(statistics.fmean(values))
    assert found.high - found.value == pytest.approx(half, rel=1e-6)
    assert found.value - found.low == pytest.approx(half, rel=1e-6)


@pytest.mark.parametrize(
    ("ours", "theirs"), [((0.88, 0.89, 0.87), (0.9, 0.95, 0.93)), ((1, 2, 4, 9), (3, 3.5, 3.2))]
)
def test_the_interval_of_a_difference_is_welchs(ours, theirs):
    found = difference(ours, theirs)
    parts = [statistics.variance(values) / len(values) for values in (ours, theirs)]
    degrees = sum(parts) ** 2 / sum(
        part**2 / (len(values) - 1) for part, values in zip(parts, (ours, theirs), strict=True)
    )
    half = quantile(degrees) * math.sqrt(sum(parts))
    assert found.value == pytest.approx(statistics.fmean(ours) - statistics.fmean(theirs))
    assert found.high - found.value == pytest.approx(half, rel=1e-6)


def test_a_single_value_has_no_interval_and_says_so():
    assert mean_interval([0.5]).is_single
    assert difference([0.5], [0.4, 0.3]).is_single
    assert mean_interval([0.5]).text(1) == "0.5 (single run)"
    assert mean_interval([0.5, 0.5]).text(1) == "0.5 (all 2 seeds alike)"
    assert difference([0.5, 0.5], [0.25, 0.25]).low == 0.25


def test_the_interval_of_a_share_is_wilsons():
    share, count, z = 0.9, 872, 1.959963984540054
    right = round(share * count)
    p = right / count
    middle = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(p * (1 - p) / count + (z / (2 * count)) ** 2)
    assert binomial(share, count) == pytest.approx((middle - half, middle + half))
    assert binomial(1.0, 872)[0] < 1.0


# ---------------------------------------------------------------- the page


@pytest.fixture
def made(page, tmp_path, monkeypatch):
    """`made(lora=..., full=..., more=...)` writes a study of these accuracies; returns its page."""

    def write(lora=(0.88, 0.89, 0.9), full=(0.89, 0.9, 0.91), preset="quick", more=(), drawn=False):
        if not drawn:
            monkeypatch.setattr(page, "plots_of", lambda study: ())
        machine = {
            "processor": "a processor", "cores": 2, "threads": 1, "system": "Linux x86_64",
            "load_average": 0.5, "python": "3.11.7", "packages": {"torch": "2.13.0"},
        }  # fmt: skip
        about = {"command": "the command", "preset": preset, "base": "a base", "machine": machine}
        lines = [
            {
                "id": f"{name}-seed-{seed}", "setting": name, "recipe": "sst2", "method": method,
                "words": "--lr 1", "seed": seed, "state": "finished",
                "measurements": rows(method, accuracy)[3:],
            }
            for name, method, values in (("lora-8", "lora", lora), ("full", "full", full))
            for seed, accuracy in enumerate(values)
        ]  # fmt: skip
        lines += more
        (tmp_path / "about.json").write_text(json.dumps(about))
        (tmp_path / "study.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in lines))
        curves = {one["id"]: {"loss": [[1, 0.7]], "accuracy": [[1, 0.8]]} for one in lines[:2]}
        (tmp_path / "curves.json").write_text(json.dumps(curves))
        page.write(tmp_path)
        return (tmp_path / "README.md").read_text()

    return write


def run_of(recipe, method, **more):
    line = {"id": f"{recipe}-{method}", "setting": method, "recipe": recipe, "method": method}
    return line | {"words": "", "seed": 0, "state": "finished"} | more


def test_the_page_has_the_means_and_the_difference(made):
    text = made()
    gap = difference((88, 89, 90), (89, 90, 91))
    assert "89.00 % [86.52, 91.48] of the 872 dev sentences rightly (3 seeds)" in text
    assert "full fine-tuning 90.00 % [87.52, 92.48] (3 seeds)" in text
    minus = "\N{MINUS SIGN}"
    assert f"is {minus}1.00 points [{minus}{-gap.low:.2f}, {gap.high:.2f}] (Welch" in text
    assert "independent), or 9 of the 872 sentences. 0 lies in the interval: seeds alone" in text
    assert "at most 1.5 points: it is reached by the mean; the interval leaves it open." in text
    assert f"- Accuracy: LoRA 89.00 %, full fine-tuning 90.00 %; the difference is {minus}1" in text


def test_the_page_says_so_where_lora_is_not_within_reach(made):
    text = made(lora=(0.86, 0.87, 0.88))
    assert "it is not reached by the mean; the interval leaves it open." in text
    assert "- LoRA within 1.5 points of full fine-tuning: the difference is" in text


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        (0.902, "0 lies in the interval: seeds alone could make such a difference. The aim is"),
        (0.902, "to lose at most 1.5 points: it is reached by the whole interval."),
        (0.895, "The whole interval is below 0: over the seeds LoRA is behind. The aim is to lose"),
        (0.895, "at most 1.5 points: it is reached by the whole interval."),
        (0.910, "The whole interval is above 0: over the seeds LoRA is ahead. The aim is to lose"),
        (0.850, "at most 1.5 points: it is not reached by the whole interval."),
    ],
)
def test_an_interval_that_is_decided_is_said_to_be(made, lora, said):
    assert said in made(lora=(lora - 0.001, lora, lora + 0.001), full=(0.900, 0.901, 0.902))


def test_seeds_that_are_all_alike_have_no_interval_that_could_say_anything(made):
    text = made(lora=(0.9, 0.9), full=(0.9, 0.9))
    assert "is 0.00 points (all 2 seeds alike), or 0 of the 872 sentences. The aim is" in text
    assert "it is reached, by all seeds alike; that is no interval." in text


def test_single_runs_are_said_to_be(made):
    text = made(lora=(0.9,), full=(0.9,))
    assert "90.00 % (single run)" in text
    assert "it is reached; from single runs that says little" in text


def test_every_method_that_is_used_is_explained(made):
    found = [{**row, "step": 1} for row in rows("head", 0.7)[3:]]
    more = [run_of("sst2", "bitfit", setting="short-bitfit", measurements=found)]
    names = made(more=more).partition("## What the names mean")[2].partition("##")[0]
    assert re.findall(r"^- `([a-z-]+)`", names, re.MULTILINE) == [
        "full",
        "lora",
        "bitfit",
        "short-",
    ]
    assert "`short-`" not in made()


def test_the_best_run_is_the_best_of_those_with_as_many_steps(made):
    longer = [{**row, "step": 3} for row in rows("lora", 0.95)[3:]]
    text = made(more=[run_of("sst2", "lora", setting="lora-8-long", measurements=longer)])
    assert "lora-8-long with seed 0: 95.00 %. It is the best of 4 runs, 1 of them with" in text
    assert "lora-8 with seed 2: 90.00 %. It is the best of 3 runs, 3 of them with as many" in made()
    assert "lora-8 with seed 0: 88.00 %.\n" in made(lora=(0.88,))


def test_single_runs_of_several_settings_are_not_ranked(made):
    def short(method, accuracy):
        found = [{**row, "step": 1} for row in rows(method, accuracy)[3:]]
        return run_of("sst2", method, setting=f"short-{method}", measurements=found)

    runs = [short("lora", 0.8), short("full", 0.82), short("head", 0.6)]
    text = made(more=runs)
    assert (
        "After 1 steps the 3 settings lie between 82.0 % (short-full) and 60.0 % (short-head). "
        "Each is a single run, with a learning rate of its own that was not searched for: a "
        "difference of a point or two says nothing about the method."
    ) in text
    assert "settings lie between" not in made(more=runs[:2])


def test_the_seeds_of_an_early_evaluation_are_held_apart(made, tmp_path, page):
    short = [
        run_of("sst2", m, setting=f"short-{m}",
               measurements=[{**row, "step": 1} for row in rows(m, 0.8)[3:]])
        for m in ("lora", "full", "head")
    ]  # fmt: skip
    made(more=short)
    curves = {f"lora-8-seed-{seed}": {"accuracy": [[1, 0.8 + seed / 100]]} for seed in range(3)}
    (tmp_path / "curves.json").write_text(json.dumps(curves))
    page.write(tmp_path)
    said = "The seeds of lora-8 alone lie 2.0 points apart after their first 1 steps."
    assert said in (tmp_path / "README.md").read_text()


def test_the_page_holds_predictions_against_what_was_measured(made):
    text = made()
    predicted = [8 * SIZES[m][0] + 4 * SIZES[m][1] for m in ("lora", "full")]
    ratio = f"{predicted[0] / predicted[1]:.3g}"
    assert f"The ratio is {ratio} predicted, {ratio} measured." in text
    assert f"trains 300 parameters, {100 * 300 / ALL:.3g} % of all" in text


def test_a_measured_state_that_is_not_as_predicted_shows(made, tmp_path, page):
    made()
    lines = (tmp_path / "study.jsonl").read_text().replace('"value": 2440', '"value": 9999')
    (tmp_path / "study.jsonl").write_text(lines)
    page.write(tmp_path)
    assert "2.44 kB, and 10 kB were measured" in (tmp_path / "README.md").read_text()


def test_a_share_is_shown_within_0_and_1(made):
    assert "99.67 % [98.23, 100.00] of the 872" in made(lora=(0.99, 1.0, 1.0))
    assert "100.00 % (all 3 seeds alike) of the 872" in made(lora=(1.0, 1.0, 1.0))


def test_a_metric_that_some_seeds_lack_says_so(made, tmp_path):
    one = run_of("sst2", "head", measurements=rows("head", 0.8)[3:])
    other = {"name": "F1", "subject": "dev", "value": 0.5, "unit": "share", "samples": 9}
    more = [
        one,
        one | {"id": "2", "seed": 1, "measurements": [*one["measurements"], other]},
        one | {"id": "3", "seed": 2, "measurements": [*one["measurements"], other]},
    ]
    assert "| 50.00 (all 2 seeds alike) (2 of 3 seeds) |" in made(more=more)
    with (tmp_path / "table.csv").open() as file:
        found = {row["setting"]: row for row in csv.DictReader(file)}["head"]
    assert (found["F1 seeds"], found["accuracy seeds"], found["seeds"]) == ("2", "3", "3")


def test_how_learning_rates_were_chosen_is_told(made, recipe, tmp_path):
    lines = [run_of("sst2", "qlora", state="not run", tried="1e-3 was tried first")]
    assert "qlora: 1e-3 was tried first. Nothing is noted" in made(more=lines)
    assert "Learning rates." not in made()
    notes = {
        job.setting.id: job.setting.tried for job in recipe.jobs_of("full", "", "base", tmp_path)
    }
    assert "88.07 % and 87.96 %" in notes["lora-8"]
    assert "1e-4 was taken before others were tried" in notes["full"]


def test_the_table_says_how_a_run_was_trained(made, tmp_path):
    more = [
        run_of("sst2", "head", words="--lr 3 --limit 9 --lr 1", measurements=rows("head", 0.8)[3:],
               settings={"batch_size": 32, "matmul_precision": "medium"}),
        run_of("cost", "full", settings={"batch_size": 4, "length": 8}),
    ]  # fmt: skip
    text = made(more=more)
    assert "| head | --lr 1 --limit 9 | 2 | 32 | 1 | 80.00 \N{DAGGER} |" in text
    assert "\N{DAGGER} is a single run" in text
    assert "(`--matmul-precision medium`), so that their ratios can differ" in text
    more[0]["settings"]["matmul_precision"] = "highest"
    assert "--matmul-precision" not in made(more=more)


def test_half_a_study_has_whole_sentences_and_its_plots(made, tmp_path):
    grown = [{"name": "peak memory growth", "subject": "CPU, resident", "value": 671e6},
             {"name": "trainable tensors", "subject": "model", "value": 3}]  # fmt: skip
    text = made(full=(), more=[run_of("cost", "full", measurements=grown)], drawn=True)
    assert "Full fine-tuning 671 MB. The model itself is in all" in text
    assert {path.stem for path in tmp_path.glob("*.svg")} == {"learning-2", "cost"}
    assert set(re.findall(r"\((.+)\.svg\)", text)) == {"learning-2", "cost"}
    assert not re.search(r"[;:,(]\s*[.;)]", text.partition("## All settings")[0])


def test_every_plot_stands_on_the_page(made, tmp_path):
    more = [run_of("sst2", m, measurements=rows("head", 0.7)[3:]) for m in ("head", "bitfit")]
    text = made(full=(), more=more, drawn=True)
    plots = {path.stem for path in tmp_path.glob("*.svg")}
    assert plots == {"learning-2", "parameters-2"}
    assert set(re.findall(r"\((.+)\.svg\)", text)) == plots


def test_what_is_written_is_drawn_by_task(made, tmp_path, page):
    found = {"name": "perplexity", "subject": "dev", "value": 2.0, "samples": 9}
    measured = [*rows("lora", 0.5)[4:], found]
    more = [
        run_of("causal_lm", "lora", setting="answers-lora-8", id="a", measurements=measured),
        run_of("causal_lm", "full", setting="answers-full", id="b", measurements=measured),
    ]
    made(more=more, drawn=True)

    def labels(**curves):
        (tmp_path / "curves.json").write_text(json.dumps(curves))
        page.write(tmp_path)
        return {*re.findall(">([^<]+)</text>", (tmp_path / "generation.svg").read_text())}

    old = labels(a={"perplexity": [[1, 3.0]], "ROUGE-L": [[1, 0.5]]})
    assert "perplexity" in old
    assert not {"ROUGE-L, descriptions, %", "verdicts right, %"} & old
    both = labels(
        a={"perplexity": [[1, 3.0]], "ROUGE-L (description)": [[1, 0.5]]},
        b={"perplexity": [[1, 2.0]]},
    )
    assert {"answers-lora-8", "answers-full", "ROUGE-L, descriptions, %"} <= both


def test_only_plots_of_ours_are_deleted(made, tmp_path):
    for name in ("cost", "learning-7", "holiday", "parameters"):
        (tmp_path / f"{name}.svg").write_text("<svg/>")
    made()
    assert {path.stem for path in tmp_path.glob("*.svg")} == {"holiday", "parameters"}


def test_missing_runs_are_named(made):
    text = made(more=[run_of("sst2", "qlora", state="failed", why="no 4-bit here")])
    text = text[text.index("## Not reached") :]
    assert "- sst2-qlora: failed (no 4-bit here)" in text
    assert "Nothing: every planned run" in made()


def test_aims_that_are_not_reached_are_named(made):
    assert "a LoRA run of at least 89.5 % accuracy" not in made(preset="quick")
    assert "a LoRA run of at least 89.5 % accuracy" not in made(preset="full")
    low = made(preset="full", lora=(0.88, 0.88, 0.89))
    assert "- a LoRA run of at least 89.5 % accuracy: the best is at 89.00 %" in low


def test_a_study_without_one_of_the_two_says_so(made):
    text = made(lora=())
    assert "- LoRA against full fine-tuning: there are no finished runs of both" in text
    assert "## How good" not in text


def test_costs_are_drawn_and_told(made, tmp_path):
    def measured(name, subject, value):
        return {"name": name, "subject": subject, "value": value, "unit": "", "samples": 3}

    more = [
        run_of("cost", method, settings={"batch_size": 4, "length": 8}, measurements=[
            measured("peak memory growth", "CPU, resident", grown),
            measured("optimizer state", "AdamW", 8e6),
            measured("trainable tensors", "model", 3),
        ])
        for method, grown in (("full", 1204e6), ("lora", 602e6))
    ]  # fmt: skip
    ratios = [
        measured(f"step time ratio{end}", method, value)
        for method, value in (("full", 1.0), ("lora", 0.7))
        for end, value in (("", value), (", low", value - 0.01), (", high", value + 0.02))
    ]
    more.append(run_of("cost", "full,lora", measurements=ratios))
    text = made(more=more, drawn=True)
    assert "Full fine-tuning 1.2 GB; lora 602 MB (0.50 of full fine-tuning)." in text
    assert "lora 0.70 [0.69, 0.72]" in text
    assert "on batches of 4 rows of 8 tokens" in text
    labels = re.findall(">([^<]+)</text>", (tmp_path / "cost.svg").read_text())
    assert {"1200", "602"} <= {*labels}  # three digits, no exponent


def test_the_peaks_of_the_trainings_are_told(made, tmp_path, page):
    grown = {"name": "peak memory growth", "subject": "CPU, resident", "value": 671e6}
    trainable = {"name": "trainable tensors", "subject": "model", "value": 3}
    made(more=[run_of("cost", "full", measurements=[grown, trainable])])
    assert "had a peak of" not in (tmp_path / "README.md").read_text()
    lines = [json.loads(line) for line in (tmp_path / "study.jsonl").read_text().splitlines()]
    for line in lines[:6]:
        value = (5e9 if line["method"] == "lora" else 4e9) + 1e8 * line["seed"]
        line["measurements"].append({"name": "peak memory", "subject": "CPU", "value": value})
    (tmp_path / "study.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    page.write(tmp_path)
    said = "had a peak of 5.2 GB with lora-8 and of 4.2 GB with full fine-tuning"
    assert said in (tmp_path / "README.md").read_text()


def test_an_adapter_trained_over_packed_weights_is_told_of_over_the_whole_base(made):
    whole = {"name": "accuracy", "subject": "dev, whole base", "value": 0.85, "samples": 872}
    found = [*rows("lora", 0.84)[3:], whole]
    text = made(more=[run_of("sst2", "qlora", setting="qlora-8", measurements=found)])
    assert "qlora-8 is made for the base in full precision: there seed 0 answers 85.00 %" in text
    assert "in full precision" not in made()


def test_the_proof_is_told_with_what_is_no_pass(made, tmp_path):
    verdict = {"limit": 1.1, "unit": "", "note": "", "where": []}
    verdicts = [
        {
            "check": "latency",
            "subject": "onnx, batch 1",
            "status": "pass",
            "measured": 0.5,
            "compared": 30,
        },
        {
            "check": "latency",
            "subject": "merged, batch 1",
            "status": "fail",
            "measured": 1.3,
            "compared": 30,
        },
        {
            "check": "decisions",
            "subject": "onnx",
            "status": "pass",
            "measured": 0.0,
            "compared": 872,
            "note": "872 of 872 decisions agree",
        },
    ]
    latency = [
        {
            "name": "latency median",
            "subject": f"{name}, batch 1, length 32",
            "value": value,
            "unit": "ms",
            "samples": 30,
        }
        for name, value in (("unmerged", 20.0), ("merged", 26.0), ("onnx", 10.0))
    ]
    for subject, value in (("merged", 0.9), ("idle", 0.5)):
        latency.append({"name": "accuracy", "subject": subject, "value": value})
    proof = run_of("proof", "lora", measurements=latency, verdicts=[verdict | v for v in verdicts])
    text = made(more=[proof], drawn=True)
    assert "onnx, batch 1 0.50 (pass); merged, batch 1 1.30 (fail)" in text
    assert "- Answering one sentence, the unmerged model's time being 1: onnx 0.50, merged" in text
    assert "onnx: pass, 872 of 872 decisions agree." in text
    assert "Accuracy on the dev sentences: merged 90.00 %; idle 50.00 % (with its adapter" in text
    assert (
        "2 of 3 verdicts of `lora-export run` on it are a pass; no pass: latency of merged" in text
    )
    assert ">26.0<" in (tmp_path / "latency.svg").read_text()


def test_decisions_that_were_not_compared_are_not_said_to_agree(made):
    verdict = {
        "check": "decisions", "subject": "labels", "status": "inconclusive", "measured": None,
        "compared": 0, "note": "",
    }  # fmt: skip
    proof = run_of("proof", "lora", verdicts=[verdict])
    assert "model's: labels: inconclusive." in made(more=[proof])


def test_generation_is_told_with_its_difference(made, tmp_path):
    def measured(value):
        found = rows("lora", 0.5)[4:]
        return [
            *found,
            {"name": "ROUGE-L", "subject": "dev, description", "value": value, "samples": 9},
            {"name": "ROUGE-L", "subject": "dev", "value": 0.1, "samples": 9},  # of a mixture
        ]

    more = [
        run_of(
            "causal_lm",
            method,
            id=f"{name}-{seed}",
            setting=name,
            measurements=measured(base + seed / 100),
        )
        for name, method, base in (("answers-lora-8", "lora", 0.4), ("answers-full", "full", 0.45))
        for seed in range(3)
    ]
    text = made(more=more)
    who, name = r"answers-lora-8 \(3 seeds, 1.48 % of the parameters\)", "ROUGE-L (description)"
    assert re.search(rf"{who}: {re.escape(name)} 41.00 % \[", text)
    gap = f"(Welch, where there are seeds): {name} \N{MINUS SIGN}5.00 points ["
    assert f"LoRA minus full fine-tuning {gap}" in text
    assert f"answers for the others): {name} 9 (answers-lora-8, answers-full)." in text


def test_the_table_has_plain_numbers(made, tmp_path):
    made()
    with (tmp_path / "table.csv").open() as file:
        found = {row["setting"]: row for row in csv.DictReader(file)}
    expected = mean_interval((0.88, 0.89, 0.9))
    assert float(found["lora-8"]["accuracy"]) == pytest.approx(0.89)
    assert float(found["lora-8"]["accuracy low"]) == pytest.approx(expected.low)
    assert float(found["lora-8"]["optimizer state ratio to full"]) == pytest.approx(2440 / 160160)
    assert float(found["full"]["checkpoint ratio to full predicted"]) == 1.0
    assert found["lora-8"]["perplexity"] == ""


def test_the_html_is_one_file_with_its_plots_and_escapes(made, tmp_path):
    made(more=[run_of("sst2", "qlora", state="failed", why="<script>")], drawn=True)
    text = (tmp_path / "index.html").read_text()
    assert text.count("data:image/svg+xml;base64,") == len([*tmp_path.glob("*.svg")]) == 1
    assert not re.search(r"(src|href)=.?(https?:|[\w-]+\.svg)", text)
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    assert "<code>the command</code>" in text


def test_the_same_figures_give_the_same_bytes(made, tmp_path):
    made(drawn=True)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    made(drawn=True)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}


@pytest.mark.parametrize("words", [["--steps", "0"], ["--ratios", "--rounds", "0"]])
def test_a_cost_over_nothing_is_refused(recipe, monkeypatch, tmp_path, words):
    cost = importlib.import_module("study_cost")
    monkeypatch.setattr(sys, "argv", ["study_cost.py", *words, "--out", str(tmp_path / "out")])
    with pytest.raises(InputError, match="is 0; expected at least 1"):
        cost.main()
    assert not (tmp_path / "out").exists()
