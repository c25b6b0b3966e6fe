import numpy as np
import pytest
import torch
from torch import nn

from lora_export import LoraConfig, inject
from lora_export.config import ALL_LINEAR
from lora_export.errors import InputError
from lora_export.injection import lora_layers
from lora_export.live import merge

CLASSIFIERS = ["bert", "distilbert", "roberta", "gpt2-cls", "llama-cls"]
GENERATORS = ["gpt2", "opt", "llama"]


def adapted(tiny, fill, family, **config):
    return fill(inject_all(tiny(family), **config))


def inject_all(model, **config):
    inject(model, LoraConfig(rank=4, alpha=8.0, targets=(ALL_LINEAR,), **config))
    return model


def tree(model):
    return {path: type(module) for path, module in model.named_modules()}


@pytest.mark.parametrize("family", [*CLASSIFIERS, *GENERATORS])
def test_the_merged_module_tree_is_the_bases(tiny, fill, family):
    assert tree(merge(adapted(tiny, fill, family))) == tree(tiny(family))


@pytest.mark.parametrize("family", [*CLASSIFIERS, *GENERATORS])
def test_the_merged_model_computes_what_the_unmerged_one_does(tiny, fill, logits, family):
    model = adapted(tiny, fill, family)
    exact = logits(adapted(tiny, fill, family).double())
    noise = (logits(model).double() - exact).abs().max()
    assert (logits(merge(model)).double() - exact).abs().max() <= 8 * noise
    assert (logits(tiny(family)).double() - exact).abs().max() > 1000 * noise


@pytest.mark.parametrize("family", GENERATORS)
def test_generation_gives_the_same_tokens_before_and_after(tiny, fill, rows, family):
    model = adapted(tiny, fill, family)
    prompt = {name: value[:1] for name, value in rows().items()}
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    before = model.generate(**prompt, **options)
    assert torch.equal(before, merge(model).generate(**prompt, **options))
    assert not torch.equal(before, tiny(family).generate(**prompt, **options))


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_merging_magnitudes_computes_what_the_unmerged_model_does(tiny, fill, logits, family):
    model = adapted(tiny, fill, family, variant="dora")
    exact = logits(adapted(tiny, fill, family, variant="dora").double())
    noise = (logits(model).double() - exact).abs().max()
    assert (logits(merge(model)).double() - exact).abs().max() <= 8 * noise
    assert (logits(tiny(family)).double() - exact).abs().max() > 1000 * noise


def test_a_merged_weight_is_the_float64_value_rounded_once(tiny, fill):
    model = adapted(tiny, fill, "bert")
    merged = merge(model)
    for path, layer in lora_layers(model).items():
        a, b = (t.detach().numpy().astype(np.float64) for t in (layer.lora_A, layer.lora_B))
        exact = layer.weight.numpy().astype(np.float64) + 2.0 * (b @ a)
        found = merged.get_submodule(path).weight.numpy()
        assert np.array_equal(found, exact.astype(np.float32)), path


def test_merging_leaves_the_model_alone(tiny, fill, logits):
    model = adapted(tiny, fill, "bert")
    before = logits(model)
    merge(model)
    assert torch.equal(logits(model), before)
    assert lora_layers(model)


def test_merging_in_place_changes_the_model_itself(tiny, fill):
    model = adapted(tiny, fill, "bert")
    assert merge(model, in_place=True) is model
    assert not lora_layers(model)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_kept(tiny, fill, training):
    merged = merge(adapted(tiny, fill, "bert").train(training))
    assert {module.training for module in merged.modules()} == {training}


def test_a_layer_that_is_merged_already_is_not_merged_twice(tiny, fill):
    model = adapted(tiny, fill, "bert")
    expected = merge(model).state_dict()
    for layer in lora_layers(model).values():
        layer.merge()
    found = merge(model).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_nothing_to_merge_is_an_error():
    with pytest.raises(InputError, match="nothing to merge"):
        merge(nn.Sequential(nn.Linear(2, 2)))


def test_a_value_that_is_not_finite_is_an_error_and_nothing_changes(tiny, fill):
    model = adapted(tiny, fill, "bert")
    last = list(lora_layers(model).values())[-1]
    with torch.no_grad():
        last.lora_B[0, 0] = float("nan")
    with pytest.raises(InputError, match="merged weights are not finite"):
        merge(model, in_place=True)
    assert len(lora_layers(model)) == len(lora_layers(adapted(tiny, fill, "bert")))
