"""Several adapters over one base: the recipe, its proof, and what the proof notices."""

import importlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lora_export import AdapterMismatch, CheckFailed, InputError, attach, read_adapter

RECIPES = Path(__file__).parent.parent / "recipes"
SENTENCES = [
    ("a great film", 1), ("the best cast of this film", 1), ("i love it , and it is not dull", 1),
    ("never boring", 1), ("a bad film", 0), ("not the worst cast of all", 0), ("i hate it", 0),
    ("no music , no story , no ending and a very dull script", 0),
]  # fmt: skip


@pytest.fixture(scope="module")
def recipe():
    return importlib.import_module("multi_task")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    lines = "".join(f"{text}\t{label}\n" for text, label in SENTENCES)
    for name, times in (("train", 4), ("dev", 2)):
        (folder / f"{name}.tsv").write_text("sentence\tlabel\n" + lines * times)
    return folder


@pytest.fixture
def run(recipe, tiny_base, data, tmp_path, monkeypatch):
    """`run(*words)`: run the recipe; return its directory."""

    def call(*more):
        words = ["--base", tiny_base, "--data", data, "--out", tmp_path / "out", "--lr", 0.01]
        words += ["--batch-size", 8, "--window", 6, "--rank", 2, "--limit", 8, *more]
        monkeypatch.setattr(sys, "argv", ["multi_task.py", *map(str, words)])
        recipe.main()
        return tmp_path / "out"

    return call


@pytest.fixture
def rows_of():
    def read(out):
        lines = (out / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        return {(row["name"], row["subject"]): row["value"] for row in rows}

    return read


def test_three_tasks_of_two_and_three_classes_are_served_from_one_base(
    run, rows_of, tiny_base, capsys
):
    out = run("--epochs", 8, "--limit", 0)
    assert "proven: the backbone is as before, and all 48 answers are as alone" in (
        capsys.readouterr().out
    )
    labels = {
        task: read_adapter(out / task / "adapter.safetensors").labels
        for task in ("sentences", "derived-length", "derived-negation")
    }
    assert labels["derived-length"] == ("short", "middle", "long")
    assert labels["derived-negation"] == ("without", "with")
    assert json.loads((out / "run.json").read_text())["faults"] == []
    found = rows_of(out)
    assert found["switch time median", "one base, 3 adapters"] > 0
    assert max(found["accuracy", task] for task in labels) == 1
    one, three = (
        found["tensors held", name] for name in ("one base, 3 adapters", "3 merged models")
    )
    files = [out / task / "adapter.safetensors" for task in labels]
    size = (tiny_base / "model.safetensors").stat().st_size
    assert found["files", "3 merged models"] == 3 * size
    assert found["files", "one base, 3 adapters"] == size + sum(f.stat().st_size for f in files)
    assert found["tensors held, share", "of merged models"] == one / three < 0.5


@pytest.mark.slow
def test_a_finished_task_is_not_trained_again_and_one_of_other_settings_is_refused(
    run, recipe, monkeypatch
):
    run()
    fits, fit = [], recipe.training.fit
    monkeypatch.setattr(
        recipe.training, "fit", lambda *a, **named: fits.append(named["folder"]) or fit(*a, **named)
    )
    run("--resume")
    assert fits == []
    with pytest.raises(InputError, match="not empty; --resume goes on with a stopped run"):
        run()
    fits.clear()
    with pytest.raises(InputError, match="written with other settings: settings was"):
        run("--resume", "--lr", 0.02)
    assert fits == []


@pytest.mark.slow
def test_a_task_that_was_stopped_goes_on_whether_there_was_a_checkpoint_yet_or_not(
    run, recipe, monkeypatch
):
    real, fit, fits = recipe.training.write, recipe.training.fit, []
    monkeypatch.setattr(
        recipe.training, "fit", lambda *a, **named: fits.append(named["resume"]) or fit(*a, **named)
    )

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe.training, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        run()
    monkeypatch.setattr(recipe.training, "write", real)
    out = run("--resume")
    assert fits == [False, True, False, False]
    folder = out / "sentences"
    for left in [*folder.iterdir()]:
        left.unlink()
    (folder / recipe.training.PROGRESS).write_text("{}")
    run("--resume")
    assert fits[4:] == [False]


def test_an_adapter_under_the_wrong_task_fails(run, recipe, data, monkeypatch):
    """Two tasks of as many classes: nothing but the answers tells them apart."""
    swap = {"one": "two", "two": "one"}
    real = recipe.Server.__init__
    monkeypatch.setattr(
        recipe.Server,
        "__init__",
        lambda self, models, adapters: real(
            self, models, {task: adapters[swap[task]] for task in adapters}
        ),
    )
    other = data.parent / "other"
    other.mkdir(exist_ok=True)
    for name in ("train", "dev"):
        rows = [f"{text}\t{int('film' in text)}\n" for text, _ in SENTENCES]
        (other / f"{name}.tsv").write_text("sentence\tlabel\n" + "".join(rows))
    with pytest.raises(CheckFailed, match="16 of 16 answers of one differ from those of its"):
        run("--task", f"one={data}", "--task", f"two={other}")


def test_a_base_that_was_changed_while_serving_fails(run, recipe, monkeypatch):
    real = recipe.Server.take_off

    def nudge(self):
        real(self)
        with torch.no_grad():
            weight = self.models["derived-length"].base_model.embeddings.word_embeddings.weight
            weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))

    monkeypatch.setattr(recipe.Server, "take_off", nudge)
    with pytest.raises(CheckFailed, match="the bits of the backbone have changed"):
        run()


def test_the_proof_needs_every_answer_of_both_sides(recipe):
    requests = [("one", ([1], 0)), ("two", ([2], 1))]
    both = {0: np.float32([0.0, 1.0]), 1: np.float32([2.0, 1.0])}
    assert recipe.faults_of("a", "a", requests, both, both) == []
    zero = {**both, 0: np.float32([-0.0, 1.0])}  # equal as a number, and other bits
    for wrong in (zero, {1: both[1]}):
        assert recipe.faults_of("a", "a", requests, both, wrong) == [
            "1 of 1 answers of one differ from those of its adapter alone"
        ]
    assert recipe.faults_of("a", "b", requests, both, both) == [
        "the bits of the backbone have changed"
    ]
    assert recipe.faults_of("a", "a", [], {}, {}) == ["nothing was served"]


def test_all_classifiers_hold_one_backbone_and_a_head_of_another_shape_is_refused(
    recipe, run, tiny_base, tiny_adapter, tmp_path
):
    path, _ = tiny_adapter(tmp_path)
    no_data = ([], [])
    tasks = [
        recipe.Task("two", ("a", "b"), no_data, no_data),
        recipe.Task("three", ("a", "b", "c"), no_data, no_data),
    ]
    args = type("Arguments", (), {"seed": 0, "base_dropout": None})
    models = recipe.over_one_backbone(tasks, tiny_base, args, 0)
    one = recipe.held_bytes([models["two"]])
    assert models["two"].base_model is models["three"].base_model
    assert recipe.held_bytes(models.values()) == one + 4 * (3 * 32 + 3)
    adapter = read_adapter(path)
    size = 4 * sum(pair.a.size + pair.b.size for pair in adapter.modules.values())
    heads = 4 * (2 * 32 + 2)
    assert recipe.held_bytes([], [adapter]) == size + heads
    before = recipe.bits_of(models["two"].base_model)
    server = recipe.Server(models, {"two": adapter, "three": adapter})
    server.switch("two")
    with pytest.raises(AdapterMismatch, match=r"adapter has shape \(2, 32\), model \(3, 32\)"):
        server.switch("three")
    assert recipe.bits_of(models["two"].base_model) == before
    server.switch("two")
    server.take_off()
    assert recipe.bits_of(models["two"].base_model) == before
    wide = replace(adapter, replaced={"classifier.bias": np.zeros(2, np.float32)})
    attach(models["two"], wide)
    assert recipe.held_bytes(models.values()) > one + size


def test_requests_of_a_task_in_a_window_are_answered_together(recipe):
    requests = [(task, ([1], 0)) for task in "abacb"]
    assert recipe.grouped(requests, 3) == [("a", [0, 2]), ("b", [1]), ("c", [3]), ("b", [4])]


@pytest.mark.parametrize("word", ["mood", "=folder", "mood=", "../x=folder"])
def test_a_task_without_name_or_folder_is_refused(run, word):
    with pytest.raises(InputError, match="expected name=folder, each name once"):
        run("--task", word)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("it does n't work", 1), ("It isn't", 1), ("No music", 1), ("nothing", 1), ("a knot", 0)],
)
def test_a_negation_is_a_word_of_its_own(recipe, text, expected):
    assert recipe.has_negation(text) == expected


@pytest.mark.slow
def test_two_processes_serve_what_they_trained(tiny_base, data, tmp_path):
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", 2]
    words = ["--base", tiny_base, "--data", data, "--out", tmp_path / "out", "--max-steps", 2]
    command = [sys.executable, *launch, RECIPES / "multi_task.py", *words]
    done = subprocess.run(
        [str(word) for word in command], check=True, capture_output=True, text=True
    )
    assert "all 48 answers are as alone" in done.stdout
    assert json.loads((tmp_path / "out" / "run.json").read_text())["processes"] == 2
