"""Models that share their weights: what they answer, what is written of them, what they hold."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import families
import numpy as np
import onnx
import pytest
import torch
import transformers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from lora_export import calling, exporters, inputs, models, stages, weightless
from lora_export.exporters import _onnx_translate
from lora_export.records import Form
from lora_export.runners.eager import EagerRunner

HERE = Path(__file__).parent
# Tied weights, Conv1D, parameters of the model itself, norms of several kinds, convolutions
QUICK = ("bert-mlm", "gpt2", "llama", "t5", "deberta-v2", "vit", "convnext")
HALF = torch.bfloat16
EVERY = [
    pytest.param(family, marks=() if family in QUICK else pytest.mark.slow)
    for family in families.FAMILIES
]


def called(model, interface):
    """Return what `model` answers at every shape."""
    runner = EagerRunner("a model", interface.bind(model), interface.signature)
    batches = inputs.grid_batches(interface.signature, seed=3)
    return runner.precision, [runner.run(batch.arrays) for batch in batches]


def same(found, expected):
    assert found[0] == expected[0]
    for ours, theirs in zip(found[1], expected[1], strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert ours[name].dtype == value.dtype
            np.testing.assert_array_equal(ours[name], value)


# ---------------------------------------------------------------- the reference


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", EVERY)
def test_the_reference_answers_what_a_copy_in_float64_does(family, dtype):
    model = families.build(family).to(dtype)
    interface = calling.interface_of(model, families.tokens_of(model))
    found = called(stages.exact(model), interface)
    assert found[0] == "float64"
    same(found, called(copy.deepcopy(model).double(), interface))


def test_a_float32_model_is_not_taken_for_the_reference():
    """The control: the comparison above sees the difference."""
    model = families.build("llama")
    interface = calling.interface_of(model, families.tokens_of(model))
    _, ours = called(stages.exact(model), interface)
    with pytest.raises(AssertionError, match=r"Arrays are not equal|assert"):
        same(("float64", ours), ("float64", called(model, interface)[1]))


def test_the_reference_of_fused_experts_is_exact_too():
    config = transformers.MixtralConfig(
        **families._GROUPED, num_local_experts=4, num_experts_per_tok=2
    )
    model = families.scale_up(transformers.MixtralForCausalLM(config)).eval().requires_grad_(False)
    interface = calling.interface_of(model, families.tokens_of(model))
    copied = copy.deepcopy(model).double()
    copied.set_experts_implementation("eager")
    same(called(stages.exact(model), interface), called(copied, interface))


def test_the_reference_of_a_live_adapter_is_exact_too(tiny_base, tiny_adapter, tmp_path):
    _, live = tiny_adapter(tmp_path, str(tiny_base))
    live.eval().requires_grad_(False)
    interface = calling.interface_of(live, families.Tokens())
    same(called(stages.exact(live), interface), called(copy.deepcopy(live).double(), interface))


def test_the_reference_leaves_the_model_alone_and_shares_its_weights():
    model = families.build("gpt2").to(HALF)
    before = {name: (p, p.clone()) for name, p in model.named_parameters()}
    found = stages.exact(model)
    assert {p.dtype for p in found.parameters()} == {torch.float64}
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0]
        assert torch.equal(parameter, before[name][1])
    assert found.lm_head._parameters.data["weight"] is model.lm_head.weight
    assert found.transformer.wte._parameters.data["weight"] is model.lm_head.weight


def test_what_has_no_fractions_stays_what_it_is():
    module = nn.Module()
    module.register_parameter("none", None)
    module.count = nn.Parameter(torch.tensor([3]), requires_grad=False)
    module.register_buffer("places", torch.arange(3))
    module.register_buffer("angles", torch.ones(3))
    found = weightless.in_double(module)
    assert found.none is None
    assert found.count.dtype == found.places.dtype == torch.int64
    assert (found.angles.dtype, module.angles.dtype) == (torch.float64, torch.float32)


# ---------------------------------------------------------------- what is written


def written(family, dtype, precision, path):
    model = families.build(family).to(dtype)
    interface = calling.interface_of(model, families.tokens_of(model))
    request = exporters.Request(
        interface.bind(model), interface.signature, inputs.example(interface.signature), {}, path,
        Form(precision),
    )  # fmt: skip
    with models.quiet():
        exporters.load("onnx").export(request)
    return model, path.read_bytes()


@pytest.mark.parametrize(
    ("family", "dtype", "precision"),
    [
        pytest.param("llama", HALF, "fp32", marks=pytest.mark.slow),
        # tied, and transposed
        pytest.param("gpt2", torch.float32, "fp32", marks=pytest.mark.slow),
        ("bert-tokens", torch.float32, "fp16"),
    ],
)
def test_the_file_is_the_one_written_from_a_model_that_holds_its_weights(
    family, dtype, precision, tmp_path, monkeypatch
):
    _, lean = written(family, dtype, precision, tmp_path / "model.onnx")
    monkeypatch.setattr(weightless, "hollow", models.in_precision)
    monkeypatch.setattr(_onnx_translate, "_attach", lambda *_: None)
    assert written(family, dtype, precision, tmp_path / "model.onnx")[1] == lean


def test_half_precision_is_widened_exactly_and_tied_weights_are_written_once(tmp_path):
    model, _ = written("gpt2", HALF, "fp32", tmp_path / "model.onnx")
    tensors = onnx.load(tmp_path / "model.onnx").graph.initializer
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in tensors}
    for name, weight in model.named_parameters(remove_duplicate=False):
        if weight.ndim > 1 and weight is not model.lm_head.weight:
            np.testing.assert_array_equal(arrays[f"model.{name}"], weight.float().numpy())
    (tied,) = (a for a in arrays.values() if a.shape == tuple(model.lm_head.weight.shape))
    np.testing.assert_array_equal(tied, model.lm_head.weight.float().numpy())


def test_a_hollow_model_has_everything_but_numbers():
    model = families.build("gpt2").to(HALF)
    found, whole = weightless.hollow(model, "fp32"), models.in_precision(model, "fp32")
    assert found.lm_head.weight is found.transformer.wte.weight
    expected = whole.state_dict()
    for name, value in found.state_dict().items():
        assert (value.dtype, value.shape) == (expected[name].dtype, expected[name].shape)
    assert all(isinstance(p, FakeTensor) for p in found.parameters())
    for (name, ours), (_, theirs) in zip(found.named_buffers(), whole.named_buffers(), strict=True):
        assert torch.equal(ours, theirs), name


# ---------------------------------------------------------------- what is held

SIZES = {
    "80 MB": {"hidden_size": 768, "num_hidden_layers": 2, "intermediate_size": 2048},
    "400 MB": {"hidden_size": 1024, "num_hidden_layers": 8, "intermediate_size": 2816},
}


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="/proc tells the memory")
@pytest.mark.parametrize(
    ("size", "dtype", "precision"),
    [
        pytest.param("80 MB", HALF, "fp32", marks=pytest.mark.slow),
        pytest.param("400 MB", HALF, "fp32", marks=pytest.mark.slow),
        pytest.param("400 MB", torch.float32, "fp16", marks=pytest.mark.slow),
    ],
)
def test_neither_export_nor_reference_holds_the_weights(size, dtype, precision, tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=4000, num_attention_heads=8, num_key_value_heads=4, pad_token_id=0, **SIZES[size]
    )
    transformers.LlamaForCausalLM(config).to(dtype).save_pretrained(tmp_path / "merged")
    words = [sys.executable, str(HERE / "memory_of.py"), tmp_path / "merged", tmp_path, precision]
    there = {
        "PYTHONPATH": os.pathsep.join((str(HERE.parent), str(HERE))),
        "MALLOC_MMAP_THRESHOLD_": "100000",  # what is freed is given back, and not used again
    }
    done = subprocess.run(
        words, check=True, capture_output=True, text=True, env={**os.environ, **there}
    )
    found = json.loads(done.stdout.splitlines()[-1])
    weights = found["written"]
    assert weights > 0.9 * found["parameters"] * (4 if precision == "fp32" else 2)
    assert found["export"] < weights / 3
    assert found["copied"] > 0.9 * weights  # the control: a copy would be seen
    assert found["reference"] < found["parameters"] * 8 / 3
    assert found["doubled"] > 0.9 * found["parameters"] * 8
