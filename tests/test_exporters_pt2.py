"""Programs of torch.export: free axes, no code of the model's, no trace of the machine."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

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

from lora_export import exporters
from lora_export.errors import ExportFailed
from lora_export.exporters import Request, pt2
from lora_export.records import Signature, TensorSpec


@pytest.fixture(scope="module")
def classifier(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("pt2") / "model.pt2"
    model, signature, example = plain(tiny)
    pt2.export(Request(model, signature, example, ABOUT, path))
    return model, signature, path


@pytest.fixture(scope="module")
def runner(classifier):
    return pt2.open_runner(classifier[2], 1)


@pytest.fixture(scope="module")
def decoding(decoder):
    return pt2.open_runner(decoder[2], 1)


@pytest.fixture(scope="module")
def decoder(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("pt2") / "model.pt2"
    model, signature, example = with_cache(tiny)
    pt2.export(Request(model, signature, example, ABOUT, path))
    return model, signature, path


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_and_padding_gives_the_models_answer(classifier, runner, shape):
    model, signature, _ = classifier
    given = arrays(*shape)
    assert_same(runner.run(given), expected(model, signature, given))


@pytest.mark.parametrize("shape", STEPS, ids=str)
def test_a_cache_of_any_length_goes_in_and_comes_out(decoder, decoding, shape):
    model, signature, _ = decoder
    given = step(*shape)
    assert_same(decoding.run(given), expected(model, signature, given))


def test_the_file_declares_its_axes_itself(classifier, decoder):
    for _, signature, path in (classifier, decoder):
        artifact = exporters.describe("pt2", path)
        assert (artifact.inputs, artifact.outputs) == (signature.inputs, signature.outputs)
        assert (artifact.lora_names, artifact.leaked_paths) == ((), ())
        assert artifact.facts["metadata"] == ABOUT


@pytest.mark.slow
def test_it_runs_where_transformers_cannot_be_imported(classifier, tmp_path):
    model, signature, path = classifier
    given = arrays(2, 5, "left")
    np.savez(tmp_path / "given.npz", **given, wanted=expected(model, signature, given)["logits"])
    code = (
        "import sys\n"
        "sys.modules['transformers'] = sys.modules['lora_export'] = None\n"
        "import numpy, torch\n"
        "given = {k: torch.from_numpy(v) for k, v in numpy.load(sys.argv[1]).items()}\n"
        "program = torch.export.load(sys.argv[2]).module()\n"
        "found = program(given['input_ids'], given['attention_mask'])\n"
        "assert torch.allclose(found, given['wanted'], atol=1e-5)\n"
        "found = program(given['input_ids'][:1, :1], given['attention_mask'][:1, :1])\n"
        "assert found.shape == (1, 2)\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "given.npz"), str(path)]
    subprocess.run(command, check=True, cwd=tmp_path)


def test_sizes_that_do_not_belong_together_are_refused(runner, decoding):
    given = arrays(2, 5, "none")
    with pytest.raises(AssertionError, match="Guard failed"):
        runner.run(given | {"attention_mask": given["attention_mask"][:, :4]})
    given = step(2, 3, 4)
    with pytest.raises(AssertionError, match="Guard failed"):
        decoding.run(given | {"attention_mask": given["attention_mask"][:, :5]})


def test_no_metadata_of_the_exporting_machine_is_kept(classifier):
    with zipfile.ZipFile(classifier[2]) as archive:
        program = archive.read("archive/models/model.json").decode()
        everything = b"".join(archive.read(name) for name in archive.namelist())
    for word in ("stack_trace", "nn_module_stack", "from_node", "modeling_bert"):
        assert word not in program
    for word in (b".py", b"site-packages", b"transformers"):
        assert word not in everything, word


def test_the_same_model_gives_the_same_bytes_under_any_name(tiny, classifier, tmp_path):
    model, signature, example = plain(tiny)
    pt2.export(Request(model, signature, example, ABOUT, tmp_path / "another.pt2"))
    assert (tmp_path / "another.pt2").read_bytes() == classifier[2].read_bytes()


@pytest.mark.slow
def test_a_fresh_process_gives_the_same_bytes(tiny, tmp_path):
    code = (
        "import sys, pathlib\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "import conftest, program_made\n"
        "from lora_export.exporters import Request, pt2\n"
        "for kind in (program_made.plain, program_made.with_cache):\n"
        "    path = pathlib.Path(sys.argv[2], kind.__name__ + '.pt2')\n"
        "    pt2.export(Request(*kind(conftest.build), program_made.ABOUT, path))\n"
    )
    here = str(Path(__file__).parent)
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        command = [sys.executable, "-W", "ignore", "-c", code, here, str(tmp_path / name)]
        subprocess.run(command, check=True)
    for kind in ("plain", "with_cache"):
        first, second = (tmp_path / n / f"{kind}.pt2" for n in ("first", "second"))
        assert first.read_bytes() == second.read_bytes()


@pytest.mark.slow
def test_tied_weights_are_stored_once(tiny, tmp_path):
    outputs = (("batch", "sequence", 100),)
    sizes = []
    for family in ("llama", "llama-tied"):
        path = tmp_path / f"{family}.pt2"
        model, signature, example = plain(tiny, family, outputs)
        pt2.export(Request(model, signature, example, ABOUT, path))
        sizes.append(path.stat().st_size)
        given = arrays(2, 5, "right")
        assert_same(pt2.open_runner(path, 1).run(given), expected(model, signature, given))
    saved = 4 * 100 * 32
    assert saved * 0.9 < sizes[0] - sizes[1] < saved * 1.2


class Fixed(nn.Module):
    def forward(self, input_ids, attention_mask):
        return (input_ids * attention_mask + torch.arange(7)).float()[:, :2]


class InSevens(nn.Module):
    def forward(self, input_ids, attention_mask):
        return (input_ids * attention_mask).reshape(-1, 7).float()[:, :2]


class OneIsSpecial(nn.Module):
    def forward(self, input_ids, attention_mask):
        found = (input_ids * attention_mask)[:, :1].float().expand(-1, 2)
        return found if input_ids.shape[1] > 1 else -found


class Broken(nn.Module):
    def forward(self, input_ids, attention_mask):
        return input_ids.float() if input_ids.sum() > 0 else attention_mask.float()


def small(kind):
    ids = tuple(
        TensorSpec(name, "int64", ("batch", "sequence")) for name in ("input_ids", "attention_mask")
    )
    signature = Signature(ids, (TensorSpec("logits", "float32", ("batch", 2)),), 64, 100, 0)
    return kind(), signature, arrays(3, 7, "right")


def test_a_model_that_fixes_an_axis_is_an_export_failure(tmp_path):
    model, signature, example = small(Fixed)
    with pytest.raises(ExportFailed, match=r"pt2: not at .*attention_mask.* == 7"):
        pt2.export(Request(model, signature, example, ABOUT, tmp_path / "model.pt2"))


def test_a_model_that_looks_at_values_is_an_export_failure(tmp_path):
    model, signature, example = small(Broken)
    with pytest.raises(ExportFailed, match=r"pt2: .*data-dependent"):
        pt2.export(Request(model, signature, example, ABOUT, tmp_path / "model.pt2"))


def test_a_model_that_cannot_do_with_one_token_is_an_export_failure(tmp_path):
    model, signature, example = small(InSevens)
    with pytest.raises(ExportFailed, match="not at batch 1, length 1: shape"):
        pt2.export(Request(model, signature, example, ABOUT, tmp_path / "model.pt2"))


def test_a_condition_that_matters_is_not_dropped_in_silence(tmp_path):
    model, signature, example = small(OneIsSpecial)
    with pytest.raises(ExportFailed, match="logits is not the model's at batch 1, length 1"):
        pt2.export(Request(model, signature, example, ABOUT, tmp_path / "model.pt2"))


@pytest.mark.parametrize("share", [3, 50, 99])
def test_a_damaged_file_is_refused(classifier, tmp_path, share):
    content = classifier[2].read_bytes()
    broken = tmp_path / "model.pt2"
    broken.write_bytes(content[: len(content) * share // 100])
    for ask in (pt2.inspect, lambda path: pt2.open_runner(path, 1)):
        with pytest.raises(ExportFailed, match=r"model\.pt2"):
            ask(broken)


def test_a_program_of_somebody_else_is_refused(tmp_path):
    class Twice(nn.Module):
        def forward(self, x):
            return 2 * x

    torch.export.save(torch.export.export(Twice(), (torch.ones(2),)), tmp_path / "model.pt2")
    with pytest.raises(ExportFailed, match=r"no pt2 file of lora-export: it has no 'lora_export"):
        pt2.inspect(tmp_path / "model.pt2")


@pytest.mark.slow
def test_what_is_left_of_a_lora_would_be_found(tiny, fill, tmp_path):
    from lora_export import LoraConfig, inject

    model, signature, example = plain(tiny)
    inject(model.model, LoraConfig(rank=2, alpha=2.0))
    fill(model.model)
    pt2.export(Request(model.eval(), signature, example, ABOUT, tmp_path / "model.pt2"))
    assert any("lora_A" in n for n in exporters.describe("pt2", tmp_path / "model.pt2").lora_names)


def test_the_note_is_json_that_names_both_sides(classifier):
    with zipfile.ZipFile(classifier[2]) as archive:
        note = json.loads(archive.read("archive/extra/lora_export.json"))
    assert [spec["name"] for spec in note["inputs"]] == ["input_ids", "attention_mask"]
    assert [spec["name"] for spec in note["outputs"]] == ["logits"]
