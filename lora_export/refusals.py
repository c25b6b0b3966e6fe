"""What is refused, why, and what the user can do instead: the one table.

`lora-export inspect --refusals` prints it; every message about one of these cases is made from it.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Refusal:
    """One kind of adapter, or of adapter and base, that cannot be merged right."""

    case: str
    why: str
    remedy: str


TABLE: dict[str, Refusal] = {
    # ------------------------------------------------ the method
    "peft-type": Refusal(
        "peft_type other than LORA and ADALORA",
        "its update is no low-rank product of this family",
        "merge it with the library that trained it, then use the merged model as a base",
    ),
    "alora": Refusal(
        "activated LoRA (alora_invocation_tokens)",
        "its update begins at an invocation token, so no fixed weight computes it",
        "serve it unmerged",
    ),
    "arrow": Refusal(
        "Arrow routing (arrow_config)",
        "it picks an adapter for each token, so no fixed weight computes it",
        "serve it unmerged, or merge one of its adapters alone",
    ),
    "qalora": Refusal(
        "QALoRA (use_qalora)",
        "it pools its input in the groups of a quantised base, which is not the base merged here",
        "merge it in the quantised base's own toolkit",
    ),
    "residual-base": Refusal(
        "init_lora_weights corda, lora_ga, loftq or pissa_niter_N",
        "training began by changing the base, by a random number, a data set or a quantiser that "
        "the adapter does not carry",
        "pass the residual base that was saved in training with --residual-base, or let PEFT "
        "convert the adapter (save_pretrained with path_initial_model_for_weight_conversion)",
    ),
    "unknown-field": Refusal(
        "a config field that is set and not known here",
        "it may change the merged weight",
        "update lora-export; or remove the field, where you know that it only steers training",
    ),
    "unknown-tensor": Refusal(
        "a LoRA tensor of a kind not known here",
        "leaving it out would merge another model than was trained",
        "update lora-export, or convert the adapter to plain LoRA with the tool that wrote it",
    ),
    "pickle": Refusal(
        "a pickle with anything but tensors in it, or written before torch 1.6",
        "loading it would run code, or trust sizes that are not checked",
        "load it where it was made, and save it as safetensors",
    ),
    "several-adapters": Refusal(
        "several adapters in one file",
        "which one is meant is not said",
        "save the one to merge by itself",
    ),
    # ------------------------------------------------ what cannot be told
    "pattern-order": Refusal(
        "rank_pattern or alpha_pattern with several matches of different value",
        "PEFT takes the first, and its files are written in sorted order, so training may have "
        "seen another first",
        "say which one wins with --pattern-order first or last",
    ),
    "rank-mismatch": Refusal(
        "a rank in the config that is not the rank of the tensors",
        "the scale is alpha / rank, and which of the two was trained with is not known",
        "correct r or rank_pattern in the config",
    ),
    "merged-linear": Refusal(
        "a MergedLinear (loralib, PEFT 0.2) without enable_lora",
        "lora_A holds the factors of several slices of the output, and which ones is not said",
        "put it into a PEFT directory whose config says enable_lora",
    ),
    "no-alpha": Refusal(
        "a format that stores no alpha (loralib, tensors without a config)",
        "the scale of the update is alpha / rank, and nothing says alpha",
        "pass --alpha with the value of the training run",
    ),
    "mlx-alpha": Refusal(
        "an mlx-lm config with both alpha and scale",
        "before mid 2024 mlx-lm multiplied scale by alpha / rank, since then it ignores alpha",
        "pass --alpha with the config's value (trained before), or remove alpha from the config",
    ),
    "expert-layout": Refusal(
        "square fused experts without a known orientation",
        "(experts, out, in) and (experts, in, out) have the same shape, and PEFT changed its "
        "mind between versions",
        "pass --expert-layout out-in or in-out",
    ),
    "expert-b": Refusal(
        "fused experts trained by Unsloth without lora_B_layout",
        "before September 2026 Unsloth ordered the columns of lora_B by expert, PEFT by rank",
        "pass --expert-b expert-major (trained before) or rank-major",
    ),
    "flat-names": Refusal(
        "kohya's module paths, to be written as another format",
        "their underscores stand for dots or for themselves, and only a base tells",
        "merge it into its base instead",
    ),
    # ------------------------------------------------ the layer
    "conv-groups": Refusal(
        "a convolution with groups > 1",
        "lora_A sees all channels, a grouped kernel only those of its group",
        "leave these layers out of target_modules",
    ),
    "conv-padding": Refusal(
        "a convolution with padding_mode other than zeros",
        "training padded the update with zeros, the merged kernel would pad it otherwise",
        "leave these layers out of target_modules",
    ),
    "max-norm": Refusal(
        "an embedding with max_norm",
        "it rescales the row before the update is added, a merged row after",
        "leave the embedding out of target_modules",
    ),
    "attention": Refusal(
        "torch.nn.MultiheadAttention",
        "PEFT adds its out_proj update twice, other tools once",
        "leave it out of target_modules",
    ),
    "no-bias": Refusal(
        "lora_bias on a layer that has no bias",
        "the architecture has no place for the merged bias",
        "serve it unmerged",
    ),
    "layer-kind": Refusal(
        "an update of a kind that its layer does not take",
        "no formula is published for it, or the base cannot be taken apart so",
        "check that this is the base that was trained on",
    ),
    "conversion": Refusal(
        "a weight that transformers rearranges on loading in a way not followed here",
        "where an update lands in the stored tensor is not known",
        "load the base with transformers and save it again, then merge into that",
    ),
    # ------------------------------------------------ the base
    "quantised-base": Refusal(
        "a quantised base",
        "the sum of its weights and an update is no longer on its grid, and was not trained so",
        "merge into the unquantised model that it was made from, then quantise the result",
    ),
    "tied": Refusal(
        "an update of one side of tied weights",
        "the other side would move too, which training did not see",
        "--tied untie writes both tensors and tie_word_embeddings: false (what was trained); "
        "--tied both moves the shared tensor",
    ),
    "diffusion": Refusal(
        "the U-Net or transformer of a diffusion pipeline",
        "it is no transformers model",
        "merge it with diffusers",
    ),
}  # fmt: skip


def refused(name: str, where: str = "", found: str = "") -> str:
    """Return the message for the case `name`, at `where`, with what was `found` there."""
    entry = TABLE[name]
    place = f"{where}: " if where else ""
    detail = f" ({found})" if found else ""
    return f"{place}{entry.case}{detail}: {entry.why}; {entry.remedy}"
