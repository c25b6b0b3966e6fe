import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_export import variants
from lora_export.config import (
    ALL_LINEAR,
    TRAINABLE,
    LoraConfig,
    layer_index,
    matches,
    nearest,
    no_match,
    select,
)
from lora_export.errors import InputError

PATHS = [
    f"bert.encoder.layer.{layer}.attention.{name}"
    for layer in range(3)
    for name in ("self.query", "self.key", "self.value", "output.dense")
] + ["bert.pooler.dense", "classifier"]
NAMES = st.text("abcdefg_0123456789", min_size=1, max_size=6)
DOTTED = st.lists(NAMES, min_size=1, max_size=5).map(".".join)


# ---------------------------------------------------------------- what a config accepts


@pytest.mark.parametrize("rank", [0, -1, 2.0, "8", True, None])
def test_a_rank_that_is_no_positive_integer_is_refused(rank):
    with pytest.raises(InputError, match=r"rank is .*expected a whole number"):
        LoraConfig(rank=rank)


@pytest.mark.parametrize("alpha", [0, -1.0, float("nan"), float("inf"), "16", None])
def test_an_alpha_that_is_no_positive_number_is_refused(alpha):
    with pytest.raises(InputError, match=r"alpha is .*expected a number above 0"):
        LoraConfig(alpha=alpha)


@pytest.mark.parametrize("dropout", [-0.1, 1.0, float("nan")])
def test_a_dropout_outside_of_its_range_is_refused(dropout):
    with pytest.raises(InputError, match=r"dropout is .*expected 0 <= dropout < 1"):
        LoraConfig(dropout=dropout)


def test_a_rank_in_a_pattern_is_checked_too():
    with pytest.raises(InputError, match="rank is 0"):
        LoraConfig(rank_pattern={"query": 0})


def test_an_alpha_in_a_pattern_is_checked_too():
    with pytest.raises(InputError, match="alpha is -2"):
        LoraConfig(alpha_pattern={"query": -2})


def test_an_unknown_init_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match="init is 'pissa'; expected one of kaiming, gaussian"):
        LoraConfig(init="pissa")


def test_targets_may_not_be_empty():
    with pytest.raises(InputError, match="targets is empty"):
        LoraConfig(targets=())


def test_one_target_may_be_given_without_a_tuple():
    assert LoraConfig(targets="query").targets == ("query",)


def test_lists_become_tuples():
    config = LoraConfig(targets=["query", "value"], layers=[0, 2])
    assert (config.targets, config.layers) == (("query", "value"), (0, 2))


@pytest.mark.parametrize("targets", [5, [1], [""]])
def test_targets_that_are_no_names_are_refused(targets):
    with pytest.raises(InputError, match=r"targets is .*expected names of modules"):
        LoraConfig(targets=targets)


@pytest.mark.parametrize("field", ["targets", "exclude"])
def test_a_broken_regular_expression_is_refused_at_once(field):
    with pytest.raises(InputError, match=r"'re:\(' is not a regular expression"):
        LoraConfig(**{field: ("re:(",)})


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_broken_regular_expression_as_a_key_is_refused_at_once(field):
    with pytest.raises(InputError, match=r"'re:\(' is not a regular expression"):
        LoraConfig(**{field: {"re:(": 2}})


def test_a_config_cannot_be_changed():
    with pytest.raises(AttributeError, match="rank"):
        LoraConfig().rank = 3


# ---------------------------------------------------------------- matching


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("query", "a.self.query", True),
        ("self.query", "a.self.query", True),
        ("query", "query", True),
        ("query", "a.big_query", False),
        ("query", "a.query.b", False),
        ("elf.query", "a.self.query", False),
        ("*.query", "a.self.query", True),
        ("*.query", "query", False),
        ("*.layer.[0-1].*", "m.layer.1.q", True),
        ("*.layer.[0-1].*", "m.layer.2.q", False),
        ("layer.?.q", "layer.1.q", True),
        ("layer.?.q", "m.layer.1.q", False),
        ("*.QUERY", "a.query", False),
        (r"re:.*\.(query|value)", "a.value", True),
        (r"re:.*\.(query|value)", "a.value.b", False),
        (r"re:value", "a.value", False),
    ],
)
def test_a_pattern_selects_by_end_by_glob_or_by_expression(pattern, path, expected):
    assert matches(pattern, path) is expected


@given(DOTTED, DOTTED)
@settings(deadline=None, max_examples=50)
def test_a_plain_pattern_matches_whole_components_at_the_end_only(pattern, path):
    wanted, found = pattern.split("."), path.split(".")
    assert matches(pattern, path) == (found[-len(wanted) :] == wanted)


@given(DOTTED, NAMES)
@settings(deadline=None, max_examples=50)
def test_a_name_does_not_match_inside_of_a_component(path, more):
    assert not matches(path, path + more)


@pytest.mark.parametrize(
    ("path", "index"),
    [("h.3.attn.c_attn", 3), ("encoder.layer.11.x.2.y", 11), ("classifier", None), ("fc1", None)],
)
def test_the_layer_is_the_first_number_in_a_path(path, index):
    assert layer_index(path) == index


# ---------------------------------------------------------------- selecting


def test_all_linear_selects_everything():
    assert select(LoraConfig(), PATHS) == tuple(PATHS)


def test_exclude_wins_over_targets():
    config = LoraConfig(targets=("query", "value"), exclude=("layer.1.attention.self.query",))
    chosen = select(config, PATHS)
    assert len(chosen) == 5
    assert "bert.encoder.layer.1.attention.self.query" not in chosen


def test_layers_restricts_to_those_layers():
    chosen = select(LoraConfig(targets=(ALL_LINEAR,), layers=(0, 2)), PATHS)
    assert {layer_index(path) for path in chosen} == {0, 2}
    assert len(chosen) == 8


def test_layer_zero_alone_can_be_selected():
    assert len(select(LoraConfig(layers=(0,)), PATHS)) == 4


def test_a_target_that_matches_nothing_is_refused_though_others_match():
    with pytest.raises(InputError, match=r"no linear module matches 'quary'.*layer\.0\S*query"):
        select(LoraConfig(targets=("value", "quary")), PATHS)


def test_every_idle_target_is_named_in_one_message():
    with pytest.raises(InputError, match=r"'quary'.*'valu'"):
        select(LoraConfig(targets=("quary", "valu")), PATHS)


def test_a_selection_that_is_excluded_to_nothing_is_refused():
    with pytest.raises(InputError, match="select none of the 14 linear modules"):
        select(LoraConfig(targets=("query",), exclude=("*",)), PATHS)


@given(st.sets(DOTTED, min_size=1), st.data())
@settings(deadline=None, max_examples=25)
def test_selecting_keeps_the_given_order_and_invents_nothing(paths, data):
    paths = list(paths)
    target = data.draw(st.sampled_from(paths)).split(".")[-1]
    chosen = select(LoraConfig(targets=(target,)), paths)
    assert list(chosen) == [path for path in paths if path.split(".")[-1] == target]


# ---------------------------------------------------------------- rank and alpha by pattern


def test_the_rank_pattern_overrides_the_rank_where_it_matches():
    config = LoraConfig(rank=8, rank_pattern={"query": 4})
    assert (config.rank_of("a.query"), config.rank_of("a.value")) == (4, 8)


def test_the_alpha_pattern_overrides_alpha_where_it_matches():
    config = LoraConfig(alpha=16, alpha_pattern={"*.0.*": 2.5})
    assert (config.alpha_of("l.0.q"), config.alpha_of("l.1.q")) == (2.5, 16)


def test_two_patterns_that_disagree_are_refused_where_both_match():
    config = LoraConfig(rank_pattern={"query": 4, "*.0.*": 2})
    with pytest.raises(InputError, match=r"rank_pattern is ambiguous for l\.0\.query"):
        config.rank_of("l.0.query")


def test_two_patterns_that_agree_are_accepted():
    config = LoraConfig(alpha_pattern={"query": 4.0, "*.0.*": 4.0})
    assert config.alpha_of("l.0.query") == 4.0


# ---------------------------------------------------------------- suggestions


def test_the_nearest_name_comes_first():
    assert nearest("qury", PATHS).startswith("bert.encoder.layer.0.attention.self.query")


def test_no_more_than_three_names_are_suggested():
    assert len(nearest("self.que", PATHS).split(", ")) <= 3


def test_a_name_like_no_other_still_gets_examples():
    assert nearest("zzzz", ["alpha.one", "beta.two"]) == "alpha.one, beta.two"


def test_a_model_without_linear_modules_says_none():
    assert no_match("query", []).endswith("the model has e.g. none")


# ---------------------------------------------------------------- variants


@pytest.mark.parametrize("variant", [*TRAINABLE, "lora+dora", "rslora+dora"])
def test_a_variant_with_a_layer_of_its_own_can_be_trained(variant):
    assert LoraConfig(variant=variant).variant == variant


@pytest.mark.parametrize(
    "variant", [*sorted(set(variants.names()) - {*TRAINABLE}), "lora+kasa", ""]
)
def test_a_variant_that_is_merged_only_cannot_be_trained(variant):
    with pytest.raises(InputError, match=f"expected one of {', '.join(TRAINABLE)}"):
        LoraConfig(variant=variant)


def test_every_variant_that_can_be_trained_is_a_known_one():
    assert set(TRAINABLE) <= set(variants.names())
