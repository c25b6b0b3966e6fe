import json
import os
import platform
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lora_export import environment

CPUINFO = """\
processor\t: 0
model name\t: Example CPU @ 2.00GHz
flags\t\t: fpu sse avx2 avx512f

processor\t: 1
model name\t: Another CPU
flags\t\t: fpu sse
"""


def _words(value):
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list):
        return [word for inner in value for word in _words(inner)]
    return str(value).split()


@pytest.fixture
def processor(tmp_path, monkeypatch):
    """`processor(text)`: what is found where /proc/cpuinfo says `text`; None: no such file."""

    def found(text):
        file = tmp_path / "cpuinfo"
        if text is not None:
            file.write_text(text)
        monkeypatch.setattr(environment, "Path", lambda _: file)
        return environment._processor()

    return found


def test_the_threads_are_those_that_were_used():
    assert environment.describe(3)["threads"] == 3


def test_the_versions_are_those_that_run():
    found = environment.describe(1)
    assert found["python"] == platform.python_version()
    assert found["packages"]["numpy"] == np.__version__


def test_a_package_that_is_not_installed_has_no_version():
    assert environment._version("no-such-package-anywhere") is None


def test_the_description_is_json():
    found = environment.describe(2)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_no_path_of_this_machine_is_described():
    places = [str(Path.cwd()), str(Path.home()), os.path.dirname(environment.__file__)]  # noqa: PTH120
    text = json.dumps(environment.describe(2))
    assert [place for place in places if len(place) > 1 and place in text] == []
    assert [word for word in _words(environment.describe(2)) if word.startswith("/")] == []


def test_the_host_is_not_named():
    assert platform.node() not in _words(environment.describe(2))


def test_the_processor_is_the_first_of_the_list(processor):
    model, flags = processor(CPUINFO)
    assert model == "Example CPU @ 2.00GHz"
    assert {"avx2", "avx512f"} <= flags


def test_an_arm_processor_calls_its_flags_features(processor):
    _, flags = processor("processor\t: 0\nFeatures\t: fp asimd sve\n")
    assert flags == {"fp", "asimd", "sve"}


@pytest.mark.parametrize("text", [None, ""])
def test_an_unknown_processor_has_a_name_and_no_flags(processor, text):
    model, flags = processor(text)
    assert model
    assert flags == set()


def test_only_instruction_sets_that_matter_are_listed(processor, monkeypatch):
    flags = processor(CPUINFO)[1]
    monkeypatch.setattr(environment, "_processor", lambda: ("x", flags))
    assert environment.describe(1)["instruction_sets"] == ["avx2", "avx512f"]


def test_a_system_without_a_load_average_has_none(monkeypatch):
    monkeypatch.delattr(environment.os, "getloadavg", raising=False)
    assert environment.describe(1)["load_average"] is None


def test_at_least_one_core_may_be_used():
    assert environment.cores() >= 1


def test_cores_are_known_where_the_system_has_no_affinity(monkeypatch):
    monkeypatch.setattr(environment, "os", SimpleNamespace(cpu_count=lambda: None))
    assert environment.cores() == 1


def test_memory_that_is_asked_for_is_resident():
    before = environment.resident_memory()
    held = np.ones(8_000_000)
    assert environment.resident_memory() - before > 0.9 * held.nbytes
    assert environment.peak_memory() > held.nbytes


def test_where_the_system_does_not_tell_the_peak_stands_for_what_is_resident(monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "_STATM", tmp_path / "absent")
    assert environment.resident_memory() == environment.peak_memory()


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("sst2", "sst2"),
        ("data/sst2", "data/sst2"),
        ("/home/me/sst2", "sst2"),
        ("--out=/home/me/out", "--out=out"),
        ("--out=out/study", "--out=out/study"),
        ("reviews=/home/me/reviews.tsv", "reviews=reviews.tsv"),
        ("--task=reviews=/home/me/reviews.tsv", "--task=reviews=reviews.tsv"),
        ("/home/me/rank=8/adapter", "adapter"),
        ("--out=/home/me/rank=8/run", "--out=run"),
        ("reviews=/home/me/x=/y", "reviews=y"),
        ("--lr=1e-3", "--lr=1e-3"),
        ("two words", "'two words'"),
    ],
)
def test_the_command_line_is_described_without_folders(monkeypatch, word, shown):
    monkeypatch.setattr("sys.argv", ["/home/me/bin/tool", "go", word])
    assert environment.invoked("tool") == f"tool go {shown}"
