"""Training over a base in 4 bits, and back to the base in full precision."""

import copy
import sys

import bitsandbytes
import numpy as np
import peft
import pytest
import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu
from conftest import VOCABULARY, answer_of, fill_in, padded_rows, scale_up
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from lora_export import LoraConfig, inject, merge, read_adapter, save_adapter, trainable_parameters
from lora_export.errors import InputError
from lora_export.injection import attach, describe, detach, extract, lora_layers, shape_of
from lora_export.lora import LoraLinear4bit, layer_class
from lora_export.quantised import load_nf4

TARGETS = ("query", "intermediate.dense")
CONFIG = {"targets": TARGETS, "modules_to_save": ("classifier",)}
EACH = pytest.mark.parametrize("variant", ["lora", "dora"])
# The levels of NormalFloat with 4 bits: appendix E of the paper.
LEVELS = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a tiny classifier whose rows are whole numbers of blocks."""
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=128, max_position_embeddings=64,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("base")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertForSequenceClassification(config)
    scale_up(model).save_pretrained(folder)
    return folder


@pytest.fixture
def whole(base):
    """`whole()`: the classifier in full precision."""
    return lambda: BertForSequenceClassification.from_pretrained(base).eval()


@pytest.fixture
def packed(base):
    """The same with its linear layers in NF4."""
    return load_nf4(BertForSequenceClassification, base).eval()


def trained(model, variant="lora"):
    inject(model, LoraConfig(3, 7.5, variant=variant, **CONFIG))
    return fill_in(model)


def unpacked(weight):
    """The matrix that `weight` stands for, (out, in) in float64, by hand."""
    state = weight.quant_state
    second = state.state2
    steps = state.absmax.numpy().astype(int)
    scales = second.code.double().numpy()[steps]
    scales = scales * second.absmax.double().numpy().repeat(second.blocksize)[: len(steps)]
    scales = scales + state.offset.double().numpy()
    pairs = weight.detach().numpy().ravel()
    indices = np.stack([pairs >> 4, pairs & 15], axis=1).ravel()
    values = np.array(LEVELS)[indices] * scales.repeat(state.blocksize)[: len(indices)]
    return values.reshape(tuple(state.shape))


def by_hand(adapter, model, weights):
    """`model` in float64 with the adapter's equation in place of its layers."""
    model = copy.deepcopy(model).double()
    with torch.no_grad():
        for name, weight in weights.items():
            model.get_parameter(name).copy_(torch.from_numpy(weight))
        for path, pair in adapter.modules.items():
            weight = model.get_parameter(f"{path}.weight")
            found = weight.numpy() + pair.alpha / len(pair.a) * pair.b.astype(float) @ pair.a
            if pair.magnitude is not None:
                lengths = np.linalg.norm(found, axis=1)
                found = found * (pair.magnitude / lengths)[:, None]
            weight.copy_(torch.from_numpy(found))
        for name, value in adapter.replaced.items():
            model.get_parameter(name).copy_(torch.from_numpy(value))
    return model


def distance(found, wanted):
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).abs().max() / wanted.abs().max())


# ---------------------------------------------------------------- the base in 4 bits


def test_all_linear_layers_but_the_head_are_packed(packed):
    found = {path: m for path, m in packed.named_modules() if isinstance(m, nn.Linear)}
    assert type(found.pop("classifier")) is nn.Linear
    assert {type(module) for module in found.values()} == {bitsandbytes.nn.Linear4bit}
    states = [module.weight.quant_state for module in found.values()]
    assert {(state.quant_type, state.nested) for state in states} == {("nf4", True)}


def test_a_model_without_a_head_is_packed_whole(base):
    model = load_nf4(BertModel, base)
    assert all(
        layer_class(m) is LoraLinear4bit for m in model.modules() if isinstance(m, nn.Linear)
    )


def test_an_output_that_is_tied_to_the_embedding_is_not_packed(tmp_path):
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=128, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    model = load_nf4(AutoModelForCausalLM, tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert layer_class(model.model.layers[0].mlp.up_proj) is LoraLinear4bit


def test_a_layer_whose_rows_are_no_whole_number_of_blocks_is_not_packed(bases):
    model = load_nf4(BertForSequenceClassification, bases("bert"))
    packed = {path for path, m in model.named_modules() if layer_class(m) is LoraLinear4bit}
    assert packed == {f"bert.encoder.layer.{index}.output.dense" for index in (0, 1)}


def test_fields_of_the_config_are_passed_on(base):
    model = load_nf4(BertForSequenceClassification, base, hidden_dropout_prob=0.25)
    assert model.dropout.p == 0.25


def test_the_shape_of_a_packed_layer_is_that_of_its_matrix(packed):
    layer = packed.bert.encoder.layer[0].intermediate.dense
    assert layer.weight.dtype == torch.uint8
    assert shape_of(layer) == (128, 64)


def test_packed_weights_count_as_what_they_stand_for(whole, packed):
    assert trainable_parameters(trained(packed)) == trainable_parameters(trained(whole()))


def test_a_transposed_layer_whose_rows_are_no_whole_number_of_blocks_is_not_packed(tmp_path):
    def packed_of(width):
        config = GPT2Config(vocab_size=VOCABULARY, n_embd=width, n_layer=1, n_head=2, n_positions=8)
        GPT2LMHeadModel(config).save_pretrained(tmp_path / f"{width}")
        model = load_nf4(AutoModelForCausalLM, tmp_path / f"{width}")
        return {path for path, m in model.named_modules() if layer_class(m) is LoraLinear4bit}

    assert packed_of(96) == {"transformer.h.0.mlp.c_proj"}  # of 384 columns
    assert "transformer.h.0.attn.c_attn" in packed_of(128)


def test_a_base_of_which_nothing_can_be_packed_is_refused(tmp_path):
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=96,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no layer of this base can be held in 4 bits"):
        load_nf4(BertForSequenceClassification, tmp_path)


def test_a_fresh_layer_computes_what_the_packed_one_does(packed):
    before = answer_of(packed)
    inject(packed, LoraConfig(**CONFIG))
    assert torch.equal(answer_of(packed), before)
    kinds = {type(layer) for layer in lora_layers(packed).values()}
    assert kinds == {LoraLinear4bit}


@EACH
def test_the_model_computes_the_equation_over_what_its_packed_weights_stand_for(
    whole, packed, variant
):
    model = trained(packed, variant)
    weights = {
        f"{path}.weight": unpacked(module.weight)
        for path, module in model.named_modules()
        if getattr(getattr(module, "weight", None), "dtype", None) == torch.uint8
    }
    assert len(weights) == 13
    expected = answer_of(by_hand(extract(model), whole(), weights))
    assert distance(answer_of(model), expected) < 1e-5
    assert distance(answer_of(by_hand(extract(model), whole(), {})), expected) > 1e-3


@EACH
def test_peft_over_the_same_packed_base_answers_and_learns_alike(packed, variant):
    theirs = copy.deepcopy(packed)
    ours = trained(packed, variant)
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=3, lora_alpha=7.5, target_modules=list(TARGETS),
        use_dora=variant == "dora",
    )  # fmt: skip
    theirs = peft.get_peft_model(theirs, config).eval()
    known = dict(theirs.named_parameters())
    names = {
        f"{path}.{name}": known[f"base_model.model.{path}.{name}.default.weight"]
        for path, layer in lora_layers(ours).items()
        for name in layer.factors()
    }
    with torch.no_grad():
        for name, parameter in names.items():
            parameter.copy_(ours.get_parameter(name))
        head = theirs.base_model.model.classifier.modules_to_save["default"]
        head.load_state_dict(ours.classifier.state_dict())
    answers = [model(**padded_rows()).logits for model in (ours, theirs)]
    assert distance(*answers) < 1e-5
    for answer in answers:
        answer.square().mean().backward()
    for name, parameter in names.items():
        slope = ours.get_parameter(name).grad
        assert slope.any()
        assert distance(slope, parameter.grad) < 1e-4, name


def test_a_step_moves_the_factors_and_the_head_only(packed):
    model = trained(packed).train()
    before = {name: value.clone() for name, value in model.named_parameters()}
    chosen = {name for name, value in before.items() if model.get_parameter(name).requires_grad}
    optimiser = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.01)
    model(**padded_rows(), labels=torch.tensor([0, 1, 1])).loss.backward()
    optimiser.step()
    after = dict(model.named_parameters())
    assert {name for name in before if not torch.equal(before[name], after[name])} == chosen
    assert {"classifier.weight", "classifier.bias"} < chosen


def test_evaluating_does_not_change_what_the_packed_weights_stand_for(packed):
    layers = {p: m for p, m in packed.named_modules() if layer_class(m) is LoraLinear4bit}
    before = {path: unpacked(module.weight) for path, module in layers.items()}
    assert len(before) == 13
    answer_of(packed)
    for path, matrix in before.items():
        assert np.array_equal(unpacked(packed.get_submodule(path).weight), matrix)


def test_a_layer_that_was_packed_anew_to_be_evaluated_is_trained_alike():
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    base = bitsandbytes.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4")
    base.to("cpu").eval()
    expected = torch.autograd.grad(base(x).sum(), x)[0]
    weight, state = _convert_weight_packed_for_cpu(base.weight.data, base.weight.quant_state)
    base.weight.data, base.weight.quant_state = weight, state
    layer = LoraLinear4bit.over(base, LoraConfig())
    found = torch.autograd.grad(layer(x).sum(), x)[0]
    assert distance(found, expected) < 0.01  # the scales were rounded to bfloat16


def test_taken_off_the_packed_base_is_what_it_was(packed):
    before = answer_of(packed)
    weights = {name: value.data_ptr() for name, value in packed.named_parameters()}
    trained(packed)
    assert distance(answer_of(packed), before) > 1e-3
    detach(packed)
    assert not lora_layers(packed)
    assert torch.equal(answer_of(packed), before)
    assert weights == {name: value.data_ptr() for name, value in packed.named_parameters()}


# ---------------------------------------------------------------- back to full precision


@EACH
def test_what_was_trained_over_4_bits_goes_into_the_full_base(whole, packed, tmp_path, variant):
    adapter = extract(trained(packed, variant))
    model = whole()
    attach(model, adapter)
    expected = answer_of(by_hand(adapter, whole(), {}))
    assert distance(answer_of(model), expected) < 1e-5
    assert distance(answer_of(packed), expected) > 1e-3  # the price of 4 bits

    written = save_adapter(model, tmp_path / "adapter.safetensors")
    other = trained(whole(), variant)
    assert written.base.fingerprint == describe(other).base.fingerprint
    found = read_adapter(tmp_path / "adapter.safetensors")
    for path, pair in adapter.modules.items():
        np.testing.assert_array_equal(found.modules[path].b, pair.b)
    assert distance(answer_of(merge(model)), expected) < 1e-5


def test_an_adapter_is_attached_to_a_packed_base(whole, packed):
    adapter = extract(trained(whole()))
    expected = answer_of(trained(copy.deepcopy(packed)))
    attach(packed, adapter)
    assert torch.equal(answer_of(packed), expected)


@pytest.mark.parametrize("asked", [merge, lambda m: merge(m, in_place=True), describe])
def test_a_base_in_4_bits_is_neither_merged_nor_described(packed, asked):
    model = trained(packed)
    before = answer_of(model)
    with pytest.raises(
        InputError, match=r"held in 4 bits.*attach it to the base in full precision"
    ):
        asked(model)
    assert torch.equal(answer_of(model), before)


def test_a_layer_over_4_bits_is_not_merged_in_place(packed):
    layer = next(iter(lora_layers(trained(packed)).values()))
    weight = layer.weight.clone()
    with pytest.raises(InputError, match="held in 4 bits"):
        layer.merge()
    assert not layer.is_merged
    assert torch.equal(layer.weight, weight)


# ---------------------------------------------------------------- where it does not run


def test_a_missing_package_is_named_with_what_installs_it(base, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    message = r"needs bitsandbytes: pip install 'lora-export\[qlora\]'"
    with pytest.raises(InputError, match=message):
        load_nf4(BertForSequenceClassification, base)


def test_a_machine_on_which_bitsandbytes_does_not_compute_is_said_to_be_one(base, monkeypatch):
    def fails(*_):
        raise NotImplementedError("no kernel for this processor")

    monkeypatch.setattr(bitsandbytes.nn.Linear4bit, "forward", fails)
    with pytest.raises(InputError, match="on this machine: no kernel for this processor"):
        load_nf4(BertForSequenceClassification, base)
