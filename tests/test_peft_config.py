"""PEFT's config, field by field: what is read, what is kept, what is refused, and how fast.

PEFT itself is the witness for the names of its fields, and for how patterns are matched.
"""

import dataclasses
import re
import time

import peft
import pytest
from on_disk import fields
from peft.utils.other import get_pattern_key

from lora_export import peft_config
from lora_export.errors import InputError
from lora_export.peft_config import is_residual, is_unmarked_unsloth, kept
from lora_export.records import Reading
from lora_export.refusals import TABLE

PATH = "model.layers.11.self_attn.q_proj"


def parse(reading=None, **config):
    made = {name: value for name, value in fields(**config).items() if value is not ...}
    return peft_config.parse(made, reading or Reading())


def fails(message, **config):
    with pytest.raises(InputError) as caught:
        parse(**config)
    assert message in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------- what is read


def test_two_fields_are_enough():
    found = peft_config.parse({"r": 3, "lora_alpha": 6}, Reading())
    assert (found.rank, found.alpha, found.variant) == (3, 6.0, "lora")
    assert found.scale_of(PATH, 3) == 2.0


def test_a_config_of_pefts_own_defaults_is_read():
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]).to_dict()
    found = parse(**{**config, "target_modules": list(config["target_modules"])})
    assert (found.rank, found.alpha, found.variant) == (4, 8.0, "lora")
    assert found.target_modules is not None
    assert found.target_parameters == ()


def test_a_config_of_pefts_adalora_is_read():
    found = parse(**peft.AdaLoraConfig(init_r=6, lora_alpha=3, total_step=10).to_dict())
    assert (found.rank, found.variant) == (6, "adalora")
    assert found.scale_of(PATH, 6) == 3 / (6 + 1e-5)


@pytest.mark.parametrize("config", [peft.LoraConfig, peft.AdaLoraConfig])
def test_every_field_of_the_installed_peft_has_its_place(config):
    """A field that is not known is refused when it is set, so a new one has to be looked at."""
    names = {field.name for field in dataclasses.fields(config)}
    known = peft_config._HARMLESS | peft_config._READ | peft_config._REFUSED.keys()
    assert names - known == set()


def test_no_field_has_two_places():
    tables = (peft_config._HARMLESS, peft_config._READ, peft_config._REFUSED.keys())
    assert sum(map(len, tables)) == len(set().union(*tables))


@pytest.mark.parametrize(
    ("config", "variant"),
    [
        ({}, "lora"),
        ({"use_rslora": True}, "rslora"),
        ({"use_dora": True}, "lora+dora"),
        ({"use_rslora": True, "use_dora": True}, "rslora+dora"),
        ({"kasa_config": {"beta": 1e-4}}, "lora+kasa"),
        ({"init_lora_weights": "pissa"}, "lora+pissa"),
        ({"init_lora_weights": "OLoRA"}, "lora+olora"),
        ({"init_lora_weights": "olora", "use_rslora": True}, "rslora+olora"),
        ({"init_lora_weights": "gaussian"}, "lora"),
        ({"init_lora_weights": "eva"}, "lora"),
        ({"init_lora_weights": "orthogonal"}, "lora"),
        ({"init_lora_weights": True}, "lora"),
        ({"init_lora_weights": False}, "lora"),
        ({"peft_type": "ADALORA", "init_r": 4}, "adalora"),
        ({"peft_type": ...}, "lora"),
    ],
    ids=str,
)
def test_the_variant_is_told_by_the_fields_that_change_the_formula(config, variant):
    assert parse(**config).variant == variant


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 2.0),
        ({"use_rslora": True}, 4 / 2**0.5),
        ({"lora_alpha": 0.5}, 0.25),
        ({"alpha_pattern": {"q_proj": 6}}, 3.0),
        ({"alpha_pattern": {"v_proj": 6}}, 2.0),
        ({"alpha_pattern": {"proj": 6}}, 2.0),  # a name is matched from a dot on
        ({"peft_type": "ADALORA", "init_r": 2}, 4 / (2 + 1e-5)),
    ],
    ids=str,
)
def test_the_scale_is_that_of_variant_and_patterns(config, scale):
    assert parse(**config).scale_of(PATH, 2) == scale


def test_an_adalora_without_an_alpha_is_read():
    assert parse(peft_type="ADALORA", init_r=4, lora_alpha=0).scale_of(PATH, 4) == 4 / (4 + 1e-5)


def test_adalora_has_its_rank_in_another_field_and_no_patterns_of_rank():
    """Its rank_pattern holds lists of flags: which singular values were pruned."""
    found = parse(peft_type="ADALORA", init_r=12, r=8, rank_pattern={PATH: [True, False]})
    assert found.rank_of(PATH) == 12


def test_a_rank_that_is_written_as_a_float_is_read():
    assert parse(r=4.0).rank == 4


# ---------------------------------------------------------------- patterns

PATTERNS = {
    "q_proj": True,
    "self_attn.q_proj": True,
    "attn.q_proj": False,  # begins in the middle of a name
    PATH: True,
    r"layers\.(1|11)\..*": True,
    r".*\.q_proj": True,
    r".*q_proj": True,
    r"layers\.1\..*": False,
    "q": False,
    r"^model\..*q_proj": True,
    r"model.layers.11": False,
    r"q_proj|v_proj": True,
    r"v_proj|q_proj": True,
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_matches_what_it_matches_in_peft(pattern):
    known = get_pattern_key([pattern], PATH) == pattern
    assert known is (re.match(rf"(.*\.)?({pattern})$", PATH) is not None)
    assert (parse(rank_pattern={pattern: 7}).rank_of(PATH) == 7) is known is PATTERNS[pattern]


@pytest.mark.parametrize(("order", "alpha"), [("first", 8), ("last", 2)])
def test_of_several_patterns_the_caller_says_which_wins(order, alpha):
    patterns = {"q_proj": 8, "self_attn.q_proj": 4, PATH: 2}
    assert parse(Reading(pattern_order=order), alpha_pattern=patterns).alpha_of(PATH) == alpha
    with pytest.raises(InputError) as caught:
        parse(alpha_pattern=patterns).alpha_of(PATH)
    assert TABLE["pattern-order"].why in str(caught.value)


def test_several_patterns_that_say_the_same_need_no_order():
    assert parse(rank_pattern={"q_proj": 8, PATH: 8}).rank_of(PATH) == 8


def test_what_no_pattern_matches_has_the_common_value():
    found = parse(rank_pattern={"v_proj": 8}, alpha_pattern={"v_proj": 32})
    assert (found.rank_of(PATH), found.alpha_of(PATH)) == (2, 4.0)


SLOW = r".*(a|a)+[0-9]"


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern", "target_modules"])
def test_an_expression_that_would_match_for_ever_ends_within_seconds(field, monkeypatch):
    """An adapter's config is a stranger's."""
    assert peft_config.MOST_SECONDS <= 5
    monkeypatch.setattr(peft_config, "MOST_SECONDS", 0.2)
    config = parse(**{field: SLOW if field == "target_modules" else {SLOW: 3}})
    long, start = f"{PATH}.{'a' * 60}", time.monotonic()
    with pytest.raises(InputError, match="too long to match"):
        {
            "rank_pattern": config.rank_of,
            "alpha_pattern": config.alpha_of,
            "target_modules": config.targets,
        }[field](long)
    assert time.monotonic() - start < 2


def test_an_expression_that_is_nested_too_deep_is_refused_within_seconds():
    start = time.monotonic()
    fails("regular expression", rank_pattern={"(" * 50_000 + "a" + ")" * 50_000: 2})
    assert time.monotonic() - start < 5


# ---------------------------------------------------------------- targets


@pytest.mark.parametrize(
    ("targets", "hit"),
    [
        (None, True),
        (["q_proj"], True),
        (["v_proj", "q_proj"], True),
        (["self_attn.q_proj"], True),
        (["attn.q_proj"], False),
        (["proj"], False),
        ([PATH], True),
        ("all-linear", True),
        ("ALL-LINEAR", True),
        (r".*\.q_proj", True),
        (r"q_proj", False),  # an expression is matched against the whole path, as in PEFT
        (r"model\.layers\.\d+\.self_attn\.(q|v)_proj", True),
    ],
)
def test_a_path_is_a_target_as_it_is_in_peft(targets, hit):
    assert parse(target_modules=targets).targets(PATH) is hit


def test_an_expression_of_syntax_that_is_not_matched_here_targets_every_module():
    """What the file holds decides; such an expression only says less."""
    assert parse(target_modules="(").targets(PATH)


def test_the_parameters_of_a_module_are_those_that_the_config_names():
    found = parse(target_parameters=["experts.gate_up_proj", "experts.down_proj", "router.weight"])
    assert set(found.leaves("model.layers.0.mlp.experts")) == {"gate_up_proj", "down_proj"}
    assert set(found.leaves("model.layers.0.mlp.router")) == {"weight"}
    assert not found.leaves("model.layers.0.mlp.my_experts")


def test_a_parameter_without_a_module_is_one_of_every_module_that_is_no_target():
    found = parse(target_parameters=["down_proj"], target_modules=["q_proj"])
    assert set(found.leaves("mlp.experts")) == {"down_proj"}
    assert not found.leaves("attn.q_proj")


def test_trained_rows_are_those_of_the_embedding_that_is_named():
    found = parse(trainable_token_indices={"embed_tokens": [3, 5], "lm_head": [1]})
    assert found.indices_of("model.embed_tokens") == (3, 5)
    assert found.indices_of("lm_head") == (1,)
    assert found.indices_of("other") is None


def test_trained_rows_without_a_name_are_those_of_any_embedding():
    assert parse(trainable_token_indices=[3, 5]).indices_of("model.embed_tokens") == (3, 5)
    assert parse(trainable_token_indices=None).indices_of("model.embed_tokens") is None


# ---------------------------------------------------------------- values of the wrong kind

NO_NUMBERS = [0, -1, None, "8", True, [8], float("nan"), float("inf")]


@pytest.mark.parametrize("value", [*NO_NUMBERS, 2.5])
def test_a_rank_that_is_no_whole_number_above_zero_is_refused(value):
    fails("config: r is ", r=value)
    fails("config: init_r is ", peft_type="ADALORA", init_r=value)


@pytest.mark.parametrize("value", NO_NUMBERS)
def test_an_alpha_that_is_no_number_above_zero_is_refused(value):
    fails("config: lora_alpha is ", lora_alpha=value)


@pytest.mark.parametrize("name", ["r", "lora_alpha"])
def test_a_missing_number_is_refused(name):
    fails(f"config: {name} is None", **{name: ...})


@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("value", [["q"], "q", {"q": 0}, {"q": "x"}, {"q": True}, {"q": None}])
def test_patterns_that_are_no_positive_numbers_by_name_are_refused(name, value):
    fails(f"config: {name} is ", **{name: value})


def test_a_rank_of_a_pattern_is_a_whole_number_and_an_alpha_any():
    fails("config: rank_pattern is ", rank_pattern={"q": 0.5})
    assert parse(alpha_pattern={"q_proj": 0.5}).alpha_of(PATH) == 0.5


@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("pattern", ["(", "a{2,1}", "[z-a]", "(?P<n>a)(?P<n>"])
def test_a_pattern_that_is_no_expression_is_refused(name, pattern):
    assert "regular expression" in fails(f"config: {name} holds ", **{name: {pattern: 2}})


@pytest.mark.parametrize("name", ["use_rslora", "use_dora", "lora_bias", "ensure_weight_tying"])
@pytest.mark.parametrize("value", ["false", "true", 1.5, 2, [], {}])
def test_a_flag_that_is_neither_true_nor_false_is_refused(name, value):
    fails(f"config: {name} is {value!r}; expected true or false", **{name: value})


@pytest.mark.parametrize(
    "name", ["task_type", "base_model_name_or_path", "revision", "peft_version"]
)
@pytest.mark.parametrize("value", [5, ["a"], {"a": 1}, True])
def test_a_text_that_is_none_is_refused(name, value):
    fails(f"config: {name} is {value!r}; expected a text", **{name: value})


@pytest.mark.parametrize("value", ["some", 1, 1.5, -0.1, True, float("nan")])
def test_a_dropout_that_is_no_share_is_refused(value):
    fails("lora_dropout is ", lora_dropout=value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("target_modules", 5),
        ("target_modules", [5]),
        ("target_modules", [""]),
        ("target_modules", {"q": 1}),
        ("target_parameters", "experts.w"),
        ("target_parameters", [1]),
        ("modules_to_save", "classifier"),
        ("modules_to_save", [None]),
        ("trainable_token_indices", 5),
        ("trainable_token_indices", "1"),
        ("trainable_token_indices", [-1]),
        ("trainable_token_indices", [1.5]),
        ("trainable_token_indices", [True]),
        ("trainable_token_indices", {"embed": 5}),
        ("layer_replication", [[0, 2], [1]]),
        ("layer_replication", [[2, 0]]),
        ("layer_replication", [[1, 1]]),
        ("layer_replication", [0, 2]),
        ("layer_replication", "all"),
        ("use_bdlora", True),
        ("use_bdlora", {"nblocks": 0}),
        ("use_bdlora", {"nblocks": 2, "target_modules_bd_a": "q"}),
        ("kasa_config", True),
        ("enable_lora", "all"),
        ("enable_lora", [1, 0]),
        ("lora_B_layout", "column_major"),
        ("lora_B_layout", 1),
    ],
    ids=str,
)
def test_a_field_of_the_wrong_shape_is_refused(name, value):
    fails(f"config: {name} is ", **{name: value})


@pytest.mark.parametrize("name", ["beta", "", "use_rslora_v2"])
def test_an_unknown_field_is_refused_when_it_is_set_and_ignored_when_not(name):
    for empty in (None, False, 0, "", [], {}):
        assert parse(**{name: empty}).variant == "lora"
    message = fails(TABLE["unknown-field"].why, **{name: {"on": True}})
    assert f"({name} is {{'on': True}})" in message


@pytest.mark.parametrize("init", ["xavier", "pisa", ""])
def test_an_unknown_start_is_refused(init):
    if init:
        assert "expected one of" in fails(f"init_lora_weights is {init!r}", init_lora_weights=init)


def test_all_faults_are_listed_at_once():
    message = fails("config: r is 0", r=0, lora_alpha=-1, use_dora="yes", arrow_config={"a": 1})
    for text in ("lora_alpha is -1", "use_dora is 'yes'", TABLE["arrow"].why):
        assert text in message


def test_a_long_value_is_shortened_in_the_message():
    assert len(fails("target_modules is", target_modules=[5] * 10_000)) < 400


def test_another_method_is_refused_by_its_name_and_its_fields_are_not_held_against_it():
    message = fails("(peft_type is 'IA3')", peft_type="IA3", feedforward_modules=["a"])
    assert TABLE["peft-type"].why in message
    assert TABLE["unknown-field"].why not in message


# ---------------------------------------------------------------- experts, and what is kept


def test_the_order_of_experts_columns_is_the_callers_else_the_configs_else_pefts():
    assert parse().expert_b == "rank-major"
    assert parse(lora_B_layout="grouped_by_expert").expert_b == "expert-major"
    assert parse(lora_B_layout="rank_major").expert_b == "rank-major"
    told = Reading(expert_b="expert-major")
    assert parse(told, lora_B_layout="rank_major").expert_b == "expert-major"


@pytest.mark.parametrize(
    ("mapping", "layout", "unmarked"),
    [
        (None, None, False),
        ({}, None, False),
        ({"unsloth_fixed": True}, None, True),
        ({"unsloth_fixed": True}, "rank_major", False),
        ("unsloth_fixed", None, False),
        ({"base_model_class": "X"}, None, False),
    ],
)
def test_an_adapter_of_unsloth_is_told_by_its_mapping(mapping, layout, unmarked):
    config = fields(auto_mapping=mapping, lora_B_layout=layout)
    assert is_unmarked_unsloth(config) is unmarked


@pytest.mark.parametrize(
    ("init", "residual"),
    [
        ("corda", True), ("CorDA", True), ("lora_ga", True), ("loftq", True),
        ("pissa_niter_16", True), ("pissa", False), ("olora", False), ("gaussian", False),
        (True, False), (None, False),
    ],
)  # fmt: skip
def test_a_start_that_cannot_be_made_again_is_known(init, residual):
    assert is_residual({"init_lora_weights": init}) is residual


def test_what_a_written_config_has_to_keep_is_kept_and_nothing_else():
    config = fields(
        init_lora_weights="pissa", layer_replication=[[0, 2]], peft_version="0.19.0",
        target_parameters=["experts.w"], trainable_token_indices=[1], lora_dropout=0.5,
        kasa_config={"beta": 1}, megatron_core="x", inference_mode=True, ensure_weight_tying=True,
    )  # fmt: skip
    assert kept(config) == {
        "init_lora_weights": "pissa", "layer_replication": [[0, 2]], "peft_version": "0.19.0",
        "target_parameters": ["experts.w"], "trainable_token_indices": [1],
        "kasa_config": {"beta": 1}, "ensure_weight_tying": True,
    }  # fmt: skip
    assert kept(fields(init_lora_weights=True, layer_replication=None)) == {}


STRANGE = [None, 5, "text", [1], {"a": 1}, True, 1e400, 10**400, "x" * 100_000]


@pytest.mark.parametrize("value", STRANGE, ids=lambda value: repr(value)[:8])
@pytest.mark.parametrize("name", sorted(peft_config._READ | peft_config._HARMLESS))
@pytest.mark.parametrize("method", [{}, {"peft_type": "ADALORA", "init_r": 4}], ids=["", "ada"])
def test_no_value_of_any_field_ends_in_anything_but_an_answer_or_an_input_error(
    name, value, method
):
    """Configs are a stranger's."""
    try:
        found = parse(**method | {name: value})
        found.rank_of(PATH)
        found.alpha_of(PATH)
        found.targets(PATH)
        found.leaves(PATH)
        found.indices_of(PATH)
    except InputError:
        pass
