"""An adapter as plain LoRA with one rank and no scale: the same updates, for any loader."""

import dataclasses

import numpy as np
import pytest
from on_disk import BF16, KINDS, adalora, delta, factors, fields, numbers

from lora_export import peft_names, peft_writing
from lora_export.errors import InputError
from lora_export.normalising import normalised
from lora_export.records import EXPERTS, Adapter, Factors, Rows

REFUSED = {"dora", "pissa", "olora", "kasa"}


def read(tensors, **config):
    return peft_names.read(tensors, fields(**config), "a")


def mixed():
    """Ranks, alphas, a diagonal and a bias, all different."""
    modules = {
        "a": factors(rank=2, alpha=4.0),
        "b": factors(rank=3, alpha=1.0, seed=5),
        "c": factors(6, 4, rank=1, alpha=7.0, bias=numbers(6)),
        "d": factors(rank=3, alpha=0.1, diagonal=numbers(3), seed=9),
    }
    return Adapter(
        modules, {"score.weight": numbers(2, 8)}, "lora", rows={"e": Rows((1,), numbers(1, 8))}
    )


def plain_loader(tensors, config):
    """What a loader computes that knows alpha / r and nothing else."""
    found = {}
    for name, b in tensors.items():
        if name.endswith(".lora_B.weight"):
            a = tensors[name.replace("lora_B", "lora_A")]
            scale = config["lora_alpha"] / config["r"]
            wide = b.reshape(len(b), -1).astype(np.float64) @ a.reshape(len(a), -1).astype(
                np.float64
            )
            found[name.removeprefix("base_model.model.").removesuffix(".lora_B.weight")] = (
                scale * wide
            )
    return found


def near(found, expected):
    """Within one rounding of B to float32, in every term of the sum."""
    size = np.abs(expected).max(initial=1e-30)
    np.testing.assert_allclose(found, expected, rtol=0, atol=size * 2.0**-22)


def test_every_scale_becomes_one_and_every_rank_the_same():
    found = normalised(mixed())
    assert {(pair.rank, pair.alpha, pair.scale) for pair in found.modules.values()} == {
        (3, 3.0, 1.0)
    }
    assert found.variant == "lora"
    assert all(pair.diagonal is None for pair in found.modules.values())


def test_every_update_stays_what_it_was():
    before, after = mixed(), normalised(mixed())
    for path, pair in before.modules.items():
        near(delta(after.modules[path]), delta(pair))


def test_a_bias_takes_the_scale_with_it():
    before, after = mixed().modules["c"], normalised(mixed()).modules["c"]
    near(after.scale * after.bias, before.scale * before.bias.astype(np.float64))


def test_what_is_no_update_stays_as_it_is():
    before = mixed()
    after = normalised(before)
    for name in ("replaced", "rows", "base", "task_type", "labels", "promises"):
        assert getattr(after, name) is getattr(before, name)


def test_the_config_that_is_written_has_one_rank_one_alpha_and_no_patterns():
    config = peft_writing.config_of(normalised(mixed()))
    assert config["r"] == config["lora_alpha"] == 3
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["use_rslora"] is config["use_dora"] is False


def test_a_loader_that_knows_plain_lora_only_computes_the_same():
    before, after = mixed(), normalised(mixed())
    found = plain_loader(peft_writing.tensors_of(after), peft_writing.config_of(after))
    assert found.keys() == before.modules.keys()
    for path, pair in before.modules.items():
        near(found[path], delta(pair)[0])
    # It would have been wrong before.
    wrong = plain_loader(peft_writing.tensors_of(before), peft_writing.config_of(before))
    assert np.abs(wrong["c"] - delta(before.modules["c"])[0]).max() > 0.1


@pytest.mark.parametrize("scale", [1.0, 2.0, 0.25, 2.0**-9])
@pytest.mark.parametrize("dtype", [np.float16, BF16, np.float32], ids=str)
def test_a_scale_that_is_a_power_of_two_loses_no_bit(scale, dtype):
    held = factors(scale=scale)
    held = dataclasses.replace(held, a=held.a.astype(dtype), b=held.b.astype(dtype))
    (found,) = normalised(Adapter({"a": held}, {}, "lora")).modules.values()
    assert found.a.dtype == found.b.dtype == np.float32
    np.testing.assert_array_equal(delta(found), delta(held))


def test_normalising_twice_changes_nothing_more():
    once = normalised(mixed())
    twice = normalised(once)
    for path, pair in once.modules.items():
        other = twice.modules[path]
        assert np.array_equal(pair.a, other.a)
        assert np.array_equal(pair.b, other.b)


def test_rank_stabilised_updates_become_plain_ones():
    held = factors(rank=3, alpha=2.0, scale=2.0 / 3**0.5)
    found = normalised(Adapter({"a": held}, {}, "rslora"))
    assert found.variant == "lora"
    near(delta(found.modules["a"]), delta(held))


def test_a_pruned_adalora_becomes_plain_lora():
    before = read(adalora(3), peft_type="ADALORA", init_r=12)
    after = normalised(before)
    assert after.variant == "lora"
    for path, pair in before.modules.items():
        near(delta(after.modules[path]), delta(pair))


def test_experts_keep_their_rank_and_lose_their_scale():
    experts = Factors(numbers(3, 2, 8), numbers(3, 6, 2), 5.0, 2.5, EXPERTS)
    modules = {"mlp.w": experts, "q": factors(rank=4)}
    after = normalised(Adapter(modules, {}, "lora"))
    assert (after.modules["mlp.w"].rank, after.modules["mlp.w"].scale) == (2, 1.0)
    for path, pair in modules.items():
        near(delta(after.modules[path]), delta(pair))


@pytest.mark.parametrize(("tensors", "config"), KINDS.values(), ids=KINDS)
def test_every_kind_keeps_its_updates_or_is_refused(tensors, config):
    before = read(tensors, **config)
    if REFUSED & set(before.variant.split("+")):
        with pytest.raises(InputError, match="cannot be normalised"):
            normalised(before)
        return
    written = normalised(before)
    after = peft_names.read(peft_writing.tensors_of(written), peft_writing.config_of(written), "a")
    assert after.modules.keys() == before.modules.keys()
    for path, pair in before.modules.items():
        near(delta(after.modules[path]), delta(pair))


def test_both_outcomes_were_seen():
    kinds = {"refused": 0, "kept": 0}
    for tensors, config in KINDS.values():
        refused = REFUSED & set(read(tensors, **config).variant.split("+"))
        kinds["refused" if refused else "kept"] += 1
    assert min(kinds.values()) > 3


@pytest.mark.parametrize(
    "variant", ["lora+dora", "rslora+dora", "lora+kasa", "lora+pissa", "lora+olora"]
)
def test_what_is_no_sum_of_base_and_product_is_refused_by_its_name(variant):
    with pytest.raises(InputError, match=f"{variant.split('+')[1]}: its merged weight is no sum"):
        normalised(Adapter({"a": factors()}, {}, variant))


@pytest.mark.parametrize("init", ["corda", "loftq", "pissa_niter_4"])
def test_an_adapter_of_a_residual_base_is_refused(init):
    with pytest.raises(InputError, match="training changed the base first"):
        normalised(Adapter({"a": factors()}, {}, "lora", fields={"init_lora_weights": init}))


@pytest.mark.parametrize("init", ["gaussian", "Gaussian", "eva", "orthogonal", "mica", True])
def test_a_start_that_leaves_the_base_alone_does_not_matter(init):
    adapter = read(
        peft_writing.tensors_of(Adapter({"a": factors()}, {}, "lora")), init_lora_weights=init
    )
    assert normalised(adapter).modules


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_a_scale_that_carries_b_beyond_float32_is_refused():
    held = factors(scale=8.0)
    held = dataclasses.replace(held, b=held.b * np.float32(2e38))
    with pytest.raises(InputError):
        normalised(Adapter({"a": held}, {}, "lora"))
