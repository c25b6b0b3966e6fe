"""The few-shot recipe on a tiny base: its samples, its table, and which cells it runs again."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from scipy import stats

from lora_export import InputError

RECIPES = Path(__file__).parent.parent / "recipes"


@pytest.fixture(scope="module")
def recipe():
    return importlib.import_module("few_shot")


@pytest.fixture
def run(recipe, tiny_base, sentences, tmp_path, monkeypatch):
    """`run(*words)`: run the recipe; return its directory."""

    def call(*more):
        words = ["--base", tiny_base, "--data", sentences, "--out", tmp_path / "out"]
        words += ["--epochs", 2, "--per-class", "2,4", "--methods", "lora", "--seeds", 2, *more]
        monkeypatch.setattr(sys, "argv", ["few_shot.py", *map(str, words)])
        recipe.main()
        return tmp_path / "out"

    return call


@pytest.fixture
def trained(recipe, monkeypatch):
    """The cells that are trained from here on, by name."""
    names, real = [], recipe.train

    def note(cell, *rest):
        names.append(cell.folder.name)
        real(cell, *rest)

    monkeypatch.setattr(recipe, "train", note)
    return names


def test_a_sample_is_balanced_and_part_of_a_larger_one_of_its_seed(recipe):
    labels = [0, 1, 2] * 10 + [0] * 30
    small, large = (recipe.sample(labels, size, 5) for size in (3, 8))
    assert sorted(labels[index] for index in small) == [0] * 3 + [1] * 3 + [2] * 3
    assert set(small) < set(large)
    assert len(set(large)) == 24
    assert recipe.sample(labels, 3, 5) == small
    assert recipe.sample(labels, 3, 6) != small


def test_every_method_has_a_learning_rate(recipe):
    assert recipe.RATES.keys() == set(recipe.sst2.METHODS)


def test_a_class_with_too_few_sentences_is_refused(recipe, run):
    with pytest.raises(InputError, match="class 0 has 30 training sentences; lower --per-class 31"):
        run("--per-class", "31")


def test_each_cell_is_trained_once_and_the_interval_is_students(run, trained, capsys):
    out = run()
    assert len(trained) == len(set(trained)) == 4
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(
        row.keys() >= {"name", "subject", "value", "unit", "samples", "step", "seed"}
        for row in rows
    )
    values = [
        row["value"]
        for row in rows
        if (row["name"], row["method"], row["per_class"]) == ("accuracy", "lora", 4)
    ]
    mean, half = sum(values) / 2, stats.t.ppf(0.975, 1) * abs(values[0] - values[1]) / 2
    table = (out / "table.md").read_text()
    line = next(line for line in table.splitlines() if line.startswith("| 4 | lora |"))
    assert f"| {mean:.3f} [" in line
    low, high = line.split("[")[1].split("]")[0].split(", ")
    assert float(low.replace("\N{MINUS SIGN}", "-")) == pytest.approx(mean - half, abs=5e-4)
    assert float(high) == pytest.approx(mean + half, abs=5e-4)
    assert table in capsys.readouterr().out
    assert json.loads((out / "run.json").read_text())["per_class"] == [2, 4]
    assert list((out / "cells").rglob("checkpoint")) == []

    trained.clear()
    with pytest.raises(InputError, match="pass --resume to go on, or another --out"):
        run()
    run("--resume", "--methods", "lora,head")
    assert trained == [f"head-{size}-seed-{seed}" for size in (2, 4) for seed in (0, 1)]
    before = (out / "table.md").read_text()
    with pytest.raises(InputError, match="written with other settings: options was"):
        run("--resume", "--rank", 2)
    with pytest.raises(InputError, match="written with other settings: settings was"):
        run("--resume", "--epochs", 3)
    assert len(trained) == 4
    assert (out / "table.md").read_text() == before


def test_a_stopped_run_goes_on_with_the_cell_it_was_in(recipe, run, trained, monkeypatch):
    words = ("--per-class", "8", "--batch-size", 4, "--evaluate-every", 3, "--methods", "lora")
    real, calls = recipe.training.class_logits, []

    def stop_at_the_second(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(recipe.training, "class_logits", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        run(*words)
    monkeypatch.setattr(recipe.training, "class_logits", real)
    fits, fit = [], recipe.training.fit
    monkeypatch.setattr(
        recipe.training, "fit", lambda *a, **named: fits.append(named["resume"]) or fit(*a, **named)
    )
    run(*words, "--resume")
    assert fits == [True, False]
    assert trained == ["lora-8-seed-0", "lora-8-seed-0", "lora-8-seed-1"]


def test_a_single_seed_has_no_interval_and_what_is_undefined_no_mean(recipe):
    place = {"per_class": 2, "method": "lora", "seed": 0, "subject": "dev"}
    rows = [
        {**place, "name": "accuracy", "value": 0.5},
        {**place, "name": "F1", "value": 0.25},
        {**place, "name": "trainable parameters", "subject": "model", "value": 1234},
        {**place, "name": "training time", "subject": "train", "value": 2.0},
    ]
    assert "| 2 | lora | 0.500 (single run) | 0.250 (single run) | 1,234 | 2 s | 1 |" in (
        recipe.table(rows)
    )
    other = [{**row, "seed": 1} for row in rows if row["name"] != "F1"]
    other.append({**place, "seed": 1, "name": "F1 undefined", "value": 10})
    assert "| 2 | lora | 0.500 (all 2 seeds alike) | - | 1,234 | 2 s | 2 |" in (
        recipe.table(rows + other)
    )


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("sentence\na\n", r"train\.tsv needs a header with a column 'label'"),
        ("sentence\tlabel\na\tpositive\n", r"train\.tsv: labels are class indices"),
        ("sentence\tlabel\n", r"train\.tsv holds no sentences"),
        ("sentence\tlabel\na\t-1\n", r"the labels of train are \[-1\]; expected all from 0"),
        ("sentence\tlabel\na\t0\nb\t2\n", r"the labels of train are \[0, 2\]; expected all from 0"),
    ],
)
def test_a_folder_that_holds_something_else_is_refused(recipe, tmp_path, lines, said):
    for name in ("train", "dev"):
        (tmp_path / f"{name}.tsv").write_text(lines)
    with pytest.raises(InputError, match=said):
        recipe.load(str(tmp_path))


def test_a_class_that_only_dev_has_is_refused(recipe, tmp_path):
    for name, lines in (("train", "a\t0\nb\t1\n"), ("dev", "a\t0\nb\t2\n")):
        (tmp_path / f"{name}.tsv").write_text(f"sentence\tlabel\n{lines}")
    with pytest.raises(InputError, match=r"the labels of dev are \[0, 2\]; expected some of"):
        recipe.load(str(tmp_path))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--per-class", "0,5"), "expected numbers of at least 1"),
        (("--methods", "lora,magic"), "no method 'magic'; expected some of lora"),
    ],
)
def test_a_wrong_list_is_refused(run, capsys, words, said):
    with pytest.raises(SystemExit, match="2"):
        run(*words)
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_give_the_table_of_one(run, sentences, tiny_base, tmp_path):
    words = ("--per-class", "8", "--seeds", 1, "--methods", "lora,head", "--base-dropout", 0)
    one = run(*words)
    two = tmp_path / "two"
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", 2]
    command = [sys.executable, *launch, RECIPES / "few_shot.py", *words, "--epochs", 2]
    command += ["--base", tiny_base, "--data", sentences, "--out", two]
    subprocess.run([str(word) for word in command], check=True, capture_output=True)
    assert json.loads((two / "run.json").read_text())["processes"] == 2
    scores = [
        [
            (row["name"], row["method"], row["value"])
            for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
            if row["name"] != "training time"
        ]
        for out in (one, two)
    ]
    assert scores[0] == scores[1]
