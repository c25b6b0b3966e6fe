"""Compiled packages: free axes, honest about the machine that they need, no trace of this one."""

import json
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from program_made import (
    ABOUT,
    SHAPES,
    STEPS,
    arrays,
    assert_same,
    expected,
    plain,
    step,
    with_cache,
)
from torch import nn
from torch._inductor import cpu_vec_isa

from lora_export import environment, exporters
from lora_export.errors import ExportFailed, InputError
from lora_export.exporters import Request, aoti
from lora_export.records import Signature, TensorSpec
from lora_export.runners import aoti as runners
from lora_export.runners._torch import NOTE

HAS_COMPILER = shutil.which("g++") is not None
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="there is no g++")
NOTED = {
    "inputs": [{"name": "input_ids", "dtype": "int64", "axes": ["batch", "sequence"]}],
    "outputs": [{"name": "logits", "dtype": "float32", "axes": ["batch", 2]}],
    "metadata": ABOUT,
    "names": ["head.weight"],
    "precision": "float32",
    "target": {"platform": sys.platform, "machine": "x86_64", "isa": ["avx2"]},
    "torch": torch.__version__,
}


def written(path, **changes):
    """Write a package without code in it."""
    with path.open("w+b") as stream, torch.export.pt2_archive.PT2ArchiveWriter(stream) as archive:
        archive.write_string(f"extra/{NOTE}", json.dumps({**NOTED, **changes}))
    return path


def test_without_a_compiler_its_name_is_in_the_error(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    model, signature, example = plain(tiny)
    with pytest.raises(ExportFailed, match=r"no C\+\+ compiler: g\+\+ is not there; install"):
        aoti.export(Request(model, signature, example, ABOUT, tmp_path / "model.aoti.pt2"))
    assert list(tmp_path.iterdir()) == []


def test_the_package_says_what_it_is_without_being_run(tmp_path):
    contents = aoti.inspect(written(tmp_path / "model.aoti.pt2"))
    assert contents.inputs == (TensorSpec("input_ids", "int64", ("batch", "sequence")),)
    assert contents.outputs == (TensorSpec("logits", "float32", ("batch", 2)),)
    assert contents.names == ("head.weight",)
    assert contents.facts["metadata"] == ABOUT
    assert contents.facts["target"]["isa"] == ["avx2"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"isa": ["avx2", "avx9000"]}, "compiled for a processor with avx9000; export it"),
        ({"machine": "m68k"}, "compiled for machine m68k, not"),
        ({"platform": "plan9"}, "compiled for platform plan9, not"),
    ],
)
def test_another_machine_is_refused_before_anything_runs(tmp_path, changes, said):
    target = {**NOTED["target"], "machine": runners.platform.machine(), **changes}
    path = written(tmp_path / "model.aoti.pt2", target=target)
    with pytest.raises(InputError, match=said):
        aoti.open_runner(path, 1)


def test_a_package_without_code_is_refused(tmp_path):
    target = {**NOTED["target"], "machine": runners.platform.machine(), "isa": []}
    path = written(tmp_path / "model.aoti.pt2", target=target)
    with pytest.raises(ExportFailed, match=r"model\.aoti\.pt2 cannot be loaded"):
        aoti.open_runner(path, 1)


def test_a_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "model.aoti.pt2"
    path.write_bytes(b"no archive at all")
    for ask in (aoti.inspect, lambda path: aoti.open_runner(path, 1)):
        with pytest.raises(ExportFailed, match=r"model\.aoti\.pt2 is no AOTInductor package"):
            ask(path)


# ---------------------------------------------------------------- with a compiler


@pytest.fixture(scope="module")
def classifier(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("aoti") / "model.aoti.pt2"
    model, signature, example = plain(tiny)
    aoti.export(Request(model, signature, example, ABOUT, path))
    return model, signature, path


@pytest.fixture(scope="module")
def decoder(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("aoti") / "model.aoti.pt2"
    model, signature, example = with_cache(tiny)
    aoti.export(Request(model, signature, example, ABOUT, path))
    return model, signature, path


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_and_padding_gives_the_models_answer(classifier, shape):
    model, signature, path = classifier
    given = arrays(*shape)
    assert_same(aoti.open_runner(path, 1).run(given), expected(model, signature, given))


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("shape", STEPS, ids=str)
def test_a_cache_of_any_length_goes_in_and_comes_out(decoder, shape):
    model, signature, path = decoder
    given = step(*shape)
    assert_same(aoti.open_runner(path, 1).run(given), expected(model, signature, given))


@needs_compiler
@pytest.mark.slow
def test_what_was_written_declares_axes_and_machine_and_names_no_place(classifier, decoder):
    for _, signature, path in (classifier, decoder):
        artifact = exporters.describe("aoti", path)
        assert (artifact.inputs, artifact.outputs) == (signature.inputs, signature.outputs)
        assert (artifact.lora_names, artifact.leaked_paths) == ((), ())
        assert artifact.facts["metadata"] == ABOUT
        assert artifact.facts["target"]["platform"] == sys.platform
        assert [file.name for file in path.parent.iterdir()] == ["model.aoti.pt2"]
        with zipfile.ZipFile(path) as archive:
            assert not [name for name in archive.namelist() if name.endswith((".cpp", ".h"))]
            everything = b"".join(archive.read(name) for name in archive.namelist())
        for word in (b"torchinductor", b"site-packages", str(path.parent).encode()):
            assert word not in everything


@needs_compiler
@pytest.mark.slow
def test_it_runs_without_compiler_and_transformers(classifier, tmp_path):
    model, signature, path = classifier
    given = arrays(2, 5, "left")
    np.savez(tmp_path / "given.npz", **given, wanted=expected(model, signature, given)["logits"])
    code = (
        "import sys, pathlib\n"
        "sys.modules['transformers'] = None\n"
        "import numpy\n"
        "from lora_export.runners.aoti import AotiRunner\n"
        "given = dict(numpy.load(sys.argv[1]))\n"
        "found = AotiRunner(pathlib.Path(sys.argv[2])).run(given)\n"
        "assert numpy.allclose(found['logits'], given['wanted'], atol=1e-5)\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "given.npz"), str(path)]
    subprocess.run(command, check=True, env={"PATH": str(tmp_path)}, cwd=tmp_path)


@needs_compiler
@pytest.mark.slow
def test_inputs_that_were_not_compiled_for_are_refused(classifier):
    runner, given = aoti.open_runner(classifier[2], 1), arrays(2, 5, "none")
    mask = given["attention_mask"]
    for wrong in (mask.astype(np.int32), mask[:1], mask[0]):
        with pytest.raises(InputError, match=r"attention_mask is int(32|64)\[.*expected int64"):
            runner.run(given | {"attention_mask": wrong})
    strided = {name: np.asfortranarray(array) for name, array in given.items()}
    np.testing.assert_array_equal(runner.run(strided)["logits"], runner.run(given)["logits"])


@needs_compiler
@pytest.mark.slow
def test_the_same_model_gives_the_same_bytes(tiny, classifier, tmp_path):
    model, signature, example = plain(tiny)
    aoti.export(Request(model, signature, example, ABOUT, tmp_path / "another.aoti.pt2"))
    assert (tmp_path / "another.aoti.pt2").read_bytes() == classifier[2].read_bytes()


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("share", [3, 99])
def test_a_damaged_file_is_refused(classifier, tmp_path, share):
    content = classifier[2].read_bytes()
    broken = tmp_path / "model.aoti.pt2"
    broken.write_bytes(content[: len(content) * share // 100])
    for ask in (aoti.inspect, lambda path: aoti.open_runner(path, 1)):
        with pytest.raises(ExportFailed, match=r"model\.aoti\.pt2"):
            ask(broken)


@needs_compiler
@pytest.mark.slow
def test_tied_weights_are_stored_once(tiny, tmp_path):
    sizes = []
    for family in ("llama", "llama-tied"):
        model, signature, example = plain(tiny, family, (("batch", "sequence", 100),))
        path = tmp_path / f"{family}.aoti.pt2"
        aoti.export(Request(model, signature, example, ABOUT, path))
        sizes.append(path.stat().st_size)
    assert sizes[0] - sizes[1] > 0.8 * 4 * 100 * 32


class Broken(nn.Module):
    def forward(self, input_ids, attention_mask):
        return input_ids.float() if input_ids.sum() > 0 else attention_mask.float()


@needs_compiler
def test_a_model_that_looks_at_values_is_an_export_failure(tmp_path):
    ids = tuple(
        TensorSpec(name, "int64", ("batch", "sequence")) for name in ("input_ids", "attention_mask")
    )
    signature = Signature(ids, (TensorSpec("logits", "float32", ("batch", 2)),), 64, 100, 0)
    with pytest.raises(ExportFailed, match=r"aoti: .*data-dependent"):
        aoti.export(
            Request(Broken(), signature, arrays(3, 7, "right"), {}, tmp_path / "m.aoti.pt2")
        )


@pytest.fixture
def offered(monkeypatch):
    """Have torch offer the instruction sets of a large server."""
    sets = [
        ("avx512", "avx512_vnni", "amx_tile"),
        ("avx512", "avx512_vnni"),
        ("avx512",),
        ("avx2",),
    ]
    known = [isa for isa in cpu_vec_isa.supported_vec_isa_list if tuple(str(isa).split()) in sets]
    assert [tuple(str(isa).split()) for isa in known] == sets
    monkeypatch.setattr(cpu_vec_isa, "valid_vec_isa_list", lambda: known)
    monkeypatch.setattr(aoti.platform, "machine", lambda: "x86_64")
    return known


@pytest.mark.parametrize(
    ("target", "wanted"),
    [
        ("native", ["avx512", "avx512_vnni", "amx_tile"]),
        ("generic", ["avx2"]),
        ("cpu-avx512", ["avx512", "avx512_vnni"]),
        ("cpu-amx", ["avx512", "avx512_vnni", "amx_tile"]),
    ],
)
def test_torch_compiles_for_the_target_that_is_asked_for(offered, target, wanted):
    with aoti._compiling_for(target):
        assert aoti._isa() == wanted
    assert aoti._isa() == ["avx512", "avx512_vnni", "amx_tile"]


def test_a_target_that_torch_has_no_instructions_of_is_refused(offered):
    del offered[-1]
    with (
        pytest.raises(ExportFailed, match="cannot compile for generic on this machine"),
        aoti._compiling_for("generic"),
    ):
        pass


def test_every_target_is_known():
    assert aoti._INSTRUCTIONS.keys() == environment.TARGETS.keys()
