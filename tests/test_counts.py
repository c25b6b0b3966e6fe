"""The counts and sizes that the README states, from the published configurations."""

import pytest
import torch
import transformers

from lora_export import LoraConfig, heads, inject, load_adapter, merge, save_adapter
from lora_export.injection import lora_layers, trainable_parameters


def _blank(kind, config):
    with torch.device("meta"):
        return kind(config)


def _opt():
    # The defaults of OPTConfig are those of facebook/opt-125m.
    return _blank(transformers.OPTForCausalLM, transformers.OPTConfig())


def test_distilbert_with_rank_8_on_q_and_v_trains_147456_parameters():
    config = transformers.DistilBertConfig()
    model = _blank(transformers.DistilBertForSequenceClassification, config)
    chosen = inject(model, LoraConfig(8, targets=("q_lin", "v_lin"), modules_to_save=heads(model)))
    count = trainable_parameters(model)
    assert len(chosen) == 6 * 2
    assert count.lora == 147_456
    assert count.saved == 768 * 768 + 768 + 2 * 768 + 2
    assert count.total == 66_955_010 + 147_456


@pytest.mark.parametrize(
    ("rank", "lora", "share"), [(8, 294_912, 0.235), (4, 147_456, 0.118)], ids=["rank 8", "rank 4"]
)
def test_opt_125m_on_q_and_v_trains_a_quarter_and_an_eighth_of_a_percent(rank, lora, share):
    model = _opt()
    inject(model, LoraConfig(rank, targets=("q_proj", "v_proj")))
    count = trainable_parameters(model)
    assert (count.lora, count.saved, count.total) == (lora, 0, 125_239_296 + lora)
    assert 100 * count.ratio == pytest.approx(share, abs=5e-4)


def test_gpt2_with_rank_8_on_c_attn_trains_294912_parameters():
    model = _blank(transformers.GPT2LMHeadModel, transformers.GPT2Config())
    inject(model, LoraConfig(8, targets=("c_attn",)))
    count = trainable_parameters(model)
    assert (count.lora, count.total) == (12 * 8 * (768 + 3 * 768), 124_439_808 + 294_912)


def _real_opt():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.OPTForCausalLM(transformers.OPTConfig())
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.05, generator=random)
    return model.eval()


@pytest.fixture(scope="module")
def opt_125m(tmp_path_factory):
    """A random model of the size of OPT-125m with a filled-in adapter, and the adapter's file."""
    model = _real_opt()
    inject(model, LoraConfig(8, targets=("q_proj", "v_proj")))
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.normal_(0, 0.05, generator=random)
    path = tmp_path_factory.mktemp("opt") / "adapter.safetensors"
    save_adapter(model, path)
    return model, path


IDS = torch.tensor([[2, 100, 2000, 30_000, 17, 5]])


def _answer(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.slow
def test_an_adapter_for_opt_125m_takes_at_most_three_megabytes(opt_125m):
    _, path = opt_125m
    assert 294_912 * 4 < path.stat().st_size < 3_000_000


@pytest.mark.slow
def test_an_adapter_for_opt_125m_reloads_to_identical_logits(opt_125m):
    model, path = opt_125m
    again = _real_opt()
    before = _answer(again)
    load_adapter(again, path)
    assert not torch.allclose(_answer(again), before, atol=1e-2)
    assert torch.equal(_answer(again), _answer(model))


@pytest.mark.slow
def test_merging_opt_125m_does_not_change_the_greedy_tokens(opt_125m):
    model, _ = opt_125m
    settings = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 16, "do_sample": False}
    before = model.generate(IDS, **settings)
    merged = merge(model)
    assert not lora_layers(merged)
    assert torch.equal(merged.generate(IDS, **settings), before)
    assert len(set(before[0, IDS.shape[1] :].tolist())) > 1
