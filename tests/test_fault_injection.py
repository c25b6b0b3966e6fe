"""The recipe that plants faults: what it counts, what it plants, and a few faults end to end."""

import importlib
import json
import random
import sys
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

from lora_export.errors import InputError
from lora_export.records import Status, Verdict

ABOUT = {
    "processor": "a processor",
    "threads": 2,
    "system": "Linux x86_64",
    "python": "3.11",
    "packages": {"torch": "2.9"},
}


@pytest.fixture(scope="module")
def recipe():
    return importlib.import_module("fault_injection")


def verdict(check, status, note="", where=()):
    return Verdict(check, "onnx", status, 1.0, 0.0, "", 1, note, where)


BEFORE = {("parity", "onnx"): True, ("structure", "onnx"): True, ("latency", "onnx"): False}
GOOD = [verdict("parity", Status.PASS), verdict("structure", Status.PASS)]


def outcome_of(recipe, verdicts, names=("layer.1",)):
    fault = recipe.Fault("artifact: a fault", "gpt2", "somewhere", names)
    return recipe.outcome(fault, BEFORE, verdicts)


# ---------------------------------------------------------------- what counts as found


def test_a_failing_verdict_catches_the_fault_and_locates_it_where_it_names_the_place(recipe):
    found = outcome_of(
        recipe, [verdict("parity", Status.FAIL, where=("model.layer.1.query",)), GOOD[1]]
    )
    assert (found.outcome, found.checks) == ("caught", ("parity",))
    assert found.located
    assert found.located_by == ("parity",)


@pytest.mark.parametrize("where", ["layer.11", "layer.10.query", "my_layer.1"])
def test_another_place_does_not_locate_it(recipe, where):
    found = outcome_of(recipe, [verdict("parity", Status.FAIL, where=(where,)), GOOD[1]])
    assert found.outcome == "caught"
    assert not found.located


def test_what_all_verdicts_pass_is_missed(recipe):
    found = outcome_of(recipe, GOOD)
    assert (found.outcome, found.checks) == ("missed", ())
    assert not found.is_found


@pytest.mark.parametrize("status", [Status.NOT_RUN, Status.INCONCLUSIVE])
def test_no_pass_and_no_fail_is_not_proven(recipe, status):
    found = outcome_of(recipe, [verdict("parity", status), GOOD[1]])
    assert (found.outcome, found.checks) == ("not proven", ("parity",))
    assert not found.is_found


def test_a_verdict_that_is_gone_is_not_proven(recipe):
    assert outcome_of(recipe, GOOD[:1]).checks == ("structure",)


def test_a_verdict_that_does_not_pass_on_the_correct_run_catches_nothing(recipe):
    noise = verdict("latency", Status.FAIL, where=("layer.1",))
    assert outcome_of(recipe, [*GOOD, noise]).outcome == "missed"


def test_a_claim_that_the_correct_run_does_not_raise_counts(recipe):
    assert outcome_of(recipe, [*GOOD, verdict("weights", Status.FAIL)]).checks == ("weights",)


@pytest.mark.parametrize(
    ("error", "outcome"), [(InputError("no layer.1"), "refused"), (KeyError("layer.1"), "crashed")]
)
def test_a_refusal_is_told_from_a_crash(recipe, error, outcome):
    fault = recipe.Fault("files: a fault", "gpt2", "somewhere", ("layer.1",))
    found = recipe.stopped(fault, error, "/a/place")
    assert found.outcome == outcome
    assert found.is_found == found.located == (outcome == "refused")


def test_the_place_of_the_copy_is_not_told(recipe):
    fault = recipe.Fault("files: a fault", "gpt2", "somewhere", ())
    (said,) = recipe.stopped(fault, InputError("/a/place/run/x is damaged"), "/a/place").said
    assert said["note"] == "/run/x is damaged"


# ---------------------------------------------------------------- counting and rendering


def found_three(recipe):
    usual = {"a": False, "b": True, "c": True}
    return [
        recipe.Found("merge: one", "gpt2", "p", "caught", ("exact",), True, ("exact",), usual),
        recipe.Found("merge: one", "llama", "q", "missed", usual=dict.fromkeys(usual, False)),
        recipe.Found("evidence: two", "llama", "r", "not proven", ("parity",)),
    ]


def test_rows_count_by_kind_and_the_last_row_sums_them(recipe):
    one, two = recipe.summarised(found_three(recipe))
    assert (one["planted"], one["found"], one["missed"], one["located"]) == (2, 1, 1, 1)
    assert one["checks"] == Counter(exact=1)
    assert one["usual"] == {"a": 0, "b": 1, "c": 1}
    assert (two["planted"], two["not_proven"], two["validated"]) == (1, 1, 0)
    assert two["checks"] == Counter()  # what proves nothing finds nothing
    total = recipe.total([one, two])
    assert (total["planted"], total["found"], total["missed"], total["validated"]) == (3, 1, 1, 2)
    assert recipe.cells(two)[-3:] == ["-"] * 3
    assert recipe.cells(one)[-3:] == ["0 of 2", "1 of 2", "1 of 2"]


def test_the_report_lists_what_slipped_through(recipe):
    alarm = {
        "run": "bert lora",
        "check": "parity",
        "subject": "onnx",
        "status": "fail",
        "note": "n",
    }
    alarms = {"runs": 4, "verdicts": 40, "alarms": [alarm], "refused": ["vit: InputError"]}
    text = recipe.markdown(
        found_three(recipe), {"gpt2 (c)": True, "gpt2 (a)": False}, alarms, ABOUT
    )
    assert "| merge: one | 2 | 1 | 0 | 1 | 1 | exact 1 | 0 of 2 | 1 of 2 | 1 of 2 |" in text
    assert "## Missed: 1\n\n- merge: one: llama, q; nothing\n" in text
    assert "the correct run of gpt2 (c)." in text
    assert "1 of 40 verdicts on 4 correct runs; 1 runs were refused." in text
    assert "- bert lora: parity of onnx is fail: n\n- refused: vit: InputError" in text


def test_the_command_line_names_no_folder_of_this_machine(recipe, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fault_injection.py", "--out", "/some/where/out"])
    assert recipe.command() == "python recipes/fault_injection.py --out out"


# ---------------------------------------------------------------- what is planted


def graph_of(recipe):
    """Return y = x @ w + x, of two rows."""
    weight = np.arange(9, dtype=np.float32).reshape(3, 3)
    axes = ["batch", 3]
    made = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "model.layer.1.weight"], ["h"]),
            helper.make_node("Add", ["h", "x"], ["y"]),
        ],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, axes)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, axes)],
        [numpy_helper.from_array(weight, "model.layer.1.weight")],
    )
    opset = [helper.make_opsetid("", 20)]
    return recipe.Graph(helper.make_model(made, opset_imports=opset, ir_version=10)), weight


def answer(graph):
    onnx.checker.check_model(graph.model)
    session = onnxruntime.InferenceSession(graph.model.SerializeToString())
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    return x, session.run(None, {"x": x})[0]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("y", lambda x, w: 2 * (x @ w + x)),  # an output keeps its name
        ("h", lambda x, w: 2 * (x @ w) + x),
        ("x", lambda x, w: 2 * x @ w + 2 * x),
    ],
)
def test_a_value_goes_through_a_step(recipe, value, expected):
    graph, weight = graph_of(recipe)
    graph.through(value, recipe.step("Mul", graph.number(2)))
    x, found = answer(graph)
    assert np.array_equal(found, expected(x, weight))


def test_a_step_may_be_for_one_user_and_take_the_value_as_it_was(recipe):
    graph, weight = graph_of(recipe)
    doubled = (recipe.step("Mul", graph.number(2)), recipe.step("Sub", recipe.BEFORE))
    graph.through("x", *doubled, recipe.step("Neg"), users=[graph.of_weight("layer.1.weight")])
    x, found = answer(graph)
    assert np.array_equal(found, -x @ weight + x)


@pytest.mark.parametrize("is_transposed", [False, True])
def test_values_are_found_in_the_graph_whatever_they_are_called(recipe, is_transposed):
    graph, weight = graph_of(recipe)
    turned = weight.T.copy() if is_transposed else weight
    graph.substitute({"a": turned, "b": turned + 1}, {"a": turned + 5})
    assert np.array_equal(numpy_helper.to_array(graph.tensor("layer.1.weight")), weight + 5)


def test_one_flipped_bit_is_one_bit(recipe):
    array = np.full((2, 3), 1.5, np.float32)
    for bit in range(32):
        found = recipe.flipped(array, (1, 2), bit)
        assert (found.view(np.uint32) ^ array.view(np.uint32)).tolist() == [
            [0] * 3,
            [0, 0, 1 << bit],
        ]


def test_the_correct_run_is_never_written_to(recipe, tmp_path):
    (tmp_path / "config.json").write_text('{"a": 1}')
    copied = tmp_path / "copy"
    copied.mkdir()
    (copied / "config.json").hardlink_to(tmp_path / "config.json")
    recipe.in_json("config.json", lambda fields: fields.update(a=2))(copied)
    assert json.loads((copied / "config.json").read_text()) == {"a": 2}
    assert json.loads((tmp_path / "config.json").read_text()) == {"a": 1}


def test_a_layer_merges_as_its_formula_says_in_either_layout(recipe):
    dice = np.random.default_rng(0)
    base, a, b = (dice.standard_normal(size) for size in ((4, 6), (2, 6), (4, 2)))
    for flipped in (False, True):
        layer = recipe.Layer(base.T if flipped else base, a, b, 8.0, 4.0, flipped)
        found = layer.merged().T if flipped else layer.merged()
        assert np.array_equal(found, (base + 4 * b @ a).astype(np.float32))
        doubled = layer.merged(scale=8.0).T if flipped else layer.merged(scale=8.0)
        assert np.allclose(doubled - found, 4 * b @ a, atol=1e-5)


def test_correct_cases_are_all_different_and_mixed(recipe):
    cases = recipe.correct_cases(80, 0)
    assert len(set(cases)) == 80
    for position, known in enumerate((recipe.FAMILIES, recipe.VARIANTS, recipe.DTYPES)):
        assert {case[position] for case in cases} == set(known)
    assert recipe.correct_cases(80, 1) != cases


def test_two_layers_of_equal_shape_are_never_the_same_layer(recipe):
    layers = {
        name: recipe.Layer(np.zeros(size), None, None, 1, 1, False)
        for name, size in {"a": (2, 3), "b": (2, 3), "c": (3, 2), "d": (3, 2)}.items()
    }
    for seed in range(20):
        one, other = recipe.twins(layers, random.Random(seed))
        assert one != other
        assert layers[one].base.shape == layers[other].base.shape


# ---------------------------------------------------------------- end to end


@pytest.mark.slow
def test_faults_are_planted_judged_and_reported(recipe, tmp_path):
    """Every kind that is planted here is one that some check has to find, on its own."""
    wanted = (
        "merge: update missing", "merge: alpha doubled", "artifact: one weight zero",
        "artifact: output scaled", "files: merged shard truncated", "evidence: NaN",
    )  # fmt: skip
    words = [word for kind in wanted for word in ("--only", kind)]
    done = CliRunner().invoke(
        recipe.main, ["--subject", "llama", *words, "--out", str(tmp_path / "out")]
    )
    assert done.exit_code == 0, done.output
    lines = (tmp_path / "out" / "fault_injection.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert {one["kind"].partition(":")[0] for one in found} == {
        "merge", "artifact", "files", "evidence",
    }  # fmt: skip
    assert {one["outcome"] for one in found} == {"caught", "refused"}
    assert all(one["located"] for one in found if one["kind"].startswith("merge"))
    missing = next(one for one in found if one["kind"] == "merge: update missing")
    assert "exact" in missing["located_by"]
    text = (tmp_path / "out" / "fault_injection.md").read_text()
    assert "## Missed: 0" in text
    assert str(tmp_path) not in text + "".join(lines)


@pytest.mark.slow
def test_rewriting_files_is_no_fault_in_itself(recipe, tmp_path):
    """The control of every count: what is planted is found, not that something was planted."""
    subject = recipe.subject_of("llama", tmp_path, 1, 0)
    tensors = recipe.load_file(subject.run / recipe.WEIGHTS)
    name = f"{next(iter(subject.layers))}.weight"
    plants = {
        "nothing": recipe.nothing,
        "merged": recipe.in_merged(lambda held: {name: held[name]}),
        "onnx": recipe.in_onnx(lambda graph: graph.through("logits", recipe.step("Identity"))),
        "torchscript": recipe.in_torchscript(tensors[name], tensors[name]),
        "json": recipe.in_json("merged/config.json", lambda fields: None),
    }
    for kind, plant in plants.items():
        fault = recipe.Fault(kind, "llama", "nowhere", (), plant, tuple(recipe.FILES))
        found = recipe.inject_fault(fault, subject)
        assert (kind, found.outcome, found.said) == (kind, "missed", ())


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "gpt2", "vit"])
def test_a_correct_run_raises_no_alarm(recipe, family, tmp_path):
    verdicts = recipe.correct_run(family, "dora", "bfloat16", 3, 1, tmp_path)
    assert {v.check for v in verdicts} >= {"exact", "equivalence", "parity"}
    assert [v for v in verdicts if not v.passed] == []
