import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from on_disk import numbers
from torch import nn

from lora_export import AdapterMismatch, LoraConfig, LoraConv1D, LoraLinear, heads, inject, merge
from lora_export.errors import InputError
from lora_export.injection import (
    attach,
    describe,
    detach,
    extract,
    idle,
    lora_layers,
    trainable_parameters,
)
from lora_export.records import Adapter, Factors

# family -> its attention projections, its MLP projections, its head
FAMILIES = {
    "bert": (
        "query key value attention.output.dense",
        "intermediate.dense *.layer.?.output.dense",
        "classifier",
    ),
    "distilbert": ("q_lin k_lin v_lin out_lin", "lin1 lin2", "pre_classifier classifier"),
    "roberta": (
        "query key value attention.output.dense",
        "intermediate.dense *.layer.?.output.dense",
        "classifier",
    ),
    "gpt2": ("attn.c_attn attn.c_proj", "mlp.c_fc mlp.c_proj", ""),
    "gpt2-cls": ("attn.c_attn attn.c_proj", "mlp.c_fc mlp.c_proj", "score"),
    "opt": ("q_proj k_proj v_proj out_proj", "fc1 fc2", ""),
    "llama": ("q_proj k_proj v_proj o_proj", "gate_proj up_proj down_proj", "lm_head"),
    "llama-cls": ("q_proj k_proj v_proj o_proj", "gate_proj up_proj down_proj", "score"),
}
EACH_FAMILY = pytest.mark.parametrize("family", FAMILIES)
PROJECTIONS = {
    "bert": ("query", "value"),
    "distilbert": ("q_lin", "v_lin"),
    "gpt2": ("c_attn",),
    "opt": ("q_proj", "v_proj"),
    "llama": ("q_proj", "v_proj"),
}
MOST_FAMILIES = pytest.mark.parametrize("family", PROJECTIONS)


def _linear_paths(model):
    """Every plain linear layer, found by class name alone."""
    return {n for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")}


def _snapshot(model):
    """Everything that an adapter must put back: classes, gradients, bits."""
    return (
        {path: type(module) for path, module in model.named_modules()},
        {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        {name: value.clone() for name, value in model.state_dict().items()},
    )


def _assert_same(left, right):
    assert left[0] == right[0]
    assert left[1] == right[1]
    assert left[2].keys() == right[2].keys()
    assert all(torch.equal(value, right[2][name]) for name, value in left[2].items())


# ---------------------------------------------------------------- which layers


@EACH_FAMILY
@pytest.mark.parametrize("part", [0, 1], ids=["attention", "mlp"])
def test_projections_are_selected_by_the_end_of_their_path(tiny, family, part):
    model, names = tiny(family), tuple(FAMILIES[family][part].split())
    chosen = inject(model, LoraConfig(targets=names))
    assert len(chosen) == 2 * len(names)
    assert set(lora_layers(model)) == set(chosen)


@EACH_FAMILY
def test_all_linear_takes_every_linear_layer_but_the_head_and_the_output(tiny, family):
    model = tiny(family)
    head = tuple(FAMILIES[family][2].split())
    expected = {
        path
        for path in _linear_paths(model)
        if path != "lm_head" and path.split(".")[0] not in head
    }
    assert set(inject(model, LoraConfig(modules_to_save=head))) == expected


@EACH_FAMILY
def test_the_heads_of_a_family_are_known(tiny, family):
    assert heads(tiny(family)) == tuple(FAMILIES[family][2].split())


def test_a_model_without_a_head_has_none(tiny):
    assert heads(tiny("bert").bert) == ()
    assert heads(nn.Sequential(nn.Linear(2, 2))) == ()


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (("attention.self.query",), 2),
        (("bert.encoder.layer.1.attention.self.query",), 1),
        (("*.layer.0.*",), 6),
        ((r"re:.*\.(query|value)",), 4),
        (("query", "re:.*pooler.*"), 3),
        ("query", 2),
    ],
    ids=["suffix", "path", "glob", "regex", "mixed", "string"],
)
def test_targets_may_be_suffixes_globs_and_expressions(tiny, targets, count):
    assert len(inject(tiny("bert"), LoraConfig(targets=targets))) == count


def test_layers_restricts_to_some_layers(tiny):
    chosen = inject(tiny("gpt2"), LoraConfig(targets=("c_attn", "c_fc"), layers=(1,)))
    assert chosen == ("transformer.h.1.attn.c_attn", "transformer.h.1.mlp.c_fc")


def test_exclude_leaves_modules_out(tiny):
    chosen = inject(tiny("bert"), LoraConfig(targets=("query",), exclude=("*.layer.0.*",)))
    assert chosen == ("bert.encoder.layer.1.attention.self.query",)


def test_rank_and_alpha_patterns_reach_the_layers(tiny):
    model = tiny("bert")
    inject(
        model,
        LoraConfig(
            8, 16, targets=("query", "value"),
            rank_pattern={"*.layer.0.*": 2}, alpha_pattern={"value": 5.0},
        ),
    )  # fmt: skip
    settings = {
        (path.split(".")[3], path.split(".")[-1]): (layer.lora_A.shape[0], layer.alpha, layer.scale)
        for path, layer in lora_layers(model).items()
    }
    assert settings == {
        ("0", "query"): (2, 16, 8),
        ("0", "value"): (2, 5, 2.5),
        ("1", "query"): (8, 16, 2),
        ("1", "value"): (8, 5, 0.625),
    }


def test_ambiguous_patterns_are_refused_and_the_model_is_left_alone(tiny):
    model = tiny("bert")
    before = _snapshot(model)
    config = LoraConfig(targets=("query",), rank_pattern={"query": 2, "*.layer.1.*": 3})
    with pytest.raises(InputError, match=r"rank_pattern is ambiguous for .*layer\.1.*query"):
        inject(model, config)
    _assert_same(_snapshot(model), before)


@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_matches_nothing_is_refused(tiny, name):
    with pytest.raises(InputError, match="quary"):
        inject(tiny("bert"), LoraConfig(targets=("query",), **{name: {"quary": 2}}))


def test_a_target_that_matches_nothing_names_the_nearest_modules(tiny):
    with pytest.raises(InputError, match=r"no linear module matches 'q_lin'; .* e\.g\. bert\."):
        inject(tiny("bert"), LoraConfig(targets=("q_lin",)))


def test_a_module_to_save_that_does_not_exist_names_the_nearest(tiny):
    with pytest.raises(InputError, match=r"no such module to save: classifer \(near: classifier"):
        inject(tiny("bert"), LoraConfig(modules_to_save=("classifer",)))


@MOST_FAMILIES
def test_layers_of_the_right_class_are_put_in(tiny, family):
    model = tiny(family)
    inject(model, LoraConfig(targets=PROJECTIONS[family]))
    expected = LoraConv1D if family == "gpt2" else LoraLinear
    assert {type(layer) for layer in lora_layers(model).values()} == {expected}


# ---------------------------------------------------------------- what is refused


def test_a_second_injection_is_refused(tiny):
    model = tiny("bert")
    inject(model, LoraConfig(targets=("query",)))
    with pytest.raises(InputError, match="has LoRA layers already; detach or merge"):
        inject(model, LoraConfig(targets=("value",)))


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama-tied"])
def test_a_tied_output_layer_is_refused_by_name(tiny, family):
    with pytest.raises(InputError, match=r"lm_head: shares its weight with .*(embed|wte)"):
        inject(tiny(family), LoraConfig(targets=("lm_head",)))


def test_an_untied_output_layer_is_adapted_by_name(tiny):
    model = tiny("llama")
    assert inject(model, LoraConfig(targets=("lm_head",))) == ("lm_head",)


def test_layers_that_share_a_weight_are_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    with pytest.raises(InputError, match="shares its weight"):
        inject(model, LoraConfig())


def test_a_layer_that_is_used_in_two_places_is_refused():
    layer = nn.Linear(4, 4)
    with pytest.raises(InputError, match="shares its weight"):
        inject(nn.Sequential(layer, nn.ReLU(), layer), LoraConfig())


class _Quantised(nn.Linear):
    pass


def test_subclasses_of_linear_are_left_alone():
    model = nn.Sequential(nn.Linear(4, 4), _Quantised(4, 4))
    assert inject(model, LoraConfig()) == ("0",)
    assert type(model[1]) is _Quantised


def test_a_subclass_of_linear_cannot_be_named():
    with pytest.raises(InputError, match="no linear module matches '1'"):
        inject(nn.Sequential(nn.Linear(4, 4), _Quantised(4, 4)), LoraConfig(targets=("1",)))


def test_the_output_projection_of_torchs_attention_is_left_alone():
    model = nn.ModuleDict({"mha": nn.MultiheadAttention(4, 2), "fc": nn.Linear(4, 4)})
    assert inject(model, LoraConfig()) == ("fc",)


def encoder(**fields):
    """Return torch's own encoder, and rows of which two are padded."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, **fields)
    nested = not fields.get("norm_first")
    padded = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 2 + [True] * 3])
    model = nn.TransformerEncoder(layer, 2, nn.LayerNorm(8), enable_nested_tensor=nested)
    return model.eval(), torch.randn(3, 5, 8), padded


def adapted_encoder(**fields):
    model, rows, padded = encoder(**fields)
    paths = inject(model, LoraConfig(rank=2))
    assert paths == tuple(f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2))
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B)
    return model, rows, padded


@torch.no_grad()
def states(model, rows, padded, *, fast=True):
    """Return what `model` makes of the places that hold a token."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fast)
    try:
        return model(rows, src_key_padding_mask=padded)[~padded]
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@pytest.fixture
def fast_calls(monkeypatch):
    """Count how often torch computes an encoder layer from the weights of its layers alone."""
    real, calls = torch._transformer_encoder_layer_fwd, []
    monkeypatch.setattr(
        torch, "_transformer_encoder_layer_fwd", lambda *a: calls.append(1) or real(*a)
    )
    return calls


TORCHS_ENCODERS = [{}, {"norm_first": True}, {"activation": "gelu"}]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("fields", TORCHS_ENCODERS, ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_torchs_encoder_computes_with_the_update_in_either_mode(fields, training, fast_calls):
    model, rows, padded = adapted_encoder(**fields)
    truth = states(model, rows, padded, fast=False)
    found = states(model.train(training), rows, padded)
    torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-5)
    merged = states(merge(model), rows, padded)
    torch.testing.assert_close(merged, truth, rtol=1e-5, atol=1e-5)
    assert len(fast_calls) == (0 if training else 2)  # the merged model alone takes the fast path


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_without_its_hook_a_layer_of_torchs_encoder_is_skipped_in_eval_mode(fast_calls):
    model, rows, padded = adapted_encoder()
    for layer in lora_layers(model).values():
        layer._forward_pre_hooks.clear()
    truth = states(model, rows, padded, fast=False)
    assert (states(model, rows, padded) - truth).abs().max() > 0.1
    assert len(fast_calls) == 2


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_torchs_encoder_is_fast_again_without_the_adapter(fast_calls):
    model, rows, padded = encoder()
    before = states(model, rows, padded)
    inject(model, LoraConfig(rank=2))
    detach(model)
    assert torch.equal(states(model, rows, padded), before)
    assert len(fast_calls) == 4


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_layer_put_into_torchs_encoder_by_hand_is_called(fast_calls):
    model, rows, padded = encoder()
    for layer in model.layers:
        layer.linear1 = LoraLinear.from_linear(layer.linear1, rank=2)
        nn.init.normal_(layer.linear1.lora_B)
    truth = states(model, rows, padded, fast=False)
    for copied in (model, copy.deepcopy(model)):
        torch.testing.assert_close(states(copied, rows, padded), truth, rtol=1e-5, atol=1e-5)
    assert fast_calls == []


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_update_without_a_layer_is_computed_in_torchs_encoder_too(fast_calls):
    model, rows, padded = encoder()
    pair = Factors(numbers(2, 8), numbers(16, 2), 2.0, 1.0, magnitude=1 + abs(numbers(16)))
    attach(model, Adapter({"layers.0.linear1": pair}, {}, "dora"))
    truth = states(model, rows, padded, fast=False)
    torch.testing.assert_close(states(model, rows, padded), truth, rtol=1e-5, atol=1e-5)
    assert len(fast_calls) == 1  # the other layer


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_torchs_encoder_does_not_run_nested_with_gradients_in_eval_mode():
    """Torch itself stops: a nested batch does not reach an attention that needs gradients."""
    model, rows, padded = adapted_encoder()
    with pytest.raises(AssertionError, match="does not support NestedTensor outside"):
        model(rows, src_key_padding_mask=padded)


@pytest.mark.parametrize("target", ["out_proj", "in_proj_weight"])
def test_the_weights_of_torchs_attention_are_refused_by_name(target):
    with pytest.raises(InputError, match=r"layers\.0\.self_attn: .*without calling a layer"):
        inject(encoder()[0], LoraConfig(targets=(target,)))


def test_a_linear_layer_in_torchs_attention_is_refused():
    model = encoder()[0]
    model.layers[0].self_attn.out_proj = nn.Linear(8, 8)
    with pytest.raises(InputError, match=r"self_attn\.out_proj: .*without calling a layer"):
        inject(model, LoraConfig())


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_an_adapter_for_torchs_attention_is_not_attached(variant):
    magnitude = 1 + abs(numbers(8)) if variant == "dora" else None
    pair = Factors(numbers(2, 8), numbers(8, 2), 2.0, 1.0, magnitude=magnitude)
    with pytest.raises(AdapterMismatch, match=r"layers\.0\.self_attn\.out_proj"):
        attach(encoder()[0], Adapter({"layers.0.self_attn.out_proj": pair}, {}, variant))


def test_an_adapter_for_a_tied_output_layer_is_not_attached(tiny):
    model = tiny("gpt2")
    pair = Factors(np.ones((1, 32), np.float32), np.ones((100, 1), np.float32), 1.0, 1.0)
    with pytest.raises((AdapterMismatch, InputError), match="lm_head"):
        attach(model, Adapter({"lm_head": pair}, {}, "lora"))


# ---------------------------------------------------------------- what is trained


@MOST_FAMILIES
def test_only_the_factors_are_trainable(tiny, family):
    model = tiny(family)
    inject(model, LoraConfig(targets=PROJECTIONS[family]))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{path}.lora_{side}" for path in lora_layers(model) for side in "AB"}


def test_the_head_is_trainable_where_it_is_saved(tiny):
    model = tiny("roberta")
    inject(model, LoraConfig(targets=("query",), modules_to_save=("classifier",)))
    trained = {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}
    layers = ("classifier.dense", "classifier.out_proj")
    assert trained == {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}


def test_a_saved_head_is_not_adapted_as_well(tiny):
    model = tiny("roberta")
    chosen = inject(model, LoraConfig(modules_to_save=("classifier",)))
    assert not [path for path in chosen if path.startswith("classifier")]


@MOST_FAMILIES
def test_a_fresh_injection_does_not_change_the_logits(tiny, logits, family):
    model = tiny(family)
    before = logits(model)
    inject(model, LoraConfig(targets=PROJECTIONS[family]))
    assert torch.equal(logits(model), before)


@MOST_FAMILIES
def test_the_state_dict_of_the_base_fits_the_injected_model(tiny, family):
    model, base = tiny(family), tiny(family, seed=5)
    inject(model, LoraConfig(targets=PROJECTIONS[family]))
    result = model.load_state_dict(base.state_dict(), strict=False)
    assert result.unexpected_keys == []
    assert all("lora_" in name for name in result.missing_keys)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_magnitude_is_a_factor_like_the_others(tiny, fill, family):
    model = tiny(family)
    inject(model, LoraConfig(4, targets=PROJECTIONS[family], variant="rslora+dora"))
    fill(model)
    layers = lora_layers(model)
    names = ("lora_A", "lora_B", "lora_magnitude_vector")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{path}.{name}" for path in layers for name in names}
    assert trainable_parameters(model).saved == 0
    found = describe(model)
    assert found.replaced == {}
    assert not any("lora_" in name for name in found.base.tensors)
    assert found.variant == "rslora+dora"
    for path, pair in found.modules.items():
        np.testing.assert_array_equal(
            pair.magnitude, layers[path].lora_magnitude_vector.detach().numpy()
        )


def _loss(model, rows):
    labels = torch.tensor([0, 1, 1]) if hasattr(model, "classifier") else rows()["input_ids"]
    return model(**rows(), labels=labels).loss


@MOST_FAMILIES
def test_gradients_reach_the_factors_and_the_head_only(tiny, fill, rows, family):
    model = tiny(family)
    head = ("classifier",) if hasattr(model, "classifier") else ()
    inject(model, LoraConfig(targets=PROJECTIONS[family], modules_to_save=head))
    fill(model)
    _loss(model, rows).backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    expected = {f"{path}.lora_{side}" for path in lora_layers(model) for side in "AB"}
    expected |= {f"{name}.{kind}" for name in head for kind in ("weight", "bias")}
    assert reached == expected


def test_the_gradients_are_those_of_the_equation():
    layer = LoraLinear(3, 2, rank=2, alpha=6, dtype=torch.float64)
    nn.init.normal_(layer.lora_B, generator=torch.Generator().manual_seed(0))
    x = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    layer(x).sum().backward()
    a, b, ones = layer.lora_A.detach().numpy(), layer.lora_B.detach().numpy(), np.ones(2)
    np.testing.assert_allclose(layer.lora_B.grad, 3 * np.outer(ones, a @ x.numpy()), rtol=1e-12)
    np.testing.assert_allclose(layer.lora_A.grad, 3 * np.outer(b.T @ ones, x), rtol=1e-12)


def test_a_training_step_changes_the_factors_and_the_head_only(tiny, fill, rows):
    model = tiny("bert")
    inject(model, LoraConfig(targets=("query", "value"), modules_to_save=("classifier",)))
    fill(model)
    before = copy.deepcopy(model.state_dict())
    optimiser = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.01)
    _loss(model, rows).backward()
    optimiser.step()
    moved = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert moved == trained
    assert {"classifier.weight", "classifier.bias"} < moved


# ---------------------------------------------------------------- attach, detach, switch


def _two_adapters(tiny, fill, logits, family, head):
    """Two adapters that differ in rank, targets and head, each with the logits it must give."""
    names = PROJECTIONS[family]
    settings = [
        LoraConfig(2, 4, targets=names, modules_to_save=head),
        LoraConfig(5, 3, targets=("all-linear",), variant="rslora", modules_to_save=head),
    ]
    made = []
    for seed, config in enumerate(settings):
        model = tiny(family)
        inject(model, config)
        fill(model, seed)
        made.append((extract(model), logits(model)))
    return made


def test_an_adapter_with_magnitudes_switches_with_one_without(tiny, fill, logits):
    made = []
    for seed, variant in enumerate(("dora", "lora")):
        model = tiny("bert")
        inject(model, LoraConfig(2, targets=("query", "value"), variant=variant))
        made.append((extract(fill(model, seed)), logits(model)))
    (one, of_one), (two, of_two) = made
    model = tiny("bert")
    before = _snapshot(model)
    for adapter, expected in ((one, of_one), (two, of_two), (one, of_one)):
        attach(model, adapter)
        assert torch.equal(logits(model), expected)
    detach(model)
    _assert_same(_snapshot(model), before)


@pytest.mark.parametrize(("family", "head"), [("bert", ("classifier",)), ("gpt2", ()), ("opt", ())])
def test_switching_between_two_adapters_gives_each_ones_logits(tiny, fill, logits, family, head):
    (one, of_one), (two, of_two) = _two_adapters(tiny, fill, logits, family, head)
    model = tiny(family)
    assert not torch.equal(of_one, of_two)
    for adapter, expected in ((one, of_one), (two, of_two), (one, of_one)):
        attach(model, adapter)
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(("family", "head"), [("bert", ("classifier",)), ("gpt2", ()), ("opt", ())])
def test_detaching_restores_everything(tiny, fill, logits, family, head):
    (one, _), (two, _) = _two_adapters(tiny, fill, logits, family, head)
    model = tiny(family)
    next(model.parameters()).requires_grad_(False)
    before, expected = _snapshot(model), logits(model)
    attach(model, one)
    attach(model, two)
    detach(model)
    _assert_same(_snapshot(model), before)
    assert torch.equal(logits(model), expected)


def test_detaching_a_merged_adapter_restores_the_bits(tiny, fill):
    model = tiny("gpt2")
    before = _snapshot(model)
    inject(model, LoraConfig(targets=("c_attn",)))
    fill(model)
    for layer in lora_layers(model).values():
        layer.merge()
    detach(model)
    _assert_same(_snapshot(model), before)


def test_detaching_a_plain_model_changes_nothing(tiny):
    model = tiny("bert")
    before = _snapshot(model)
    detach(model)
    _assert_same(_snapshot(model), before)


def test_attaching_copies_no_weight_of_the_base(tiny, fill, logits):
    (one, _), _ = _two_adapters(tiny, fill, logits, "bert", ("classifier",))
    model = tiny("bert")
    weights = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    attach(model, one)
    assert weights == {n: p.data_ptr() for n, p in model.named_parameters() if "lora_" not in n}


@pytest.mark.parametrize("training", [True, False])
def test_attaching_keeps_the_models_mode(tiny, fill, logits, training):
    (one, _), _ = _two_adapters(tiny, fill, logits, "bert", ("classifier",))
    model = tiny("bert").train(training)
    attach(model, one)
    assert {module.training for module in model.modules()} == {training}


def test_an_attached_adapter_can_be_trained_on(tiny, fill, logits):
    (one, _), _ = _two_adapters(tiny, fill, logits, "bert", ("classifier",))
    model = tiny("bert")
    attach(model, one)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(one.replaced) | {
        f"{path}.lora_{side}" for path in one.modules for side in "AB"
    }


def test_attaching_does_not_let_the_model_write_into_the_adapter(tiny, fill, logits):
    (one, _), _ = _two_adapters(tiny, fill, logits, "bert", ("classifier",))
    before = copy.deepcopy(one)
    model = tiny("bert")
    attach(model, one)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0)
    for path, pair in one.modules.items():
        np.testing.assert_array_equal(pair.a, before.modules[path].a)
        np.testing.assert_array_equal(pair.b, before.modules[path].b)
    for name, value in one.replaced.items():
        np.testing.assert_array_equal(value, before.replaced[name])


def _spoilt(adapter):
    """The adapter with one fault of each kind."""
    modules, replaced = dict(adapter.modules), dict(adapter.replaced)
    wide = "bert.encoder.layer.0.attention.self.query"
    modules[wide] = replace(modules[wide], a=np.ones((2, 33), np.float32))
    modules["bert.encoder.layer.0.attention.self.quary"] = modules[wide]
    modules["bert.embeddings"] = modules[wide]
    replaced["classifier.weight"] = np.ones((3, 32), np.float32)
    replaced["clasifier.bias"] = np.ones(2, np.float32)
    return replace(adapter, modules=modules, replaced=replaced)


@pytest.mark.parametrize(
    "fault",
    [
        r"self\.query: adapter is for \(out, in\) \(32, 33\), the model has \(32, 32\)",
        r"self\.quary: no linear module \(near: \S*self\.query",
        r"bert\.embeddings: no linear module",
        r"classifier\.weight: adapter has shape \(3, 32\), model \(2, 32\)",
        r"clasifier\.bias: no such parameter \(near: classifier\.bias",
    ],
)
def test_a_misfit_lists_every_fault_at_once(tiny, fill, logits, fault):
    (one, _), _ = _two_adapters(tiny, fill, logits, "bert", ("classifier",))
    with pytest.raises(AdapterMismatch, match=fault):
        attach(tiny("bert"), _spoilt(one))


def test_a_misfit_leaves_the_attached_adapter_in_place(tiny, fill, logits):
    (one, of_one), (two, _) = _two_adapters(tiny, fill, logits, "bert", ("classifier",))
    model = tiny("bert")
    attach(model, one)
    before = _snapshot(model)
    with pytest.raises(AdapterMismatch, match="does not fit this model"):
        attach(model, _spoilt(two))
    _assert_same(_snapshot(model), before)
    assert torch.equal(logits(model), of_one)


def test_an_unknown_variant_is_refused_and_leaves_the_attached_adapter_in_place(tiny, fill, logits):
    """Which layers would be needed is not known then, so nothing else can be looked at."""
    (one, of_one), (two, _) = _two_adapters(tiny, fill, logits, "bert", ("classifier",))
    model = tiny("bert")
    attach(model, one)
    with pytest.raises(InputError, match="variant 'dorra': dorra is not one of "):
        attach(model, replace(two, variant="dorra"))
    assert torch.equal(logits(model), of_one)


def test_an_adapter_with_an_impossible_setting_leaves_the_attached_one_in_place(tiny, fill, logits):
    (one, of_one), (two, _) = _two_adapters(tiny, fill, logits, "bert", ("classifier",))
    model = tiny("bert")
    attach(model, one)
    with pytest.raises((AdapterMismatch, InputError), match="dropout"):
        attach(model, replace(two, dropout=2.0))
    assert torch.equal(logits(model), of_one)


def test_an_adapter_for_conv1d_has_its_shape_as_out_and_in(tiny):
    pair = Factors(np.ones((2, 96), np.float32), np.ones((32, 2), np.float32), 1.0, 0.5)
    turned = Adapter({"transformer.h.0.attn.c_attn": pair}, {}, "lora")
    with pytest.raises(AdapterMismatch, match=r"\(out, in\) \(32, 96\), the model has \(96, 32\)"):
        attach(tiny("gpt2"), turned)


# ---------------------------------------------------------------- extract, describe, idle


def test_extracting_gives_copies_of_the_factors_and_the_head(tiny, fill):
    model = tiny("bert")
    config = LoraConfig(
        3, 6, 0.25, targets=("query",), variant="rslora", modules_to_save=("classifier",)
    )
    inject(model, config)
    fill(model)
    found = extract(model)
    layers = lora_layers(model)
    assert found.modules.keys() == layers.keys()
    for path, pair in found.modules.items():
        np.testing.assert_array_equal(pair.a, layers[path].lora_A.detach().numpy())
        np.testing.assert_array_equal(pair.b, layers[path].lora_B.detach().numpy())
        assert (pair.rank, pair.alpha, pair.scale) == (3, 6, pytest.approx(6 / 3**0.5))
        assert not np.shares_memory(pair.b, layers[path].lora_B.detach().numpy())
    assert set(found.replaced) == {"classifier.weight", "classifier.bias"}
    assert (found.variant, found.dropout) == ("rslora", 0.25)


def test_extracting_from_a_bfloat16_model_widens_exactly(tiny, fill):
    model = tiny("opt").bfloat16()
    inject(model, LoraConfig(targets=("q_proj",)))
    fill(model)
    for path, pair in extract(model).modules.items():
        assert pair.b.dtype == np.float32
        back = torch.from_numpy(pair.b).bfloat16()
        assert torch.equal(back, lora_layers(model)[path].lora_B)


def test_extracting_from_a_plain_model_is_refused(tiny):
    with pytest.raises(InputError, match="has no LoRA layers"):
        extract(tiny("bert"))


def test_extracting_while_merged_is_refused(tiny, fill):
    model = tiny("bert")
    inject(model, LoraConfig(targets=("query",)))
    next(iter(lora_layers(model).values())).merge()
    with pytest.raises(InputError, match="merged at present"):
        extract(model)


def test_an_adapter_kept_in_float32_survives_a_bfloat16_base(tiny, fill):
    source = tiny("opt")
    inject(source, LoraConfig(targets=("q_proj",)))
    fill(source)
    adapter = extract(source)
    model = tiny("opt").bfloat16()
    attach(model, adapter)
    for path, pair in extract(model).modules.items():
        np.testing.assert_array_equal(pair.b, adapter.modules[path].b)


def test_the_fingerprint_covers_the_adapted_weights(tiny):
    marks = []
    adapted = "bert.encoder.layer.1.attention.self.query.weight"
    for change in (None, adapted, "bert.pooler.dense.weight"):
        model = tiny("bert")
        if change:
            with torch.no_grad():
                model.get_parameter(change)[0, 0] += 1
        inject(model, LoraConfig(targets=("query",)))
        marks.append(describe(model).base.fingerprint)
    untouched, touched, elsewhere = marks
    assert untouched.sha256 != touched.sha256
    assert untouched == elsewhere
    assert (untouched.tensors, untouched.dtype) == (2, "F32")


def test_training_does_not_change_the_fingerprint(tiny, fill):
    model = tiny("bert")
    inject(model, LoraConfig(targets=("query",)))
    before = describe(model).base.fingerprint
    fill(model)
    assert describe(model).base.fingerprint == before


def test_describing_names_the_class_of_the_model(tiny):
    model = tiny("distilbert")
    inject(model, LoraConfig(targets=("q_lin",)))
    assert describe(model).base.architecture == "DistilBertForSequenceClassification"


def test_idle_switches_the_updates_off_and_on_again(tiny, fill, logits):
    model = tiny("opt")
    base = logits(model)
    inject(model, LoraConfig(targets=("q_proj", "fc1")))
    fill(model)
    adapted = logits(model)
    with idle(model):
        assert torch.equal(logits(model), base)
    assert not torch.equal(adapted, base)
    assert torch.equal(logits(model), adapted)


def test_idle_keeps_the_trained_head(tiny, fill, logits):
    model = tiny("bert")
    base = logits(model)
    inject(model, LoraConfig(targets=("query",), modules_to_save=("classifier",)))
    fill(model)
    with idle(model):
        assert not torch.equal(logits(model), base)


def test_an_error_inside_of_idle_switches_the_updates_on_again(tiny, fill, logits):
    model = tiny("opt")
    inject(model, LoraConfig(targets=("q_proj",)))
    fill(model)
    adapted = logits(model)
    with pytest.raises(ZeroDivisionError, match="division"), idle(model):
        _ = 1 / 0
    assert torch.equal(logits(model), adapted)


# ---------------------------------------------------------------- counts


def test_parameters_are_counted_by_kind(tiny):
    model = tiny("bert")
    total = sum(p.numel() for p in model.parameters())
    inject(model, LoraConfig(4, targets=("query", "value"), modules_to_save=("classifier",)))
    count = trainable_parameters(model)
    lora, head = 2 * 2 * 4 * (32 + 32), 32 * 2 + 2
    assert (count.lora, count.saved, count.total) == (lora, head, total + lora)
    assert count.trainable == lora + head
    assert count.ratio == pytest.approx((lora + head) / (total + lora))


def test_tied_parameters_count_once(tiny):
    model = tiny("gpt2")
    embedding = model.transformer.wte.weight.numel()
    apart = sum(value.numel() for value in model.state_dict().values())
    assert trainable_parameters(model).total == apart - embedding


def test_a_model_without_parameters_has_a_ratio_of_zero():
    assert trainable_parameters(nn.Sequential()).ratio == 0


def test_the_counts_are_printed_with_their_shares(tiny):
    model = tiny("bert")
    inject(model, LoraConfig(4, targets=("query", "value"), modules_to_save=("classifier",)))
    text = str(trainable_parameters(model))
    assert "1,024" in text
    assert text.count("%") == 4
    assert "100.000%" in text
