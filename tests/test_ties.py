"""Tied weights as checkpoints really hold them: once, twice alike, or twice and unlike."""

import json

import peft
import pytest
import torch
import transformers
from conftest import scale_up
from safetensors.torch import load_file, save_file

from lora_export import companions, merged_files
from lora_export.errors import AdapterMismatch

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns of ties, each time
IDS = torch.arange(20).view(2, 10)
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def base(tmp_path):
    """Make `base(head)`: a tied Llama whose file holds the head as well, as it is given."""

    def make(head=None):
        config = transformers.LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True,
        )  # fmt: skip
        torch.manual_seed(0)
        scale_up(transformers.LlamaForCausalLM(config)).save_pretrained(tmp_path / "base")
        file = tmp_path / "base" / "model.safetensors"
        tensors = load_file(file)
        if head is not None:
            save_file({**tensors, HEAD: head(tensors[EMBED])}, file, {"format": "pt"})
        return tmp_path / "base"

    return make


def adapted(folder, place, **options):
    """Save an adapter of PEFT's for the base in `folder`; return what it answers."""
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    fields = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **options}
    live = peft.get_peft_model(model, peft.LoraConfig(**fields)).eval()
    with torch.no_grad():
        for value in live.parameters():
            if value.requires_grad:
                value.add_(0.3 * torch.randn_like(value))
        logits = live(IDS).logits
    live.save_pretrained(place)
    return logits


def answers(folder):
    with torch.no_grad():
        return transformers.LlamaForCausalLM.from_pretrained(folder).eval()(IDS).logits


def test_rows_go_into_both_copies_of_a_tied_weight(tmp_path, base):
    folder = base(torch.clone)
    wanted = adapted(folder, tmp_path / "a", trainable_token_indices={"embed_tokens": [1, 2]})
    out = tmp_path / "merged"
    assert merged_files.merge_files(tmp_path / "a", base=str(folder), out=out).ok
    tensors = load_file(out / "model.safetensors")
    assert torch.equal(tensors[EMBED], tensors[HEAD])
    assert float((answers(out) - wanted).abs().max()) < 1e-4


def test_an_update_of_both_sides_goes_into_both_copies(tmp_path, base):
    folder = base(torch.clone)
    adapted(folder, tmp_path / "a", target_modules=["q_proj", "embed_tokens"])
    out = tmp_path / "merged"
    assert merged_files.merge_files(tmp_path / "a", base=str(folder), out=out, tied="both").ok
    tensors = load_file(out / "model.safetensors")
    assert torch.equal(tensors[EMBED], tensors[HEAD])


def test_what_is_stored_twice_and_unlike_is_not_tied(tmp_path, base):
    folder = base(lambda weight: weight + 1)
    wanted = adapted(folder, tmp_path / "a", target_modules=["q_proj", "lm_head"])
    out = tmp_path / "merged"
    assert merged_files.merge_files(tmp_path / "a", base=str(folder), out=out).ok
    before, after = (load_file(f / "model.safetensors") for f in (folder, out))
    assert torch.equal(before[EMBED], after[EMBED])
    assert float((answers(out) - wanted).abs().max()) < 1e-4


@pytest.mark.parametrize("head", [None, torch.clone])
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens"]},
        {"trainable_token_indices": {"lm_head": [1, 2]}},
        {"trainable_token_indices": {"lm_head": [1, 2], "embed_tokens": [3, 4]}},
    ],
    ids=["output", "input", "rows of the output", "other rows of each"],
)
def test_one_side_is_refused_and_right_when_untied(tmp_path, base, options, head):
    folder = base(head)
    wanted = adapted(folder, tmp_path / "a", **options)
    with pytest.raises(AdapterMismatch, match="tied weights"):
        merged_files.merge_files(tmp_path / "a", base=str(folder), out=tmp_path / "no")
    out = tmp_path / "merged"
    assert merged_files.merge_files(tmp_path / "a", base=str(folder), out=out, tied="untie").ok
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    assert float((answers(out) - wanted).abs().max()) < 1e-4
    # Later, without being told again how the merge was made.
    assert merged_files.verify_merged(out, tmp_path / "a", base=str(folder)).ok


def test_rows_of_the_input_follow_to_the_output_when_untied(tmp_path, base):
    folder = base()
    wanted = adapted(folder, tmp_path / "a", trainable_token_indices={"embed_tokens": [1, 2]})
    out = tmp_path / "merged"
    assert merged_files.merge_files(tmp_path / "a", base=str(folder), out=out, tied="untie").ok
    assert float((answers(out) - wanted).abs().max()) < 1e-4


def test_two_updates_of_one_weight_are_not_added_up(tmp_path, base):
    folder = base()
    adapted(folder, tmp_path / "a", target_modules=["lm_head", "embed_tokens"])
    with pytest.raises(AdapterMismatch, match="at once"):
        merged_files.merge_files(
            tmp_path / "a", base=str(folder), out=tmp_path / "merged", tied="both"
        )


def test_both_levels_of_a_config_are_untied(tmp_path):
    fields = {"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": True}}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    found = companions.config_json(tmp_path, {"tie_word_embeddings": False}, None)
    assert found["tie_word_embeddings"] is found["text_config"]["tie_word_embeddings"] is False
