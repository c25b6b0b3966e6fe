"""Vocabularies that grew before training, written by PEFT: both ends of a model must grow along."""

import peft
import pytest
import torch
import transformers
from conftest import scale_up

from lora_export import merged_files
from lora_export.errors import AdapterMismatch
from lora_export.storage import Checkpoint, read_json

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT says what it saves beside the adapter
IDS = torch.tensor([[5, 100, 103, 7, 8, 99]])
PLAIN: dict[str, object] = {}
ROWS = {"trainable_token_indices": [5, 100, 103]}
SAVED = {"modules_to_save": ["embed_tokens", "lm_head"]}
INPUT = {"target_modules": ["q_proj", "embed_tokens"]}
OUTPUT = {"target_modules": ["q_proj", "lm_head"]}


@pytest.fixture
def grown(tmp_path):
    """Make `grown(tied, **options)`: a base of 100 rows, an adapter of 104; returns the logits."""

    def make(tied, **options):
        config = transformers.LlamaConfig(
            vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied,
        )  # fmt: skip
        torch.manual_seed(0)
        scale_up(transformers.LlamaForCausalLM(config)).save_pretrained(tmp_path / "base")
        model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
        model.resize_token_embeddings(104)
        fields = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **options}
        live = peft.get_peft_model(model, peft.LoraConfig(**fields)).eval()
        with torch.no_grad():
            for value in live.parameters():
                if value.requires_grad:
                    value.add_(0.1 * torch.randn_like(value))
            logits = live(input_ids=IDS).logits
        live.save_pretrained(tmp_path / "adapter")
        return logits

    return make


def merged(folder, tied):
    out = folder / "merged"
    certificate = merged_files.merge_files(
        folder / "adapter", base=str(folder / "base"), out=out, tied=tied
    )
    assert certificate.ok
    assert read_json(out / "config.json")["vocab_size"] == 104
    model = transformers.LlamaForCausalLM.from_pretrained(out).eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize(
    ("tied", "option", "options"),
    [
        (False, "error", PLAIN), (False, "error", ROWS), (False, "error", SAVED),
        (True, "error", PLAIN), (True, "error", ROWS), (True, "untie", PLAIN),
        (True, "untie", ROWS), (True, "untie", SAVED),
    ],
)  # fmt: skip
def test_a_grown_model_answers_as_peft_does(tmp_path, grown, tied, option, options):
    wanted = grown(tied, **options)
    assert float((merged(tmp_path, option) - wanted).abs().max()) < 1e-5


@pytest.mark.parametrize(
    ("tied", "option", "options", "reason"),
    [
        # PEFT saves the end that was adapted, and loses the rows that the other grew by.
        (False, "error", INPUT, "lm_head.weight: the base has shape"),
        (False, "error", OUTPUT, "embed_tokens.weight: the base has shape"),
        (True, "error", INPUT, "tied weights"),
        (True, "error", SAVED, "tied weights"),
        (True, "both", SAVED, "tied weights"),
    ],
)
def test_a_model_that_grew_at_one_end_only_is_refused(
    tmp_path, grown, tied, option, options, reason
):
    grown(tied, **options)
    with pytest.raises(AdapterMismatch, match=reason):
        merged(tmp_path, option)
    assert not (tmp_path / "merged").exists()


def test_equal_ends_of_a_tie_are_stored_once(tmp_path, grown):
    grown(True)
    merged(tmp_path, "error")
    names = Checkpoint.open(tmp_path / "merged").tensors
    assert "lm_head.weight" not in names
    assert names["model.embed_tokens.weight"].shape == (104, 32)
