"""Adapters of every kind beside tiny bases that they fit, for models that answer.

`CASES`: family of the base, tensors and config, as PEFT would hold them. A case is made by hand,
so it can be read without PEFT; what PEFT itself writes is in `peft_made`.
"""

import numpy as np
import torch
import transformers
from conftest import build, padded_rows, scale_up
from on_disk import PREFIX, fused, keyed, numbers, pair

ATTENTION = "model.layers.{}.self_attn.{}"
Q, K = ATTENTION.format(0, "q_proj"), ATTENTION.format(1, "k_proj")
MLP = "model.layers.1.mlp.down_proj"


def small(sides):
    """Factors small enough for the answers of a float32 model to stay comparable."""
    return tuple(side / np.float32(4) for side in sides)


def llama_pairs(rank=2, other=None):
    """Pairs for a query, a key of half the width, and the last layer of an MLP."""
    return keyed(
        {
            Q: small(pair(32, 32, rank)),
            K: small(pair(16, 32, other or rank, seed=3)),
            MLP: small(pair(32, 64, rank, seed=5)),
        }
    )


def with_parts(tensors, end, length_of):
    """The tensors of every pair, with a vector beside each."""
    found = dict(tensors)
    for name, value in tensors.items():
        if name.endswith(".lora_B.weight"):
            path = name.removesuffix(".lora_B.weight")
            found[path + end] = np.abs(numbers(length_of(value), seed=len(path)))
    return found


def rows_of(value):
    return value.shape[0]


EMBED, EMBEDDED = "model.embed_tokens", (".lora_embedding_A", ".lora_embedding_B")
EXPERT = "model.layers.0.mlp.experts"

# Family of the base, tensors, config: as PEFT would hold them.
CASES = {
    "plain": ("llama", llama_pairs(), {}),
    "rank-stabilised": ("llama", llama_pairs(3), {"r": 3, "use_rslora": True}),
    "patterns": (
        "llama",
        llama_pairs(2, 4),
        {"rank_pattern": {"k_proj": 4}, "alpha_pattern": {"layers.0.*": 3, "down_proj": 0.5}},
    ),
    "patterns of rank-stabilised": (
        "llama",
        llama_pairs(2, 4),
        {"rank_pattern": {"k_proj": 4}, "alpha_pattern": {"k_proj": 3}, "use_rslora": True},
    ),
    "dora": (
        "llama",
        with_parts(llama_pairs(), ".lora_magnitude_vector", rows_of),
        {"use_dora": True},
    ),
    "embedding": ("llama", keyed({EMBED: small(pair(32, 100))}, ends=EMBEDDED), {}),
    "rows": (
        "llama",
        llama_pairs() | {f"{PREFIX}{EMBED}.token_adapter.trainable_tokens_delta": numbers(40, 32)},
        {"trainable_token_indices": {"embed_tokens": list(range(10, 50))}},
    ),
    "head": (
        "llama-cls",
        llama_pairs() | {f"{PREFIX}score.weight": numbers(2, 32)},
        {"modules_to_save": ["score"], "task_type": "SEQ_CLS"},
    ),
    "bias of lora_B": (
        "bert",
        with_parts(
            keyed({"bert.encoder.layer.0.attention.self.query": small(pair(32, 32))}),
            ".lora_B.bias",
            rows_of,
        ),
        {"lora_bias": True},
    ),
    "conv1d": ("gpt2", keyed({"transformer.h.0.attn.c_attn": small(pair(96, 32))}), {}),
    "convolution": (
        "vit",
        keyed(
            {
                "vit.embeddings.patch_embeddings.projection": small(
                    (numbers(2, 3, 4, 4), numbers(8, 2, 1, 1))
                )
            }
        ),
        {},
    ),
    "experts": (
        "mixtral",
        keyed(
            {
                f"{EXPERT}.base_layer": small(fused(3, 24, 8)),
                EXPERT: small(fused(3, 8, 12, seed=5)),
            }
        ),
        {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
    "experts by expert": (
        "mixtral",
        keyed({EXPERT: small(fused(3, 8, 12))}),
        {"target_parameters": ["experts.down_proj"], "lora_B_layout": "grouped_by_expert"},
    ),
    "adalora": (
        "llama",
        {name.removesuffix(".weight"): value for name, value in llama_pairs(3).items()}
        | {f"{PREFIX}{path}.lora_E": numbers(3, 1, seed=7) for path in (Q, K, MLP)},
        {"peft_type": "ADALORA", "init_r": 6},
    ),
}


# ---------------------------------------------------------------- bases that answer


def vit():
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12,
        image_size=8, patch_size=4,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def mixtral():
    config = transformers.MixtralConfig(
        vocab_size=100, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=12, max_position_embeddings=64,
        num_local_experts=3, num_experts_per_tok=3,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)


MADE = {"vit": vit, "mixtral": mixtral}


def base_of(family, root):
    """Return a directory in `root` with a tiny base, made when it is first asked for."""
    if not (root / family).is_dir():
        if family in MADE:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = scale_up(MADE[family]())
        else:
            model = build(family)
        model.save_pretrained(root / family)
    return root / family


CLASSES = {
    "bert": "BertForSequenceClassification",
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "llama-cls": "LlamaForSequenceClassification",
    "mixtral": "MixtralForCausalLM",
    "vit": "ViTForImageClassification",
}


def load(family, folder):
    return getattr(transformers, CLASSES[family]).from_pretrained(folder).eval()


@torch.no_grad()
def answer(family, model):
    if family == "vit":
        values = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        return model(pixel_values=values).logits
    return model(**padded_rows()).logits
