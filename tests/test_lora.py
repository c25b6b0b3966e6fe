import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_export import LoraConfig, LoraConv1D, LoraLinear
from lora_export.errors import InputError
from lora_export.lora import layer_class

IN, OUT, RANK, ALPHA = 5, 7, 3, 12.0
SCALES = {
    "lora": ALPHA / RANK,
    "rslora": ALPHA / RANK**0.5,
    "dora": ALPHA / RANK,
    "rslora+dora": ALPHA / RANK**0.5,
}
DORA = pytest.mark.parametrize("variant", [name for name in SCALES if "dora" in name])
KINDS = pytest.mark.parametrize("kind", [LoraLinear, LoraConv1D])
VARIANTS = pytest.mark.parametrize("variant", SCALES)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@torch.no_grad()
def _base(kind, dtype=torch.float32, bias=True, seed=0):
    """A random base layer of the class that `kind` adapts."""
    random = torch.Generator().manual_seed(seed)
    base = nn.Linear(IN, OUT, bias) if kind is LoraLinear else Conv1D(OUT, IN)
    for parameter in base.parameters():
        parameter.normal_(0, 1, generator=random)
    return base.to(dtype)


@torch.no_grad()
def _layer(kind, dtype=torch.float32, variant="lora", bias=True, dropout=0.0, fresh=False):
    """A layer over such a base, with its factors as after training unless `fresh`."""
    config = LoraConfig(RANK, ALPHA, dropout, variant=variant)
    layer = kind.over(_base(kind, dtype, bias), config)
    if not fresh:
        random = torch.Generator().manual_seed(1)
        for factor in layer.factors().values():
            factor.normal_(0, 1, generator=random)
    return layer.eval()


def _float64(tensor):
    return tensor.detach().double().numpy()


def _parts(layer):
    """W as (out, in), b, A and B, in float64."""
    weight = _float64(layer.weight)
    if isinstance(layer, LoraConv1D):
        weight = weight.T
    bias = 0 if layer.bias is None else _float64(layer.bias)
    return weight, bias, _float64(layer.lora_A), _float64(layer.lora_B)


def _exact(layer):
    """The merged weight (out, in) in float64, written down from the papers."""
    weight, _, a, b = _parts(layer)
    found = weight + SCALES[layer.variant] * b @ a
    if "dora" in layer.variant:
        lengths = np.linalg.norm(found, axis=1)
        found = found * (_float64(layer.lora_magnitude_vector) / lengths)[:, None]
    return found


def _inputs(*shape):
    return torch.randn(*shape, IN, generator=torch.Generator().manual_seed(2))


def _bits(tensor):
    return tensor.detach().view({8: torch.int64, 4: torch.int32, 2: torch.int16}[tensor.itemsize])


# ---------------------------------------------------------------- the forward equation


@KINDS
@VARIANTS
@pytest.mark.parametrize("shape", [(), (4,), (2, 3)], ids=str)
def test_forward_is_the_papers_equation(kind, variant, shape):
    layer, x = _layer(kind, torch.float64, variant), _inputs(*shape).double()
    expected = _float64(x) @ _exact(layer).T + _parts(layer)[1]
    np.testing.assert_allclose(_float64(layer(x)), expected, rtol=1e-12, atol=1e-12)


@KINDS
@VARIANTS
def test_forward_in_float32_agrees_within_float32(kind, variant):
    layer, x = _layer(kind, variant=variant), _inputs(4)
    expected = _float64(x) @ _exact(layer).T + _parts(layer)[1]
    np.testing.assert_allclose(_float64(layer(x)), expected, rtol=1e-5, atol=1e-4)


def test_forward_with_hand_placed_numbers():
    layer = LoraLinear(2, 2, rank=1, alpha=3)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        layer.bias.copy_(torch.tensor([10.0, 20.0]))
        layer.lora_A.copy_(torch.tensor([[1.0, 2.0]]))
        layer.lora_B.copy_(torch.tensor([[1.0], [-1.0]]))
    # A x = 1 + 2 = 3; s B A x = 3 * (3, -3)
    assert layer(torch.ones(2)).tolist() == [1 + 10 + 9, 1 + 20 - 9]


@KINDS
@pytest.mark.parametrize("variant", ["lora", "rslora"])
def test_a_fresh_layer_computes_what_its_base_does(kind, variant):
    layer, x = _layer(kind, variant=variant, fresh=True), _inputs(3)
    assert layer.lora_A.ne(0).all()
    assert torch.equal(_bits(layer(x)), _bits(nn.functional.linear(x, *_plain(kind))))


@KINDS
@DORA
@DTYPES
def test_a_fresh_layer_with_a_magnitude_computes_what_its_base_does_up_to_rounding(
    kind, variant, dtype
):
    layer, x = _layer(kind, dtype, variant, fresh=True), _inputs(3).to(dtype)
    weight, bias, _, _ = _parts(layer)
    size = np.abs(_float64(x)) @ np.abs(weight).T + np.abs(bias)
    expected, found = _float64(x) @ weight.T + bias, layer(x)
    assert found.dtype == dtype
    assert (np.abs(_float64(found) - expected) < 2 * torch.finfo(dtype).eps * size).all()
    lengths = np.linalg.norm(weight, axis=1)
    np.testing.assert_allclose(_float64(layer.lora_magnitude_vector), lengths, rtol=1e-6)


@DORA
def test_the_squares_of_small_half_precision_weights_do_not_vanish(variant):
    base = nn.Linear(64, 8).half()
    with torch.no_grad():
        base.weight.normal_(0, 1e-4, generator=torch.Generator().manual_seed(0))
    layer = LoraLinear.over(base, LoraConfig(2, variant=variant))
    np.testing.assert_allclose(_float64(layer._gain()), 1, rtol=1e-5)


@DORA
def test_a_row_of_zeros_stays_zero_in_training(variant):
    base = _base(LoraLinear)
    with torch.no_grad():
        base.weight[2] = 0
    layer, x = LoraLinear.from_linear(base, variant=variant), _inputs(3)
    found = layer(x)
    assert torch.equal(found[:, 2], layer.bias[2].expand(3))
    found.sum().backward()
    assert all(factor.grad.isfinite().all() for factor in layer.factors().values())


@KINDS
@DORA
def test_the_gradients_of_dora_are_the_papers(kind, variant):
    """Of equation 11: the norm is a constant, so its own derivative has no part in them."""
    layer, x = _layer(kind, torch.float64, variant), _inputs(4).double()
    weight, _, a, b = _parts(layer)
    direction, magnitude = _exact(layer), _float64(layer.lora_magnitude_vector)
    sum_of = weight + SCALES[variant] * b @ a
    lengths = np.linalg.norm(sum_of, axis=1)
    slope = np.cos(np.arange(4 * OUT)).reshape(4, OUT)  # of the loss by the outputs
    layer(x).backward(torch.from_numpy(slope))
    of_weight = slope.T @ _float64(x) * (magnitude / lengths)[:, None]
    np.testing.assert_allclose(
        layer.lora_magnitude_vector.grad,
        (slope * (_float64(x) @ direction.T)).sum(0) / magnitude,
        rtol=1e-10,
    )
    scale = SCALES[variant]
    np.testing.assert_allclose(layer.lora_A.grad, scale * b.T @ of_weight, rtol=1e-10)
    np.testing.assert_allclose(layer.lora_B.grad, scale * of_weight @ a.T, rtol=1e-10)


@DORA
def test_autocast_does_not_make_the_norm_coarser(variant):
    layer, x = _layer(LoraLinear, variant=variant), _inputs(4)
    expected = layer._gain()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer._gain(), expected)
        assert layer(x).dtype == torch.bfloat16


def _plain(kind):
    base = _base(kind)
    return (base.weight if kind is LoraLinear else base.weight.T), base.bias


def test_a_layer_without_a_bias_has_none():
    layer, x = _layer(LoraLinear, torch.float64, bias=False), _inputs(3).double()
    weight, _, a, b = _parts(layer)
    assert layer.bias is None
    assert "bias" not in layer.state_dict()
    expected = _float64(x) @ (weight + SCALES["lora"] * b @ a).T
    np.testing.assert_allclose(_float64(layer(x)), expected, rtol=1e-12)


@KINDS
@VARIANTS
def test_dropout_acts_before_a_and_in_training_only(kind, variant):
    layer, x = _layer(kind, variant=variant, dropout=0.5), _inputs(64)
    assert torch.equal(layer(x), layer(x))
    layer.train()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dropped = layer(x)
        torch.manual_seed(0)
        masked = nn.functional.dropout(x, 0.5)
    weight, bias, a, b = _parts(layer)
    expected = _float64(x) @ weight.T + SCALES[variant] * _float64(masked) @ (b @ a).T
    if "dora" in variant:
        lengths = np.linalg.norm(weight + SCALES[variant] * b @ a, axis=1)
        expected = expected * (_float64(layer.lora_magnitude_vector) / lengths)
    expected = expected + bias
    np.testing.assert_allclose(_float64(dropped), expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- construction


def test_a_has_the_kaiming_uniform_bound():
    layer = LoraLinear(400, 10, rank=50)
    bound = 1 / math.sqrt(400)  # sqrt(6 / ((1 + 5) * in))
    assert layer.lora_A.abs().max() <= bound
    assert layer.lora_A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_gaussian_a_has_a_deviation_of_one_over_the_rank():
    layer = LoraLinear(4000, 10, rank=5, init="gaussian")
    assert layer.lora_A.std().item() == pytest.approx(1 / 5, rel=0.05)


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_b_starts_at_zero(init):
    assert LoraLinear(IN, OUT, rank=RANK, init=init).lora_B.eq(0).all()


def test_from_linear_shares_the_weight_and_bias_objects():
    base = _base(LoraLinear)
    weight, bias = base.weight, base.bias
    layer = LoraLinear.from_linear(base, rank=2)
    assert layer.weight is weight
    assert layer.bias is bias


@KINDS
@VARIANTS
def test_the_base_is_frozen_and_the_factors_are_not(kind, variant):
    layer = _layer(kind, variant=variant)
    trained = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B"} | (
        {"lora_magnitude_vector"} if "dora" in variant else set()
    )
    assert trained == set(layer.factors())


@DTYPES
def test_from_linear_keeps_the_dtype(dtype):
    layer = LoraLinear.from_linear(_base(LoraLinear, dtype))
    assert {p.dtype for p in layer.parameters()} == {dtype}


def test_from_linear_keeps_the_device():
    layer = LoraLinear.from_linear(nn.Linear(IN, OUT, device="meta"))
    assert {p.device.type for p in layer.parameters()} == {"meta"}


@pytest.mark.parametrize("training", [True, False])
def test_from_linear_keeps_the_training_mode(training):
    layer = LoraLinear.from_linear(nn.Linear(IN, OUT).train(training), dropout=0.1)
    assert (layer.training, layer.dropout.training) == (training, training)


def test_from_linear_passes_every_setting_on():
    layer = LoraLinear.from_linear(nn.Linear(IN, OUT), 4, 2, dropout=0.25, variant="rslora")
    assert layer.lora_A.shape == (4, IN)
    assert layer.lora_B.shape == (OUT, 4)
    assert (layer.scale, layer.dropout.p) == (2 / 4**0.5, 0.25)


def test_the_constructor_takes_dtype_device_and_bias():
    layer = LoraLinear(IN, OUT, bias=False, rank=2, dtype=torch.bfloat16, device="meta")
    assert (layer.weight.dtype, layer.weight.device.type) == (torch.bfloat16, "meta")
    assert layer.lora_B.shape == (OUT, 2)
    assert layer.bias is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"alpha": -1}, "alpha is -1"),
        ({"dropout": 1.0}, r"dropout is 1\.0"),
        ({"variant": "dorra"}, "variant is 'dorra'; expected one of"),
        ({"variant": "rslora+dorra"}, "variant is 'rslora\\+dorra'; expected one of"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        LoraLinear.from_linear(nn.Linear(IN, OUT), **settings)


@KINDS
def test_the_state_dict_of_the_base_fits_the_layer(kind):
    layer, other = _layer(kind), _base(kind, seed=9)
    result = layer.load_state_dict(other.state_dict(), strict=False)
    assert result.unexpected_keys == []
    assert sorted(result.missing_keys) == ["lora_A", "lora_B"]
    assert torch.equal(layer.weight, other.weight)


# ---------------------------------------------------------------- the merged weight


@KINDS
@VARIANTS
def test_the_merged_weight_computes_what_the_layer_does(kind, variant):
    layer, x = _layer(kind, torch.float64, variant), _inputs(3).double()
    before = _float64(layer(x))
    layer.merge()
    np.testing.assert_allclose(_float64(layer(x)), before, rtol=1e-12, atol=1e-12)


@KINDS
@VARIANTS
@DTYPES
def test_the_merged_weight_is_the_float64_sum_rounded_once(kind, variant, dtype):
    layer = _layer(kind, dtype, variant)
    exact, merged = _exact(layer), layer.merged_weight()
    assert (merged.dtype, merged.shape) == (dtype, layer.weight.shape)
    stored = _float64(merged if kind is LoraLinear else merged.T)
    error = np.abs(stored - exact)
    for direction in (-math.inf, math.inf):
        neighbour = torch.nextafter(
            torch.from_numpy(stored).to(dtype), torch.tensor(direction, dtype=dtype)
        )
        assert (error <= np.abs(_float64(neighbour) - exact)).all()


def test_a_bfloat16_merge_does_not_round_twice():
    layer = LoraLinear(1, 1, rank=1, alpha=1, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.weight.fill_(1)
        # 1 + 2^-8 + 2^-30 lies above the middle of 1 and 1 + 2^-7, by less than float32 can see
        layer.lora_A.fill_(2**-8)
        layer.lora_B.fill_(1)
        wide = layer.lora_A.double() + 2**-30
    layer.lora_A = nn.Parameter(wide)
    assert layer.merged_weight().item() == 1 + 2**-7


def test_merging_by_hand_placed_numbers():
    layer = LoraLinear(2, 3, rank=1, alpha=2)
    with torch.no_grad():
        layer.weight.zero_()
        layer.lora_A.copy_(torch.tensor([[1.0, 3.0]]))
        layer.lora_B.copy_(torch.tensor([[0.0], [1.0], [-5.0]]))
    assert layer.merged_weight().tolist() == [[0, 0], [2, 6], [-10, -30]]


@KINDS
@DTYPES
def test_unmerging_restores_the_exact_bits(kind, dtype):
    layer = _layer(kind, dtype)
    before = layer.weight.detach().clone()
    layer.merge()
    assert layer.is_merged
    assert not torch.equal(layer.weight, before)
    layer.unmerge()
    assert not layer.is_merged
    assert torch.equal(_bits(layer.weight), _bits(before))


@KINDS
def test_asking_for_the_merged_weight_changes_nothing(kind):
    layer = _layer(kind)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.merged_weight()
    assert not layer.is_merged
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


@KINDS
def test_merging_keeps_the_bias_and_the_factors(kind):
    layer = _layer(kind)
    before = copy.deepcopy(layer)
    layer.merge()
    for name in ("bias", "lora_A", "lora_B"):
        assert torch.equal(layer.get_parameter(name), before.get_parameter(name))


@KINDS
def test_merging_keeps_the_parameter_object(kind):
    layer = _layer(kind)
    weight = layer.weight
    layer.merge()
    assert layer.weight is weight
    assert not weight.requires_grad


@KINDS
def test_the_merged_weight_is_contiguous(kind):
    assert _layer(kind).merged_weight().is_contiguous()


def test_merging_twice_is_refused():
    layer = _layer(LoraLinear)
    layer.merge()
    once = layer.weight.detach().clone()
    with pytest.raises(InputError, match="merged already"):
        layer.merge()
    assert torch.equal(layer.weight, once)


def test_the_merged_weight_of_a_merged_layer_is_its_weight():
    layer = _layer(LoraLinear)
    expected = layer.merged_weight()
    layer.merge()
    assert torch.equal(layer.merged_weight(), expected)


def test_unmerging_what_is_not_merged_is_refused():
    with pytest.raises(InputError, match="not merged"):
        _layer(LoraLinear).unmerge()


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e38])
def test_a_merge_that_is_not_finite_is_refused_and_changes_nothing(value):
    layer = _layer(LoraLinear)
    with torch.no_grad():
        layer.lora_B[0, 0] = value
        layer.lora_A[0] = 1e3
    before = layer.weight.detach().clone()
    with pytest.raises(InputError, match=f"{IN} of {IN * OUT} merged weights are not finite"):
        layer.merge()
    assert not layer.is_merged
    assert torch.equal(layer.weight, before)


@KINDS
def test_a_change_of_dtype_while_merged_is_followed_by_unmerge(kind):
    layer = _layer(kind)
    before = layer.weight.detach().clone()
    layer.merge()
    layer.double()
    layer.unmerge()
    assert layer.weight.dtype == torch.float64
    assert torch.equal(layer.weight, before.double())


def test_moving_an_unmerged_layer_changes_nothing_but_the_dtype():
    layer = _layer(LoraLinear)
    before = layer.weight.detach().clone()
    layer.to(torch.float64)
    assert not layer.is_merged
    assert torch.equal(layer.weight, before.double())


def test_a_copy_of_a_merged_layer_unmerges_by_itself():
    layer = _layer(LoraLinear)
    before = layer.weight.detach().clone()
    layer.merge()
    twin = copy.deepcopy(layer)
    twin.unmerge()
    assert torch.equal(twin.weight, before)
    assert layer.is_merged
    assert not torch.equal(layer.weight, before)


# ---------------------------------------------------------------- back to a plain layer


@KINDS
def test_a_plain_layer_holds_the_present_weight_uncopied(kind):
    layer = _layer(kind).train()
    layer.merge()
    plain = layer.plain()
    assert type(plain) is (nn.Linear if kind is LoraLinear else Conv1D)
    assert plain.weight is layer.weight
    assert plain.bias is layer.bias
    assert plain.training


@KINDS
def test_a_plain_layer_computes_what_the_merged_one_does(kind):
    layer, x = _layer(kind), _inputs(2, 3)
    layer.merge()
    np.testing.assert_allclose(_float64(layer.plain()(x)), _float64(layer(x)), rtol=1e-5, atol=1e-5)


def test_a_plain_layer_without_a_bias_has_none():
    assert _layer(LoraLinear, bias=False).plain().bias is None


class _Quantised(nn.Linear):
    pass


class Conv1DLookalike(Conv1D):
    pass


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Linear(2, 2), LoraLinear),
        (Conv1D(2, 2), LoraConv1D),
        (_Quantised(2, 2), None),
        (Conv1DLookalike(2, 2), None),
        (nn.MultiheadAttention(4, 2).out_proj, None),
        (nn.Conv1d(2, 2, 1), None),
        (nn.Embedding(2, 2), None),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else type(value).__name__,
)
def test_only_exact_classes_are_adapted(module, expected):
    assert layer_class(module) is expected


def test_the_layer_prints_its_settings():
    text = repr(_layer(LoraLinear, variant="rslora"))
    assert "in_features=5, out_features=7, bias=True, rank=3, alpha=12, variant=rslora" in text
