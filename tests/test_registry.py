import sys

import pytest

from lora_export import formats, registry, variants
from lora_export.errors import InputError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A package of two entries, one private file, and an entry that must not be imported."""
    package = tmp_path / "kinds_of_tea"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "green.py").write_text("CUPS = 2\n")
    (package / "_leaves.py").write_text("")
    (package / "black.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "kinds_of_tea"
    for name in [name for name in sys.modules if name.startswith("kinds_of_tea")]:
        del sys.modules[name]
    registry.names.cache_clear()


def test_a_file_is_an_entry_under_its_own_name(folder):
    assert registry.names(folder) == ("black", "green")


def test_listing_names_imports_no_entry(folder):
    registry.names(folder)
    assert not {"kinds_of_tea.black", "kinds_of_tea.green"} & sys.modules.keys()


def test_loading_returns_the_module_of_that_name(folder):
    assert registry.load(folder, "green").CUPS == 2


def test_an_unknown_name_is_answered_with_the_known_ones(folder):
    with pytest.raises(InputError, match="'mint' is not one of the kinds_of_tea: black, green"):
        registry.load(folder, "mint")


@pytest.mark.parametrize("name", ["_leaves", "../secrets", "", "__init__"])
def test_only_listed_names_are_imported(folder, name):
    with pytest.raises(InputError, match="is not one of"):
        registry.load(folder, name)


def test_the_shipped_variants_are_found():
    assert {"lora", "rslora"} <= set(variants.names())


def test_the_shipped_adapter_formats_are_found():
    assert {"native", "peft"} <= set(formats.names())


@pytest.mark.parametrize("name", formats.names())
def test_every_adapter_format_can_detect_and_read(name):
    module = formats.load(name)
    assert callable(module.detect)
    assert callable(module.read)
