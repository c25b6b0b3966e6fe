import math

import numpy as np
import pytest
import torch

from lora_export import variants
from lora_export.errors import InputError

# Written down here by hand from the papers; a new variant needs its own line.
SCALES = {"lora": lambda alpha, rank: alpha / rank, "rslora": lambda alpha, rank: alpha / rank**0.5}


@pytest.mark.parametrize("name", variants.names())
@pytest.mark.parametrize(("alpha", "rank"), [(16, 8), (1, 1), (8, 64), (0.5, 3)])
def test_the_scale_is_the_papers(name, alpha, rank):
    assert variants.load(name).scaling(alpha, rank) == pytest.approx(SCALES[name](alpha, rank))


def test_rank_stabilised_scale_is_larger_by_the_root_of_the_rank():
    ratio = variants.load("rslora").scaling(16, 9) / variants.load("lora").scaling(16, 9)
    assert math.isclose(ratio, 3)


@pytest.mark.parametrize("name", variants.names())
def test_the_merged_weight_is_the_sum_in_float64(name):
    random = np.random.default_rng(0)
    weight, delta = random.normal(size=(2, 5, 3))
    merged = variants.load(name).merged(torch.from_numpy(weight), torch.from_numpy(delta))
    assert merged.dtype == torch.float64
    np.testing.assert_array_equal(merged.numpy(), weight + delta)


@pytest.mark.parametrize("name", variants.names())
def test_merging_leaves_its_arguments_alone(name):
    weight, delta = torch.ones(2, 3, dtype=torch.float64), torch.full((2, 3), 0.5).double()
    variants.load(name).merged(weight, delta)
    assert weight.eq(1).all()
    assert delta.eq(0.5).all()


def test_an_unknown_variant_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match="'lorra' is not one of the variants: lora, rslora"):
        variants.load("lorra")
