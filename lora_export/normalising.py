"""Rewrite an adapter so that a loader which knows plain LoRA only reads it right.

Scales, patterns, rsLoRA and diagonals are multiplied into B, ranks are made equal with zeros.
"""

import dataclasses

import numpy as np

from lora_export import peft_config
from lora_export.errors import InputError, listed
from lora_export.records import EXPERTS, Adapter, Array, Factors, all_finite


def normalised(adapter: Adapter) -> Adapter:
    """Return `adapter` as plain LoRA with scale one and one rank, in float32.

    B is rounded once, from float64; where scales are powers of two, nothing is lost. Fused experts
    keep their rank.

    Raises:
        InputError: part of the adapter is no low-rank sum, so that no B can hold it.
    """
    names = set(adapter.variant.split("+")) & {"dora", "kasa", "pissa", "olora"}
    faults = [f"{name}: its merged weight is no sum of the base and a product" for name in names]
    if peft_config.changes_base(adapter.fields):
        init = adapter.fields["init_lora_weights"]
        faults.append(f"init_lora_weights {init}: training changed the base first")
    if faults:
        raise InputError(listed("cannot be normalised", faults))
    ranks = [pair.rank for pair in adapter.modules.values() if pair.kind != EXPERTS]
    widest = max(ranks, default=0)
    with np.errstate(over="ignore"):  # said below, with the names
        modules = {path: _plain(pair, widest) for path, pair in adapter.modules.items()}
    if large := [path for path, pair in modules.items() if not all_finite(pair.b)]:
        raise InputError(listed("scale times B is too large for float32", large))
    return dataclasses.replace(adapter, modules=modules, variant="lora")


def _plain(pair: Factors, rank: int) -> Factors:
    b = pair.b.astype(np.float64) * pair.scale
    if pair.diagonal is not None:
        b = b * pair.diagonal.astype(np.float64)
    a, bias = pair.a, pair.bias
    if bias is not None:
        bias = (bias.astype(np.float64) * pair.scale).astype(np.float32)
    if pair.kind == EXPERTS:
        rank = pair.rank
    else:
        a, b = _padded(a, 0, rank), _padded(b, 1, rank)
    return dataclasses.replace(
        pair,
        a=a.astype(np.float32),
        b=b.astype(np.float32),
        alpha=float(rank),
        scale=1.0,
        diagonal=None,
        bias=bias,
    )


def _padded(value: Array, axis: int, length: int) -> Array:
    """Return `value` with zeros up to `length` along `axis`: they add nothing to the product."""
    widths = [(0, 0)] * value.ndim
    widths[axis] = (0, length - value.shape[axis])
    return np.pad(value, widths)
