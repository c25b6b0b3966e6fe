import pickle

import pytest

from lora_export import errors

CODES = {"InputError": 2, "AdapterMismatch": 3, "ExportFailed": 4, "CheckFailed": 5}


def _branches():
    return {kind.__name__: kind for kind in errors.LoraExportError.__subclasses__()}


def test_the_tree_has_exactly_the_branches_that_its_docstring_draws():
    assert set(_branches()) == set(CODES)
    assert all(f"── {name} " in errors.__doc__ for name in _branches())


@pytest.mark.parametrize(("name", "code"), CODES.items())
def test_a_branch_has_its_own_exit_code(name, code):
    assert _branches()[name].exit_code == code


def test_the_root_counts_as_a_programming_mistake():
    assert errors.LoraExportError.exit_code == 1


@pytest.mark.parametrize("name", ["InputError", "AdapterMismatch"])
def test_wrong_input_is_also_a_value_error(name):
    assert issubclass(_branches()[name], ValueError)


@pytest.mark.parametrize("name", ["ExportFailed", "CheckFailed"])
def test_a_failed_run_is_also_a_runtime_error(name):
    assert issubclass(_branches()[name], RuntimeError)


@pytest.mark.parametrize("name", CODES)
def test_an_error_survives_the_way_between_processes(name):
    error = pickle.loads(pickle.dumps(_branches()[name]("what failed")))
    assert (type(error).__name__, str(error)) == (name, "what failed")


def test_faults_are_listed_in_sorted_order():
    assert errors.listed("bad", ["b", "c", "a"]) == "bad: a; b; c"


def test_twenty_faults_are_all_shown():
    assert errors.listed("bad", [f"f{i:02}" for i in range(20)]).endswith("; f19")


def test_the_faults_after_the_first_twenty_are_counted():
    message = errors.listed("bad", (f"f{i:02}" for i in range(23)))
    assert "f19" in message
    assert "f20" not in message
    assert message.endswith("; and 3 more")
