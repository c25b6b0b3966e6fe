"""What is tried, what is chosen, and what never is: a configuration that fails its checks."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_export import (
    candidates,
    exporters,
    footprint,
    inputs,
    merged_files,
    records,
    stages,
    storage,
    timing,
    tuning,
)
from lora_export.candidates import Configuration, Figures, Row
from lora_export.errors import ExportFailed, InputError
from lora_export.records import Status, Verdict

# ---------------------------------------------------------------- front and choice


def verdict(status=Status.PASS):
    return Verdict("parity", "onnx", status, 1.0, 8.0, "abs", 4)


def row(ratio, size=1, memory=1, deviation=1.0, statuses=(Status.PASS,), name="onnx", threads=1):
    figures = Figures(ratio, size, memory, deviation, 0.9 * ratio, 1.1 * ratio, 30, 4.0, 8.0)
    return Row(Configuration(name, "fp32", threads), figures, tuple(map(verdict, statuses)))


small = st.integers(1, 4)  # few values, so that there are ties
outcomes = st.lists(st.sampled_from(Status), max_size=2)
rows_of = st.lists(
    st.builds(row, small, small, small, small, outcomes, st.sampled_from("abc"), small),
    max_size=12,
)
NO = [status for status in Status if status is not Status.PASS]


def beats(one, other):
    mine, yours = one.figures.compared, other.figures.compared
    return all(a <= b for a, b in zip(mine, yours, strict=True)) and mine != yours


@given(rows_of)
def test_nobody_beats_a_row_of_the_front(rows):
    proven = [one for one in rows if one.is_proven]
    assert not any(beats(a, b) for a in proven for b in candidates.front(rows))


@given(rows_of)
def test_every_proven_row_off_the_front_is_beaten_by_one_on_it(rows):
    found = candidates.front(rows)
    for one in rows:
        if one.is_proven and one not in found:
            assert any(beats(other, one) for other in found)


@given(rows_of)
def test_only_proven_rows_are_on_the_front_or_chosen(rows):
    chosen = candidates.fastest(rows)
    assert all(one.is_proven for one in (*candidates.front(rows), *([chosen] if chosen else [])))
    assert (chosen is None) == (not any(one.is_proven for one in rows))


@given(rows_of)
def test_the_chosen_row_is_on_the_front_and_none_proven_is_faster(rows):
    if chosen := candidates.fastest(rows):
        assert chosen in candidates.front(rows)
        assert chosen.figures.ratio == min(r.figures.ratio for r in rows if r.is_proven)


@given(rows_of, st.randoms())
def test_the_order_of_the_rows_decides_nothing(rows, dice):
    other = list(rows)
    dice.shuffle(other)
    assert set(candidates.front(other)) == set(candidates.front(rows))
    assert candidates.fastest(other) == candidates.fastest(rows)


@given(rows_of, st.sampled_from(NO))
def test_a_failed_row_changes_neither_front_nor_choice_however_fast(rows, status):
    wrong = row(0.01, 0, 0, 0.0, (Status.PASS, status))
    assert candidates.fastest([wrong, *rows]) == candidates.fastest(rows)
    assert candidates.front([wrong, *rows]) == candidates.front(rows)


def test_a_row_that_no_verdict_speaks_of_is_not_proven():
    assert not row(0.1, statuses=()).is_proven
    assert "no verdicts" in row(0.1, statuses=()).judgement


def test_a_row_with_a_fault_is_not_proven():
    fault = dataclasses.replace(row(0.1), fault="ExportFailed: no")
    assert candidates.fastest([fault]) is None
    assert fault.judgement == "ExportFailed: no"


def test_of_equally_fast_rows_the_smaller_one_is_chosen():
    assert candidates.fastest([row(0.5, 2), row(0.5, 1, 9)]) == row(0.5, 1, 9)


def test_a_row_whose_interval_overlaps_is_named():
    best, near, far = row(0.5, name="a"), row(0.6, name="b"), row(0.9, name="c")
    assert candidates.as_fast([best, near, far], best) == (near,)


# ---------------------------------------------------------------- what is tried


AMX = ("avx2", "avx512f", "amx_bf16")
OFFERED = {"onnx": ("fp32", "fp16", "int8"), "pt2": ("fp32", "bf16"), "aoti": ("fp32",)}


def offered(asked=(), lacking=lambda name: "", instructions=AMX, threads=(1, 4)):
    found, left = candidates.candidates(OFFERED, threads, asked, lacking, instructions)
    return [str(one) for one in found], {one.what: one.reason for one in left}


def test_the_most_promising_comes_first():
    names = ["pt2 bf16", "onnx fp32", "pt2 fp32", "onnx int8", "aoti fp32"]
    found, _ = offered()
    assert found == [f"{n}, 4 threads" for n in names] + [f"{n}, 1 thread" for n in names]


@given(st.lists(st.builds(Configuration, st.text(), st.text(), st.integers(1, 64))))
def test_arranging_loses_nothing_and_starts_with_the_most_threads(configurations):
    found = candidates.arranged(configurations)
    assert set(found) == set(configurations)
    counts = [one.threads for one in found]
    assert counts == sorted(counts, reverse=True)
    assert len(found) == len(set(found))


def test_an_exporter_that_was_dropped_in_is_tried_too():
    one, other = Configuration("mine", "int4", 2), Configuration("onnx", "fp32", 2)
    assert candidates.arranged([one, other]) == (other, one)


def test_a_format_that_lacks_something_is_left_out_with_the_reason():
    found, left = offered(lacking=lambda name: "no compiler" if name == "aoti" else "")
    assert left["aoti"] == "no compiler"
    assert not any("aoti" in one for one in found)


def test_fp16_is_left_out_unless_asked_for():
    assert "no gain on a CPU" in offered()[1]["onnx fp16"]
    assert "onnx fp16, 4 threads" in offered(["fp16"])[0]


def test_bf16_is_left_out_where_the_processor_has_no_instructions_for_it():
    found, left = offered(instructions=("avx2",))
    assert "no instructions" in left["pt2 bf16"]
    assert not any("bf16" in one for one in found)
    assert "pt2 bf16, 1 thread" in offered(["bf16"], instructions=("avx2",))[0]


def test_a_precision_that_a_format_lacks_is_left_out_with_those_it_has():
    found, left = offered(["int8"])
    assert found == ["onnx int8, 4 threads", "onnx int8, 1 thread"]
    assert left["pt2 int8"] == "is written in fp32, bf16"


def test_without_openvino_and_a_compiler_both_are_left_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.setattr(exporters.load("aoti").config.cpp, "cxx", ("nowhere-g++",))
    _, skipped = tuning._candidates((), (), ())
    reasons = {left.what: left.reason for left in skipped}
    assert "OpenVINO is not installed" in reasons["openvino"]
    assert "no C++ compiler" in reasons["aoti"]


# ---------------------------------------------------------------- the whole of it


@pytest.fixture(scope="module")
def merged(tiny_base, tiny_adapter, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tune")
    path, _ = tiny_adapter(folder, str(tiny_base))
    merged_files.merge_files(path, out=folder / "merged")
    return folder / "merged"


@pytest.fixture(autouse=True, scope="module")
def quick():
    patch = pytest.MonkeyPatch()
    patch.setattr(timing, "LEAST_ROUNDS", 20)
    patch.setattr(timing, "MOST_ROUNDS", 20)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def tuned(merged, tmp_path_factory):
    """All real, the fresh processes too."""
    out = tmp_path_factory.mktemp("tuned") / "tuned"
    said = []
    formats = ("torchscript", "onnx")
    found = tuning.tune(
        merged, out=out, formats=formats, precisions=["fp32"], threads=[1], say=said.append
    )
    return out, found, said


@pytest.fixture
def cheap(monkeypatch):
    """No fresh processes: what they cost is not judged here."""
    monkeypatch.setattr(footprint, "grown_bytes", lambda *arguments: 1_000_000)


FAST = {"formats": ("torchscript",), "precisions": ("fp32",), "threads": (1,)}
WORDS = ("--format", "torchscript", "--precision", "fp32", "--threads", "1")


def test_both_are_proven_and_the_faster_one_is_chosen(tuned):
    _, found, _ = tuned
    assert found.ok
    assert {str(one.configuration) for one in found.rows} == {
        "onnx fp32, 1 thread", "torchscript fp32, 1 thread",
    }  # fmt: skip
    ratios = {one.configuration: one.figures.ratio for one in found.rows if one.is_proven}
    assert len(ratios) == 2
    assert found.chosen == min(ratios, key=ratios.get)
    assert found.chosen in found.front


def test_every_figure_is_there(tuned):
    for one in tuned[1].rows:
        f = one.figures
        assert 0 < f.low <= f.ratio <= f.high
        assert f.pairs == 20
        assert f.median_ms > 0 < f.eager_ms
        assert f.size_bytes > 10_000
        assert f.memory_bytes > 0
        assert 0 < f.deviation <= 8


def test_the_verdicts_are_those_of_export(tuned):
    asked = {"parity", "decisions", "structure", "plain", "intact"}
    assert all({v.check for v in one.verdicts} == asked for one in tuned[1].rows)


def test_it_leaves_the_artifact_its_tokenizer_and_what_was_measured(tuned):
    out, found, _ = tuned
    suffix = exporters.load(found.chosen.format).SUFFIX
    assert {file.name for file in out.iterdir()} == {
        f"model{suffix}", "tokenizer", "tuning.json", "certificate.json", "report.md",
        "report.xml", "report.html",
    }  # fmt: skip
    assert (out / "tokenizer" / "tokenizer.json").is_file()
    assert list(out.parent.iterdir()) == [out]


def test_the_certificate_is_of_the_files_that_are_there(tuned):
    out, found, _ = tuned
    told = json.loads((out / "certificate.json").read_text())
    assert told["ok"] is True
    for file in told["outputs"]:
        assert storage.digest(out / file["name"], file["name"]).digest == file["digest"]
    assert told["settings"]["format"] == found.chosen.format
    assert {m["name"] for m in told["measurements"]} >= {"latency median", "size"}


def test_tuning_json_holds_every_row_and_no_path_of_this_machine(tuned):
    out, found, _ = tuned
    text = (out / "tuning.json").read_text()
    told = json.loads(text)
    assert told == json.loads(json.dumps(found.facts()))
    assert [one["configuration"]["format"] for one in told["rows"]] == ["onnx", "torchscript"]
    assert all(one["proven"] for one in told["rows"])
    assert str(out.parent) not in text


def test_every_configuration_is_said_as_it_begins(tuned):
    assert "trying onnx fp32, 1 thread" in tuned[2]


class Wrong:
    """Answers zeros at once: the fastest of all, and wrong."""

    precision = "float32"

    def __init__(self, name):
        self.name = name

    def run(self, arrays):
        return {"logits": np.zeros((len(arrays["input_ids"]), 2), np.float32)}


@pytest.fixture
def wrong(monkeypatch):
    """`wrong(*formats)`: their runners answer zeros."""

    def make(*formats):
        before = stages.open_runners

        def opened(artifacts, folder, threads):
            found = before(artifacts, folder, threads)
            return {n: Wrong(n) if n in formats else runner for n, runner in found.items()}

        monkeypatch.setattr(stages, "open_runners", opened)

    return make


def test_what_fails_its_checks_is_not_chosen_even_when_fastest(merged, tmp_path, wrong, cheap):
    wrong("torchscript")
    both = {**FAST, "formats": ("torchscript", "pt2")}
    found = tuning.tune(merged, out=tmp_path / "tuned", **both)
    by_format = {one.configuration.format: one for one in found.rows}
    bad, good = by_format["torchscript"], by_format["pt2"]
    assert bad.figures.ratio < good.figures.ratio  # or this test would show nothing
    assert "parity of torchscript: fail" in bad.judgement
    assert (found.ok, found.chosen) == (True, good.configuration)
    assert found.front == (good.configuration,)
    assert (tmp_path / "tuned" / "model.pt2").is_file()
    assert not (tmp_path / "tuned" / "model.pt").exists()


def test_nothing_proven_exits_with_5_and_leaves_the_rows(call, merged, wrong, cheap, tmp_path):
    wrong("torchscript")
    code, out, err = call("tune", "--model", merged, *WORDS)
    assert code == 5, err
    assert "NOT PROVEN: no configuration is chosen" in out
    assert [file.name for file in (tmp_path / "tuned").iterdir()] == ["tuning.json"]
    assert call("tune", "--model", merged, *WORDS)[0] == 2  # it exists
    code, out, _ = call("tune", "--model", merged, *WORDS, "--overwrite", "--json", "--quiet")
    told = json.loads(out)
    assert (code, told["ok"], told["chosen"]) == (5, False, None)


def test_a_spent_budget_lists_what_was_not_tried(call, merged, cheap):
    more = ("--format", "pt2", "--time-budget", "0.001")
    code, out, err = call("tune", "--model", merged, *WORDS, *more)
    assert code == 0, err
    assert "proven: torchscript fp32, 1 thread" in out
    assert "not tried: pt2 fp32, 1 thread: the budget of 0.001 s was spent" in out


def test_an_unavailable_format_is_listed_with_its_reason(call, merged, cheap, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    code, out, err = call("tune", "--model", merged, *WORDS, "--format", "openvino")
    assert code == 0, err
    assert "skipped: openvino: OpenVINO is not installed" in out


def test_nothing_to_try_is_an_input_error_and_writes_nothing(call, merged, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "openvino", None)
    code, _, err = call("tune", "--model", merged, "--format", "openvino")
    assert code == 2
    assert "OpenVINO is not installed" in err
    assert not (tmp_path / "tuned").exists()


def test_an_export_that_fails_is_a_row_and_the_others_go_on(merged, tmp_path, cheap, monkeypatch):
    def failing(*arguments):
        raise ExportFailed("no such operator")

    monkeypatch.setattr(exporters.load("onnx"), "export", failing)
    more = {**FAST, "formats": ("onnx", "torchscript"), "threads": (1, 2)}
    found = tuning.tune(merged, out=tmp_path / "tuned", **more)
    faults = [one.fault for one in found.rows]
    assert faults == ["ExportFailed: no such operator", "", ""]
    assert [left.what for left in found.not_tried] == ["onnx fp32, 1 thread"]
    assert "with more threads" in found.not_tried[0].reason
    assert found.chosen.format == "torchscript"


def test_a_full_disk_is_no_fault_of_a_configuration(merged, tmp_path, cheap, monkeypatch):
    def failing(*arguments):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(exporters.load("torchscript"), "export", failing)
    with pytest.raises(InputError, match="No space left"):
        tuning.tune(merged, out=tmp_path / "tuned", **FAST)
    assert list(tmp_path.iterdir()) == []


def test_the_threads_of_torch_are_as_they_were(merged, tmp_path, cheap):
    before = torch.get_num_threads()
    tuning.tune(merged, out=tmp_path / "tuned", **{**FAST, "threads": [3]})
    assert torch.get_num_threads() == before


def test_the_same_file_with_other_answers_on_disk_is_not_proven(merged, tmp_path, cheap):
    """The certificate is drawn again from the files as they lie in the output."""
    before = tuning.fastest

    def tampering(rows):
        for path in tmp_path.rglob("model.pt"):
            path.write_bytes(b"other")
        return before(rows)

    patch = pytest.MonkeyPatch()
    patch.setattr(tuning, "fastest", tampering)
    found = tuning.tune(merged, out=tmp_path / "tuned", **FAST)
    patch.undo()
    assert found.rows[0].is_proven
    assert not found.ok
    assert [v.check for v in found.certificate.verdicts if not v.passed] == ["intact"]


def test_a_chosen_one_that_may_be_no_faster_than_eager_torch_is_said_to(call, merged, cheap):
    patch = pytest.MonkeyPatch()
    patch.setattr(tuning, "median_interval", lambda values: (0.99, 0.9, 1.02))
    code, out, _ = call("tune", "--model", merged, *WORDS)
    patch.setattr(tuning, "median_interval", lambda values: (0.5, 0.4, 0.6))
    quick = call("tune", "--model", merged, *WORDS, "--overwrite")
    patch.undo()
    assert (code, quick[0]) == (0, 0)
    assert "eager torch may be as fast" in out
    assert "eager torch may be as fast" not in quick[1]


@pytest.mark.slow
def test_every_format_can_be_tried(merged, tmp_path):
    names = [name for name in exporters.names() if name != "aoti"]  # minutes of compiling
    found = tuning.tune(
        merged, out=tmp_path / "tuned", time_budget=1e6, threads=[1, 2], formats=names
    )
    skipped = {left.what for left in found.skipped}
    tried = {one.configuration.format for one in found.rows}
    assert tried == {*names} - skipped
    assert [one.fault for one in found.rows if one.fault] == []
    assert found.ok


# ---------------------------------------------------------------- parts


def test_a_fresh_process_says_what_is_wrong_with_a_file(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"nothing")
    with pytest.raises(ExportFailed, match="a fresh process cannot run it: "):
        footprint.grown_bytes("torchscript", tmp_path / "model.pt", 1, {"input_ids": np.ones(1)})


def test_a_process_that_gives_no_answer_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(footprint, "MOST_SECONDS", 0.01)
    with pytest.raises(ExportFailed, match=r"no answer in 0\.01 s"):
        footprint.grown_bytes("torchscript", tmp_path / "model.pt", 1, {})


def test_a_runner_on_threads_sets_those_of_torch():
    class Seeing(Wrong):
        def run(self, arrays):
            return {"threads": np.asarray(torch.get_num_threads())}

    before = torch.get_num_threads()
    try:
        counts = [int(timing.OnThreads(Seeing("x"), n).run({})["threads"]) for n in (3, 1)]
    finally:
        torch.set_num_threads(before)
    assert counts == [3, 1]


def test_one_shape_is_measured_against_the_named_runner(merged):
    subject = stages.load_subject(merged)
    found = timing.measure_shape(
        {"one": subject.runner("one"), "other": Wrong("other")},
        subject.signature, (2, 5), threads=1, seed=0, against="one", most_seconds=0.0,
    )  # fmt: skip
    assert (found.batch, found.sequence, found.past) == (2, 5, 0)
    assert set(found.samples_ms) == {"one", "other"}
    assert records.UNMERGED not in found.samples_ms
    assert inputs.TIMED != ((2, 5),)


def test_help_loads_no_torch():
    code = (
        "from lora_export.cli import main\ntry:\n    main(['tune', '--help'])\n"
        "except SystemExit: pass\nimport sys\nprint('LOADED', *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--time-budget" in done.stdout
    loaded = set(done.stdout.partition("LOADED")[2].split())
    assert not loaded & {"torch", "transformers", "onnx", "rich", "numpy"}
