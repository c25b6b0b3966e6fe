"""Where an update lands on disk, with transformers as the witness: it loads base and merged model.

A made-up model comes with whatever conversion a test asks for; a few real families follow.
"""

import json

import numpy as np
import on_disk
import pytest
import torch
import transformers
from on_disk import delta, factors, numbers
from torch import nn
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
)

from lora_export import merged_files, merging, resolving
from lora_export.architecture import CONV1D, OTHER, names_of
from lora_export.errors import AdapterMismatch
from lora_export.plan import plan
from lora_export.records import CONV, EMBEDDING, EXPERTS, LINEAR, Adapter, Factors
from lora_export.refusals import TABLE

# ---------------------------------------------------------------- a model with any conversion


class Stack(nn.Module):
    """Experts in one parameter."""

    def __init__(self, *shape, transposed=None):
        super().__init__()
        self.w = nn.Parameter(torch.empty(*shape))
        if transposed is not None:
            self.is_transposed = transposed


class Made(transformers.PreTrainedModel):
    """A model of the modules that a test names."""

    config_class = transformers.PretrainedConfig
    base_model_prefix = "model"
    parts = None

    def __init__(self, config):
        super().__init__(config)
        for name, make in type(self).parts.items():
            setattr(self, name, make())
        self.post_init()

    def _init_weights(self, module):
        pass


COUNT = iter(range(10_000))


def made(parts, *conversions):
    """A model with these modules, whose checkpoints are read through these conversions."""
    kind = f"made_up_{next(COUNT)}"
    config = type("Config", (transformers.PretrainedConfig,), {"model_type": kind})
    register_checkpoint_conversion_mapping(kind, list(conversions), overwrite=True)
    model = type("Made", (Made,), {"parts": parts, "config_class": config})
    return model(config())


def base_of(folder, model, tensors):
    on_disk.base_folder(folder, tensors, model_type=model.config.model_type)
    return on_disk.storage.Checkpoint.open(folder)


def loaded(model, folder):
    """The tensors of the model that transformers loads from `folder`."""
    found, report = type(model).from_pretrained(
        folder, config=model.config, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    return {name: value.detach().numpy() for name, value in found.state_dict().items()}


def merged(folder, model, tensors, modules, replaced=None, variant="lora"):
    """Merge into a base of `tensors`; return what transformers loads before and after."""
    base = base_of(folder / "base", model, tensors)
    adapter = Adapter(modules, replaced or {}, variant)
    found = resolving.architecture(model, base, names_of(adapter))
    steps = plan(adapter, base, found)
    merging.write_merged(steps, adapter, base, {}, folder / "merged")
    return loaded(model, folder / "base"), loaded(model, folder / "merged")


def holds(before, after, updates):
    """Every tensor is the base's, plus its update rounded once where it has one."""
    assert before.keys() == after.keys()
    assert updates.keys() <= before.keys()
    for name, value in before.items():
        exact = value.astype(np.float64) + updates.get(name, 0.0)
        assert np.array_equal(after[name], exact.astype(np.float32)), name


def linear(out, width):
    return lambda: nn.Linear(width, out, bias=False)


def experts(count, out, width, seed=0):
    """An update of fused experts."""
    a, b = numbers(count, 2, width, seed=seed), numbers(count, out, 2, seed=seed + 1)
    return Factors(a, b, 4.0, 2.0, EXPERTS)


def each(name, count, *shape):
    return {name.format(i): numbers(*shape, seed=i) for i in range(count)}


QKV = {"q": linear(4, 8), "k": linear(2, 8), "v": linear(2, 8)}
THIRDS = {"q": linear(4, 8), "k": linear(4, 8), "v": linear(4, 8)}
CHUNKED = WeightConverter("qkv.weight", ["q.weight", "k.weight", "v.weight"], [Chunk(dim=0)])


def test_updates_of_the_parts_of_a_chunked_weight_land_side_by_side(tmp_path):
    modules = {"q": factors(4, 8), "v": factors(4, 8, seed=3)}
    tensors = {"qkv.weight": numbers(12, 8)}
    before, after = merged(tmp_path, made(THIRDS, CHUNKED), tensors, modules)
    holds(before, after, {f"{n}.weight": delta(p)[0] for n, p in modules.items()})


def test_an_update_of_the_whole_of_a_chunked_weight_lands_in_all_its_parts(tmp_path):
    """An adapter that was trained before transformers cut the weight."""
    update = factors(12, 8)
    tensors = {"qkv.weight": numbers(12, 8)}
    before, after = merged(tmp_path, made(THIRDS, CHUNKED), tensors, {"qkv": update})
    cut = np.split(delta(update)[0], 3)
    holds(before, after, {f"{n}.weight": part for n, part in zip("qkv", cut, strict=True)})


JOINED = WeightConverter(["gate.weight", "up.weight"], "gate_up.weight", [Concatenate(dim=0)])
SIDES = {"gate.weight": numbers(6, 8), "up.weight": numbers(6, 8, seed=2)}


def test_an_update_of_a_joined_weight_lands_in_both_halves(tmp_path):
    update = factors(12, 8)
    before, after = merged(
        tmp_path, made({"gate_up": linear(12, 8)}, JOINED), SIDES, {"gate_up": update}
    )
    holds(before, after, {"gate_up.weight": delta(update)[0]})


def test_updates_of_the_halves_of_a_joined_weight_land_in_it(tmp_path):
    modules = {"gate": factors(6, 8), "up": factors(6, 8, seed=5)}
    before, after = merged(tmp_path, made({"gate_up": linear(12, 8)}, JOINED), SIDES, modules)
    whole = np.concatenate([delta(modules["gate"])[0], delta(modules["up"])[0]])
    holds(before, after, {"gate_up.weight": whole})


def test_halves_on_disk_that_are_joined_already_are_found_by_the_old_names(tmp_path):
    """The base was saved after the change, the adapter was trained before it."""
    modules = {"gate": factors(6, 8), "up": factors(6, 8, seed=5)}
    model = made({"gate_up": linear(12, 8)}, JOINED)
    before, after = merged(tmp_path, model, {"gate_up.weight": numbers(12, 8)}, modules)
    whole = np.concatenate([delta(modules["gate"])[0], delta(modules["up"])[0]])
    holds(before, after, {"gate_up.weight": whole})


def dora(weight, pair):
    """The formula, in float64."""
    exact = weight.astype(np.float64) + delta(pair)[0]
    length = np.linalg.norm(exact, axis=1, keepdims=True)
    return exact * pair.magnitude[:, None].astype(np.float64) / length


def test_dora_of_a_joined_weight_scales_the_rows_of_both_halves(tmp_path):
    update = factors(12, 8, magnitude=np.abs(numbers(12)))
    model = made({"gate_up": linear(12, 8)}, JOINED)
    before, after = merged(tmp_path, model, SIDES, {"gate_up": update}, variant="lora+dora")
    exact = dora(before["gate_up.weight"], update)
    np.testing.assert_allclose(after["gate_up.weight"], exact, rtol=1e-7)


def test_dora_of_the_parts_of_a_chunked_weight_scales_their_rows_alone(tmp_path):
    modules = {"q": factors(4, 8, magnitude=np.abs(numbers(4)))}
    tensors = {"qkv.weight": numbers(12, 8)}
    before, after = merged(tmp_path, made(THIRDS, CHUNKED), tensors, modules, variant="lora+dora")
    exact = dora(before["q.weight"], modules["q"])
    np.testing.assert_allclose(after["q.weight"], exact, rtol=1e-7)
    for name in ("k.weight", "v.weight"):
        assert np.array_equal(after[name], before[name])


def test_dora_of_a_transposed_matrix_takes_the_lengths_of_its_own_rows(tmp_path):
    turn = WeightConverter("old.weight", "new.weight", [Transpose(dim0=0, dim1=1)])
    update = factors(6, 8, magnitude=np.abs(numbers(6)))
    model = made({"new": linear(6, 8)}, turn)
    before, after = merged(
        tmp_path, model, {"old.weight": numbers(8, 6)}, {"new": update}, variant="lora+dora"
    )
    exact = dora(before["new.weight"], update)
    np.testing.assert_allclose(after["new.weight"], exact, rtol=1e-7)


def test_dora_whose_rows_lie_in_two_tensors_is_refused(tmp_path):
    """The length of a row is that of the whole row."""
    mapping = WeightConverter(["a.weight", "b.weight"], "c.weight", [Concatenate(dim=1)])
    model = made({"c": linear(6, 8)}, mapping)
    tensors = {"a.weight": numbers(6, 4), "b.weight": numbers(6, 4, seed=2)}
    before, after = merged(tmp_path, model, tensors, {"c": factors(6, 8)})
    holds(before, after, {"c.weight": delta(factors(6, 8))[0]})
    update = factors(6, 8, magnitude=np.abs(numbers(6)))
    with pytest.raises(AdapterMismatch) as caught:
        merged(tmp_path / "dora", model, tensors, {"c": update}, variant="lora+dora")
    assert TABLE["layer-kind"].why in str(caught.value)


@pytest.mark.parametrize("rows", [3, 4, 8])
def test_an_update_whose_columns_lie_in_two_tensors_is_cut_between_them(tmp_path, rows):
    """Whatever the number of its rows: four columns of eight are half of them."""
    mapping = WeightConverter(["a.weight", "b.weight"], "c.weight", [Concatenate(dim=1)])
    tensors = {"a.weight": numbers(rows, 4), "b.weight": numbers(rows, 4, seed=2)}
    update = factors(rows, 8)
    before, after = merged(tmp_path, made({"c": linear(rows, 8)}, mapping), tensors, {"c": update})
    holds(before, after, {"c.weight": delta(update)[0]})


def test_an_update_of_a_weight_that_is_stored_whole_lands_in_the_stored_one(tmp_path):
    """A grown embedding that was trained with LoRA, for instance."""
    whole, update = numbers(6, 8, seed=40), factors(6, 8)
    model = made({"a": linear(6, 8)})
    tensors = {"a.weight": numbers(6, 8)}
    before, after = merged(tmp_path, model, tensors, {"a": update}, {"a.weight": whole})
    holds({"a.weight": whole}, after, {"a.weight": delta(update)[0]})
    assert not np.array_equal(before["a.weight"], whole)


def test_two_updates_of_one_region_are_refused(tmp_path):
    """Under the old name and the new one: which of the two was meant is not known."""
    model = made({"new": linear(6, 8)}, WeightRenaming("old", "new"))
    modules = {"old": factors(6, 8), "new": factors(6, 8, seed=3)}
    with pytest.raises(AdapterMismatch, match="is changed by old and new at once"):
        merged(tmp_path, model, {"old.weight": numbers(6, 8)}, modules)


STACKED = WeightConverter("experts.*.w.weight", "experts.w", [MergeModulelist(dim=0)])
BOTH = WeightConverter(
    ["experts.*.w1.weight", "experts.*.w3.weight"],
    "experts.w",
    [MergeModulelist(dim=0), Concatenate(dim=1)],
)


@pytest.mark.parametrize("count", [3, 12])  # 10 comes after 9, not after 1
def test_an_update_of_fused_experts_lands_in_the_tensors_of_each(tmp_path, count):
    model = made({"experts": lambda: Stack(count, 6, 8)}, STACKED)
    update = experts(count, 6, 8)
    tensors = each("experts.{}.w.weight", count, 6, 8)
    before, after = merged(tmp_path, model, tensors, {"experts.w": update})
    holds(before, after, {"experts.w": delta(update)})


@pytest.mark.parametrize("index", [0, 2, 10])
def test_an_update_of_one_expert_lands_in_its_slice(tmp_path, index):
    model = made({"experts": lambda: Stack(12, 6, 8)}, STACKED)
    update, tensors = factors(6, 8), {"experts.w": numbers(12, 6, 8)}
    before, after = merged(tmp_path, model, tensors, {f"experts.{index}.w": update})
    whole = np.zeros((12, 6, 8))
    whole[index] = delta(update)[0]
    holds(before, after, {"experts.w": whole})


def test_an_update_of_fused_and_joined_experts_lands_in_the_tensors_of_each(tmp_path):
    model, update = made({"experts": lambda: Stack(3, 12, 8)}, BOTH), experts(3, 12, 8)
    tensors = each("experts.{}.w1.weight", 3, 6, 8) | each("experts.{}.w3.weight", 3, 6, 8)
    before, after = merged(tmp_path, model, tensors, {"experts.w": update})
    holds(before, after, {"experts.w": delta(update)})


def test_updates_of_single_experts_land_in_the_halves_of_the_fused_ones(tmp_path):
    model = made({"experts": lambda: Stack(3, 12, 8)}, BOTH)
    modules = {"experts.1.w1": factors(6, 8), "experts.2.w3": factors(6, 8, seed=4)}
    before, after = merged(tmp_path, model, {"experts.w": numbers(3, 12, 8)}, modules)
    whole = np.zeros((3, 12, 8))
    whole[1, :6], whole[2, 6:] = (delta(pair)[0] for pair in modules.values())
    holds(before, after, {"experts.w": whole})


def test_updates_of_single_experts_land_in_single_experts(tmp_path):
    model = made({"experts": lambda: Stack(3, 6, 8)}, STACKED)
    update, tensors = factors(6, 8), each("experts.{}.w.weight", 3, 6, 8)
    before, after = merged(tmp_path, model, tensors, {"experts.1.w": update})
    whole = np.zeros((3, 6, 8))
    whole[1] = delta(update)[0]
    holds(before, after, {"experts.w": whole})


@pytest.mark.parametrize("flipped", [False, True])
def test_fused_experts_may_be_stored_as_out_in_or_in_out(tmp_path, flipped):
    """Which of the two the shape tells, where it is not square."""
    shape = (3, 8, 6) if flipped else (3, 6, 8)
    model, update = made({"experts": lambda: Stack(*shape)}), experts(3, 6, 8)
    before, after = merged(tmp_path, model, {"experts.w": numbers(*shape)}, {"experts.w": update})
    whole = delta(update)
    holds(before, after, {"experts.w": whole.transpose(0, 2, 1) if flipped else whole})


@pytest.mark.parametrize("check_dims", [True, False])
def test_an_update_of_transposed_experts_is_transposed_on_disk(tmp_path, check_dims):
    turn = WeightConverter(
        "experts.w_old", "experts.w", [Transpose(dim0=1, dim1=2, check_dims=check_dims)]
    )
    model, update = made({"experts": lambda: Stack(3, 6, 8)}, turn), experts(3, 6, 8)
    tensors = {"experts.w_old": numbers(3, 8, 6)}
    before, after = merged(tmp_path, model, tensors, {"experts.w": update})
    holds(before, after, {"experts.w": delta(update)})


@pytest.mark.parametrize("flipped", [False, True], ids=["out-in", "in-out"])
def test_experts_that_are_stacked_joined_and_turned_are_followed(tmp_path, flipped):
    """The model has (experts, in, out); on disk lies a matrix (out, in) for each half of each."""
    turned = WeightConverter(
        ["experts.*.w1.weight", "experts.*.w3.weight"],
        "experts.w",
        [MergeModulelist(dim=0), Concatenate(dim=1), Transpose(dim0=1, dim1=2)],
    )
    model = made({"experts": lambda: Stack(3, 8, 12)}, turned)
    tensors = each("experts.{}.w1.weight", 3, 6, 8) | each("experts.{}.w3.weight", 3, 6, 8)
    # PEFT before 0.19 took the parameter for (experts, in, out), later ones for (experts, out, in).
    update = experts(3, 8, 12) if flipped else experts(3, 12, 8)
    before, after = merged(tmp_path, model, tensors, {"experts.w": update})
    whole = delta(update)
    holds(before, after, {"experts.w": whole if flipped else whole.transpose(0, 2, 1)})


def test_an_update_of_a_transposed_matrix_is_transposed_on_disk(tmp_path):
    turn = WeightConverter("old.weight", "new.weight", [Transpose(dim0=0, dim1=1)])
    model, update = made({"new": linear(6, 8)}, turn), factors(6, 8)
    before, after = merged(tmp_path, model, {"old.weight": numbers(8, 6)}, {"new": update})
    holds(before, after, {"new.weight": delta(update)[0]})


def test_a_renamed_tensor_keeps_the_name_that_it_has_on_disk(tmp_path):
    model = made({"new": linear(6, 8)}, WeightRenaming("old", "new"))
    tensors = {"old.weight": numbers(6, 8)}
    for name in ("old", "new"):
        before, after = merged(tmp_path / name, model, tensors, {name: factors(6, 8)})
        holds(before, after, {"new.weight": delta(factors(6, 8))[0]})
        assert on_disk.arrays(tmp_path / name / "merged").keys() == tensors.keys()


# ---------------------------------------------------------------- what cannot be followed

MOVED = {
    "cut after a turn": [Transpose(dim0=0, dim1=1), Chunk(dim=0)],
    "cut along columns": [Chunk(dim=1)],
}


@pytest.mark.parametrize("operations", MOVED.values(), ids=MOVED)
def test_an_update_of_what_is_rearranged_in_a_way_not_followed_is_refused(tmp_path, operations):
    mapping = WeightConverter("qkv.weight", ["q.weight", "k.weight", "v.weight"], operations)
    with pytest.raises(AdapterMismatch) as caught:
        merged(tmp_path, made(THIRDS, mapping), {"qkv.weight": numbers(12, 24)}, {"q": factors(4)})
    assert TABLE["conversion"].why in str(caught.value)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("operations", MOVED.values(), ids=MOVED)
def test_what_is_rearranged_and_not_updated_is_copied(tmp_path, operations):
    mapping = WeightConverter("qkv.weight", ["q.weight", "k.weight", "v.weight"], operations)
    model = made(THIRDS | {"o": linear(8, 4)}, mapping)
    shape = (12, 8) if len(operations) == 1 and operations[0].dim == 0 else (8, 12)
    tensors = {"qkv.weight": numbers(*shape), "o.weight": numbers(8, 4)}
    base = base_of(tmp_path / "base", model, tensors)
    adapter = Adapter({"o": factors(8, 4)}, {}, "lora")
    steps = plan(adapter, base, resolving.architecture(model, base, names_of(adapter)))
    merging.write_merged(steps, adapter, base, {}, tmp_path / "merged")
    found = on_disk.arrays(tmp_path / "merged")
    assert found["qkv.weight"].tobytes() == tensors["qkv.weight"].tobytes()
    assert not np.array_equal(found["o.weight"], tensors["o.weight"])


def test_an_update_by_the_name_on_disk_is_refused_where_the_model_is_arranged_otherwise(tmp_path):
    mapping = WeightConverter(
        "qkv.weight", ["q.weight", "k.weight", "v.weight"], MOVED["cut along columns"]
    )
    model, update = made(THIRDS, mapping), factors(8, 12)
    base = base_of(tmp_path / "base", model, {"qkv.weight": numbers(8, 12)})
    adapter = Adapter({"qkv": update}, {}, "lora")
    with pytest.raises(AdapterMismatch, match="rearranges on loading"):
        plan(adapter, base, resolving.architecture(model, base, names_of(adapter)))


# ---------------------------------------------------------------- layers and ties


def test_the_kinds_of_layers_are_told_by_their_class(tmp_path):
    from transformers.pytorch_utils import Conv1D

    parts = {
        "linear": linear(4, 8), "conv1d": lambda: Conv1D(4, 8), "embed": lambda: nn.Embedding(5, 4),
        "conv": lambda: nn.Conv2d(2, 3, 2), "turned": lambda: nn.ConvTranspose1d(2, 3, 2),
        "norm": lambda: nn.LayerNorm(4), "stack": lambda: Stack(2, 3, 4),
        "told": lambda: Stack(2, 3, 4, transposed=True),
    }  # fmt: skip
    model = made(parts)
    base = base_of(tmp_path, model, {"linear.weight": numbers(4, 8)})
    layers = resolving.architecture(model, base, {}).layers
    kinds = {name: layers[name].kind for name in parts}
    assert kinds == {
        "linear": LINEAR, "conv1d": CONV1D, "embed": EMBEDDING, "conv": CONV, "turned": OTHER,
        "norm": OTHER, "stack": OTHER, "told": OTHER,
    }  # fmt: skip
    assert layers["told"].out_first is False
    assert layers["stack"].out_first is None
    assert layers["turned"].refusal == "layer-kind"


def test_tensors_that_share_their_storage_are_tied(tiny, tmp_path):
    model = tiny("llama-tied")
    found = resolving.architecture(model, on_disk.saved(model, tmp_path), {})
    both = {"lm_head.weight", "model.embed_tokens.weight"}
    assert found.tied("lm_head.weight") == found.tied("model.embed_tokens.weight") == both
    assert [link.stored for link in found.stored_for("lm_head.weight")] == [
        "model.embed_tokens.weight"
    ]
    assert found.tied("model.norm.weight") == {"model.norm.weight"}


def test_buffers_are_told_from_parameters(tiny, tmp_path):
    model = made({"norm": lambda: nn.BatchNorm1d(4)})
    found = resolving.architecture(model, on_disk.saved(model, tmp_path), {})
    buffers = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    assert found.buffers == buffers


def test_underscored_names_are_resolved_where_one_module_spells_so(tiny, tmp_path):
    model = tiny("llama")
    base = on_disk.saved(model, tmp_path)
    name = "model_layers_0_self_attn_q_proj.weight"
    (link,) = resolving.architecture(model, base, {name: (32, 32)}, flat=True).names[name]
    assert link.tensor == "model.layers.0.self_attn.q_proj.weight"
    assert not resolving.architecture(model, base, {name: (32, 32)}).names[name]


def test_underscored_names_that_two_modules_spell_are_not_resolved(tmp_path):
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.b = nn.Linear(4, 4)

    model = made({"a_b": linear(4, 4), "a": Inner})
    base = on_disk.saved(model, tmp_path)
    found = resolving.architecture(model, base, {"a_b.weight": (4, 4)}, flat=True)
    assert {link.tensor for link in found.names["a_b.weight"]} <= {"a_b.weight"}


# ---------------------------------------------------------------- real families

SMALL = {
    "vocab_size": 40, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "intermediate_size": 12, "max_position_embeddings": 16,
}  # fmt: skip
MOE = {
    "MixtralForCausalLM": (
        {"num_local_experts": 3, "num_experts_per_tok": 1},
        "model.layers.1.block_sparse_moe.experts.{}.{}",
        ("w1", "w3", "w2"),
        12,
    ),
    "Qwen2MoeForCausalLM": (
        {
            "num_experts": 3, "num_experts_per_tok": 1, "moe_intermediate_size": 6,
            "shared_expert_intermediate_size": 6,
        },
        "model.layers.1.mlp.experts.{}.{}",
        ("gate_proj", "up_proj", "down_proj"),
        6,
    ),
}  # fmt: skip
EACH_MOE = pytest.mark.parametrize("family", MOE)
EACH_LAYOUT = pytest.mark.parametrize("fused", [False, True], ids=["single", "fused"])


def scaled(model, seed=0):
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.from_numpy(numbers(*parameter.shape, seed=seed + index)))
    return model.eval()


def moe(family, folder, *, fused):
    """A base with its experts in one tensor each, or with one tensor for each expert."""
    settings = MOE[family][0]
    kind = getattr(transformers, family)
    model = scaled(kind(kind.config_class(**SMALL, **settings)))
    if fused:
        on_disk.saved(model, folder)
    else:
        model.save_pretrained(folder)
    names = on_disk.storage.Checkpoint.open(folder).tensors
    assert any(".experts.0." in name for name in names) is not fused
    return model


def states(family, *folders):
    kind = getattr(transformers, family)
    found = []
    for folder in folders:
        model, report = kind.from_pretrained(folder, output_loading_info=True)
        assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        found.append({n: v.detach().numpy() for n, v in model.state_dict().items()})
    return found


@EACH_MOE
@EACH_LAYOUT
def test_an_adapter_of_fused_experts_merges_into_either_layout(tmp_path, family, fused):
    moe(family, tmp_path / "base", fused=fused)
    width, path = MOE[family][3], "model.layers.1.mlp.experts"
    up, down = experts(3, 2 * width, 8), experts(3, 8, width, seed=7)
    pairs = {f"{path}.base_layer": up, path: down}
    tensors = {}
    for name, pair in pairs.items():
        columns = pair.b.transpose(1, 2, 0).reshape(pair.b.shape[1], -1)
        tensors |= on_disk.keyed({name: (pair.a.reshape(-1, pair.a.shape[2]), columns)})
    adapter = on_disk.peft_folder(
        tmp_path / "adapter",
        tensors,
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        target_modules=[],
    )
    certificate = merged_files.merge_files(
        adapter, base=str(tmp_path / "base"), out=tmp_path / "out"
    )
    assert certificate.ok
    before, after = states(family, tmp_path / "base", tmp_path / "out")
    updates = {f"{path}.gate_up_proj": delta(up), f"{path}.down_proj": delta(down)}
    holds(before, after, updates)
    kept = (on_disk.arrays(tmp_path / name).keys() for name in ("base", "out"))
    assert len(set(map(frozenset, kept))) == 1


@EACH_MOE
@EACH_LAYOUT
def test_an_adapter_of_single_experts_merges_into_either_layout(tmp_path, family, fused):
    moe(family, tmp_path / "base", fused=fused)
    _, name, (gate, up, down), width = MOE[family]
    modules = {
        name.format(0, gate): factors(width, 8), name.format(2, up): factors(width, 8, seed=3),
        name.format(1, down): factors(8, width, seed=5),
    }  # fmt: skip
    tensors = on_disk.keyed({path: (pair.a, pair.b) for path, pair in modules.items()})
    adapter = on_disk.peft_folder(tmp_path / "adapter", tensors, task_type="CAUSAL_LM")
    certificate = merged_files.merge_files(
        adapter, base=str(tmp_path / "base"), out=tmp_path / "out"
    )
    assert certificate.ok
    before, after = states(family, tmp_path / "base", tmp_path / "out")
    one, two, three = (delta(pair)[0] for pair in modules.values())
    both, last = np.zeros((3, 2 * width, 8)), np.zeros((3, 8, width))
    both[0, :width], both[2, width:], last[1] = one, two, three
    path = "model.layers.1.mlp.experts"
    holds(before, after, {f"{path}.gate_up_proj": both, f"{path}.down_proj": last})


OLD_VIT, NEW_VIT = "vit.encoder.layer.0.attention.attention.query", "vit.layers.0.attention.q_proj"


@pytest.mark.parametrize("stored", ["old", "new"])
@pytest.mark.parametrize("named", [OLD_VIT, NEW_VIT], ids=["old", "new"])
def test_old_and_new_names_of_vit_meet(tmp_path, stored, named):
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12,
        image_size=8, patch_size=4,
    )  # fmt: skip
    model = scaled(transformers.ViTForImageClassification(config))
    if stored == "old":
        model.save_pretrained(tmp_path / "base")
        assert f"{OLD_VIT}.weight" in on_disk.arrays(tmp_path / "base")
    else:
        on_disk.saved(model, tmp_path / "base")
        assert f"{NEW_VIT}.weight" in on_disk.arrays(tmp_path / "base")
    update = factors(8, 8)
    adapter = on_disk.peft_folder(
        tmp_path / "adapter", on_disk.keyed({named: (update.a, update.b)})
    )
    certificate = merged_files.merge_files(
        adapter, base=str(tmp_path / "base"), out=tmp_path / "out"
    )
    assert certificate.ok
    before, after = states("ViTForImageClassification", tmp_path / "base", tmp_path / "out")
    holds(before, after, {f"{NEW_VIT}.weight": delta(update)[0]})


def test_a_headless_base_gets_the_models_prefix_under_a_head(tmp_path):
    config = transformers.LlamaConfig(**SMALL, pad_token_id=0)
    scaled(transformers.LlamaModel(config)).save_pretrained(tmp_path / "base")
    path, update, head = "model.layers.0.mlp.up_proj", factors(12, 8), numbers(2, 8)
    tensors = on_disk.keyed({path: (update.a, update.b)})
    tensors |= {on_disk.PREFIX + "score.weight": head}
    adapter = on_disk.peft_folder(tmp_path / "adapter", tensors, task_type="SEQ_CLS")
    certificate = merged_files.merge_files(
        adapter, base=str(tmp_path / "base"), out=tmp_path / "out"
    )
    assert certificate.ok
    (after,) = states("LlamaForSequenceClassification", tmp_path / "out")
    before = {f"model.{n}": v for n, v in on_disk.arrays(tmp_path / "base").items()}
    holds(before | {"score.weight": head}, after, {f"{path}.weight": delta(update)[0]})
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [
        "LlamaForSequenceClassification"
    ]


@pytest.mark.parametrize("task", ["CAUSAL_LM", "FEATURE_EXTRACTION", None])
def test_an_adapter_of_the_headless_model_finds_its_modules_under_a_head(tmp_path, task):
    config = transformers.LlamaConfig(**SMALL)
    scaled(transformers.LlamaForCausalLM(config)).save_pretrained(tmp_path / "base")
    update = factors(12, 8)
    tensors = on_disk.keyed({"layers.0.mlp.up_proj": (update.a, update.b)})
    adapter = on_disk.peft_folder(tmp_path / "adapter", tensors, task_type=task)
    certificate = merged_files.merge_files(
        adapter, base=str(tmp_path / "base"), out=tmp_path / "out"
    )
    assert certificate.ok
    headless = task == "FEATURE_EXTRACTION"
    kind = "LlamaModel" if headless else "LlamaForCausalLM"
    (after,) = states(kind, tmp_path / "out")
    before = on_disk.arrays(tmp_path / "base")
    if headless:
        before = {n.removeprefix("model."): v for n, v in before.items() if n != "lm_head.weight"}
    path = "layers.0.mlp.up_proj.weight" if headless else "model.layers.0.mlp.up_proj.weight"
    holds(before, after, {path: delta(update)[0]})


def test_gamma_and_beta_are_weight_and_bias_of_a_norm(tmp_path):
    sizes = {key: SMALL[key] for key in SMALL if key != "num_key_value_heads"}
    model = scaled(transformers.BertForMaskedLM(transformers.BertConfig(**sizes)))
    model.save_pretrained(tmp_path / "base")
    held = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): value
        for name, value in on_disk.arrays(tmp_path / "base").items()
    }
    assert any(name.endswith(".gamma") for name in held)
    on_disk.save(tmp_path / "base" / "model.safetensors", held)
    norm, query = (
        "bert.encoder.layer.0.output.LayerNorm",
        "bert.encoder.layer.0.attention.self.query",
    )
    update, bias = factors(8, 8), numbers(8, seed=9)
    tensors = on_disk.keyed({query: (update.a, update.b)})
    tensors |= {f"{on_disk.PREFIX}{norm}.bias": bias}
    adapter = on_disk.peft_folder(tmp_path / "adapter", tensors)
    certificate = merged_files.merge_files(
        adapter, base=str(tmp_path / "base"), out=tmp_path / "out"
    )
    assert certificate.ok
    (after,) = states("BertForMaskedLM", tmp_path / "out")
    before = {n: v.detach().numpy() for n, v in model.state_dict().items()}
    holds(before | {f"{norm}.bias": bias}, after, {f"{query}.weight": delta(update)[0]})
