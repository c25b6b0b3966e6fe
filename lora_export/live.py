"""Merge a live model: its LoRA layers into plain layers, in memory."""

import copy

from torch import nn

from lora_export import recomputed
from lora_export.errors import InputError
from lora_export.injection import forget, lora_layers


def merge(model: nn.Module, *, in_place: bool = False) -> nn.Module:
    """Return `model` with each LoRA layer replaced by a plain layer that holds the merged weight.

    The module tree is the base's. Mode, device and dtype stay; merged weights are the float64
    value rounded once.

    Args:
        model: A model with LoRA layers, in train or eval mode.
        in_place: Change `model` itself; otherwise it is copied first and left alone.

    Raises:
        InputError: the model has no LoRA layers, or its base is held in 4 bits, or a merged
            weight is not finite; the model is then left as it was.
    """
    layers = lora_layers(model)
    if not layers and not any(recomputed.updates(model)):
        raise InputError("the model has no LoRA layers: nothing to merge")
    weights = {path: layer.merged_weight() for path, layer in layers.items()}
    result = model if in_place else copy.deepcopy(model)
    recomputed.merge(result)
    for path, weight in weights.items():
        layer = result.get_submodule(path)
        plain = layer.plain()  # type: ignore[operator]
        plain.weight = nn.Parameter(weight.clone(), requires_grad=False)
        result.set_submodule(path, plain)
    forget(result)
    return result
