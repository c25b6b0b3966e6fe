"""Tensors found by their bits: what counts as there, and what is reported where one is not."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_export import matching
from lora_export.exporters._onnx_schemes import symmetric
from lora_export.matching import Wanted

DICE = np.random.default_rng(0)
BF16 = ml_dtypes.bfloat16
SHAPES = [(6, 6), (8, 6), (12,), (4, 3, 2, 2), ()]


def made(*shape):
    return np.asarray(DICE.standard_normal(shape), np.float32)


W, V = made(8, 6), made(8, 6)
SQUARE, BIAS = made(6, 6), made(12)


def placed(held, wanted, precision="fp32", used=lambda paths: set(paths)):
    """Return the placements of the arrays `wanted`, by name."""
    known = [Wanted(name, name, array.shape, lambda a=array: a) for name, array in wanted.items()]
    found = matching.placements("onnx", precision, lambda: list(held), known, used)
    assert all(p.artifact == "onnx" and p.elements == wanted[p.tensor].size for p in found)
    return {p.tensor: p for p in found}


def one(held, array, name="a.weight", **more):
    return placed(held, {name: array}, **more)[name]


def flipped(array, element, bit):
    """Return a copy with one bit of one element turned over; views stay views of the same order."""
    bits = np.array(array).view(f"u{array.itemsize}")
    bits.flat[element] ^= bits.dtype.type(1 << bit)
    return bits.view(array.dtype)


# ---------------------------------------------------------------- what is there


@pytest.mark.parametrize(
    ("held", "how"),
    [
        ([("model.a.weight", W)], "as it is"),
        ([("val_1", W)], "as it is"),
        ([("val_1", V), ("val_2", W.T)], "transposed"),
        ([("model.a.weight", W.T)], "transposed"),
        ([("val_1", W.reshape(8, 3, 2))], "as it is"),
        ([("qkv", np.concatenate([V, W, V]))], "rows 8 to 16"),
        ([("qkv", np.concatenate([V.T, W.T], axis=1))], "columns 8 to 16, transposed"),
        ([("qkv", np.concatenate([V, W], axis=1))], "columns 6 to 12"),
    ],
)
def test_a_tensor_is_found_in_every_form(held, how):
    found = one(held, W)
    assert (found.how, found.differing, found.largest) == (how, 0, 0.0)
    assert found.found == (held[-1][0],)


def test_the_kernel_of_a_convolution_is_found_flattened():
    kernel = made(4, 3, 2, 2)
    assert one([("c", kernel.reshape(4, 12))], kernel).differing == 0


def test_the_same_bytes_in_a_shape_of_another_order_fails():
    found = one([("model.a.weight", W.reshape(6, 8))], W)
    assert found.differing > 0


def test_a_norm_that_adds_one_is_found_when_that_is_computed_before():
    assert one([("add_5", BIAS + 1)], BIAS).how == "one added"


def test_one_added_under_its_own_name_fails():
    assert one([("a.weight", BIAS + 1)], BIAS).differing == 12


def test_a_table_whose_rows_are_repeated_is_found():
    chosen = W[DICE.permutation(np.r_[np.arange(8), np.arange(8), np.arange(4)])]
    assert one([("bias", chosen.T[None])], W).how == "repeated"


def test_rows_in_another_order_fails():
    assert one([("val_1", W[::-1])], W).differing > 0


def test_tied_tensors_are_one_constant():
    found = placed([("model.embed.weight", W)], {"embed.weight": W, "head.weight": W.copy()})
    assert [p.found for p in found.values()] == [("model.embed.weight",)] * 2
    assert not any(p.differing for p in found.values())


def test_the_longest_name_is_whose_constant_it_is():
    held = [("model.q.norm.weight", BIAS), ("model.norm.weight", BIAS + 2)]
    found = placed(held, {"q.norm.weight": BIAS, "norm.weight": BIAS + 2})
    assert not any(p.differing for p in found.values())


def test_what_no_output_needs_may_be_left_out():
    assert placed([("val_1", V)], {"pooler.weight": W}, used=lambda paths: set()) == {}


# ---------------------------------------------------------------- precisions


def test_half_precision_is_found_widened():
    narrow = W.astype(BF16)
    assert one([("val_1", narrow.astype(np.float32).T)], narrow).differing == 0


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", np.float16), ("bf16", BF16)])
def test_half_precision_is_the_tensor_rounded_once(precision, dtype):
    assert one([("a.weight", W.astype(dtype))], W, precision=precision).differing == 0


def test_rounding_to_bfloat16_on_the_way_fails():
    found = one([("a.weight", W.astype(BF16).astype(np.float16))], W, precision="fp16")
    assert found.differing > 0


def test_half_precision_in_an_artifact_that_says_single_fails():
    assert one([("a.weight", W.astype(np.float16))], W).differing > 0


@pytest.mark.parametrize("axis", [0, 1])
def test_eight_bits_are_within_half_a_step(axis):
    values, scales = symmetric(W.T if axis == 0 else W, axis)
    held = [
        ("m.a.weight_int8", values),
        ("m.a.weight_scale", np.squeeze(scales, 0 if axis == 0 else ())),
    ]
    found = one(held, W, precision="int8")
    assert (found.how, found.differing) == ("in eight bits", 0)
    assert 0 < found.largest <= scales.max()


def test_a_step_too_far_in_eight_bits_fails():
    values, scales = symmetric(W.T, 0)
    values[2, 3] += 1
    held = [("m.a.weight_int8", values), ("m.a.weight_scale", scales[0])]
    assert one(held, W, precision="int8").differing == 1


def test_scales_of_another_tensor_in_eight_bits_fails():
    held = [("a.weight_int8", symmetric(W.T, 0)[0]), ("a.weight_scale", symmetric(V.T, 0)[1][0])]
    assert one(held, W, precision="int8").differing > W.size / 2


def test_integers_of_no_known_name_are_not_compared():
    found = one([("val_1_int8", symmetric(W.T, 0)[0])], W, precision="int8")
    assert (found.how, found.found) == ("in integers", ())


# ---------------------------------------------------------------- what is not there


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(SHAPES), st.data())
def test_one_flipped_bit_is_found_at_its_tensor(shape, data):
    """Whatever the element and the bit, under its own name or another, turned or not."""
    array, other = made(*shape), made(*shape)
    element = data.draw(st.integers(0, array.size - 1))
    bit = data.draw(st.integers(0, 31))
    name = data.draw(st.sampled_from(["model.a.weight", "val_1"]))
    damaged = flipped(array, element, bit)
    if data.draw(st.booleans()) and array.ndim == 2 and shape[0] != shape[1]:
        damaged = damaged.T
    held = data.draw(st.permutations([(name, damaged), ("model.b.weight", other)]))
    found = placed(held, {"a.weight": array, "b.weight": other})
    assert (found["a.weight"].differing, found["a.weight"].found) == (1, (name,))
    assert found["b.weight"].differing == 0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=8), st.randoms())
def test_intact_tensors_are_found_in_any_order_under_any_name(shapes, random):
    wanted = {f"layer.{i}.weight": made(*shape) for i, shape in enumerate(shapes)}
    held = [
        (random.choice([f"model.{name}", f"val_{i}"]), array)
        for i, (name, array) in enumerate(wanted.items())
    ]
    held = [
        (name, array.T if array.ndim == 2 and "val" in name and random.random() < 0.5 else array)
        for name, array in held
    ]
    random.shuffle(held)
    found = placed(held, wanted)
    assert found.keys() == wanted.keys()
    assert not any(p.differing for p in found.values())


def test_a_zero_of_the_other_sign_fails():
    found = one([("a.weight", np.float32([0.0, 1.0]))], np.float32([-0.0, 1.0]))
    assert (found.differing, found.largest) == (1, 0.0)


def test_a_number_that_became_none_fails():
    array = W.copy()
    array[0, 0] = np.nan
    found = one([("a.weight", array)], W)
    assert (found.differing, found.largest) == (1, np.inf)


def test_the_same_bits_of_no_number_are_equal_and_others_fails():
    array = np.float32([np.nan, 1])
    assert one([("a.weight", array.copy())], array).differing == 0
    assert one([("a.weight", flipped(array, 0, 3))], array).differing == 1


def test_two_tensors_under_each_others_names_fails_for_both():
    held = [("model.a.weight", V), ("model.b.weight", W)]
    found = placed(held, {"a.weight": W, "b.weight": V})
    assert all(p.differing > W.size / 2 for p in found.values())
    assert found["a.weight"].found == ("model.a.weight",)


def test_content_under_the_name_of_another_is_not_enough():
    found = placed([("model.b.weight", W)], {"a.weight": W, "b.weight": V})
    assert found["b.weight"].differing > 0


def test_a_square_weight_that_is_transposed_under_its_own_name_fails():
    found = one([("model.a.weight", SQUARE.T)], SQUARE)
    assert found.differing == 30
    assert found.how == "as it is"


def test_one_of_two_constants_of_one_name_fails():
    held = [("model.a.weight", W), ("model.a.weight", flipped(W, 5, 20))]
    assert one(held, W).differing == 1


def test_a_weight_of_zeros_fails():
    found = one([("a.weight", np.zeros_like(W))], W)
    assert (found.differing, found.largest) == (48, np.float32(np.abs(W).max()))


def test_a_tensor_of_another_shape_fails():
    found = one([("model.a.weight", made(7, 5))], W)
    assert (found.how, found.found, found.differing) == (
        "of another shape",
        ("model.a.weight",),
        48,
    )


def test_a_tensor_that_is_nowhere_fails():
    found = placed([("b.weight", V)], {"a.weight": W, "b.weight": V})
    assert (found["a.weight"].how, found["a.weight"].found) == ("missing", ())
    assert found["a.weight"].differing == 48


def test_a_part_that_is_damaged_is_compared_where_it_lies():
    held = [("qkv", np.concatenate([V, flipped(W, 7, 30), V]))]
    found = one(held, W)
    assert (found.how, found.differing) == ("rows 8 to 16", 1)


def test_the_most_similar_tensor_is_that_of_least_difference():
    near = W + np.float32(0.01) * V
    found = one([("val_1", made(8, 6)), ("val_2", near.T), ("val_3", made(8, 6))], W)
    assert found.found == ("val_2",)
    assert found.largest == pytest.approx(np.abs(0.01 * V).max(), rel=1e-3)


@pytest.mark.parametrize("elements", [0, 1, 20])
def test_a_second_copy_that_is_damaged_fails(elements):
    copy = W.copy()
    copy.flat[:elements] += 1
    found = one([("model.a.weight", W), ("val_1", copy.T)], W)
    assert found.differing == elements


def test_a_constant_of_the_graph_is_no_copy_of_a_tensor_that_does_not_vary():
    ones = np.ones(32, np.float32)
    held = [("model.a.weight", ones), ("mask", np.r_[ones[:31], 0]), ("b", made(32))]
    assert one(held, ones).differing == 0


def test_a_shared_constant_that_is_damaged_fails_for_all_that_share_it():
    zeros = np.zeros(12, np.float32)
    held = [("model.a.bias", flipped(zeros, 3, 30))]
    found = placed(held, {"a.bias": zeros, "b.bias": zeros})
    assert [(p.found, p.differing) for p in found.values()] == [(("model.a.bias",), 1)] * 2
