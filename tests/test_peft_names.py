"""PEFT's tensor names: what they are read as, and written as again."""

import dataclasses

import numpy as np
import pytest
from on_disk import BF16, KINDS, PREFIX, adalora, factors, fields, fused, keyed, numbers, pair

from lora_export import peft_names, peft_writing
from lora_export.errors import InputError
from lora_export.records import (
    CONV,
    EMBEDDING,
    EXPERTS,
    LINEAR,
    Adapter,
    Promises,
    Reading,
    Rows,
)
from lora_export.refusals import TABLE

LAYER = "model.layers.0.self_attn.q_proj"
EXPERT = "model.layers.0.mlp.experts"
EMBED = "model.embed_tokens"


def read(tensors, reading=None, **config):
    return peft_names.read(tensors, fields(**config), "a", reading)


def refuses(message, tensors, reading=None, **config):
    with pytest.raises(InputError) as caught:
        read(tensors, reading, **config)
    assert message in str(caught.value)


def only(adapter):
    (found,) = adapter.modules.values()
    return found


def same(left, right):
    """Whether two arrays agree in dtype, shape and every bit."""
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and np.ascontiguousarray(left).tobytes() == np.ascontiguousarray(right).tobytes()
    )


# ---------------------------------------------------------------- prefixes


@pytest.mark.parametrize(
    "prefix",
    [
        PREFIX, "", PREFIX * 2, PREFIX * 3, "module." + PREFIX, PREFIX + "module.",
        "_orig_mod." + PREFIX, "module._orig_mod." + PREFIX, PREFIX + "_orig_mod.",
        "_fsdp_wrapped_module." + PREFIX, "module._fsdp_wrapped_module._orig_mod." + PREFIX * 2,
    ],
)  # fmt: skip
def test_the_prefixes_of_peft_and_of_wrappers_are_taken_off(prefix):
    adapter = read(keyed({LAYER: pair()}, prefix))
    assert adapter.modules.keys() == {LAYER}
    odd = [note for note in adapter.notes if "PEFT would not load them" in note]
    assert len(odd) == (prefix != PREFIX)
    if odd:
        assert odd[0].startswith("2 tensors have ")
        assert repr(prefix) in odd[0] or not prefix


def test_a_compiled_layer_in_the_middle_has_its_plain_name():
    tensors = keyed({"model.layers.0._orig_mod.self_attn.q_proj": pair()})
    assert read(tensors).modules.keys() == {LAYER}


def test_prefixes_may_differ_from_tensor_to_tensor():
    tensors = keyed({LAYER: pair()}) | keyed({"other": pair()}, "")
    adapter = read(tensors)
    assert adapter.modules.keys() == {LAYER, "other"}
    assert any("2 tensors have no prefix" in note for note in adapter.notes)


@pytest.mark.parametrize("name", ["base_model", "base_model.model", "base_model.model."])
def test_a_name_that_is_a_prefix_and_nothing_more_does_not_end_in_a_crash(name):
    refuses("no lora_A and lora_B tensors at all", {name: numbers(2)})


# ---------------------------------------------------------------- adapter names in the keys


@pytest.mark.parametrize("name", ["default", "my_adapter", "1", "weight"])
@pytest.mark.parametrize(
    ("ends", "config"),
    [
        ((".lora_A{}.weight", ".lora_B{}.weight"), {}),
        ((".lora_embedding_A{}", ".lora_embedding_B{}"), {}),
        ((".lora_A{}", ".lora_B{}"), {}),
    ],
)
def test_the_adapters_name_may_stand_in_the_keys(name, ends, config):
    tensors = keyed({LAYER: pair()}, ends=[end.format("." + name) for end in ends])
    assert read(tensors, **config).modules.keys() == {LAYER}


@pytest.mark.parametrize("name", ["", ".default"])
def test_every_other_part_is_found_with_and_without_the_adapters_name(name):
    tensors = {
        **keyed({LAYER: pair()}, ends=(f".lora_A{name}.weight", f".lora_B{name}.weight")),
        f"{PREFIX}{LAYER}.lora_B{name}.bias": numbers(8),
        f"{PREFIX}{LAYER}.lora_magnitude_vector{name}": numbers(8),
        f"{PREFIX}{LAYER}.lora_diag{name}": numbers(2),
        f"{PREFIX}{EMBED}.token_adapter.trainable_tokens_delta{name}": numbers(1, 8),
        f"{PREFIX}score.modules_to_save{name}.weight": numbers(2, 8),
    }
    adapter = read(
        tensors,
        lora_bias=True,
        use_dora=True,
        kasa_config={"beta": 1},
        trainable_token_indices=[5],
    )
    found = only(adapter)
    for held in (found.bias, found.magnitude, found.diagonal):
        assert held is not None
    assert adapter.rows.keys() == {EMBED}
    assert adapter.replaced.keys() == {"score.weight"}


def test_the_magnitude_of_newer_versions_has_a_weight():
    tensors = keyed({LAYER: pair()})
    tensors[f"{PREFIX}{LAYER}.lora_magnitude_vector.default.weight"] = numbers(8)
    assert same(only(read(tensors, use_dora=True)).magnitude, numbers(8))


def test_two_adapters_in_one_file_are_refused():
    tensors = keyed({"a": pair()}, ends=(".lora_A.x.weight", ".lora_B.x.weight"))
    tensors |= keyed({"b": pair()}, ends=(".lora_A.y.weight", ".lora_B.y.weight"))
    refuses(f"{TABLE['several-adapters'].case} (x, y)", tensors)


# ---------------------------------------------------------------- duplicates


def test_one_tensor_under_two_names_counts_once_where_both_say_the_same():
    tensors = keyed({LAYER: pair()})
    tensors |= keyed({LAYER: pair()}, PREFIX, (".lora_A.default.weight", ".lora_B.default.weight"))
    adapter = read(tensors)
    assert adapter.modules.keys() == {LAYER}
    assert len(adapter.ignored) == 2
    assert all("the same as" in why for why in adapter.ignored.values())


@pytest.mark.parametrize("side", [0, 1])
def test_one_tensor_under_two_names_is_refused_where_they_differ(side):
    other = list(pair())
    other[side] = other[side] * 2
    tensors = keyed({LAYER: pair()}) | keyed({LAYER: other}, "")
    refuses(f"for {LAYER}, unlike ", tensors)


def test_a_whole_tensor_and_pefts_copy_of_it_count_once():
    head = numbers(2, 8)
    tensors = keyed({LAYER: pair()}) | {
        f"{PREFIX}score.weight": head,
        f"{PREFIX}score.modules_to_save.default.weight": head,
        f"{PREFIX}score.original_module.weight": head * 2,
    }
    adapter = read(tensors)
    assert same(adapter.replaced["score.weight"], head)
    assert len(adapter.ignored) == 2


@pytest.mark.parametrize(
    "key",
    [
        f"{LAYER}.lora_velora_embed.default", f"{LAYER}.lora_monteclora_sampler.x.y",
        f"{LAYER}.ranknum", "score.original_module.weight",
        f"{EMBED}.token_adapter.trainable_tokens_original.default",
    ],
)  # fmt: skip
def test_what_only_training_needs_is_left_out_with_a_reason(key):
    adapter = read({**keyed({LAYER: pair()}), PREFIX + key: numbers(3)})
    assert adapter.ignored.keys() == {PREFIX + key}
    assert adapter.replaced == {}


def test_a_whole_tensor_may_hold_integers_and_may_not_hold_what_is_not_finite():
    counts = np.array([3], np.int64)
    name = f"{PREFIX}norm.num_batches_tracked"
    assert same(
        read({**keyed({LAYER: pair()}), name: counts}).replaced["norm.num_batches_tracked"], counts
    )
    refuses("1 of 2 values are NaN", {**keyed({LAYER: pair()}), name: np.array([1, np.inf])})


# ---------------------------------------------------------------- fused experts


def test_the_columns_of_experts_run_by_expert_first_as_in_peft():
    a, b = fused()
    found = only(read(keyed({EXPERT: (a, b)}), target_parameters=["experts.down_proj"]))
    assert (found.kind, found.rank, found.scale) == (EXPERTS, 2, 2.0)
    for expert in range(3):
        assert same(found.a[expert], a[2 * expert : 2 * expert + 2])
        assert same(found.b[expert], b[:, expert::3])


@pytest.mark.parametrize(
    ("reading", "config"),
    [
        (Reading(expert_b="expert-major"), {}),
        (None, {"lora_B_layout": "grouped_by_expert"}),
        (Reading(expert_b="expert-major"), {"auto_mapping": {"unsloth_fixed": True}}),
    ],
)
def test_the_columns_of_experts_may_be_grouped_by_expert(reading, config):
    a, b = fused()
    names = {"target_parameters": ["experts.down_proj"], **config}
    found = only(read(keyed({EXPERT: (a, b)}), reading, **names))
    for expert in range(3):
        assert same(found.b[expert], b[:, 2 * expert : 2 * expert + 2])


def test_the_order_of_experts_of_unsloth_has_to_be_said():
    config = {"target_parameters": ["experts.w"], "auto_mapping": {"unsloth_fixed": True}}
    refuses(TABLE["expert-b"].remedy, keyed({EXPERT: fused()}), **config)
    read(keyed({EXPERT: fused()}), Reading(expert_b="rank-major"), **config)
    assert read(keyed({LAYER: pair()}), auto_mapping={"unsloth_fixed": True}).modules


def test_the_innermost_wrapper_is_the_first_parameter_of_the_module():
    """PEFT wraps the parameters in the order in which the module registers them."""
    up, down = fused(), fused(out=8, width=4, seed=5)
    tensors = keyed({f"{EXPERT}.base_layer": up, EXPERT: down})
    for names in (["gate_up_proj", "down_proj"], ["down_proj", "gate_up_proj"]):
        found = read(tensors, target_parameters=[f"experts.{name}" for name in names]).modules
        assert found.keys() == {f"{EXPERT}.gate_up_proj", f"{EXPERT}.down_proj"}
        assert found[f"{EXPERT}.gate_up_proj"].b.shape == (3, 4, 2)
        assert found[f"{EXPERT}.down_proj"].b.shape == (3, 8, 2)


def test_a_module_inside_a_wrapped_one_has_its_plain_name():
    tensors = keyed({"mlp.base_layer.router": pair(), "mlp": fused()})
    found = read(tensors, target_parameters=["mlp.gate_up_proj"], target_modules=["router"])
    assert found.modules.keys() == {"mlp.router", "mlp.gate_up_proj"}


def test_the_number_of_parameters_has_to_be_that_of_the_wrappers():
    two = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    refuses("the file holds 1 of them", keyed({EXPERT: fused()}), **two)
    nested = keyed({f"{EXPERT}.base_layer": fused(), EXPERT: fused()})
    refuses("the file holds 2 of them", nested, target_parameters=["experts.down_proj"])


def test_nested_wrappers_without_a_parameter_are_refused():
    nested = keyed({f"{EXPERT}.base_layer": fused(), EXPERT: fused()})
    refuses(TABLE["unknown-tensor"].case, nested)


@pytest.mark.parametrize("extra", ["lora_magnitude_vector", "lora_B.bias", "lora_diag"])
def test_experts_take_no_magnitude_no_bias_and_no_diagonal(extra):
    tensors = {**keyed({EXPERT: fused()}), f"{PREFIX}{EXPERT}.{extra}": numbers(4)}
    refuses(TABLE["unknown-tensor"].case, tensors, target_parameters=["experts.down_proj"])


@pytest.mark.parametrize(
    ("a", "b", "rank"),
    [
        ((6, 8), (4, 5), 2), ((6, 8), (4, 6), 4), ((6, 8, 1), (4, 6), 2), ((6,), (4, 6), 2),
        ((0, 8), (4, 0), 2),
    ],
)  # fmt: skip
def test_shapes_that_are_no_pairs_of_experts_are_refused(a, b, rank):
    tensors = keyed({EXPERT: (numbers(*a), numbers(*b))})
    config = {"target_parameters": ["experts.w"], "rank_pattern": {"experts.w": rank}}
    refuses(f"{EXPERT}.w: ", tensors, **config)


def test_experts_have_a_rank_and_an_alpha_of_their_own():
    config = {"target_parameters": ["experts.w"], "rank_pattern": {r"experts\.w": 3}}
    found = only(read(keyed({EXPERT: fused()}), **config, alpha_pattern={r".*experts\.w": 6}))
    assert (found.rank, len(found.a), found.alpha, found.scale) == (3, 2, 6.0, 2.0)


# ---------------------------------------------------------------- odd pairs


@pytest.mark.parametrize("enabled", [(True, False, True), (True, True, True), (False, True)])
def test_a_merged_linear_updates_the_enabled_slices_alone(enabled):
    """B is a grouped convolution there: (rows of the enabled slices, rank, 1)."""
    groups, rank, width = sum(enabled), 2, 4
    a, b = numbers(rank * groups, 8), numbers(width * groups, rank, 1)
    tensors = keyed({LAYER: (a, b)}, ends=(".lora_A.weight", ".lora_B.weight"))
    found = only(read(tensors, enable_lora=list(enabled)))
    assert (found.kind, found.scale) == (LINEAR, 2.0)  # of the rank of one slice
    product = found.b.astype(np.float64) @ found.a.astype(np.float64)
    group = 0
    for index, on in enumerate(enabled):
        rows = product[index * width : (index + 1) * width]
        if not on:
            assert not rows.any()
            continue
        one = b[group * width : (group + 1) * width, :, 0].astype(np.float64)
        np.testing.assert_array_equal(rows, one @ a[group * rank : (group + 1) * rank])
        group += 1


@pytest.mark.parametrize(
    ("a", "b", "enabled"),
    [
        ((4, 8), (8, 2, 1), [False, False]),
        ((5, 8), (8, 2, 1), [True, True]),
        ((4, 8), (7, 2, 1), [True, True]),
        ((4, 8), (8, 2, 3), [True, True]),
    ],
)
def test_a_merged_linear_that_does_not_fit_its_flags_is_refused(a, b, enabled):
    refuses(f"{LAYER}: lora_A", keyed({LAYER: (numbers(*a), numbers(*b))}), enable_lora=enabled)


def test_a_merged_linear_without_its_flags_is_refused():
    tensors = keyed({LAYER: (numbers(4, 8), numbers(16, 2))})
    refuses(TABLE["merged-linear"].why, tensors)


@pytest.mark.parametrize("side", ["a", "b"])
def test_the_block_diagonal_side_of_bd_lora_is_written_out(side):
    blocks = {"nblocks": 2, f"target_modules_bd_{side}": ["q_proj"]}
    a = numbers(4, 4 if side == "a" else 8)
    b = numbers(6, 2 if side == "b" else 4)
    found = only(read(keyed({LAYER: (a, b)}), r=4, use_bdlora=blocks))
    assert (found.a.shape, found.b.shape) == ((4, 8), (6, 4))
    thin, wide = (a, found.a) if side == "a" else (b, found.b)
    rows, columns = len(thin) // 2, thin.shape[1]
    expected = np.zeros_like(wide)
    expected[:rows, :columns], expected[rows:, columns:] = thin[:rows], thin[rows:]
    assert same(wide, expected)


def test_a_module_that_bd_lora_does_not_name_is_a_plain_pair():
    blocks = {"nblocks": 2, "target_modules_bd_a": ["k_proj"]}
    assert same(only(read(keyed({LAYER: pair()}), use_bdlora=blocks)).a, pair()[0])


def test_a_bd_lora_that_cannot_be_cut_or_is_cut_on_both_sides_is_refused():
    blocks = {"nblocks": 3, "target_modules_bd_a": ["q_proj"]}
    refuses("cannot be cut into 3 blocks", keyed({LAYER: pair()}), use_bdlora=blocks)
    blocks = {"nblocks": 2, "target_modules_bd_a": ["q"], "target_modules_bd_b": ["q"]}
    refuses("block-diagonal for both", keyed({LAYER: pair()}), use_bdlora=blocks)


ADA = {"peft_type": "ADALORA", "init_r": 12, "r": 8}


@pytest.mark.parametrize("rank", [12, 3, 1])
def test_a_pruned_adalora_keeps_its_first_rank_in_the_scale(rank):
    tensors = {**adalora(rank), f"{PREFIX}{LAYER}.ranknum": np.array(3.0, np.float32)}
    found = only(read(tensors, **ADA))
    assert (found.rank, found.scale) == (rank, 4 / (12 + 1e-5))
    assert same(found.diagonal, numbers(rank, 1)[:, 0])


def test_a_module_that_adalora_pruned_away_is_left_out_with_a_reason():
    adapter = read(adalora() | adalora(0, "gone"), **ADA)
    assert adapter.modules.keys() == {LAYER}
    assert "pruned" in adapter.ignored["gone"]


def test_an_adalora_without_its_diagonal_is_refused():
    tensors = adalora()
    del tensors[f"{PREFIX}{LAYER}.lora_E"]
    refuses("the file holds no lora_E", tensors, **ADA)


@pytest.mark.parametrize("shape", [(3,), (1, 8), (8, 1), (1, 8, 1, 1)])
def test_a_magnitude_is_a_vector_however_it_is_stored(shape):
    tensors = keyed({LAYER: pair()})
    tensors[f"{PREFIX}{LAYER}.lora_magnitude_vector"] = numbers(*shape)
    if 8 in shape:
        assert same(only(read(tensors, use_dora=True)).magnitude, numbers(*shape).reshape(-1))
    else:
        refuses("lora_magnitude_vector has shape (3,)", tensors, use_dora=True)


# ---------------------------------------------------------------- rows


def test_trained_rows_come_with_their_indices():
    tensors = keyed({LAYER: pair()})
    tensors[f"{PREFIX}{EMBED}.token_adapter.trainable_tokens_delta"] = numbers(2, 8)
    found = read(tensors, trainable_token_indices={"embed_tokens": [7, 3]}).rows
    assert found[EMBED].indices == (7, 3)
    assert same(found[EMBED].values, numbers(2, 8))


def test_a_grown_table_under_trained_rows_is_stored_whole():
    tensors = keyed({LAYER: pair()})
    tensors[f"{PREFIX}{EMBED}.token_adapter.trainable_tokens_delta"] = numbers(1, 8)
    tensors[f"{PREFIX}{EMBED}.token_adapter.base_layer.weight"] = numbers(22, 8)
    adapter = read(tensors, trainable_token_indices=[21])
    assert adapter.rows.keys() == {EMBED}
    assert adapter.replaced.keys() == {f"{EMBED}.weight"}


@pytest.mark.parametrize("indices", [None, {"other": [1, 2]}, [1], [1, 2, 3]])
def test_rows_that_the_config_does_not_number_are_refused(indices):
    tensors = keyed({LAYER: pair()})
    tensors[f"{PREFIX}{EMBED}.token_adapter.trainable_tokens_delta"] = numbers(2, 8)
    refuses(f"{EMBED}: ", tensors, trainable_token_indices=indices)


def test_an_embedding_may_have_a_pair_and_trained_rows():
    tensors = keyed({EMBED: pair()}, ends=(".lora_embedding_A", ".lora_embedding_B"))
    tensors[f"{PREFIX}{EMBED}.token_adapter.trainable_tokens_delta"] = numbers(1, 8)
    adapter = read(tensors, trainable_token_indices=[3])
    assert adapter.modules.keys() == adapter.rows.keys() == {EMBED}


# ---------------------------------------------------------------- what the config promises


def test_what_the_config_promises_is_kept_to_be_held_against_the_base():
    tensors = keyed({LAYER: pair()})
    found = read(tensors, target_modules=["q_proj"], modules_to_save=["score"])
    assert found.promises == Promises(("q_proj",), ("score",))
    for narrowing in ({"layers_to_transform": [0]}, {"exclude_modules": ["v"]}):
        found = read(tensors, target_modules=["q_proj"], modules_to_save=["score"], **narrowing)
        assert found.promises == Promises((), ("score",))
    assert read(tensors, target_modules=".*q_proj").promises == Promises()


def test_a_module_outside_of_the_targets_is_read_and_noted_with_its_numbers():
    a, b = pair(rank=4)
    adapter = read(keyed({LAYER: pair(), "lm_head": (a, b)}), target_modules=["q_proj"])
    assert adapter.modules["lm_head"].scale == 1.0
    (note,) = (note for note in adapter.notes if "PEFT would leave them out" in note)
    assert note.startswith("1 modules")
    assert "rank 4 in the tensors, 2 in the config, scale 1" in note


@pytest.mark.parametrize("kind", ["all", "lora_only"])
def test_biases_that_the_config_promises_and_the_file_lost_are_noted(kind):
    assert f"bias={kind!r}" in " ".join(read(keyed({LAYER: pair()}), bias=kind).notes)
    tensors = {**keyed({LAYER: pair()}), f"{PREFIX}{LAYER}.base_layer.bias": numbers(8)}
    assert "bias=" not in " ".join(read(tensors, bias=kind).notes)


# ---------------------------------------------------------------- there and back

EACH_KIND = pytest.mark.parametrize(("tensors", "config"), KINDS.values(), ids=KINDS)
EACH_DTYPE = pytest.mark.parametrize("dtype", [np.float16, BF16, np.float32, np.float64], ids=str)


def _as(tensors, dtype):
    return {n: v if v.dtype.kind == "i" else v.astype(dtype) for n, v in tensors.items()}


@EACH_KIND
@EACH_DTYPE
def test_the_tensors_that_are_written_are_those_that_were_read(tensors, config, dtype):
    held = _as(tensors, dtype)
    written = peft_writing.tensors_of(read(held, **config))
    assert written.keys() == held.keys()
    for name, value in held.items():
        assert same(written[name], value), name


@EACH_KIND
def test_what_is_written_is_read_as_the_same_adapter(tensors, config):
    first = read(tensors, **config)
    again = peft_names.read(peft_writing.tensors_of(first), peft_writing.config_of(first), "a")
    assert again.modules.keys() == first.modules.keys()
    for path, held in first.modules.items():
        found = again.modules[path]
        for name in ("a", "b", "diagonal", "magnitude", "bias"):
            left, right = getattr(held, name), getattr(found, name)
            assert (left is right is None) or same(left, right), (path, name)
        assert (found.kind, found.rank) == (held.kind, held.rank)
        assert found.scale == held.scale
        assert found.alpha == held.alpha
    for name in ("variant", "dropout", "task_type", "base"):
        assert getattr(again, name) == getattr(first, name), name
    for name in (first.fields | again.fields).keys() - {"target_parameters"}:  # in full, the 2nd
        assert again.fields[name] == first.fields[name], name
    assert again.rows.keys() == first.rows.keys()
    for path, rows in first.rows.items():
        assert again.rows[path].indices == rows.indices


@EACH_KIND
def test_reading_does_not_depend_on_the_order_of_the_file(tensors, config):
    one, other = (
        peft_writing.tensors_of(read(dict(order), **config))
        for order in (tensors.items(), reversed(tensors.items()))
    )
    assert list(one) == list(other)
    assert all(same(one[name], other[name]) for name in one)


def test_adalora_is_written_as_plain_lora_with_the_same_update():
    """Its diagonal has no place in plain LoRA, and PEFT's AdaLoRA cannot be read by others."""
    first = read(adalora(3), **ADA)
    again = peft_names.read(peft_writing.tensors_of(first), peft_writing.config_of(first), "a")
    assert again.variant == "lora"
    (one,), (other,) = first.modules.values(), again.modules.values()
    assert other.diagonal is None
    expected = one.scale * (one.b.astype(np.float64) * one.diagonal) @ one.a.astype(np.float64)
    found = other.scale * other.b.astype(np.float64) @ other.a.astype(np.float64)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


def test_the_patterns_that_are_written_match_one_module_each():
    """So no reader's order of patterns matters."""
    modules = {
        path: factors(rank=rank, alpha=alpha)
        for path, rank, alpha in (
            ("h.1.q", 2, 4.0), ("h.11.q", 3, 4.0), ("h.1.q.q", 2, 5.0), ("h1.q", 2, 4.0),
        )
    }  # fmt: skip
    adapter = Adapter(modules, {}, "lora")
    config = peft_writing.config_of(adapter)
    assert config["rank_pattern"].keys() == {r"h\.11\.q"}
    again = peft_names.read(peft_writing.tensors_of(adapter), config, "a").modules
    for path, held in modules.items():
        assert (again[path].rank, again[path].alpha) == (held.rank, held.alpha)


@pytest.mark.parametrize(("rank", "alpha"), [(3, 4.0), (2, 9.0)])
def test_a_path_that_ends_another_path_keeps_its_own_numbers(rank, alpha):
    """A pattern matches from any dot on, so that of `q` would match `h.q` as well."""
    modules = {"q": factors(rank=rank, alpha=alpha), "h.q": factors(), "i.q": factors()}
    adapter = Adapter(modules, {}, "lora")
    config = peft_writing.config_of(adapter)
    again = peft_names.read(peft_writing.tensors_of(adapter), config, "a").modules
    for path, held in modules.items():
        assert (again[path].rank, again[path].alpha) == (held.rank, held.alpha)


@pytest.mark.parametrize("scale", [0.1, 1 / 3, 20.0, 1e-3, 2.0**-20])
@pytest.mark.parametrize("variant", ["lora", "rslora"])
def test_a_scale_without_an_alpha_is_written_as_the_alpha_that_gives_it(scale, variant):
    """Of mlx-lm, whose config says the scale itself; half an ulp of float64 may be lost."""
    held = factors(rank=3, alpha=1.0, scale=scale)
    adapter = Adapter({LAYER: held}, {}, variant)
    again = peft_names.read(peft_writing.tensors_of(adapter), peft_writing.config_of(adapter), "a")
    assert only(again).scale == pytest.approx(scale, rel=4e-16)


def test_heads_are_named_as_peft_wants_them():
    whole = {f"classifier.{name}.weight": numbers(2, 2) for name in ("dense", "out_proj")}
    adapter = Adapter({LAYER: factors()}, whole, "lora", task_type="SEQ_CLS")
    assert peft_writing.config_of(adapter)["modules_to_save"] == ["classifier"]
    plain = dataclasses.replace(adapter, task_type=None)
    expected = ["classifier.dense", "classifier.out_proj"]
    assert peft_writing.config_of(plain)["modules_to_save"] == expected


def test_rows_are_written_with_the_config_that_numbers_them():
    rows = {EMBED: Rows((4, 2), numbers(2, 8))}
    config = {"trainable_token_indices": {"embed_tokens": [4, 2]}}
    adapter = Adapter({LAYER: factors()}, {}, "lora", rows=rows, fields=config)
    assert peft_writing.config_of(adapter)["trainable_token_indices"] == {"embed_tokens": [4, 2]}


@pytest.mark.parametrize("kind", [EMBEDDING, CONV, EXPERTS])
def test_no_plain_pair_is_taken_for_another_kind(kind):
    assert only(read(keyed({LAYER: pair()}))).kind != kind
