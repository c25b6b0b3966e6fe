"""The equations, held against numpy in float64, written down here by hand from the papers."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from lora_export import variants
from lora_export.errors import InputError

# A variant that changes the scale has a line here.
SCALES = {
    "lora": lambda alpha, rank: alpha / rank,
    "rslora": lambda alpha, rank: alpha / rank**0.5,
    "adalora": lambda alpha, rank: alpha / (rank + 1e-5),
}
FUNCTIONS = ("scaling", "base", "magnitude", "gain", "merged")
OUT, IN, RANK, SCALE = 7, 5, 2, 1.5
# A residual is found by a decomposition: float64's error times a few.
NEAR = {"rtol": 0, "atol": 1e-13}


def _weight(out=OUT, width=IN, seed=0):
    return np.random.default_rng(seed).normal(size=(out, width))


def _ours(function, variant, *arguments):
    """What numpy computes, and torch as well, but for the order of sums."""
    tensors = [torch.from_numpy(x) if isinstance(x, np.ndarray) else x for x in arguments]
    theirs = getattr(variants, function)(variant, *tensors)
    found = getattr(variants, function)(variant, *arguments)
    assert (found.dtype, theirs.dtype) == (np.float64, torch.float64)
    np.testing.assert_allclose(found, theirs.numpy(), **NEAR)
    return found


def _singular_parts(weight):
    """The rank-one parts of a weight, largest first, from its Gram matrix."""
    values, vectors = np.linalg.eigh(weight.T @ weight)
    return [weight @ np.outer(v, v) for v in vectors.T[np.argsort(values)[::-1]]]


def _gram_schmidt(weight):
    """The orthonormal columns that span the first columns of a weight."""
    basis = []
    for column in weight.T:
        for _ in range(2):  # twice is enough
            column = column - sum((b @ column) * b for b in basis)
        basis.append(column / np.linalg.norm(column))
    return np.array(basis).T


# ---------------------------------------------------------------- the registry


@pytest.mark.parametrize("name", variants.names())
def test_a_variant_provides_at_least_one_function_and_no_other(name):
    module = variants.load(name)
    own = {n: v for n, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__}
    public = [name for name, value in own.items() if not name.startswith("_") and callable(value)]
    assert public
    assert set(public) <= set(FUNCTIONS)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_plain_lora_provides_every_function(function):
    assert hasattr(variants.load("lora"), function)


def test_an_unknown_variant_is_refused_with_the_known_ones():
    known = ", ".join(variants.names())
    with pytest.raises(InputError, match=f"'lorra' is not one of the variants: {known}"):
        variants.load("lorra")


def test_an_unknown_part_of_a_variant_is_refused_by_its_name():
    variants.check("rslora+dora")
    with pytest.raises(InputError, match=r"'lora\+lorra': lorra is not one of "):
        variants.check("lora+lorra")


def test_of_two_parts_that_provide_one_function_the_later_wins():
    for left, right in (("rslora+lora", 2.0), ("lora+rslora", 4.0)):
        assert variants.scaling(left, 8, 4) == right


# ---------------------------------------------------------------- the scale


def test_every_scale_has_a_reference_here():
    assert {n for n in variants.names() if hasattr(variants.load(n), "scaling")} == SCALES.keys()


@pytest.mark.parametrize("name", SCALES)
@pytest.mark.parametrize(("alpha", "rank"), [(16, 8), (1, 1), (8, 64), (0.5, 3)])
def test_the_scale_is_the_papers(name, alpha, rank):
    assert variants.scaling(name, alpha, rank) == SCALES[name](alpha, rank)


@pytest.mark.parametrize("name", sorted(set(variants.names()) - SCALES.keys()))
def test_a_variant_without_a_scale_of_its_own_has_that_of_lora(name):
    assert variants.scaling(f"lora+{name}", 16, 8) == 2.0
    assert variants.scaling(f"rslora+{name}", 16, 4) == 8.0


def test_rank_stabilised_scale_is_larger_by_the_root_of_the_rank():
    ratio = variants.scaling("rslora", 16, 9) / variants.scaling("lora", 16, 9)
    assert math.isclose(ratio, 3)


def test_adalora_without_an_alpha_takes_the_initial_rank_for_it():
    """Its config may say lora_alpha 0; PEFT takes alpha then for the rank."""
    assert variants.scaling("adalora", 0, 4) == 4 / (4 + 1e-5)


# ---------------------------------------------------------------- the base before training


@pytest.mark.parametrize("name", ["lora", "rslora", "rslora+dora", "adalora"])
def test_most_variants_begin_with_the_base_itself(name):
    weight = _weight()
    np.testing.assert_array_equal(_ours("base", name, weight, SCALE, RANK), weight)
    assert not variants.changes_base(name)


@pytest.mark.parametrize("shape", [(OUT, IN), (IN, OUT), (6, 6)])
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_pissa_begins_without_the_largest_singular_parts(shape, rank):
    weight = _weight(*shape)
    expected = sum(_singular_parts(weight)[rank : min(shape)], np.zeros(shape))
    for scale in (0.5, SCALE):  # the initial pair is the parts themselves, whatever the scale
        found = _ours("base", "lora+pissa", weight, scale, rank)
        np.testing.assert_allclose(found, expected, **NEAR)
    assert variants.changes_base("lora+pissa")


@pytest.mark.parametrize("shape", [(OUT, IN), (IN, OUT), (6, 6)])
@pytest.mark.parametrize("rank", [1, 2])
def test_kasa_begins_without_the_smallest_singular_parts(shape, rank):
    weight = _weight(*shape)
    expected = sum(_singular_parts(weight)[: min(shape) - rank])
    found = _ours("base", "lora+kasa", weight, SCALE, rank)
    np.testing.assert_allclose(found, expected, **NEAR)
    assert np.abs(found - weight).max() > 1e-2
    assert variants.changes_base("lora+kasa")


def test_kasa_of_a_rank_beyond_the_weights_leaves_nothing():
    np.testing.assert_allclose(_ours("base", "lora+kasa", _weight(), SCALE, 9), 0, **NEAR)


@pytest.mark.parametrize("shape", [(OUT, IN), (6, 6)])
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_olora_begins_without_scale_times_the_first_parts_of_the_qr(shape, rank):
    weight = _weight(*shape)
    q = _gram_schmidt(weight)  # signs of a column and its row cancel out in Q R
    expected = weight - SCALE * (q[:, :rank] @ (q.T @ weight)[:rank])
    found = _ours("base", "lora+olora", weight, SCALE, rank)
    np.testing.assert_allclose(found, expected, **NEAR)
    assert variants.changes_base("lora+olora")


# ---------------------------------------------------------------- the merged weight


@pytest.mark.parametrize("name", [n for n in variants.names() if n != "dora"])
def test_the_merged_weight_is_the_sum_in_float64(name):
    weight, delta = _weight(), _weight(seed=1)
    np.testing.assert_array_equal(_ours("merged", name, weight, delta), weight + delta)


def _dora(weight, delta, magnitude):
    rows = []
    for row, length in zip(weight + delta, magnitude, strict=True):
        norm = math.sqrt(math.fsum(x * x for x in row))
        rows.append(row * (length / norm) if norm else row)
    return np.array(rows)


@pytest.mark.parametrize("name", ["lora+dora", "rslora+dora"])
def test_the_rows_of_dora_have_the_length_that_was_learned(name):
    weight, delta, magnitude = _weight(), _weight(seed=1), np.linspace(-1, 3, OUT)
    found = _ours("merged", name, weight, delta, magnitude)
    np.testing.assert_allclose(found, _dora(weight, delta, magnitude), rtol=1e-14)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), np.abs(magnitude), rtol=1e-14)


@pytest.mark.parametrize("name", ["lora+dora", "rslora+dora"])
def test_dora_begins_with_the_lengths_of_the_bases_rows_and_scales_by_what_was_learned(name):
    weight, delta, magnitude = _weight(), _weight(seed=1), np.linspace(-1, 3, OUT)
    np.testing.assert_allclose(
        _ours("magnitude", name, weight), np.linalg.norm(weight, axis=1), rtol=1e-14
    )
    found = _ours("gain", name, weight + delta, magnitude)
    lengths = np.linalg.norm(weight + delta, axis=1)
    np.testing.assert_allclose(found, magnitude / lengths, rtol=1e-14)


@pytest.mark.parametrize("name", ["lora", "rslora", "adalora"])
def test_a_sum_has_no_magnitude_and_scales_no_row(name):
    assert variants.magnitude(name, _weight()) is None
    assert variants.gain(name, _weight(), None) == 1


def test_a_row_of_zeros_has_no_direction_and_stays_zero_in_dora():
    weight, delta = _weight(), _weight(seed=1)
    weight[3] = -delta[3]
    weight[4] = delta[4] = 0
    magnitude = np.full(OUT, 2.0)
    found = _ours("merged", "lora+dora", weight, delta, magnitude)
    assert not found[3].any()
    assert not found[4].any()
    np.testing.assert_allclose(found, _dora(weight, delta, magnitude), rtol=1e-14)


def test_dora_takes_the_lengths_of_each_expert_by_itself():
    weight, delta = (np.random.default_rng(seed).normal(size=(3, OUT, IN)) for seed in (0, 1))
    magnitude = np.linspace(1, 2, OUT)
    found = _ours("merged", "lora+dora", weight, delta, magnitude)
    for one, w, d in zip(found, weight, delta, strict=True):
        np.testing.assert_allclose(one, _dora(w, d, magnitude), rtol=1e-14)


@pytest.mark.parametrize("name", variants.names())
def test_the_equations_leave_their_arguments_alone(name):
    weight, delta, magnitude = np.ones((4, 3)), np.full((4, 3), 0.5), np.ones(4)
    _ours("base", f"lora+{name}", weight, SCALE, 2)  # torch works on the same memory
    _ours("merged", f"lora+{name}", weight, delta, magnitude)
    assert (weight == 1).all()
    assert (delta == 0.5).all()
    assert (magnitude == 1).all()


def test_scales_are_read_without_loading_torch():
    """Reading an adapter asks for a scale, and should not take seconds."""
    source = "import sys; from lora_export import variants; "
    source += "[variants.scaling(f'lora+{n}', 8, 2) for n in variants.names()]; "
    source += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", source], check=True)
