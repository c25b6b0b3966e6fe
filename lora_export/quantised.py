"""A base in 4-bit NormalFloat, to train an adapter over: QLoRA. Source: arXiv:2305.14314.

What is trained so is merged into the base in full precision, which is not quite what it was trained
over: that difference is the price of the memory saved.
"""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, BitsAndBytesConfig

from lora_export.errors import InputError, first_line
from lora_export.lora import LoraLinear4bit, layer_class, shape_of

BLOCK = 64  # weights that share a scale
EXTRA = "pip install 'lora-export[qlora]'"


def load_nf4(
    model_class: Any, path: str | Path, *, dtype: torch.dtype = torch.float32, **options: Any
) -> nn.Module:
    """Return `model_class.from_pretrained(path, **options)` with linear layers packed in NF4.

    Scales are quantised a second time, as in the paper. Left as they are: the task head, and layers
    whose rows are no whole number of blocks. (bitsandbytes 0.50 gives those wrong scales on CPUs
    with AVX-512.)

    Args:
        model_class: A class of transformers for one architecture, or one of its Auto classes.
        path: The folder of the base, or its id.
        dtype: In which the packed layers compute; the others are held in it.
        options: Of `from_pretrained`, fields of the config included.

    Raises:
        InputError: bitsandbytes is not installed, or does not compute on this machine.
    """
    _try_bitsandbytes()
    config, rest = AutoConfig.from_pretrained(path, return_unused_kwargs=True, **options)
    with torch.device("meta"):
        blank = getattr(model_class, "from_config", model_class)(config)
    heads = [
        name for name, child in blank.named_children() if blank.base_model not in (blank, child)
    ]
    ragged = [
        path
        for path, module in blank.named_modules()
        if (shape := shape_of(module)) and shape[1] % BLOCK
    ]
    packing = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=[*heads, *ragged],
    )
    model: nn.Module = model_class.from_pretrained(
        path, config=config, dtype=dtype, quantization_config=packing, **rest
    )
    if not any(layer_class(module) is LoraLinear4bit for module in model.modules()):
        raise InputError("no layer of this base can be held in 4 bits: rows are too short")
    modules: Iterator[Any] = model.modules()
    for module in modules:
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # Or the first evaluation rounds the scales to bfloat16, where the processor has that.
            module.support_avx512bf16_for_cpu = False
    return model


def _try_bitsandbytes() -> None:
    """Raise `InputError` unless bitsandbytes multiplies by a packed matrix here, both ways."""
    try:
        for package in ("accelerate", "bitsandbytes"):
            importlib.import_module(package)
    except ImportError as error:
        raise InputError(f"a base in 4 bits needs {error.name}: {EXTRA}") from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        from bitsandbytes.nn import Linear4bit

        layer = Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4").to(device)
        layer(torch.ones(1, 64, device=device, requires_grad=True)).sum().backward()
    except Exception as error:  # what is missing differs from one machine to the next
        raise InputError(
            f"bitsandbytes does not compute in 4 bits on this machine: {first_line(error)}"
        ) from error
