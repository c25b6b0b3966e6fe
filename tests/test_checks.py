import ast
import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
from hand_made import LOGITS, alone, evidence, reading, recordings, reduced, writing

from lora_export import checks, registry
from lora_export.records import Evidence, Status

SCOPES = {
    checks.MERGE, checks.TRIAL, checks.EXPORT, checks.QUICK, checks.RUN, checks.VERIFY,
    checks.REPLAY,
}  # fmt: skip
FIELDS = {
    "account": None, "weights": (), "modules": None, "signature": None, "artifacts": (),
    "batches": (), "recordings": {}, "timings": (), "files": (),
}  # fmt: skip


# Asked of artifacts in reduced precision alone, of those with the tokenizer inside, and of models
# that write.
RARE = {"fidelity": reduced, "text": reading, "generation": writing}


def sound(name):
    """Evidence that the check `name` passes."""
    return RARE.get(name, evidence)()


def _check(name):
    return registry.load("lora_export.checks", name)


def test_the_shipped_checks_are_found():
    assert set(checks.names()) >= {
        "accounted", "decisions", "effect", "equivalence", "exact", "intact", "latency", "parity",
        "plain", "structure",
    }  # fmt: skip


@pytest.mark.parametrize("name", checks.names())
def test_a_check_declares_the_commands_that_ask_it(name):
    assert set(_check(name).SCOPES)
    assert set(_check(name).SCOPES) <= SCOPES


@pytest.mark.parametrize("name", checks.names())
def test_a_whole_run_asks_every_check(name):
    assert checks.RUN in _check(name).SCOPES


@pytest.mark.parametrize("name", checks.names())
def test_a_check_without_evidence_gives_verdicts_and_none_is_a_pass(name):
    verdicts = _check(name).judge(Evidence())
    assert verdicts
    assert {verdict.status for verdict in verdicts} == {Status.NOT_RUN}


@pytest.mark.parametrize("name", checks.names())
def test_a_check_passes_sound_evidence(name):
    verdicts = _check(name).judge(sound(name))
    assert [(v.subject, v.note) for v in verdicts if not v.passed] == []


@pytest.mark.parametrize("name", checks.names())
def test_a_verdict_carries_the_name_of_its_check(name):
    assert {v.check for v in _check(name).judge(sound(name))} == {name}
    assert {v.check for v in _check(name).judge(Evidence())} == {name}


@pytest.mark.parametrize("name", checks.names())
def test_no_two_verdicts_of_a_check_have_the_same_subject(name):
    subjects = [verdict.subject for verdict in _check(name).judge(sound(name))]
    assert len(subjects) == len(set(subjects))


@pytest.mark.parametrize("name", checks.names())
def test_a_check_gives_the_same_verdicts_twice(name):
    assert _check(name).judge(sound(name)) == _check(name).judge(sound(name))


@pytest.mark.parametrize("name", checks.names())
def test_a_check_has_a_named_test_in_which_it_fails(name):
    file = Path(__file__).with_name(f"test_checks_{name}.py")
    functions = [node.name for node in ast.walk(ast.parse(file.read_text("utf-8")))
                 if isinstance(node, ast.FunctionDef)]  # fmt: skip
    assert [f for f in functions if f.startswith("test_") and "fails" in f]


@pytest.mark.parametrize("scope", sorted(SCOPES))
def test_only_the_checks_of_a_scope_are_asked(scope):
    wanted = {name for name in checks.names() if scope in _check(name).SCOPES}
    assert {verdict.check for verdict in checks.judge(evidence(), scope)} == wanted - RARE.keys()


def test_verdicts_come_in_the_order_of_the_checks_names():
    found = [verdict.check for verdict in checks.judge(evidence(), checks.RUN)]
    assert found == sorted(found)


def test_a_scope_that_nobody_knows_gives_no_verdicts():
    assert checks.judge(evidence(), "nonsense") == ()


@pytest.mark.parametrize(("field", "nothing"), FIELDS.items())
def test_whatever_is_missing_from_a_run_it_does_not_pass(field, nothing):
    found = checks.judge(dataclasses.replace(evidence(), **{field: nothing}), checks.RUN)
    assert not all(verdict.passed for verdict in found)


def test_a_check_whose_question_makes_no_sense_is_not_asked(monkeypatch):
    senseless = SimpleNamespace(
        SCOPES=(checks.RUN,), applies=lambda _: False, judge=lambda _: [checks.not_run("", "", "")]
    )
    monkeypatch.setattr(checks.registry, "load", lambda *_: senseless)
    assert checks.judge(evidence(), checks.RUN) == ()


def test_a_regression_can_pass_every_check_that_it_is_asked():
    single = [logits[:, :1] for logits in LOGITS]
    known = recordings(single)
    found = checks.judge(evidence(recordings=known, alone=alone(answers=known)), checks.RUN)
    assert [verdict.note for verdict in found if not verdict.passed] == []
    assert {verdict.check for verdict in found} == (
        {*checks.names()} - {"decisions", "accuracy"} - RARE.keys()
    )


def test_a_check_that_says_nothing_is_a_mistake(monkeypatch):
    silent = SimpleNamespace(SCOPES=(checks.RUN,), judge=lambda _: [])
    monkeypatch.setattr(checks.registry, "load", lambda *_: silent)
    with pytest.raises(AssertionError, match="gave no verdict"):
        checks.judge(evidence(), checks.RUN)


def test_counting_nothing_is_a_fail():
    assert checks.counted("exact", "x", 0, 0, "faults", "").status is Status.FAIL


def test_counting_a_fault_is_a_fail():
    assert checks.counted("exact", "x", 1, 5, "faults", "").status is Status.FAIL


def test_counting_without_a_fault_is_a_pass():
    assert checks.counted("exact", "x", 0, 5, "faults", "").status is Status.PASS


def test_what_was_not_run_compares_nothing_and_says_why():
    verdict = checks.not_run("exact", "x", "no files")
    assert (verdict.status, verdict.compared, verdict.note) == (Status.NOT_RUN, 0, "no files")
