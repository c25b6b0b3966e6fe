"""The bench of merging: what it makes loads elsewhere, and its figures come from its samples."""

import importlib
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
import torch
import transformers
from safetensors import safe_open

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "recipes" / "bench_merge.py"
SHARD = 4_000_000


@pytest.fixture(scope="module")
def recipe():
    return importlib.import_module("bench_merge")


@pytest.fixture(scope="module")
def made(recipe, tmp_path_factory):
    """A checkpoint of ten megabytes in several shards, and its adapters. Do not write to it."""
    folder = tmp_path_factory.mktemp("bench") / "made"
    recipe.make(folder, recipe.shape_of(0.01), 0, SHARD)
    return folder


def bench_of(recipe, cases):
    return recipe.Bench(cases, None, 0, {})


def run_script(folder, *words):
    done = subprocess.run(
        [sys.executable, SCRIPT, *map(str, words)],
        cwd=folder, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "out" / "bench_merge.json").read_text()), done.stdout


# ---------------------------------------------------------------- what is made


@pytest.mark.parametrize(
    ("size", "parameters"), [(2.0, 1_100_048_384), (14.0, 6_738_415_616)]
)  # as the cards of TinyLlama-1.1B and Llama-2-7B state them
def test_the_named_shapes_are_those_of_known_models(recipe, size, parameters):
    assert recipe.bytes_of(recipe.shape_of(size)) == 2 * parameters


@pytest.mark.parametrize("size", [0.005, 0.01, 0.1, 0.3, 0.5, 1.5, 2.0, 5.0, 7.0, 14.0, 20.0])
def test_a_checkpoint_is_about_as_large_as_asked(recipe, size):
    assert recipe.bytes_of(recipe.shape_of(size)) == pytest.approx(size * 1e9, rel=0.15)


def test_transformers_finds_every_tensor_and_no_other(recipe, made):
    model, info = transformers.LlamaForCausalLM.from_pretrained(
        made / "base", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    shape = recipe.shape_of(0.01)
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == shape.tensors()
    for name, weight in model.state_dict().items():
        expected = 1.0 if name.endswith("norm.weight") else 0.0
        assert weight.float().mean().item() == pytest.approx(expected, abs=0.01), name
        assert weight.float().std().item() == pytest.approx(recipe.STD, rel=0.2), name


def test_shards_hold_what_the_index_says_and_no_more_than_allowed(recipe, made):
    index = json.loads((made / "base" / "model.safetensors.index.json").read_text())
    files = sorted((made / "base").glob("*.safetensors"))
    assert len(files) > 1
    found = {}
    for file in files:
        with safe_open(file, "np") as opened:
            assert opened.metadata() == {"format": "pt"}
            found |= dict.fromkeys(opened.keys(), file.name)
        data = file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little")
        assert data <= SHARD
    assert found == index["weight_map"]
    assert index["metadata"]["total_size"] == recipe.bytes_of(recipe.shape_of(0.01))


def test_no_two_rows_and_no_two_tensors_are_the_same(made):
    seen = set()
    for file in (made / "base").glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - no mapping
                weight = opened.get_tensor(name)
                if weight.ndim == 2:
                    rows = {bytes(row.view(torch.uint8).numpy()) for row in weight}
                    assert len(rows) == len(weight), name
                    assert seen.isdisjoint(rows), name
                    seen |= rows


@pytest.mark.parametrize("adapter", ["all", "qv"])
def test_peft_loads_the_adapters_and_moves_what_they_name(recipe, made, adapter):
    from peft import PeftModel

    base = transformers.LlamaForCausalLM.from_pretrained(made / "base")
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        wrapped = PeftModel.from_pretrained(base, made / adapter)
    assert not [str(w.message) for w in caught if "adapter" in str(w.message)]
    after = wrapped.merge_and_unload().state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    named = tuple(f".{target}.weight" for target in recipe.TARGETS[adapter])
    assert moved == {name for name in before if name.endswith(named)}


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(recipe, tmp_path):
    shape = recipe.shape_of(0.005)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        recipe.make(tmp_path / name, shape, seed, 10**9)
    content = [
        {str(f.relative_to(folder)): f.read_bytes() for f in recipe.files_in(folder)}
        for folder in sorted(tmp_path.iterdir())
    ]
    assert content[0] == content[1]
    differing = {name for name in content[0] if content[0][name] != content[2][name]}
    assert differing == {name for name in content[0] if name.endswith(".safetensors")}
    assert "base/model.safetensors" in differing  # one shard has no index


def test_a_complete_checkpoint_is_used_again_and_another_is_made_anew(recipe, tmp_path):
    bench = bench_of(recipe, [])

    def stamp(keep=True, seed=0):
        bench.seed = seed
        with recipe.checkpoint(bench, tmp_path, 0.005, 1.0, keep=keep) as folder:
            assert not list(tmp_path.glob("*.making"))
            return (folder / "base" / "model.safetensors").stat().st_mtime_ns

    first = stamp()
    assert stamp() == first
    third = stamp(seed=1)
    assert third != first
    (tmp_path / "bench-0.005GB" / "all" / "adapter_config.json").write_text("{}")
    fourth = stamp(seed=1)
    assert fourth != third
    assert stamp(seed=1, keep=False) == fourth
    assert not list(tmp_path.iterdir())


def test_a_folder_of_others_is_neither_used_nor_removed(recipe, tmp_path):
    (tmp_path / "bench-0.005GB").mkdir()
    (tmp_path / "bench-0.005GB" / "thesis").write_text("years")
    with (
        pytest.raises(click.ClickException, match="was not made by this recipe"),
        recipe.checkpoint(bench_of(recipe, []), tmp_path, 0.005, 1.0, keep=False),
    ):
        pass
    assert (tmp_path / "bench-0.005GB" / "thesis").read_text() == "years"


def test_a_disk_too_small_is_refused_before_anything_is_written(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe.shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    with (
        pytest.raises(click.ClickException, match=r"need 0\.0 GB of disk, and 0\.0 GB are free"),
        recipe.checkpoint(bench_of(recipe, []), tmp_path, 0.005, 1.0, keep=False),
    ):
        pass
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- what is measured


def test_a_process_is_measured_and_not_the_one_that_started_it(recipe, tmp_path):
    """This process holds torch; what it measures holds nothing of that."""
    used, stdout, stderr = recipe.measured(["sh", "-c", "echo out; echo err >&2; exit 7"], tmp_path)
    assert (used["exit_code"], stdout, stderr.strip()) == (7, "out\n", "err")
    assert used["peak_rss_bytes"] < 30e6
    held = 300_000_000
    code = f"import time; b = b'x' * {held}; time.sleep(0.2)"
    used = recipe.measured([sys.executable, "-I", "-S", "-c", code], tmp_path)[0]
    assert held < used["peak_rss_bytes"] < held + 50e6
    assert used["seconds"]["wall"] > 0.2
    assert used["seconds"]["user"] + used["seconds"]["system"] < used["seconds"]["wall"]


def test_a_command_that_cannot_start_is_named(recipe, tmp_path):
    with pytest.raises(click.ClickException, match="cannot start no-such-program"):
        recipe.measured(["no-such-program"], tmp_path)


def test_work_is_what_the_certificate_states_in_seconds(recipe):
    def of(*entries):
        keys = ("name", "subject", "value", "unit", "samples")
        stated = [dict(zip(keys, entry, strict=True)) for entry in entries]
        return recipe.stated_by("lora-export", json.dumps({"measurements": stated}))

    assert of(("merge", "merged", 3.0, "s", 1), ("sync", "merged", 1.0, "s", 1)) == {
        "merge": 3.0, "sync": 1.0, "work": 3.0,
    }  # fmt: skip
    assert of(("merge", "merged", 3.0, "ms", 1), ("size", "onnx", 1.0, "MB", 1)) == {}
    assert of(("sync", "merged", 1.0, "s", 1)) == {"sync": 1.0}
    assert recipe.stated_by("peft", 'talk\n{"import": 2, "work": 1}\n') == {"import": 2, "work": 1}


def test_another_tool_that_fails_is_left_out_and_ours_stops_the_bench(recipe, made, monkeypatch):
    cases = [recipe.Case(tool, "qv") for tool in ("peft", "lora-export")]
    bench = bench_of(recipe, [recipe.Case("cp -r"), *cases])
    monkeypatch.setattr(recipe, "words", lambda case, _: ["false"])
    assert recipe.run(bench, cases[0], made, 0.01, 1) == "ended with 1"
    with pytest.raises(click.ClickException, match="lora-export, qv: ended with 1"):
        recipe.run(bench, cases[1], made, 0.01, 1)
    monkeypatch.setattr(recipe, "words", lambda case, _: ["true"])
    assert recipe.run(bench, cases[0], made, 0.01, 1) == "wrote 0 bytes of weights"
    recipe.leave_out(bench, "peft", "ended with 1")
    assert [case.tool for case in bench.cases] == ["cp -r", "lora-export"]
    assert bench.not_run == ["peft: ended with 1"]
    assert not (made / "out").exists()


def test_memory_too_small_leaves_out_the_others_and_says_so(recipe, made, monkeypatch):
    cases = [recipe.Case("cp -r"), recipe.Case("peft", "qv"), recipe.Case("mergekit", "qv")]
    bench = bench_of(recipe, cases)
    monkeypatch.setattr(recipe, "memory_bytes", lambda: 2 * 10_557_952)
    recipe.run_size(bench, made, 0.01, 2)
    assert [(s.case.tool, s.round) for s in bench.samples] == [("cp -r", 1), ("cp -r", 2)]
    assert [line.split()[0] for line in bench.not_run] == ["mergekit", "peft"]
    assert all("in memory" in line for line in bench.not_run)


# ---------------------------------------------------------------- what is said about it


def sample(recipe, tool, turn, wall, *, adapter="", busy=False, peak=10, **seconds):
    case = recipe.Case(tool, adapter, "warm", busy)
    seconds = {"wall": wall, "user": 0.5, "system": 0.25, **seconds}
    return recipe.Sample(2.0, case, turn, seconds, peak, 0, 0.0)


def test_ratios_are_medians_over_the_rounds_of_pairs(recipe):
    found = []
    for turn, (copy, work) in enumerate([(1.0, 4.0), (2.0, 4.0), (4.0, 16.0)], start=1):
        found.append(sample(recipe, "cp -r", turn, copy, work=copy))
        found.append(sample(recipe, "cp -r + fsync", turn, 2 * copy, work=2 * copy))
        ours = {"adapter": "qv", "work": work, "merge": work, "streaming": work / 2}
        found.append(sample(recipe, "lora-export", turn, work + 1, peak=100 * turn, **ours))
        ours["work"] = 1.5 * work
        found.append(sample(recipe, "lora-export", turn, 2 * (work + 1), busy=True, **ours))
    rows = {row["label"]: row for row in recipe.summarised(found)}
    assert list(rows) == [
        "cp -r", "cp -r + fsync", "lora-export, qv", "lora-export, qv, one core busy",
    ]  # fmt: skip
    row = rows["lora-export, qv"]
    assert row["to_cp"]["work"] == 4.0  # of 4, 2, 4; that of the medians would be 2
    assert row["to_cp"]["streaming"] == 2.0
    assert row["to_cp_fsync"]["work"] == 2.0
    assert row["to_cp"]["wall"] == 4.25
    assert row["peak_rss_bytes"] == 300
    assert row["bytes_per_s"] == row["bytes"] / 4.0
    assert rows["cp -r + fsync"]["to_cp"]["work"] == 2.0
    assert rows["lora-export, qv, one core busy"]["slowdown"] == {"work": 1.5, "wall": 2.0}


def test_a_ratio_pairs_only_runs_of_one_round(recipe):
    found = [sample(recipe, "cp -r", turn, wall, work=wall) for turn, wall in ((1, 1.0), (2, 9.0))]
    found += [sample(recipe, "peft", 1, 9.0, adapter="all", work=5.0)]
    found += [sample(recipe, "peft", 3, 9.0, adapter="all", work=700.0)]
    rows = recipe.summarised(found)
    assert rows[1]["to_cp"]["work"] == 5.0
    assert rows[1]["to_cp_fsync"] == {}


def test_what_is_not_stated_is_a_dash(recipe):
    found = [sample(recipe, "cp -r", 1, 1.0, work=1.0)]
    found += [sample(recipe, "lora-export", 1, 9.0, adapter="all", busy=b) for b in (False, True)]
    first, parts, others, busy = recipe.tables(recipe.summarised(found))
    named = dict(zip(first[1], first[2][1], strict=True))
    assert named["tool"] == "lora-export"
    assert (named["work s"], named["GB/s"], named["x cp -r"]) == ("-", "-", "-")
    assert (named["wall s"], named["process s"]) == ("9", "0.75")
    assert parts[2] == others[2] == []
    assert busy[2] == [["2.2", "all", "-", "-", "9", "1"]]


def test_the_process_time_of_another_tool_is_held_against_ours(recipe):
    found = [sample(recipe, "lora-export", 1, 9.0, adapter="all")]
    found += [sample(recipe, tool, 1, 9.0, adapter="all") for tool in ("cp -r", "peft")]
    _, _, (_, head, rows), _ = recipe.tables(recipe.summarised(found))
    (named,) = (dict(zip(head, row, strict=True)) for row in rows)
    assert (named["tool"], named["process s"], named["x lora-export"]) == ("peft", "0.75", "1")


def test_the_deepest_mount_says_what_the_file_system_is(recipe, monkeypatch):
    mounts = "a / ext4 rw\nb /data xfs rw\nc /data tmpfs rw\nd /data/more btrfs rw\n"
    monkeypatch.setattr(recipe.Path, "read_text", lambda _: mounts)
    found = [recipe.file_system(Path(p)) for p in ("/home", "/data/x", "/data/more/x", "/database")]
    assert found == ["ext4", "tmpfs", "btrfs", "ext4"]


def test_a_run_writes_its_samples_tables_and_plot(tmp_path):
    found, stdout = run_script(
        tmp_path, "--size", 0.01, "--repeats", 1, "--no-rehearse", "--tool", "lora-export",
        "--adapter", "qv", "--out", tmp_path / "out",
    )  # fmt: skip
    tools = ["cp -r", "cp -r + fsync", "lora-export"]
    assert sorted(s["case"]["tool"] for s in found["samples"]) == tools
    assert [row["tool"] for row in found["summary"]] == tools
    assert [row["to_cp"]["wall"] > 0 for row in found["summary"]] == [True] * 3
    assert found["summary"][0]["to_cp"]["work"] == pytest.approx(1)  # of itself
    assert found["checkpoints"][0]["bytes"] == found["summary"][0]["bytes"]
    assert found["peak_floor_bytes"] < 30e6
    assert {"processor", "cores", "memory_bytes", "file_system", "kernel"} <= set(found["machine"])
    text = (tmp_path / "out" / "bench_merge.md").read_text()
    assert "| lora-export | qv | warm |" in text
    assert "lora-export" in stdout
    for name in ("bench_merge.md", "bench_merge.json"):
        assert str(tmp_path) not in (tmp_path / "out" / name).read_text()
        assert sys.prefix not in (tmp_path / "out" / name).read_text()
    assert (tmp_path / "out" / "bench_merge.png").read_bytes().startswith(b"\x89PNG")
    assert not list((tmp_path / "artifacts").iterdir())


@pytest.mark.slow
@pytest.mark.alone
def test_peft_cold_and_busy_runs_are_told_apart_and_the_checkpoint_is_kept(tmp_path):
    found, stdout = run_script(
        tmp_path, "--size", 0.01, "--repeats", 2, "--shard", 0.004, "--adapter", "all", "--cold",
        "--busy", "--work", "work", "--keep", "--out", "out",
    )  # fmt: skip
    rows = {row["label"]: row for row in found["summary"]}
    assert set(rows) == {
        "cp -r", "cp -r + fsync", "lora-export, all", "peft, all", "cp -r, cold",
        "cp -r + fsync, cold", "lora-export, all, cold", "peft, all, cold",
        "lora-export, all, one core busy",
    }  # fmt: skip
    assert {row["runs"] for row in rows.values()} == {2}
    assert rows["peft, all"]["to_cp"]["work"] > 1
    assert rows["peft, all, cold"]["seconds"]["import"] > 0
    assert rows["lora-export, all, one core busy"]["slowdown"]["wall"] > 0
    assert found["not_run"] == ["mergekit: no --mergekit-python was given"]
    assert "not run: mergekit" in stdout
    assert (tmp_path / "work" / "bench-0.01GB" / "base" / "config.json").is_file()
    rounds = [[s["case"] for s in found["samples"] if s["round"] == turn] for turn in (1, 2)]
    assert rounds[0] != rounds[1]  # shuffled
    by_name = [sorted(map(json.dumps, cases)) for cases in rounds]
    assert by_name[0] == by_name[1]
