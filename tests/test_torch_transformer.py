"""The recipe for transformers of torch.nn: what it promises holds, and a planted fault is found."""

import importlib
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lora_export import InputError, LoraLinear, read_adapter
from lora_export.injection import lora_layers

ENCODERS = ["own", "torch"]


@pytest.fixture(scope="module")
def recipe():
    return importlib.import_module("torch_transformer")


@pytest.fixture
def start(recipe, tmp_path, monkeypatch):
    def start(*more):
        words = ["--out", tmp_path / "out", "--steps", 5, "--width", 16, "--rank", 2, *more]
        monkeypatch.setattr(sys, "argv", ["torch_transformer.py", *map(str, words)])
        recipe.main()
        return tmp_path / "out"

    return start


@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_claim_holds(start, encoder, capsys):
    out = start("--encoder", encoder)
    told = capsys.readouterr().out
    assert told.count("pass  ") == 10
    assert "FAIL" not in told
    adapter = read_adapter(out / "adapter.safetensors")
    assert {pair.rank for pair in adapter.modules.values()} == {2}
    assert len(adapter.modules) == {"own": 12, "torch": 4}[encoder]
    assert set(adapter.replaced) == {"head.weight", "head.bias"}
    names = load_file(out / "merged.safetensors")
    assert names
    assert not [name for name in names if "lora" in name]


@pytest.mark.parametrize("option", ["--steps", "--lr"])
def test_an_update_that_was_not_trained_fails(start, option, capsys):
    with pytest.raises(SystemExit) as stopped:
        start(option, 0)
    assert stopped.value.code == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if "FAIL" in line]
    assert [line.split("  ")[1] for line in failed] == ["every update was trained"]
    assert failed[0].endswith("12 of 12 are zero")


@pytest.mark.slow
def test_lora_learns_the_second_task(start, capsys):
    start("--steps", 80, "--lr", 0.01, "--width", 32)
    shares = capsys.readouterr().out.split("in the second ")[1].split()
    before, after = float(shares[0]), float(shares[3])
    assert after > 0.9 > before


def test_a_lora_linear_has_the_names_of_the_layer_that_it_stands_for(recipe):
    plain = recipe.Classifier(10, 16, "own", nn.Linear)
    adapted = recipe.Classifier(10, 16, "own", LoraLinear)
    added = set(adapted.state_dict()) - set(plain.state_dict())
    assert {name.rpartition(".")[2] for name in added} == {"lora_A", "lora_B"}
    assert set(plain.state_dict()) < set(adapted.state_dict())


@pytest.mark.parametrize("encoder", ENCODERS)
def test_padding_changes_no_answer(recipe, encoder):
    model = recipe.Classifier(10, 16, encoder, nn.Linear).eval()
    short, long = torch.tensor([[2, 3, 4]]), torch.tensor([[2, 3, 4, 0, 0], [5, 6, 7, 8, 9]])
    with torch.no_grad():
        torch.testing.assert_close(model(long)[:1], model(short), rtol=1e-5, atol=1e-6)


def no_update(recipe, monkeypatch):
    """One layer is merged without its update."""
    real = recipe.merge

    def merge(model):
        merged = real(model)
        path, layer = next(iter(lora_layers(model).items()))
        merged.get_submodule(path).weight = nn.Parameter(layer.weight.detach().clone())
        return merged

    monkeypatch.setattr(recipe, "merge", merge)


def other_scale(recipe, monkeypatch):
    """The adapter comes back from its file with another scale."""
    real = recipe.load_adapter

    def load(model, path):
        real(model, path)
        next(iter(lora_layers(model).values())).scale *= 1.01

    monkeypatch.setattr(recipe, "load_adapter", load)


def thawed_base(recipe, monkeypatch):
    """A norm of the base is trained along with LoRA."""
    real = recipe.adapt

    def adapt(*given):
        adapted = real(*given)
        next(m for m in adapted.modules() if isinstance(m, nn.LayerNorm)).requires_grad_(True)
        return adapted

    monkeypatch.setattr(recipe, "adapt", adapt)


def skipped_update(recipe, monkeypatch):
    """Torch's fast path is open again, which reads weights alone."""
    real = recipe.answers

    def answers(model, examples, **mode):
        for layer in lora_layers(model).values():
            layer._forward_pre_hooks.clear()
        return real(model, examples, **mode)

    monkeypatch.setattr(recipe, "answers", answers)


@pytest.mark.parametrize(
    ("fault", "encoder", "claim"),
    [
        (no_update, "own", "merged answers as in float64, eval mode"),
        (no_update, "torch", "merged answers as in float64, training mode"),
        (other_scale, "own", "saved and loaded again"),
        (thawed_base, "own", "the base did not move"),
        (skipped_update, "torch", "LoRA answers as in float64, eval mode"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_claim_fails_on_a_planted_fault(
    fault, encoder, claim, recipe, start, monkeypatch, capsys
):
    fault(recipe, monkeypatch)
    with pytest.raises(SystemExit) as stopped:
        start("--encoder", encoder, "--lr", 0.01)
    assert stopped.value.code == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if "FAIL" in line]
    assert any(claim in line for line in failed)


def test_it_reads_sentences_and_labels_from_a_folder(start, tmp_path, capsys):
    rows = "".join(f"a {word} film\t{label}\n" for word, label in [("good", 1), ("bad", 0)] * 9)
    for name in ("train", "dev"):
        (tmp_path / f"{name}.tsv").write_text("sentence\tlabel\n" + rows)
    start("--data", tmp_path)
    assert "accuracy on 18 dev texts" in capsys.readouterr().out


@pytest.mark.parametrize("label", ["2", "-1"])
def test_a_label_of_another_kind_is_refused(start, tmp_path, label):
    (tmp_path / "train.tsv").write_text(f"sentence\tlabel\na film\t1\na plot\t{label}\n")
    with pytest.raises(InputError, match=rf"train\.tsv has labels \{{{label}\}}; expected 0 and 1"):
        start("--data", tmp_path)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--width", 18, "--width is 18; expected a multiple of 4 heads"),
        ("--width", 0, "--width is 0"),
        ("--batch-size", 0, "--batch-size is 0; expected at least 1"),
    ],
)
def test_a_number_that_cannot_work_is_refused(start, option, value, message):
    with pytest.raises(InputError, match=message):
        start(option, value)
