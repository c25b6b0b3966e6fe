"""Bases and adapters written by PEFT itself, and a second, dumb reading of what they mean.

`make` trains nothing: it injects with PEFT, fills every trainable parameter with noise and saves.
`reference` merges in float64 from the two folders alone, sharing no code with the package.
"""

import copy
import json
import math
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from conftest import scale_up
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

VOCABULARY = 60
WIDTH = 24
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Significant bits, and the exponent of the smallest normal number.
FORMATS = {"float32": (24, -126), "bfloat16": (8, -126), "float16": (11, -14)}
Inputs = Callable[[], dict[str, Tensor]]


# ---------------------------------------------------------------- inputs


def _ids(seed: int = 7) -> Tensor:
    # The lowest ids stay out: they pad, begin and end sentences.
    random = torch.Generator().manual_seed(seed)
    return torch.randint(5, VOCABULARY, (3, 7), generator=random)


def _tokens() -> dict[str, Tensor]:
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, 4:] = 0
    return {"input_ids": _ids(), "attention_mask": mask}


def _two_texts() -> dict[str, Tensor]:
    return {**_tokens(), "decoder_input_ids": _ids(8)[:, :4]}


def _pictures() -> dict[str, Tensor]:
    return {"pixel_values": _noise(2, 3, 16, 16)}


def _sounds() -> dict[str, Tensor]:
    return {"input_features": _noise(2, 10, 32), "decoder_input_ids": _ids(8)[:2, :4]}


def _waves() -> dict[str, Tensor]:
    return {"input_values": _noise(2, 100)}


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(9))


# ---------------------------------------------------------------- architectures


@dataclass(frozen=True)
class Architecture:
    """How to build a tiny model, what PEFT may adapt in it, and what to ask of it.

    Called with a seed it returns the model whose checkpoint is the base. `loads` names the class
    that is adapted, where that is another one; `headless` saves the model without its head.
    """

    kind: str
    sizes: Mapping[str, Any]
    linears: tuple[str, ...]
    inputs: Inputs = _tokens
    task: str | None = "CAUSAL_LM"
    biased: tuple[str, ...] = ()  # those of `linears` that all have a bias
    loads: str = ""
    headless: bool = False
    dropped: str = "$^"  # what the adapted class has no place for, as a regular expression

    def __call__(self, seed: int = 0) -> nn.Module:
        """Return the seeded model, with weights large enough for its answers to depend on input."""
        kind = getattr(transformers, self.kind)
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(seed)
            model = kind(kind.config_class(**self.sizes))
        return scale_up(model, seed).eval()

    def drops(self, name: str) -> bool:
        """Say whether the adapted class has no place for this tensor of the base."""
        return re.fullmatch(self.dropped, name) is not None

    def load(self, base: Path, dtype: torch.dtype, seed: int = 0) -> nn.Module:
        """Return the model that is adapted, over the checkpoint in `base`."""
        kind = getattr(transformers, self.loads or self.kind)
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(seed)  # a head that the base lacks is random
            model = kind.from_pretrained(base, dtype=dtype).eval()
            if model._can_set_experts_implementation():
                model.set_experts_implementation("eager")  # the fast ones know no float64
        return model


def _usual(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 40,
        "max_position_embeddings": 40,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **more,
    }


def _grouped(**more: Any) -> dict[str, Any]:
    return _usual(num_key_value_heads=2, **more)


def _speaking(**more: Any) -> dict[str, Any]:
    names = ("layers", "attention_heads", "ffn_dim")
    sizes = zip(names, (2, 4, 40), strict=True)
    both = {f"{side}_{n}": v for n, v in sizes for side in ("encoder", "decoder")}
    return {
        "vocab_size": VOCABULARY,
        "d_model": WIDTH,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 3,
        **both,
        **more,
    }


_DISTIL = {
    "vocab_size": VOCABULARY, "dim": WIDTH, "n_layers": 2, "n_heads": 4, "hidden_dim": 40,
    "max_position_embeddings": 40,
}  # fmt: skip
_GPT2 = {
    "vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 40,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_OPT = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2, "ffn_dim": 40,
    "num_attention_heads": 4, "word_embed_proj_dim": 16, "max_position_embeddings": 40,
}  # fmt: skip
_T5 = {
    "vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 8, "d_ff": 40, "num_layers": 2,
    "num_heads": 4, "decoder_start_token_id": 0,
}  # fmt: skip
_VIT = {
    "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 40, "image_size": 16, "patch_size": 4,
}  # fmt: skip
_WHISPER = _speaking(
    num_mel_bins=10, max_source_positions=16, max_target_positions=20,
    suppress_tokens=None, begin_suppress_tokens=None,
)  # fmt: skip
_WAV2VEC2 = _usual(
    conv_dim=(16, 20), conv_kernel=(5, 3), conv_stride=(3, 2), num_feat_extract_layers=2,
    num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, classifier_proj_size=16,
)  # fmt: skip
_DEBERTA = _usual(relative_attention=True, position_buckets=8, pos_att_type=["p2c", "c2p"])
_MOE = {"num_experts_per_tok": 2}

_ENCODER = ("query", "key", "value", "intermediate.dense", "output.dense")
_DECODER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_SEQ2SEQ = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
_DISTILLED = ("q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2")
_CONV1D = ("c_attn", "c_proj", "c_fc")

# Square here, oblong there: a transposed delta shows in its shape in the latter only.
ARCHITECTURES: dict[str, Architecture] = {
    "distilbert": Architecture(
        "DistilBertForSequenceClassification", _DISTIL, _DISTILLED, task="SEQ_CLS",
        biased=_DISTILLED,
    ),
    "distilbert-from-mlm": Architecture(
        "DistilBertForMaskedLM", _DISTIL, _DISTILLED, task="SEQ_CLS", biased=_DISTILLED,
        loads="DistilBertForSequenceClassification", dropped=r"vocab_.*",
    ),
    "bert": Architecture(  # all its linears are square
        "BertForSequenceClassification", _usual(intermediate_size=WIDTH),
        ("query", "key", "value", "dense"), task="SEQ_CLS",
        biased=("query", "key", "value", "dense"),
    ),
    "bert-headless": Architecture(
        "BertForSequenceClassification", _usual(), _ENCODER, task="SEQ_CLS", biased=_ENCODER,
        headless=True,
    ),
    "bert-mlm": Architecture("BertForMaskedLM", _usual(), _ENCODER, task=None, biased=_ENCODER),
    "roberta": Architecture(
        "RobertaForSequenceClassification", _usual(pad_token_id=1, type_vocab_size=1), _ENCODER,
        task="SEQ_CLS", biased=_ENCODER,
    ),
    "roberta-from-mlm": Architecture(
        "RobertaForMaskedLM", _usual(pad_token_id=1, type_vocab_size=1), _ENCODER,
        task="SEQ_CLS", biased=_ENCODER, loads="RobertaForSequenceClassification",
        dropped=r"lm_head\..*",
    ),
    "deberta-v2": Architecture(
        "DebertaV2ForSequenceClassification", _DEBERTA,
        ("query_proj", "key_proj", "value_proj", "dense"), task="SEQ_CLS",
        biased=("query_proj", "key_proj", "value_proj", "dense"),
    ),
    "gpt2": Architecture("GPT2LMHeadModel", _GPT2, _CONV1D, biased=_CONV1D),
    "gpt2-headless": Architecture(
        "GPT2LMHeadModel", _GPT2, _CONV1D, biased=_CONV1D, headless=True,
    ),
    "gpt2-cls": Architecture(  # all but c_attn are square
        "GPT2ForSequenceClassification", {**_GPT2, "n_inner": WIDTH}, _CONV1D, task="SEQ_CLS",
        biased=_CONV1D,
    ),
    "opt": Architecture(
        "OPTForCausalLM", _OPT, (*_SEQ2SEQ, "project_in", "project_out"), biased=_SEQ2SEQ,
    ),
    "gpt-neox": Architecture(
        "GPTNeoXForCausalLM", _usual(),
        ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
        biased=("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    ),
    "llama": Architecture("LlamaForCausalLM", _grouped(), _DECODER),
    "llama-square": Architecture(
        "LlamaForCausalLM", _usual(num_key_value_heads=4, intermediate_size=WIDTH), _DECODER,
    ),
    "llama-headless": Architecture(
        "LlamaForSequenceClassification", _grouped(), _DECODER, task="SEQ_CLS", headless=True,
    ),
    "qwen2": Architecture("Qwen2ForCausalLM", _grouped(), _DECODER, biased=_DECODER[:3]),
    "mistral": Architecture("MistralForCausalLM", _grouped(head_dim=8), _DECODER),
    "gemma": Architecture(
        "GemmaForCausalLM", _usual(num_key_value_heads=1, head_dim=8), _DECODER,
    ),
    "t5": Architecture(
        "T5ForConditionalGeneration", _T5, ("q", "k", "v", "o", "wi", "wo"), inputs=_two_texts,
        task="SEQ_2_SEQ_LM",
    ),
    "bart": Architecture(
        "BartForConditionalGeneration", _speaking(max_position_embeddings=40), _SEQ2SEQ,
        inputs=_two_texts, task="SEQ_2_SEQ_LM", biased=_SEQ2SEQ,
    ),
    "mixtral": Architecture(  # gate_up_proj of an expert is square
        "MixtralForCausalLM",
        _grouped(num_local_experts=3, **_MOE) | {"hidden_size": 32, "intermediate_size": 16},
        _ATTENTION,
    ),
    "qwen2-moe": Architecture(  # no expert is square
        "Qwen2MoeForCausalLM",
        _grouped(num_experts=3, moe_intermediate_size=16, shared_expert_intermediate_size=28,
                 **_MOE),
        ("q_proj", "k_proj", "v_proj", "o_proj", "shared_expert.up_proj"),
        biased=("q_proj", "k_proj", "v_proj"),
    ),
    "qwen3-moe": Architecture(  # down_proj of an expert is square
        "Qwen3MoeForCausalLM",
        _grouped(num_experts=3, moe_intermediate_size=WIDTH, head_dim=8, **_MOE), _ATTENTION,
    ),
    "gpt-oss": Architecture(  # experts stand as (in, out); down_proj is square
        "GptOssForCausalLM",
        _grouped(num_local_experts=3, head_dim=8, intermediate_size=WIDTH, sliding_window=8,
                 layer_types=["full_attention", "sliding_attention"], **_MOE),
        _ATTENTION, biased=_ATTENTION,
    ),
    "vit": Architecture(
        "ViTForImageClassification", _VIT, ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"),
        inputs=_pictures, task=None, biased=("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"),
    ),
    "whisper": Architecture(
        "WhisperForConditionalGeneration", _WHISPER, _SEQ2SEQ, inputs=_sounds, task=None,
        biased=("q_proj", "v_proj", "out_proj", "fc1", "fc2"),
    ),
    "wav2vec2": Architecture(
        "Wav2Vec2ForSequenceClassification", _WAV2VEC2,
        ("q_proj", "k_proj", "v_proj", "out_proj", "intermediate_dense", "output_dense"),
        inputs=_waves, task=None,
        biased=("q_proj", "v_proj", "out_proj", "intermediate_dense", "output_dense"),
    ),
    "phi3": Architecture(
        "Phi3ForCausalLM", _grouped(), ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    ),
}  # fmt: skip


# ---------------------------------------------------------------- variants


@dataclass(frozen=True)
class Variant:
    """Keyword arguments of `peft.LoraConfig`: the same everywhere, and by architecture.

    A variant applies to the architectures in `applies`; their values are more arguments.
    `target_modules` is the architecture's linears where nothing else is said.
    """

    options: Mapping[str, Any]
    applies: Mapping[str, Mapping[str, Any]]
    config: Callable[..., peft.PeftConfig] = peft.LoraConfig
    around: str = "noise"  # or "start": trained values lie near the initial ones
    loose: bool = False  # PEFT works on the base in float32, so float64 cannot repeat it
    autocast: bool = True  # the adapter is float32 on a narrower base
    one_sided: bool = False  # it adapts one side of tied weights


def _all(*but: str) -> dict[str, Mapping[str, Any]]:
    return {name: {} for name in ARCHITECTURES if name not in but}


def _patterns(architecture: Architecture) -> dict[str, Any]:
    """Ranks and alphas by module, where no module matches two patterns."""
    first, last = architecture.linears[0], architecture.linears[-1]
    return {
        "rank_pattern": {first: 5, rf".*\.1\..*{re.escape(last)}": 2},
        "alpha_pattern": {first: 3, rf".*\.0\..*{re.escape(last)}": 7.5},
    }


def _blocks(architecture: Architecture) -> dict[str, Any]:
    # PEFT looks for these as parts of a module's name, so that a bare "q" is too little.
    first, last = architecture.linears[0], architecture.linears[-1]
    return {
        "use_bdlora": peft.BdLoraConfig(
            target_modules_bd_a=[f".{first}"],
            target_modules_bd_b=[f".{last}"],
            nblocks=2,
            match_strict=False,
        )
    }


CONV1D = ("gpt2", "gpt2-headless", "gpt2-cls")
_BIASED = {n: {"target_modules": [*a.biased]} for n, a in ARCHITECTURES.items() if a.biased}
_EMBEDDINGS = {
    "distilbert": "word_embeddings",
    "bert": "word_embeddings",
    "bert-headless": "word_embeddings",
    "roberta": "word_embeddings",
    "gpt2-cls": "wte",
    "gpt-neox": "embed_in",
    "llama": "embed_tokens",
    "llama-headless": "embed_tokens",
    "qwen2": "embed_tokens",
    "mixtral": "embed_tokens",
    "gpt-oss": "embed_tokens",
}
_TIED_EMBEDDINGS = {
    "bert-mlm": "word_embeddings",
    "gpt2": "wte",
    "gpt2-headless": "wte",
    "opt": "embed_tokens",
    "gemma": "embed_tokens",
}
_TIED_HEADS = {
    "bert-mlm": "decoder", "gpt2": "lm_head", "opt": "lm_head", "gemma": "lm_head",
    "t5": "lm_head",
}  # fmt: skip
_CONV = ("feature_extractor.conv_layers.0.conv", "feature_extractor.conv_layers.1.conv")
# Not Whisper's: its encoder asks them for their stride, which PEFT's wrapper does not have.
_CONVOLUTIONS = {
    "vit": {"target_modules": ["projection", "fc1"]},
    "wav2vec2": {"target_modules": [*_CONV, "q_proj"]},
}
_SAVED = {
    "distilbert": ["classifier"],  # PEFT saves pre_classifier as well: it compares name endings
    "distilbert-from-mlm": ["classifier"],
    "bert-headless": ["classifier"],
    "roberta": ["classifier"],
    "roberta-from-mlm": ["classifier"],
    "deberta-v2": ["classifier", "LayerNorm"],
    "gpt2-cls": ["score"],
    "gpt-neox": ["lm_head"],  # embed_out in the checkpoint
    "llama": ["lm_head", "embed_tokens"],
    "llama-headless": ["score"],
    "qwen2": ["lm_head"],
    "mistral": ["lm_head", "norm"],  # all norms, by their name's ending
    "mixtral": ["lm_head"],
    "gpt-oss": ["lm_head"],
    "phi3": ["lm_head"],
    "vit": ["classifier"],
}
_EXPERTS = ("mixtral", "qwen2-moe", "qwen3-moe", "gpt-oss")
_GATE_UP, _DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
_FEW = {"lora_alpha": 6, "r": 3}


def _experts(*parameters: str, **more: Any) -> dict[str, Mapping[str, Any]]:
    return {name: {"target_parameters": [*parameters], **more} for name in _EXPERTS}


def _on(names: Mapping[str, str], *linears: int) -> dict[str, Mapping[str, Any]]:
    """Target the embedding, and those of the linears."""
    return {
        name: {"target_modules": [e, *(ARCHITECTURES[name].linears[i] for i in linears)]}
        for name, e in names.items()
    }


def _by_architecture(make: Callable[[Architecture], dict[str, Any]], *but: str) -> dict[str, Any]:
    return {name: make(built) for name, built in ARCHITECTURES.items() if name not in but}


VARIANTS: dict[str, Variant] = {
    "plain": Variant(_FEW, _all()),
    "rslora": Variant({**_FEW, "use_rslora": True}, _all()),
    "dora": Variant({**_FEW, "use_dora": True}, _all()),
    "rslora-dora": Variant({**_FEW, "use_rslora": True, "use_dora": True}, _all()),
    "all-linear": Variant(
        {**_FEW, "target_modules": "all-linear"},
        # Not DistilBERT: PEFT finds pre_classifier both to adapt and to save whole, and raises.
        _all("distilbert", "distilbert-from-mlm"),
    ),
    "narrow": Variant(_FEW, _all(), autocast=False),
    "narrow-dora": Variant({**_FEW, "use_dora": True}, _all(), autocast=False),
    "bias-all": Variant({**_FEW, "bias": "all"}, _BIASED),
    "bias-lora-only": Variant({**_FEW, "bias": "lora_only"}, _BIASED),
    "lora-bias": Variant({**_FEW, "lora_bias": True}, _BIASED),
    "lora-bias-bias-all": Variant({**_FEW, "lora_bias": True, "bias": "all"}, _BIASED),
    "patterns": Variant(_FEW, _by_architecture(_patterns)),
    "rslora-patterns": Variant({**_FEW, "use_rslora": True}, _by_architecture(_patterns)),
    "modules-to-save": Variant(_FEW, {n: {"modules_to_save": [*m]} for n, m in _SAVED.items()}),
    "embedding": Variant(_FEW, _on(_EMBEDDINGS, 0)),
    "embedding-dora": Variant({**_FEW, "use_dora": True}, _on(_EMBEDDINGS, 0)),
    "conv": Variant(_FEW, _CONVOLUTIONS),
    "conv-dora": Variant({**_FEW, "use_dora": True}, _CONVOLUTIONS),
    "trainable-tokens": Variant(
        _FEW,
        {n: {"trainable_token_indices": {e: [3, 17, 9]}}
         for n, e in (_EMBEDDINGS | _TIED_EMBEDDINGS).items()},
    ),
    "trainable-tokens-list": Variant(
        {**_FEW, "trainable_token_indices": [3, 17, 9]},
        {n: {} for n in ("llama", "gemma", "bert", "gpt2", "t5", "bart")},
    ),
    "experts": Variant(_FEW, _experts(_GATE_UP, _DOWN)),
    "experts-gate-up": Variant(_FEW, _experts(_GATE_UP)),
    "experts-down": Variant(_FEW, _experts(_DOWN, target_modules=[])),
    "experts-patterns": Variant(
        {**_FEW, "rank_pattern": {"experts.gate_up_proj": 2},
         "alpha_pattern": {"experts.down_proj": 5}, "use_rslora": True},
        _experts(_GATE_UP, _DOWN),
    ),
    "parameter-2d": Variant(
        _FEW,
        {"llama": {"target_parameters": ["q_proj.weight"], "target_modules": ["up_proj"]},
         "mixtral": {"target_parameters": ["mlp.gate.weight"]},
         "qwen3-moe": {"target_parameters": ["mlp.gate.weight"], "target_modules": []}},
    ),
    "pissa": Variant(
        {**_FEW, "init_lora_weights": "pissa"}, _all(), around="start", loose=True,
    ),
    # PEFT's QR ignores that Conv1D stands as (in, out), and fails in the first forward pass.
    "olora": Variant(
        {**_FEW, "init_lora_weights": "olora"}, _all(*CONV1D), around="start", loose=True,
    ),
    "kasa": Variant(
        {**_FEW, "kasa_config": peft.KasaConfig()}, _all(*CONV1D), loose=True,
    ),
    "bdlora": Variant({"r": 4, "lora_alpha": 6}, _by_architecture(_blocks, *CONV1D)),
    "adalora": Variant(
        {"init_r": 4, "target_r": 2, "lora_alpha": 6, "total_step": 10}, _all(),
        config=peft.AdaLoraConfig,
    ),
    "adalora-pruned": Variant(
        {"init_r": 4, "target_r": 2, "lora_alpha": 6, "total_step": 10}, _all(),
        config=peft.AdaLoraConfig,
    ),
    "layer-replication": Variant(
        {**_FEW, "layer_replication": [(0, 2), (1, 2)]},
        # Not Qwen2: PEFT leaves its list of layer types as short as it was.
        {n: {} for n in ("llama", "bert", "mistral", "phi3")},
    ),
    # PEFT ties what it adapts only where the embedding is called embed_tokens.
    "tied-modules-to-save": Variant(
        {**_FEW, "ensure_weight_tying": True},
        {n: {"modules_to_save": ["embed_tokens"]} for n in ("opt", "gemma")},
    ),
    "tied-embedding": Variant(
        {**_FEW, "ensure_weight_tying": True},
        {n: {"target_modules": ["embed_tokens", "q_proj"]} for n in ("opt", "gemma")},
    ),
    "tied-trainable-tokens": Variant(
        {**_FEW, "ensure_weight_tying": True},
        {n: {"trainable_token_indices": {e: [3, 17, 9]}} for n, e in _TIED_EMBEDDINGS.items()},
    ),
    "one-side-embedding": Variant(
        _FEW,
        {**_on(_TIED_EMBEDDINGS, 0),
         "gpt2": {"target_modules": ["wte", "c_attn"], "ensure_weight_tying": True}},
        one_sided=True,
    ),
    "one-side-head": Variant(_FEW, _on(_TIED_HEADS, 0), one_sided=True),
    "one-side-modules-to-save": Variant(
        _FEW,
        {"gpt2": {"modules_to_save": ["wte"], "ensure_weight_tying": True},
         "bert-mlm": {"modules_to_save": ["word_embeddings"]},
         "gemma": {"modules_to_save": ["embed_tokens"]},
         "opt": {"modules_to_save": ["lm_head"]},
         "t5": {"modules_to_save": ["lm_head"]}},
        one_sided=True,
    ),
}  # fmt: skip


def cases(*variants: str) -> list[tuple[str, str]]:
    """Return the pairs of architecture and variant that apply, of all variants or of these."""
    return [(a, v) for v in variants or VARIANTS for a in VARIANTS[v].applies]


# ---------------------------------------------------------------- making


@dataclass
class Made:
    """A base and an adapter on disk, and the model that PEFT has of them in memory."""

    architecture: Architecture
    variant: Variant
    base: Path
    adapter: Path
    live: Any
    inputs: dict[str, Tensor]
    logits: Tensor
    dtype: torch.dtype


def make(architecture: str, variant: str, dtype: str, folder: Path, seed: int = 0) -> Made:
    """Write folder/base and folder/adapter, and return both with the live model of PEFT."""
    built, chosen = ARCHITECTURES[architecture], VARIANTS[variant]
    base, adapter = folder / "base", folder / "adapter"
    model = built(seed)
    if chosen.loose:
        _part_singular_values(model)
    model = model.to(DTYPES[dtype])
    (model.base_model if built.headless else model).save_pretrained(base)
    options = {"task_type": built.task, "target_modules": [*built.linears]}
    options |= copy.deepcopy({**chosen.options, **chosen.applies[architecture]})
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(1000 + seed)
        model = built.load(base, DTYPES[dtype], seed)
        config = chosen.config(**options)
        live = peft.get_peft_model(model, config, autocast_adapter_dtype=chosen.autocast).eval()
        _fill(live, chosen.around, seed)
        if variant == "adalora-pruned":
            _prune(live)
        live.save_pretrained(adapter)
    inputs = _like(built.inputs(), DTYPES[dtype])
    return Made(built, chosen, base, adapter, live, inputs, answer(live, inputs), DTYPES[dtype])


def answer(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the logits of `model`, which is put into eval mode."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logits: Tensor = model.eval()(**inputs).logits
    return logits


def _like(inputs: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {n: x.to(dtype) if x.is_floating_point() else x for n, x in inputs.items()}


@torch.no_grad()
def _part_singular_values(model: nn.Module, rank: int = 3) -> None:
    """Set the largest and the smallest singular values of every layer apart from the others.

    What a float32 decomposition says of values that lie close together is mostly noise.
    """
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Linear | Conv1D) and min(weight.shape) > 2 * rank:
            left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
            values[:rank] *= 1.5
            values[-rank:] *= 0.5
            weight.copy_((left * values) @ right)


@torch.no_grad()
def _fill(live: nn.Module, around: str, seed: int) -> None:
    """Stand in for training: move every trainable parameter, each in its own way."""
    random = torch.Generator().manual_seed(2000 + seed)
    for name, parameter in live.named_parameters():
        if not parameter.requires_grad:
            continue
        noise = torch.empty(parameter.shape).normal_(0, 1, generator=random).to(parameter.dtype)
        if "lora_magnitude_vector" in name:
            parameter.mul_(1 + 0.1 * noise.clamp(-2, 2))
        elif "lora_" not in name:
            parameter.add_(0.2 * noise)
        elif around == "start":
            parameter.add_(0.2 * parameter.std() * noise)
        else:
            parameter.copy_(0.25 * noise)


@torch.no_grad()
def _prune(live: nn.Module) -> None:
    """Take singular values away as AdaLoRA's budget does, all of one module's among them."""
    config, kept = live.peft_config["default"], {}
    names = [n for n, _ in live.base_model.model.named_parameters() if ".lora_E." in n]
    for index, name in enumerate(names):
        mask = [(index + place) % 3 > 0 and index != 1 for place in range(config.init_r)]
        parameter = live.base_model.model.get_parameter(name)
        parameter.mul_(torch.tensor(mask, dtype=parameter.dtype)[:, None])
        kept[name] = mask
    config.rank_pattern = kept


def reloaded(made: Made) -> Any:
    """Return what PEFT makes of the two folders, all in float64."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = made.architecture.load(made.base, made.dtype)
        return peft.PeftModel.from_pretrained(model, made.adapter).double()


def merged_by_peft(live: Any, folder: Path) -> dict[str, np.ndarray]:
    """Return what PEFT's own merge of `live` gives, under the names of a checkpoint."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if live.peft_config["default"].layer_replication:
            # The copies share their weights, and PEFT would add each one's delta to all of them.
            for module in live.modules():
                for name, value in list(module.named_parameters(recurse=False)):
                    setattr(module, name, nn.Parameter(value.detach().clone()))
        live.merge_and_unload().save_pretrained(folder)
    return {name: value.numpy() for name, value in load_file(_weights(folder)).items()}


def plain(made: Made, weights: Mapping[str, np.ndarray], folder: Path) -> nn.Module:
    """Return the plain model in float64 that has `weights`, by way of a checkpoint in `folder`."""
    config = copy.deepcopy(made.live.get_base_model().config)
    if made.variant.one_sided:
        config.tie_word_embeddings = False
    config.save_pretrained(folder)
    save_file(
        {name: torch.from_numpy(value.copy()) for name, value in weights.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    return made.architecture.load(folder, torch.float64)


# ---------------------------------------------------------------- the reference


# Where a module's name is not the one in the checkpoint: (in the checkpoint, in the module).
_RENAMED = {
    "gpt_neox": [(r"embed_out\.(.*)", r"lm_head.\1")],
    "mixtral": [(r"(.*)\.block_sparse_moe\.gate\.(.*)", r"\1.mlp.gate.\2")],
    "vit": [
        (r"vit\.encoder\.layer\.(\d+)\.attention\.attention\.(q|k|v)\w+\.(.*)",
         r"vit.layers.\1.attention.\2_proj.\3"),
        (r"vit\.encoder\.layer\.(\d+)\.attention\.output\.dense\.(.*)",
         r"vit.layers.\1.attention.o_proj.\2"),
        (r"vit\.encoder\.layer\.(\d+)\.intermediate\.dense\.(.*)", r"vit.layers.\1.mlp.fc1.\2"),
        (r"vit\.encoder\.layer\.(\d+)\.output\.dense\.(.*)", r"vit.layers.\1.mlp.fc2.\2"),
        (r"vit\.encoder\.layer\.(\d+)\.(.*)", r"vit.layers.\1.\2"),
    ],
}  # fmt: skip
# Experts that stand apart in the checkpoint and together in the module.
_EXPERT = {
    "mixtral": r"(.*)\.block_sparse_moe\.experts\.(\d+)\.(w1|w2|w3)\.weight",
    "qwen2_moe": r"(.*)\.mlp\.experts\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight",
    "qwen3_moe": r"(.*)\.mlp\.experts\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight",
}
_HALF = {"w1": 0, "gate_proj": 0, "w3": 1, "up_proj": 1}
# Layers whose weights stand as (in, out): GPT-2's Conv1D, and the experts of GPT-OSS.
_TRANSPOSED = {"gpt2": r".*\.(c_attn|c_proj|c_fc|q_attn)", "gpt_oss": r".*\.experts"}
# Tied weights by the name that a checkpoint leaves out.
_TIES = {
    "bert": {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    "gpt2": {"lm_head.weight": "transformer.wte.weight"},
    "opt": {"lm_head.weight": "model.decoder.embed_tokens.weight"},
    "gemma": {"lm_head.weight": "model.embed_tokens.weight"},
    "t5": {
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
        "lm_head.weight": "shared.weight",
    },
    "bart": {"lm_head.weight": "model.shared.weight"},
}
_PART = re.compile(
    r"(?P<path>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_E|lora_diag"
    r"|lora_magnitude_vector|token_adapter\.trainable_tokens_delta)"
    r"(\.(?P<end>weight|bias))?"
)


class _Base:
    """A checkpoint, seen by the names of the modules that PEFT adapts."""

    def __init__(
        self, folder: Path, replication: list[list[int]] | None = None, untie: bool = False
    ) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        self.kind = self.config["model_type"]
        self.dtype = str(next(iter(load_file(_weights(folder)).values())).dtype).partition(".")[2]
        self.checkpoint = replicated(_wide(_weights(folder)), replication)
        self.seen: dict[str, np.ndarray] = {}
        self.places: dict[str, list[tuple[str, Any]]] = {}  # module's name: (name, its part)
        for name, value in self.checkpoint.items():
            module, part, shape = self._place(name, value)
            whole = self.seen.setdefault(module, np.zeros(shape))
            whole[part] = value
            self.places.setdefault(module, []).append((name, part))
        ties = _TIES.get(self.kind, {})
        self.ties: Mapping[str, str] = {} if untie else ties
        kept = {alias: self.find(name) for alias, name in ties.items() if untie}
        self.untied = {alias: self.seen[name] for alias, name in kept.items() if name}
        self.seen |= self.untied

    def _place(self, name: str, value: np.ndarray) -> tuple[str, Any, tuple[int, ...]]:
        if found := re.fullmatch(_EXPERT.get(self.kind, "$^"), name):
            stem, expert, which = found[1], int(found[2]), found[3]
            count = self.config.get("num_local_experts") or self.config["num_experts"]
            rows, columns = value.shape
            if which not in _HALF:
                return f"{stem}.mlp.experts.down_proj", expert, (count, rows, columns)
            half = slice(_HALF[which] * rows, (_HALF[which] + 1) * rows)
            return f"{stem}.mlp.experts.gate_up_proj", (expert, half), (count, 2 * rows, columns)
        return self._renamed(name), ..., value.shape

    def _renamed(self, name: str) -> str:
        for old, new in _RENAMED.get(self.kind, []):
            if re.fullmatch(old, name):
                return re.sub(old, new, name)
        return name

    def find(self, name: str) -> str | None:
        """Return the name of this tensor of the adapted model, or None where the base lacks it."""
        name = self.ties.get(name, name)
        headless = name.partition(".")[2]
        return next((n for n in (name, headless) if n in self.seen), None)

    def names(self, merged: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return `merged` by the checkpoint's names; what the base lacks keeps its own."""
        result = {}
        for module, value in merged.items():
            for name, part in self.places.get(module, [(self._unknown(module), ...)]):
                result[name] = value[part]
        return result

    def _unknown(self, module: str) -> str:
        return re.sub(r"^lm_head\.", "embed_out.", module) if self.kind == "gpt_neox" else module


def replicated(
    checkpoint: Mapping[str, np.ndarray], ranges: list[list[int]] | None
) -> dict[str, np.ndarray]:
    """Return the checkpoint of the deeper model that has the layers of `ranges` in turn."""
    if not ranges:
        return dict(checkpoint)
    order = [old for start, end in ranges for old in range(start, end)]
    result = {}
    for name, value in checkpoint.items():
        found = re.fullmatch(r"(.*\.layers?\.)(\d+)(\..*)", name)
        if not found:
            result[name] = value
            continue
        for new, old in enumerate(order):
            if old == int(found[2]):
                result[f"{found[1]}{new}{found[3]}"] = value
    return result


def reference(
    base: Path, adapter: Path, *, residual_base: bool = False, untie: bool = False
) -> dict[str, np.ndarray]:
    """Return what the adapter makes of the base's tensors, in float64, by the base's names.

    Holds the tensors that change, and those that the base lacks. With `residual_base` the base
    has lost already what PiSSA and its like take away from it. With `untie` each tied tensor
    stands for itself.
    """
    config = json.loads((adapter / "adapter_config.json").read_text())
    held = _Base(base, config.get("layer_replication"), untie)
    layers: dict[str, dict[str, np.ndarray]] = {}
    merged: dict[str, np.ndarray] = {}
    for key, value in _wide(adapter / "adapter_model.safetensors").items():
        name = key.removeprefix("base_model.model.")
        if ".original_module." in name:
            continue  # what stood there before training
        if found := _PART.fullmatch(name):
            part = f"{found['part']}.bias" if found["end"] == "bias" else found["part"]
            layers.setdefault(found["path"], {})[part] = value
            continue
        # Where all biases are saved, a module that is saved whole has its own twice.
        name = re.sub(r"\.modules_to_save\.(default\.)?|\.base_layer\.", ".", name)
        _put(merged, held.find(name) or name, value)
    replaced = dict(merged)
    for path, parts in layers.items():
        for name, value in _layer(held, replaced, config, path, parts, residual_base).items():
            _put(merged, name, value, over=replaced)
    return held.names(held.untied | merged)


def _put(
    merged: dict[str, np.ndarray],
    name: str,
    value: np.ndarray,
    over: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Set a value; two sides of a tie must bring the same one."""
    known = merged.get(name)
    if known is not None and known is not (over or {}).get(name):
        assert np.allclose(known, value, rtol=1e-12, atol=0), f"{name}: two values"
    merged[name] = value


def _layer(
    held: _Base,
    replaced: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    path: str,
    parts: Mapping[str, np.ndarray],
    residual_base: bool,
) -> dict[str, np.ndarray]:
    def get(name: str) -> np.ndarray:
        found = held.find(name)
        assert found, f"{name}: not in the base"
        return replaced.get(found, held.seen[found])

    def at(name: str) -> str:
        return held.find(name) or name

    weight = f"{path}.weight"
    if "token_adapter.trainable_tokens_delta" in parts:
        rows = config["trainable_token_indices"]
        if isinstance(rows, dict):
            [rows] = [r for n, r in rows.items() if f".{path}".endswith(f".{n}")]
        value = get(weight).copy()
        value[rows] = parts["token_adapter.trainable_tokens_delta"]
        return {at(weight): value}
    if config.get("target_parameters") and held.find(weight) is None:
        name = _parameter(path, config["target_parameters"])
        key = held.find(name)
        assert key, f"{name}: not in the base"
        return {key: held.seen[key] + _expert_delta(held, config, name, parts)}

    old = get(weight)
    if "lora_embedding_A" in parts:
        down, up = parts["lora_embedding_A"], parts["lora_embedding_B"]
        scale = _scale(config, path, len(down))
        value = old + scale * (up @ down).T
        if "lora_magnitude_vector" in parts:
            value = value * (parts["lora_magnitude_vector"] / np.linalg.norm(value, axis=0))
        return {at(weight): value}

    down, up = parts["lora_A"], parts["lora_B"]
    scale = _scale(config, path, len(down))
    if old.ndim > 2:
        shape, old = old.shape, old.reshape(len(old), -1)
        down, up = down.reshape(len(down), -1), up.reshape(len(up), -1)
    transposed = re.fullmatch(_TRANSPOSED.get(held.kind, "$^"), path)
    if transposed:
        old = old.T
    if "lora_E" in parts:
        down = down * parts["lora_E"]
        scale = (config["lora_alpha"] or config["init_r"]) / (config["init_r"] + 1e-5)
    if "lora_diag" in parts:
        up = up * parts["lora_diag"]
    if blocks := config.get("use_bdlora"):
        if any(p in path for p in blocks["target_modules_bd_a"]):
            down = _diagonal(np.split(down, blocks["nblocks"]))
        if any(p in path for p in blocks["target_modules_bd_b"]):
            up = _diagonal(np.split(up, blocks["nblocks"]))
    if not residual_base:
        # PEFT keeps what is left in the base's own dtype, and trains on that.
        left = old - _taken_away(old, config, len(parts["lora_A"]), scale)
        old = rounded(left, held.dtype)
    value = old + scale * up @ down
    if "lora_magnitude_vector" in parts:
        norm = np.linalg.norm(value, axis=1)
        value = (parts["lora_magnitude_vector"].reshape(-1) / norm)[:, None] * value
    if transposed:
        value = value.T
    if get(weight).ndim > 2:
        value = value.reshape(shape)
    result = {at(weight): value}
    if "lora_B.bias" in parts:
        result[at(f"{path}.bias")] = get(f"{path}.bias") + scale * parts["lora_B.bias"]
    return result


def _taken_away(
    old: np.ndarray, config: Mapping[str, Any], rank: int, scale: float
) -> np.ndarray | float:
    """Return what PEFT took out of the weight when it made the adapter."""
    init = config.get("init_lora_weights")
    if config.get("kasa_config"):
        left, values, right = np.linalg.svd(old, full_matrices=False)
        return (left[:, -rank:] * values[-rank:]) @ right[-rank:]
    if init == "pissa":
        left, values, right = np.linalg.svd(old, full_matrices=False)
        return (left[:, :rank] * values[:rank]) @ right[:rank]
    if init == "olora":
        q, r = np.linalg.qr(old)
        return scale * q[:, :rank] @ r[:rank]
    assert init is True, f"init_lora_weights is {init!r}"
    return 0.0


def _parameter(path: str, targets: list[str]) -> str:
    """Return the parameter that the wrapper at `path` adapts: the innermost has the first one."""
    experts = path.removesuffix(".base_layer")
    both = [n for n in ("gate_up_proj", "down_proj") if any(t.endswith(n) for t in targets)]
    return f"{experts}.{both[0] if path != experts else both[-1]}"


def _expert_delta(
    held: _Base, config: Mapping[str, Any], name: str, parts: Mapping[str, np.ndarray]
) -> np.ndarray:
    experts = len(held.seen[name])
    down, up = parts["lora_A"], parts["lora_B"]
    rank = len(down) // experts
    scale = _scale(config, name, rank)
    transposed = re.fullmatch(_TRANSPOSED.get(held.kind, "$^"), name.rpartition(".")[0])
    deltas = []
    for expert in range(experts):
        rows = down[expert * rank : (expert + 1) * rank]  # experts one after the other
        columns = up[:, expert::experts]  # ranks one after the other
        delta = scale * columns @ rows
        deltas.append(delta.T if transposed else delta)
    return np.stack(deltas)


def _scale(config: Mapping[str, Any], path: str, rank: int) -> float:
    if config["peft_type"] == "ADALORA":
        return math.nan  # has an equation of its own
    assert _pattern(config["rank_pattern"], path, config["r"]) == rank, path
    alpha = _pattern(config["alpha_pattern"], path, config["lora_alpha"])
    return float(alpha / (math.sqrt(rank) if config["use_rslora"] else rank))


def _pattern(patterns: Mapping[str, Any] | None, path: str, usual: Any) -> Any:
    found = [v for p, v in (patterns or {}).items() if re.fullmatch(rf"(.*\.)?({p})", path)]
    assert len(set(found)) <= 1, f"{path}: ambiguous"
    return found[0] if found else usual


def half_ulp(values: np.ndarray, dtype: str) -> np.ndarray:
    """Return how far a number may lie from the nearest one of `dtype`."""
    bits, least = FORMATS[dtype]
    _, exponents = np.frexp(values)
    return np.ldexp(0.5, np.maximum(exponents - 1, least) - bits + 1)


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """Return the nearest numbers of `dtype`, ties to even."""
    ulp = 2 * half_ulp(values, dtype)
    return np.rint(values / ulp) * ulp


def _diagonal(blocks: list[np.ndarray]) -> np.ndarray:
    rows, columns = blocks[0].shape
    result = np.zeros((rows * len(blocks), columns * len(blocks)))
    for i, block in enumerate(blocks):
        result[i * rows : (i + 1) * rows, i * columns : (i + 1) * columns] = block
    return result


def _weights(folder: Path) -> Path:
    [path] = folder.glob("*.safetensors")
    return path


def _wide(path: Path) -> dict[str, np.ndarray]:
    # Numpy knows no bfloat16; float64 holds all values of every narrower type.
    return {name: value.double().numpy() for name, value in load_file(path).items()}
