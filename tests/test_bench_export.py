"""The bench of exports: it runs, its figures come from its samples, what is missing is said."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "recipes" / "bench_export.py"


@pytest.fixture(scope="module")
def recipe():
    with mock.patch.dict(os.environ):  # it sets some for the processes that it starts
        return importlib.import_module("bench_export")


@pytest.fixture
def bench(recipe, tmp_path):
    found = recipe.Bench(tuple(recipe.CONTENDERS), 1, 2, 1, 1.0, 0, tmp_path)
    found.about = {"command": "the command", "machine": recipe.machine(1)}
    return found


def run_script(folder, *words):
    done = subprocess.run(
        [sys.executable, SCRIPT, *map(str, words), "--work", "work", "--out", "out"],
        cwd=folder, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = (folder / "out" / "bench_export.jsonl").read_text().splitlines()
    found = {}
    for line in map(json.loads, lines):
        found.setdefault(line.pop("kind"), []).append(line)
    return found, done


def samples_of(recipe, case, **times):
    """Samples of rounds 1, 2, ...; the keys are contenders with _ for a blank."""
    found, last = [], recipe.BASE
    for turn in range(max(map(len, times.values()))):
        for name, values in times.items():
            if turn < len(values) and values[turn] is not None:
                named = name.replace("_", " ")
                found.append(recipe.Sample(case, named, turn + 1, values[turn], last))
                last = named
    return found


def said_of(recipe, case, name, **more):
    facts = {
        "precision": "float32", "open_s": 1.0, "first_s": 2.0, "resident_bytes": 3e8,
        "deviation": 1e-7, "spread": 0.5, "load_average": 0.0, **more,
    }  # fmt: skip
    return recipe.Opened(case, name, **facts)


# ---------------------------------------------------------------- what is run


def test_a_decoder_is_timed_twice_and_an_encoder_once(recipe):
    assert [c.label for c in recipe.cases_of("distilbert", (1, 8, 1), (16,))] == [
        "distilbert, batch 1, length 16", "distilbert, batch 8, length 16",
    ]  # fmt: skip
    assert [c.phase for c in recipe.cases_of("gpt2", (1,), (16,))] == ["prefill", "decode"]
    large = recipe.cases_of("llama-1b", (1,), (16, 128))
    assert [(c.length, c.phase) for c in large] == [
        (16, "decode"), (128, "prefill"), (128, "decode"),
    ]  # fmt: skip


def test_a_step_of_generation_has_one_new_token_and_the_others_cached(recipe):
    from lora_export.records import Signature, TensorSpec

    specs = (
        TensorSpec("input_ids", "int64", ("batch", "sequence")),
        TensorSpec("attention_mask", "int64", ("batch", "total")),
        TensorSpec("past_key_values.0.key", "float32", ("batch", 2, "past", 4)),
    )
    signature = Signature(specs, (), 64, 50, 0)

    def shapes(phase):
        arrays = recipe.Case("tiny-gpt2", 3, 16, phase).arrays(signature)
        assert arrays["attention_mask"].all()
        return [array.shape for array in arrays.values()]

    assert shapes("decode") == [(3, 1), (3, 17), (3, 2, 16, 4)]
    assert shapes("prefill") == [(3, 16), (3, 16), (3, 2, 0, 4)]


def test_another_exporters_inputs_are_fed_from_ours(recipe):
    arrays = {
        "input_ids": np.ones((2, 1), np.int64),
        "attention_mask": np.ones((2, 5), np.int64),
        "past_key_values.1.value": np.full((2, 1, 4, 8), 7, np.float32),
    }
    name = "input.past_key_values.layers.1.values"
    assert recipe.fed(name, arrays) is arrays["past_key_values.1.value"]
    assert recipe.fed("position_ids", arrays).tolist() == [[4], [4]]
    assert recipe.fed("input_ids", arrays) is arrays["input_ids"]


def test_groups_fit_into_memory_and_torch_eager_is_in_each(recipe):
    names = list(recipe.CONTENDERS)
    assert recipe.groups(names, 10**6, 1e12) == [names]
    found = recipe.groups(names, 4 * 10**9, 20e9)
    assert len(found) > 2
    assert all(group[0] == recipe.BASE and len(group) > 1 for group in found)
    assert sorted(name for group in found for name in group[1:]) == sorted(names[1:])


@pytest.mark.parametrize(
    ("name", "package", "why"),
    [
        ("lora-export openvino", "openvino", "openvino is not installed"),
        ("transformers onnx", "onnxruntime", "onnxruntime is not installed"),
        ("transformers onnx", "transformers.exporters", r"transformers \S+ has no exporters"),
    ],
)
def test_a_missing_tool_is_left_out_and_said(recipe, bench, monkeypatch, name, package, why):
    monkeypatch.setattr(recipe, "find_spec", lambda wanted: None if wanted == package else "there")
    bench.names = (recipe.BASE, name)
    recipe.leave_out_the_missing(bench)
    assert bench.names == (recipe.BASE,)
    (line,) = bench.not_run
    assert re.fullmatch(f"{name}: {why}", line)
    assert f"Not run: {line}." in recipe.page(bench)


def test_without_a_compiler_nothing_is_compiled(recipe, monkeypatch):
    monkeypatch.setattr(recipe.shutil, "which", lambda _: None)
    compiled = [name for name, found in recipe.CONTENDERS.items() if recipe.lacking(found)]
    assert compiled == ["torch.compile", "lora-export aoti"]
    assert recipe.lacking(recipe.CONTENDERS["torch.compile"]) == "there is no C++ compiler"


def test_an_environment_that_cannot_be_made_leaves_optimum_out(recipe, bench, monkeypatch):
    def fails(_):
        raise recipe.Failed("cannot be installed: no index")

    monkeypatch.setattr(recipe, "optimum_environment", fails)
    bench.names = (recipe.BASE, "optimum onnx")
    recipe.leave_out_the_missing(bench)
    assert bench.names == (recipe.BASE,)
    assert bench.not_run == ["optimum onnx: cannot be installed: no index"]


def test_a_model_too_large_for_memory_is_left_out_and_said(recipe, bench, monkeypatch):
    made = {
        "folder": "", "signature": recipe.Signature((), (), 64, 50, 0), "parameters": 250_000_000,
        "bytes": 10**9, "linear_layers": 1,
    }  # fmt: skip
    monkeypatch.setattr(recipe, "apart", lambda *_: made)
    monkeypatch.setattr(recipe, "memory_bytes", lambda _: 2 * 10**9)
    recipe.run_model(bench, "llama-1b", recipe.cases_of("llama-1b", (1,), (16, 128)))
    assert bench.not_run == [
        "llama-1b, batch 1, length 128, prefill: the model takes at most 64 tokens",
        "llama-1b, batch 1, length 128, decode: the model takes at most 64 tokens",
        "llama-1b: it needs 3.0 GB of memory, and 2.0 GB are free",
    ]


def test_a_process_that_fails_says_how_and_leaves_no_one_behind(recipe, bench):
    worker = recipe.Worker(bench, "x", sys.exit, 3)  # called with the pipe as well
    with pytest.raises(recipe.Failed, match=r"the process ended with 1|TypeError"):
        worker.receive()
    worker.close()
    assert worker.process.exitcode is not None


# ---------------------------------------------------------------- what is said about it


def test_ratios_are_medians_over_the_rounds_of_pairs(recipe):
    case = recipe.Case("distilbert", 1, 128, "forward")
    samples = samples_of(
        recipe, case, torch_eager=[1.0, 2.0, 4.0], torch_bf16=[4.0, 4.0, 16.0, 900.0],
    )  # fmt: skip
    opened = [said_of(recipe, case, "torch bf16", precision="bfloat16")]
    base, half = recipe.summarised(samples, opened)
    assert (base["contender"], base["ratio"], base["interval"]) == (recipe.BASE, 1, [1, 1])
    assert half["ratio"] == 4.0  # of 4, 2, 4; that of the medians would be 5
    assert half["interval"] == [2.0, 4.0]
    assert half["ms"] == 10.0
    assert half["precision"] == "bfloat16"


def test_a_contender_without_a_pair_has_no_row(recipe):
    case = recipe.Case("distilbert", 1, 128, "forward")
    samples = samples_of(recipe, case, torch_eager=[1.0, None], torch_bf16=[None, 4.0])
    assert [row["contender"] for row in recipe.summarised(samples, [])] == [recipe.BASE]


def test_what_a_contender_leaves_behind_shows_in_the_turns_after_it(recipe):
    case = recipe.Case("distilbert", 1, 128, "forward")

    def sample(name, ms, after):
        return recipe.Sample(case, name, 1, ms, after)

    ours = "lora-export onnx"
    samples = [sample(recipe.BASE, 1.0, "torch bf16") for _ in range(5)]
    samples += [sample(recipe.BASE, 1.5, ours) for _ in range(3)]
    samples += [sample(recipe.BASE, 9.0, recipe.BASE)]  # nobody was there
    assert recipe.left_behind(samples) == {"onnxruntime": (1.5, 3), "torch": (1.0, 5)}


def test_the_tables_say_what_was_measured(recipe, bench):
    case = recipe.Case("gpt2", 8, 128, "decode")
    bench.samples = samples_of(
        recipe, case, torch_eager=[10.0, 10.0], torch_bf16=[5.0, 5.0], torch_int8=[4.0, 4.0],
    )  # fmt: skip
    bench.opened = [
        said_of(recipe, case, recipe.BASE, deviation=0.0),
        said_of(recipe, case, "torch bf16", precision="bfloat16", deviation=0.0123),
        said_of(recipe, case, "torch int8", precision="int8", deviation=None),
    ]
    bench.exports = [
        recipe.Exported("gpt2", "onnx fp32", turn, seconds, peak, 500_000_000)
        for turn, seconds, peak in ((1, 9.0, 1_000_000), (2, 3.0, 2_000_000), (3, 4.0, 9_000_000))
    ]
    bench.not_run = ["torch.compile: there is no C++ compiler"]
    text = recipe.page(bench)
    for line in (
        "gpt2, batch 8, length 128, decode: medians of 2 rounds; the answers of torch eager "
        "spread by 0.5:",
        "| torch eager | float32 | 10 | 1.00 | 1.00 to 1.00 | - | 2 | 1 | 300 |",
        "| torch bf16 | bfloat16 | 5 | 0.50 | 0.50 to 0.50 | 1.2e-02 | 2 | 1 | 300 |",
        "| torch int8 | int8 | 4 | 0.40 | 0.40 to 0.40 | not comparable | 2 | 1 | 300 |",
        "| gpt2 | onnx fp32 | 3 | 4 | 3 to 9 | 2 | 500 |",
        "Not run: torch.compile: there is no C++ compiler.",
    ):
        assert line in text.splitlines()
    kinds = [line["kind"] for line in recipe.lines_of(bench)]
    assert {"about", "summary", "export summary", "opened", "export", "sample"} <= set(kinds)


def test_deviation_leaves_padding_out_and_nothing_compared_is_no_pass(recipe):
    mask = {"attention_mask": np.array([[1, 1], [1, 0]])}
    states = {"last_hidden_state": np.zeros((2, 2, 3), np.float32)}
    other = {"last_hidden_state": states["last_hidden_state"].copy(), "present.0.key": None}
    other["last_hidden_state"][1, 1] = 9
    other["last_hidden_state"][1, 0, 0] = 0.25
    found = [recipe.comparable(outputs, mask, "forward") for outputs in (states, other)]
    assert recipe.deviation_of(found[1], found[0])[0] == 0.25
    assert recipe.deviation_of({}, found[0])[0] is None
    assert recipe.deviation_of({"last_hidden_state": np.zeros((1, 3))}, found[0])[0] is None
    found[1]["last_hidden_state"][0, 0] = np.nan
    assert recipe.deviation_of(found[1], found[0])[0] is None
    logits = {"logits": np.arange(12.0).reshape(2, 3, 2)}
    assert recipe.comparable(logits, mask, "prefill")["logits"].tolist() == [[4, 5], [10, 11]]


def test_a_turn_does_not_count_its_first_run(recipe, monkeypatch):
    clock = iter(range(0, 10**12, 10**7))  # ten milliseconds further at each look
    calls = []
    monkeypatch.setattr(recipe.time, "perf_counter_ns", lambda: next(clock))
    assert recipe.turn_of(lambda: calls.append(1)) == 10
    assert len(calls) == 11  # a tenth of a second


# ---------------------------------------------------------------- whole runs


@pytest.mark.slow
def test_a_run_writes_its_samples_tables_and_plot(tmp_path):
    found, done = run_script(
        tmp_path, "--model", "tiny-bert", "--batch", 2, "--length", 8, "--quick", "--threads", 1,
        "--contender", "lora-export torchscript",
    )  # fmt: skip
    rows = {row["contender"]: row for row in found["summary"]}
    assert list(rows) == ["torch eager", "lora-export torchscript"]
    assert rows["torch eager"]["ratio"] == 1
    assert rows["lora-export torchscript"]["deviation"] < 1e-6
    assert [s["round"] for s in found["sample"]] == [1, 1, 2, 2]
    (export,) = found["export"]
    assert export["artifact"] == "torchscript fp32"
    assert min(export["seconds"], export["peak_bytes"], export["size_bytes"]) > 0
    assert found["about"][0]["not_run"] == []
    assert {"processor", "instruction_sets", "load_average"} <= set(found["about"][0]["machine"])
    assert "torchscript fp32" in done.stdout
    for name in ("bench_export.md", "bench_export.jsonl"):
        text = (tmp_path / "out" / name).read_text()
        assert str(tmp_path) not in text
        assert sys.prefix not in text
    assert (tmp_path / "out" / "bench_export.png").read_bytes().startswith(b"\x89PNG")
    assert not list((tmp_path / "work").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny-bert"])  # tiny-gpt2 takes minutes more; run it by hand
def test_every_contender_runs_and_answers_as_torch_does(recipe, tmp_path, model):
    pytest.importorskip("openvino")
    lacking = {"torch int8", "torch.compile"} if model == "tiny-gpt2" else set()
    names = [name for name in recipe.DEFAULTS if name not in lacking]  # the second takes minutes
    found, _ = run_script(
        tmp_path, "--model", model, "--batch", 2, "--length", 8, "--quick", "--threads", 1,
        *(word for name in names for word in ("--contender", name)),
    )  # fmt: skip
    phases = {row["phase"] for row in found["summary"]}
    assert phases == ({"forward"} if model == "tiny-bert" else {"prefill", "decode"})
    for phase in phases:
        rows = [row for row in found["summary"] if row["phase"] == phase]
        assert [row["contender"] for row in rows] == names
        for row in rows:
            limit = 1e-5 if row["precision"] == "float32" else row["spread"]
            assert row["deviation"] <= limit, row["contender"]
