"""The integrity recipe: what it promises holds, and a planted fault is found."""

import dataclasses
import importlib
import sys

import pytest
import torch
from torch import nn

from lora_export import certificates
from lora_export.errors import InputError
from lora_export.injection import lora_layers
from lora_export.records import Status


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A place to write to; each run over the same base would write the same there."""
    return tmp_path_factory.mktemp("integrity")


@pytest.fixture(scope="module")
def recipe():
    return importlib.import_module("integrity")


@pytest.fixture
def outcome(recipe, folder, monkeypatch, capsys):
    """Run the recipe on a small OPT; return the exit code and whether each claim holds."""

    def outcome(*more, source=("--from-config",)):
        words = [*source, "--out", folder, "--steps", 2, "--new-tokens", 6, *more]
        monkeypatch.setattr(sys, "argv", ["integrity.py", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            recipe.main()
        lines = [line.split("  ", 1) for line in capsys.readouterr().out.splitlines()]
        told = {text.split("  ")[0].strip(): mark == "pass" for mark, text in lines}
        return stopped.value.code, told

    return outcome


def test_every_claim_holds_up_to_the_merge_in_memory(outcome, folder):
    code, told = outcome("--no-export")
    assert code == 0
    assert len(told) == 10
    assert all(told.values())
    assert (folder / "adapter.safetensors").is_file()


def test_a_base_in_a_directory_is_taken_as_it_is(outcome, folder):
    outcome("--no-export")
    before = (folder / "base" / "model.safetensors").read_bytes()
    source = ("--model", folder / "base")
    code, told = outcome("--no-export", "--targets", "q_proj", source=source)
    assert code == 0
    assert all(told.values())
    assert (folder / "base" / "model.safetensors").read_bytes() == before


def first(model):
    return next(iter(lora_layers(model).items()))


def other_scale(recipe, monkeypatch):
    real = recipe.load_adapter

    def load(model, path):
        real(model, path)
        first(model)[1].scale *= 1.001

    monkeypatch.setattr(recipe, "load_adapter", load)


def no_update_in_one_layer(recipe, monkeypatch):
    real = recipe.merge

    def merge(model):
        nn.init.zeros_(first(model)[1].lora_B)
        return real(model)

    monkeypatch.setattr(recipe, "merge", merge)


def a_layer_left(recipe, monkeypatch):
    monkeypatch.setattr(recipe, "merge", lambda model: model)


def another_rank(recipe, monkeypatch):
    real = recipe.inject
    monkeypatch.setattr(
        recipe, "inject", lambda m, config: real(m, dataclasses.replace(config, rank=9))
    )


def a_bias_that_is_trained(recipe, monkeypatch):
    real = recipe.inject

    def inject(model, config):
        paths = real(model, config)
        model.get_submodule(paths[0]).bias.requires_grad_(True)
        return paths

    monkeypatch.setattr(recipe, "inject", inject)


def no_training(recipe, monkeypatch):
    monkeypatch.setattr(recipe, "train", lambda *given: None)


@pytest.mark.parametrize(
    ("fault", "claims"),
    [
        (other_scale, {"saved and loaded: logits of the same bits"}),
        (no_update_in_one_layer, {"merged: logits as in float64"}),
        (a_layer_left, {"merged: the base's own modules"}),
        (another_rank, {"LoRA has r (in + out) parameters a layer"}),
        (a_bias_that_is_trained, {"all others are frozen", "training left the base's bits alone"}),
        (no_training, {"every update was trained", "the adapter moves the logits"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_claim_fails_on_a_planted_fault(fault, claims, recipe, outcome, monkeypatch):
    fault(recipe, monkeypatch)
    code, told = outcome("--no-export")
    assert code == 1
    assert claims <= {claim for claim, holds in told.items() if not holds}


def test_other_text_fails(recipe):
    truth = recipe.Truth(torch.zeros(1, 2), 1.0, [[1, 2, 3]])
    assert truth.same_text("own", [[1, 2, 3]]).holds
    assert not truth.same_text("other", [[1, 2, 4]]).holds
    assert not recipe.Truth(torch.zeros(1, 2), 1.0, [[]]).same_text("none", [[]]).holds


def test_logits_that_are_no_numbers_fail(recipe):
    truth = recipe.Truth(torch.zeros(1, 2), 1.0, [])
    assert truth.same_logits("near", torch.ones(1, 2)).holds
    assert not truth.same_logits("far", torch.full((1, 2), 1.1)).holds
    assert not truth.same_logits("nan", torch.full((1, 2), torch.nan)).holds


def test_nothing_claimed_is_not_a_pass(recipe):
    assert not recipe.report(iter([]))


def test_an_untrained_adapter_is_refused(recipe, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["integrity.py", "--from-config", "--steps", "0"])
    with pytest.raises(InputError, match="an untrained adapter proves nothing"):
        recipe.main()


def test_what_the_model_has_no_positions_for_is_refused(recipe, folder, tmp_path, monkeypatch):
    (tmp_path / "long.txt").write_text("a great film " * 200)
    cases = (
        (["--new-tokens", "0"], "--new-tokens is 0; expected at least 1"),
        (["--new-tokens", "300"], "the model has 256 positions"),
        (["--text", str(tmp_path / "long.txt")], "the model has 256 positions; shorten the texts"),
    )
    for words, message in cases:
        monkeypatch.setattr(
            sys, "argv", ["integrity.py", "--from-config", "--out", str(folder), *words]
        )
        with pytest.raises(InputError, match=message):
            recipe.main()


@pytest.mark.slow
def test_every_claim_holds_up_to_the_export_and_what_was_changed_is_told(
    recipe, outcome, monkeypatch
):
    code, told = outcome()
    assert code == 0
    assert len(told) == 14
    assert all(told.values())

    def run(*_, out, **__):
        """Return what the run above left, with a weight changed and a verdict that is no pass."""
        merged = recipe.load(out / "merged")
        with torch.no_grad():
            merged.model.decoder.layers[0].fc1.weight.mul_(1.5)
        merged.save_pretrained(out / "merged")
        certificate = certificates.read(out)
        one, *others = certificate.verdicts
        bad = dataclasses.replace(one, status=Status.FAIL)
        return dataclasses.replace(certificate, verdicts=(bad, *others))

    monkeypatch.setattr(recipe, "run", run)
    code, told = outcome()
    assert code == 1
    failed = {claim for claim, holds in told.items() if not holds}
    assert {"exported: the certificate", "merged directory: logits as in float64"} <= failed
    assert told["onnx: the same greedy text"]
