"""The command line's contract: exit codes, one JSON object, defaults that chain, nothing left."""

import json
import re
import shutil
import struct

import numpy as np
import pytest
from hand_made import edit_tensors

from lora_export import storage


@pytest.fixture
def adapter(tiny_base, tiny_adapter, tmp_path):
    return tiny_adapter(tmp_path, str(tiny_base))[0]


def only(folder, *names):
    return sorted(file.name for file in folder.iterdir()) == sorted(names)


def test_the_commands_of_the_readme_chain(call, adapter, tmp_path):
    assert call("merge", "--adapter", "sst2.safetensors")[0] == 0
    assert call("onnx", "--out", "model.onnx")[0] == 0
    assert call("torchscript")[0] == 0
    files = [name + more for name in ("model.onnx", "model.pt") for more in ("", ".tokenizer")]
    assert only(tmp_path, "sst2.safetensors", "merged", *files)


@pytest.mark.slow
def test_run_and_check_chain(call, adapter, tmp_path):
    # a tiny model on a busy machine proves no speed
    code, out, err = call("run", "--adapter", "sst2.safetensors", "--slowest", 1e9)
    assert code == 0, out
    assert "proven: " in out
    assert "merging" in err
    assert call("check", "--quiet")[0] == 0
    (tmp_path / "run" / "model.pt").unlink()
    code, out, _ = call("check", "--quiet", "--json")
    assert code == 5
    assert json.loads(out)["ok"] is False


def test_json_is_one_object_and_progress_is_elsewhere(call, adapter):
    code, out, err = call("merge", "--adapter", adapter, "--json")
    found = json.loads(out)
    assert (code, found["schema"], found["ok"]) == (0, 3, True)
    assert {v["status"] for v in found["verdicts"]} == {"pass"}
    assert "auditing" in err


def test_quiet_says_nothing_on_stderr(call, adapter):
    assert call("merge", "--adapter", adapter, "--quiet")[2] == ""


def test_a_dry_run_writes_nothing(call, adapter, tmp_path):
    code, out, _ = call("merge", "--adapter", adapter, "--dry-run")
    assert code == 0
    assert "2 place" in out
    assert only(tmp_path, "sst2.safetensors")


def test_a_dry_run_prints_json_too(call, adapter):
    found = json.loads(call("merge", "--adapter", adapter, "--dry-run", "--json")[1])
    assert {step["operation"] for step in found["plan"]} == {"copy", "merge", "place"}


def test_inspect_shows_rank_scale_and_base(call, adapter, tiny_base):
    code, out, _ = call("inspect", adapter, "--base", tiny_base)
    assert code == 0
    assert "the fingerprint that the adapter was trained on" in " ".join(out.split())
    found = json.loads(call("inspect", adapter, "--json")[1])
    assert {(m["rank"], m["scale"]) for m in found["modules"]} == {(4, 2.0)}


def test_an_existing_output_needs_overwrite(call, adapter, tmp_path):
    assert call("merge", "--adapter", adapter)[0] == 0
    before = storage.digest_tree(tmp_path / "merged")
    code, _, err = call("merge", "--adapter", adapter)
    assert code == 2
    assert "pass --overwrite" in err
    assert storage.digest_tree(tmp_path / "merged") == before
    assert call("merge", "--adapter", adapter, "--overwrite")[0] == 0
    assert only(tmp_path, "sst2.safetensors", "merged")


def test_failed_verdicts_exit_with_5_and_keep_the_files(call, adapter, tmp_path, monkeypatch):
    from lora_export import auditing

    monkeypatch.setattr(auditing, "weights", lambda *arguments: ())
    code, out, _ = call("merge", "--adapter", adapter)
    assert code == 5
    assert "NOT PROVEN" in out
    assert (tmp_path / "merged").is_dir()


# ---------------------------------------------------------------- wrong input


def untrained(path, base):
    edit_tensors(path, lambda arrays: [arrays[n].fill(0) for n in arrays if "lora_B" in n])


def with_nan(path, base):
    edit_tensors(path, lambda arrays: next(arrays[n] for n in arrays if "lora_B" in n).fill(np.nan))


def truncated(path, base):
    path.write_bytes(path.read_bytes()[:-100])


def no_adapter(path, base):
    path.unlink()


def not_an_adapter(path, base):
    path.write_bytes(struct.pack("<Q", 2) + b"{}")


def without_head(path, base):
    def change(arrays):
        for name in [n for n in arrays if "classifier" in n]:
            del arrays[name]

    edit_tensors(path, change)


def other_base(path, base):
    def change(arrays):
        arrays["encoder.layer.0.attention.self.query.weight"][0, 0] += 1

    edit_tensors(base / "model.safetensors", change)


def no_base(path, base):
    shutil.rmtree(base)


def truncated_base(path, base):
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def no_tokenizer(path, base):
    for name in ("tokenizer.json", "vocab.txt"):
        (base / name).unlink(missing_ok=True)


FAULTS = [
    (untrained, 2, "untrained: all 13 low-rank updates are zero"),
    (with_nan, 2, r"lora_B\.weight: \d+ of \d+ values are NaN"),
    (truncated, 2, "truncated"),
    (no_adapter, 2, "no adapter at"),
    (not_an_adapter, 2, "none of the known adapter formats"),
    (without_head, 3, r"classifier\.weight: neither the base nor the adapter has it"),
    (other_base, 3, "is not the one that this adapter was trained on"),
    (no_base, 2, "no such directory|is no directory"),
    (truncated_base, 2, "truncated"),
    (no_tokenizer, 2, "no tokenizer in"),
]


@pytest.mark.parametrize(
    ("fault", "code", "message"), FAULTS, ids=lambda v: getattr(v, "__name__", "")
)
def test_wrong_input_is_one_line_with_its_exit_code_and_leaves_nothing(
    call, tiny_base, tiny_adapter, tmp_path, fault, code, message
):
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    path, _ = tiny_adapter(tmp_path, str(base))
    fault(path, base)
    before = {file.name for file in tmp_path.iterdir()}
    found, out, err = call("run", "--adapter", path, "--quiet", "--json")
    assert found == code
    assert len(err.strip().splitlines()) == 1
    assert re.search(message, err), err
    assert json.loads(out)["error"]["exit_code"] == code
    assert {file.name for file in tmp_path.iterdir()} == before


def test_an_output_that_cannot_be_written_is_one_line(call, adapter, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = call("merge", "--adapter", adapter, "--out", "file/merged", "--quiet")
    assert code == 2
    assert err.startswith("Error: cannot write")
    assert only(tmp_path, "sst2.safetensors", "file")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["merge"], "Missing option '--adapter'"),
        (["merge", "--adapter"], "requires an argument"),
        (["marge"], "No such command 'marge'"),
        (["export", "--format", "tflite"], "'tflite' is not one of"),
        (["onnx"], "no merged model in merged: run `lora-export merge` first"),
        (["check"], "no run in run"),
        (["inspect", "nothing.safetensors"], "no adapter at nothing.safetensors"),
    ],
)
def test_wrong_usage_exits_with_2(call, words, message):
    code, _, err = call(*words)
    assert code == 2
    assert message in err


def test_no_command_shows_the_help(call):
    code, out, err = call()
    assert (code, out) == (2, "")
    assert err.startswith("Usage:")
    assert "\n  lora-export merge --adapter sst2.safetensors" in err


def test_wrong_usage_gives_json_where_it_was_asked_for(call):
    code, out, _ = call("merge", "--json")
    assert code == 2
    assert json.loads(out)["error"]["type"] == "UsageError"


def test_a_bug_exits_with_1_and_still_gives_an_object(call, adapter, monkeypatch):
    from lora_export import merged_files

    def broken(*arguments, **options):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(merged_files, "merge_files", broken)
    code, out, err = call("merge", "--adapter", adapter, "--json")
    assert code == 1
    assert json.loads(out)["error"]["type"] == "Bug"
    assert "Traceback" in err


def test_an_interrupt_exits_with_130(call, adapter, monkeypatch):
    from lora_export import merged_files

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(merged_files, "merge_files", interrupted)
    assert call("merge", "--adapter", adapter)[0] == 130


def test_the_same_version_everywhere(call):
    from importlib.metadata import version

    assert version("lora-export") in call("--version")[1]


# ---------------------------------------------------------------- check


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--adapter", "a.safetensors", "--replay"), "exclude each other"),
        (("--replay", "--from-evidence"), "exclude each other"),
        (("--quick",), "--quick is of use with --adapter only"),
        (("--artifact", "model.onnx"), "--artifact is of use with --adapter only"),
        (("--replay", "--tolerance", "1"), "--tolerance is of use with --adapter only"),
        (("--out", "again"), "--out is of use with --adapter and --replay"),
        (("--tolerance", "0", "--adapter", "a"), "--tolerance"),
        (("--replay",), "no run in run"),
        (("--adapter", "nothing"), "no merged model in run/merged"),
    ],
)
def test_a_check_that_makes_no_sense_is_a_usage_error(call, words, said):
    code, out, err = call("check", *words)
    assert (code, out) == (2, "")
    assert said in err


def test_limits_of_the_command_line_are_those_that_are_judged_by(call, adapter):
    assert call("merge", "--adapter", adapter)[0] == 0
    code, out, _ = call("onnx", "--tolerance", 1e-12, "--json", "--quiet")
    found = json.loads(out)
    limits = {v["limit"] for v in found["verdicts"] if v["check"] == "parity"}
    assert (code, limits) == (5, {1e-12})
    code, out, _ = call("onnx", "--strict", "--json", "--quiet", "--overwrite")
    floor = {v["check"]: v["limit"] for v in json.loads(out)["verdicts"]}
    assert code == 0
    code, out, _ = call("onnx", "--json", "--quiet", "--overwrite")
    usual = {v["check"]: v["limit"] for v in json.loads(out)["verdicts"]}
    assert floor["parity"] == pytest.approx(usual["parity"] * 3 / 8)
