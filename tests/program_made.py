"""Small models as functions of tensors, with signatures: what the tests of the exporters export."""

import inspect

import numpy as np
import torch
import transformers
from torch import nn

from lora_export.records import Signature, TensorSpec

ABOUT = {"lora_export.labels": '["negative", "positive"]', "lora_export.adapter": '{"sha256": "0"}'}
LAYERS, HEADS, DIM = 2, 2, 8  # of the tiny Llama's cache
# (batch, length, padding), none of them that of the example
SHAPES = ((1, 1, "none"), (1, 9, "none"), (4, 1, "none"), (3, 8, "left"), (5, 17, "right"))
# (batch, new tokens, cached tokens)
STEPS = ((1, 1, 0), (1, 6, 0), (3, 5, 0), (1, 1, 9), (4, 1, 1), (2, 4, 11), (5, 2, 3))


class Plain(nn.Module):
    """A model that takes ids and a mask and gives one output."""

    def __init__(self, model: nn.Module, output: str = "logits") -> None:
        super().__init__()
        self.model, self.output = model, output

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask)[self.output]


class WithCache(nn.Module):
    """A decoder whose cache goes in and comes out as tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args, **named):
        input_ids, attention_mask, *past = (*args, *named.values())
        cache = transformers.DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        found = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :],
            past_key_values=cache,
            use_cache=True,
        )
        layers = found.past_key_values.layers
        return (found.logits, *(t for layer in layers for t in (layer.keys, layer.values)))


def plain(tiny, family="bert", outputs=(("batch", 2),)):
    """Return a tiny model, its signature and an example."""
    ids = tuple(
        TensorSpec(name, "int64", ("batch", "sequence")) for name in ("input_ids", "attention_mask")
    )
    specs = tuple(TensorSpec("logits", "float32", axes) for axes in outputs)
    signature = Signature(ids, specs, 64, 100, 0)
    model = tiny(family)
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    return Plain(model).eval().requires_grad_(False), signature, arrays(3, 7, "right")


def with_cache(tiny):
    """Return a tiny Llama with its cache, its signature and an example."""
    names = [f"{layer}.{part}" for layer in range(LAYERS) for part in ("key", "value")]
    inputs = (
        TensorSpec("input_ids", "int64", ("batch", "sequence")),
        TensorSpec("attention_mask", "int64", ("batch", "total")),
        *(
            TensorSpec(f"past_key_values.{name}", "float32", ("batch", HEADS, "past", DIM))
            for name in names
        ),
    )
    outputs = (
        TensorSpec("logits", "float32", ("batch", "sequence", 100)),
        *(
            TensorSpec(f"present.{name}", "float32", ("batch", HEADS, "total", DIM))
            for name in names
        ),
    )
    model = WithCache(tiny("llama")).eval().requires_grad_(False)
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind) for name in ("self", *(s.argument for s in inputs))]
    WithCache.forward.__signature__ = inspect.Signature(parameters)
    return model, Signature(inputs, outputs, 64, 100, 0), step(2, 7, 3)


def arrays(batch, length, padding, seed=0):
    dice = np.random.default_rng((seed, batch, length))
    ids = dice.integers(5, 99, (batch, length))
    mask = np.ones_like(ids)
    for row in range(1, batch):
        count = min(row, length - 1)
        if padding == "left":
            mask[row, :count] = 0
        elif padding == "right":
            mask[row, length - count :] = 0
    return {"input_ids": np.where(mask, ids, 0), "attention_mask": mask}


def step(batch, length, past, seed=0):
    dice = np.random.default_rng((seed, batch, length, past))
    found = {
        "input_ids": dice.integers(5, 99, (batch, length)),
        "attention_mask": np.ones((batch, past + length), np.int64),
    }
    if past > 1:
        found["attention_mask"][1:, 0] = 0  # a row that is shorter than the first, padded left
    for name in (f"{layer}.{part}" for layer in range(LAYERS) for part in ("key", "value")):
        shape = (batch, HEADS, past, DIM)
        found[f"past_key_values.{name}"] = dice.standard_normal(shape).astype(np.float32)
    return found


@torch.inference_mode()
def expected(model, signature, given):
    """Return what the model itself answers, by name."""
    found = model(*[torch.from_numpy(given[spec.name]) for spec in signature.inputs])
    values = found if isinstance(found, tuple) else (found,)
    return {s.name: v.numpy() for s, v in zip(signature.outputs, values, strict=True)}


def assert_same(found, wanted):
    """Assert that both hold the same names, dtypes and, nearly, numbers."""
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_allclose(found[name], value, atol=3e-6, rtol=3e-5)
