"""Imports point down: each module imports only modules that stand above it in this list."""

import ast
from pathlib import Path

import pytest

import lora_export

ROOT = Path(lora_export.__file__).parent
ORDER = [
    "errors", "refusals", "records", "scoring", "registry", "environment", "storage",
    "architecture", "publishing", "config", "rounding", "_kernel", "arithmetic", "variants",
    "torch_rounding", "pickles", "lora", "recomputed", "injection", "live", "quantised",
    "peft_config", "peft_names", "peft_writing", "formats", "bases", "adapter", "methods",
    "training", "normalising", "conversion", "companions", "plan", "blocks", "streaming", "merging",
    "auditing",
    "models", "weightless", "resolving", "fitting", "loading", "compare", "runners", "recording",
    "inputs", "generating", "calling", "exporters", "matching", "placing", "timing", "footprint",
    "candidates", "checks", "measurements", "codec", "report", "certificates", "comparing",
    "judging", "replaying", "opening", "inspection", "merged_files", "claims", "stages", "fusing",
    "observing", "plotting", "localising", "diagnosing", "proving", "tuning", "pipeline", "cli",
    "pytest_plugin", "__main__",
]  # fmt: skip
# Heavy or replaceable packages, and the only places that may know them.
HOMES = {
    "onnx": {"exporters/onnx.py", "exporters/_onnx_translate.py", "exporters/_onnx_double.py"},
    "onnxruntime": {"runners/onnx.py"},
    "onnxruntime_extensions": {"runners/onnx.py"},
    "openvino": {"runners/openvino.py"},
    "transformers": {"models.py", "calling.py", "resolving.py", "lora.py", "quantised.py"},
    "bitsandbytes": {"lora.py", "quantised.py"},
    "huggingface_hub": {"bases.py"},
    "click": {"cli"},
    "rich": {"cli", "training.py"},
    "accelerate": {"training.py"},
    "peft": set(),
    "pytest": {"pytest_plugin.py"},
    "jsonschema": {"certificates.py"},
    "jinja2": {"report/html.py"},
    "matplotlib": {"plotting.py", "report/_plots.py"},
    "sklearn": {"scoring.py"},
    "sacrebleu": {"scoring.py"},
    "rouge_score": {"scoring.py"},
}


def imported(source: str) -> set[str]:
    """Return every module that the text imports, function-level imports included."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def upward(name: str, source: str) -> list[str]:
    """Return the imports of the module `name` (a name in ORDER) that do not point down."""
    bad = []
    for path in imported(source):
        parts = path.split(".")
        if parts[0] != "lora_export" or parts[1] not in ORDER:
            continue  # a third party, or the package's own version
        own_folder = parts[1] == name and (ROOT / name).is_dir()
        entry = len(parts) > 2 and (ROOT / name / f"{parts[2]}.py").is_file()
        private = entry and parts[2].startswith("_")
        if own_folder and (not entry or private):
            continue  # what the folder's own __init__ or private file offers to its entries
        if ORDER.index(parts[1]) >= ORDER.index(name):
            bad.append(path)
    return sorted(bad)


def files() -> list[Path]:
    found = [*ROOT.rglob("*.py"), *ROOT.rglob("*.pyi")]  # the latter of what is written in C
    return [path for path in sorted(found) if path != ROOT / "__init__.py"]


def home(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".pyi").removesuffix(".py")


def test_every_module_has_its_place_in_the_order():
    assert sorted({home(path) for path in files()}) == sorted(ORDER)


@pytest.mark.parametrize("path", files(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_point_down(path):
    found = upward(home(path), path.read_text())
    if path == ROOT / "cli" / "__init__.py":  # makes the exporters' commands, when one is asked for
        found.remove("lora_export.cli.export.command_for")
    assert found == []


def test_an_upward_import_is_found():
    assert upward("plan", "def f():\n    from lora_export.merging import merge") == [
        "lora_export.merging.merge"
    ]


def test_an_import_of_a_sibling_entry_is_found():
    assert upward("checks", "from lora_export.checks import parity") == [
        "lora_export.checks.parity"
    ]


@pytest.mark.parametrize("package", HOMES)
def test_a_package_is_known_in_its_home_only(package):
    found = {
        path.relative_to(ROOT).as_posix()
        for path in files()
        if any(name.split(".")[0] == package for name in imported(path.read_text()))
    }
    strangers = {path for path in found if path not in HOMES[package]}
    assert {path for path in strangers if path.split("/")[0] not in HOMES[package]} == set()
