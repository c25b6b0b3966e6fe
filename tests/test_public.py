import subprocess
import sys
import time

import pytest

import lora_export


def loaded_after(statement: str) -> set[str]:
    """Return the names of the modules that a fresh interpreter has loaded after `statement`."""
    code = f"{statement}\nimport sys\nprint('LOADED', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.partition("LOADED")[2].split())


@pytest.mark.parametrize("name", lora_export.__all__)
def test_every_public_name_exists(name):
    assert getattr(lora_export, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        lora_export.nothing  # noqa: B018


def test_importing_the_package_loads_no_torch():
    assert not loaded_after("import lora_export") & {"torch", "transformers", "numpy", "click"}


def test_loading_torch_would_be_seen():
    assert "torch" in loaded_after("import lora_export; lora_export.LoraLinear")


def test_reading_an_adapter_loads_no_torch():
    assert "torch" not in loaded_after("import lora_export; lora_export.read_adapter")


def test_help_loads_no_torch():
    statement = (
        "from lora_export.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit: pass"
    )
    assert not loaded_after(statement) & {"torch", "transformers", "onnx", "rich", "numpy"}


@pytest.mark.parametrize("name", ["report", "verify", "compare", "check"])
def test_help_of_what_reads_certificates_loads_no_torch(name):
    statement = (
        f"from lora_export.cli import main\ntry:\n    main([{name!r}, '--help'])\n"
        "except SystemExit: pass"
    )
    assert not loaded_after(statement) & {"torch", "transformers", "onnx", "rich", "numpy"}


def test_help_is_fast():
    """The fastest of several starts, so that a busy machine does not decide."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "lora_export", "--help"], check=True, capture_output=True
        )
        times.append(time.perf_counter() - start)
    assert min(times) < 0.25
