"""From a caller's words to a job: options that check themselves, and a model made to fit."""

import json
import signal

import numpy as np
import on_disk
import pytest
import torch
import transformers
from on_disk import PREFIX, delta, factors, keyed, numbers, pair

from lora_export import merged_files
from lora_export.errors import AdapterMismatch, InputError
from lora_export.models import MOST_LAYERS
from lora_export.opening import DTYPES, Options, open_job
from lora_export.plan import LAYOUTS, TIED, Choices
from lora_export.records import Reading
from lora_export.refusals import TABLE

LAYER = "model.layers.{}.self_attn.q_proj"
SMALL = {
    "vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "intermediate_size": 12, "max_position_embeddings": 16,
    "pad_token_id": 0,
}  # fmt: skip


def llama(folder, **config):
    """A tiny Llama on disk."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL | config))
    for index, parameter in enumerate(model.parameters()):
        parameter.data = torch.from_numpy(numbers(*parameter.shape, seed=index))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def tied_base(tmp_path_factory):
    return llama(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True)


def adapter(folder, tensors=None, **config):
    tensors = keyed({LAYER.format(1): pair()}) if tensors is None else tensors
    return on_disk.peft_folder(folder / "adapter", tensors, **config)


def merged(folder, place, base, **options):
    """Merge; return the model that transformers loads, as arrays, and the certificate."""
    certificate = merged_files.merge_files(place, base=str(base), out=folder / "merged", **options)
    assert certificate.ok
    kind = transformers.LlamaForCausalLM
    model, report = kind.from_pretrained(folder / "merged", output_loading_info=True)
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return {n: v.detach().numpy() for n, v in model.state_dict().items()}, model.config


def plus(value, update):
    return (value.astype(np.float64) + update).astype(value.dtype)


# ---------------------------------------------------------------- options


def test_the_defaults_leave_everything_open():
    assert Options().stated() == {}
    assert Options().reading == Reading()
    assert Options().choices == Choices()


BAD = {
    "dtype": ["int8", "F32", "", None],
    "tied": ["", None, "untied", True],
    "pattern_order": ["", "any", 1],
    "expert_layout": ["", "in_out", False],
    "expert_b": ["", "rank_major"],
    "alpha": [0, -1, float("nan"), float("inf")],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in BAD.items() for v in values])
def test_an_option_that_nobody_knows_is_refused_with_the_known_ones(name, value):
    with pytest.raises(InputError, match=f"^{name} is .*; expected "):
        Options(**{name: value})


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("dtype", ["keep", *DTYPES]), ("tied", TIED), ("pattern_order", ["first", "last"]),
        ("expert_layout", LAYOUTS), ("expert_b", ["rank-major", "expert-major"]),
        ("alpha", [1, 0.5]),
    ],
)  # fmt: skip
def test_every_known_option_is_taken_and_stated_where_it_is_no_default(name, known):
    for value in known:
        options = Options(**{name: value})
        default = getattr(Options(), name)
        assert options.stated() == ({} if value == default else {name: value})


def test_what_a_reader_and_a_plan_are_told_is_what_the_caller_said():
    options = Options("float16", "peft", 3.0, "both", "last", True, "in-out", "expert-major", True)
    assert options.reading == Reading(3.0, "last", "expert-major")
    assert options.choices == Choices("F16", "both", True, "in-out", True)


def test_an_option_with_a_wrong_name_is_a_mistake_of_the_program(base, tmp_path):
    with pytest.raises(TypeError, match="colour"):
        merged_files.merge_files(
            adapter(tmp_path), base=str(base), out=tmp_path / "m", colour="red"
        )


# ---------------------------------------------------------------- opening


def test_opening_writes_nothing(base, tmp_path):
    place = adapter(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    open_job(place, str(base))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_simple_job_needs_no_model_and_changes_no_setting(base, tmp_path):
    job = open_job(adapter(tmp_path), str(base))
    assert job.config is None
    assert job.settings_of_model == {}
    assert job.live.modules.keys() == job.adapter.modules.keys()


def test_a_job_that_needs_the_model_says_its_class(base, tmp_path):
    job = open_job(adapter(tmp_path, keyed({"layers.1.self_attn.q_proj": pair()})), str(base))
    assert job.config.architectures == ["LlamaForCausalLM"]
    assert job.settings_of_model["architectures"] == ["LlamaForCausalLM"]
    assert job.live.modules.keys() == {LAYER.format(1)}


def test_the_base_that_the_adapter_names_is_taken_where_none_is_given(base, tmp_path):
    job = open_job(adapter(tmp_path, base_model_name_or_path=str(base)))
    assert job.base == base
    assert job.origin == "directory"


def test_without_any_base_the_caller_is_asked(tmp_path):
    with pytest.raises(InputError, match="names no base model; pass --base"):
        open_job(adapter(tmp_path))


def test_a_quantised_base_is_refused_with_its_method(tmp_path):
    tensors = {"model.layers.0.q.weight": numbers(8, 8)}
    config = {"quantization_config": {"quant_method": "gptq"}}
    base = on_disk.base_folder(tmp_path / "base", tensors, architectures=["X"], **config)
    with pytest.raises(AdapterMismatch) as caught:
        open_job(adapter(tmp_path), str(base))
    assert TABLE["quantised-base"].why in str(caught.value)
    assert "(gptq)" in str(caught.value)


def test_a_task_that_nobody_knows_is_noted_and_the_bases_own_class_taken(base, tmp_path):
    job = open_job(adapter(tmp_path, task_type="CAUSAL"), str(base))
    assert job.plan.architecture == "LlamaForCausalLM"
    assert any("task_type is 'CAUSAL'" in note for note in job.settings()["notes"])


def test_the_digests_of_a_job_are_those_of_everything_that_goes_in(base, tmp_path):
    names = {file.name for file in open_job(adapter(tmp_path), str(base)).inputs()}
    assert names >= {
        "adapter_config.json", "adapter_model.safetensors", "base/model.safetensors",
        "base/config.json",
    }  # fmt: skip


def test_the_settings_of_a_job_are_the_options_and_the_notes(base, tmp_path):
    options = Options(dtype="float16", tied="both")
    found = open_job(adapter(tmp_path), str(base), options).settings(seed=3)
    assert (found["dtype"], found["tied"], found["seed"]) == ("float16", "both", 3)
    assert "alpha" not in found
    assert found["notes"]


def test_an_expression_in_the_config_that_would_match_for_ever_does_not_hang(base, tmp_path):
    """Names in a config are PEFT's, and a stranger's: no expression of ours hides in them."""

    def stop(*_):
        raise AssertionError("still at it after three seconds")

    slow = "re:([a-z.0-9_]+)+!"
    place = adapter(tmp_path, modules_to_save=[slow], target_modules=["q_proj", slow])
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(3)
    try:
        open_job(place, str(base))
    except (InputError, AdapterMismatch):
        pass
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_a_module_to_save_that_looks_like_an_expression_of_ours_is_a_name(base, tmp_path):
    job = open_job(adapter(tmp_path, modules_to_save=["re:(", "*", "re:.*"]), str(base))
    assert job.plan.steps


# The second path is not on disk as it stands, so there the model is asked, which knows more.
@pytest.mark.parametrize(
    ("path", "lost"),
    [
        (LAYER.format(1), ".layers.2."),
        (LAYER.format(1), "layers.2.self_attn.v_proj"),
        ("layers.1.self_attn.q_proj", "model.norm.weight"),
        ("layers.1.self_attn.q_proj", "v_proj"),
        ("layers.1.self_attn.q_proj", ".layers.2."),
    ],
)
def test_a_base_that_lacks_a_weight_of_its_own_model_is_refused(base, tmp_path, lost, path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_bytes((base / "config.json").read_bytes())
    held = {name: value for name, value in on_disk.arrays(base).items() if lost not in name}
    on_disk.save(tmp_path / "base" / "model.safetensors", held)
    place = adapter(tmp_path, keyed({path: pair()}), task_type="CAUSAL_LM")
    with pytest.raises(AdapterMismatch, match="neither the base nor the adapter has it"):
        open_job(place, str(tmp_path / "base"))


# ---------------------------------------------------------------- a grown vocabulary


def tables(rows, embed=True, head=True):
    found = keyed({LAYER.format(1): pair()})
    if embed:
        found[f"{PREFIX}model.embed_tokens.weight"] = numbers(rows, 8, seed=70)
    if head:
        found[f"{PREFIX}lm_head.weight"] = numbers(rows, 8, seed=71)
    return found


@pytest.mark.parametrize("rows", [22, 18])
def test_tables_of_another_length_change_the_vocabulary(base, tmp_path, rows):
    place = adapter(tmp_path, tables(rows), modules_to_save=["embed_tokens", "lm_head"])
    found, config = merged(tmp_path, place, base)
    assert config.vocab_size == rows
    assert np.array_equal(found["model.embed_tokens.weight"], numbers(rows, 8, seed=70))
    assert np.array_equal(found["lm_head.weight"], numbers(rows, 8, seed=71))
    update = delta(factors())[0]
    name = f"{LAYER.format(1)}.weight"
    assert np.array_equal(found[name], plus(on_disk.arrays(base)[name], update))


def test_tables_of_the_same_length_change_nothing_in_the_config(base, tmp_path):
    job = open_job(adapter(tmp_path, tables(20), modules_to_save=["lm_head"]), str(base))
    assert "vocab_size" not in job.settings_of_model


def test_tables_of_two_lengths_are_refused(base, tmp_path):
    tensors = tables(22, head=False) | tables(21, embed=False)
    with pytest.raises(AdapterMismatch, match="embeddings of several sizes: 21; 22"):
        open_job(adapter(tmp_path, tensors), str(base))


def test_one_longer_table_without_the_other_is_refused_before_anything_is_written(base, tmp_path):
    place = adapter(tmp_path, tables(22, head=False))
    with pytest.raises(AdapterMismatch):
        merged_files.merge_files(place, base=str(base), out=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_one_longer_table_is_enough_where_the_two_are_tied(tied_base, tmp_path):
    place = adapter(tmp_path, tables(22, head=False), modules_to_save=["embed_tokens"])
    found, config = merged(tmp_path, place, tied_base, tied="both")
    assert (config.vocab_size, config.tie_word_embeddings) == (22, True)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert np.array_equal(found[name], numbers(22, 8, seed=70))


# ---------------------------------------------------------------- tied weights

HEAD = keyed({"lm_head": pair(20, 8)})
EMBED = keyed({"model.embed_tokens": pair(8, 20)}, ends=(".lora_embedding_A", ".lora_embedding_B"))
SIDES = pytest.mark.parametrize("side", ["head", "embedding"])


def one_side(folder, side):
    """An adapter of one side of the tie, and its update of the table."""
    if side == "head":
        return adapter(folder, HEAD, task_type="CAUSAL_LM"), delta(factors(20, 8))[0]
    return adapter(folder, EMBED, task_type="CAUSAL_LM"), delta(factors(8, 20))[0].T


@SIDES
def test_an_update_of_one_side_of_a_tie_is_refused_with_both_ways_out(tied_base, tmp_path, side):
    place, _ = one_side(tmp_path, side)
    with pytest.raises(AdapterMismatch) as caught:
        open_job(place, str(tied_base))
    assert TABLE["tied"].remedy in str(caught.value)
    other = "model.embed_tokens.weight" if side == "head" else "lm_head.weight"
    assert f"shared with {other}" in str(caught.value)


@SIDES
def test_untied_the_other_side_stays_as_it_was(tied_base, tmp_path, side):
    place, update = one_side(tmp_path, side)
    found, config = merged(tmp_path, place, tied_base, tied="untie")
    assert config.tie_word_embeddings is False
    table = on_disk.arrays(tied_base)["model.embed_tokens.weight"]
    names = ["lm_head.weight", "model.embed_tokens.weight"]
    moved, kept = names if side == "head" else names[::-1]
    assert np.array_equal(found[moved], plus(table, update))
    assert np.array_equal(found[kept], table)
    assert found.keys() == on_disk.arrays(tmp_path / "merged").keys()


@SIDES
def test_with_both_the_shared_table_moves_once(tied_base, tmp_path, side):
    place, update = one_side(tmp_path, side)
    found, config = merged(tmp_path, place, tied_base, tied="both")
    assert config.tie_word_embeddings is True
    table = on_disk.arrays(tied_base)["model.embed_tokens.weight"]
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert np.array_equal(found[name], plus(table, update))
    assert on_disk.arrays(tmp_path / "merged").keys() == on_disk.arrays(tied_base).keys()


@SIDES
def test_where_nothing_is_tied_no_option_changes_anything(base, tmp_path, side):
    contents = []
    for tied in TIED:
        place, update = one_side(tmp_path / tied, side)
        found, config = merged(tmp_path / tied, place, base, tied=tied)
        assert config.tie_word_embeddings is False
        contents.append((tmp_path / tied / "merged" / "model.safetensors").read_bytes())
        name = "lm_head.weight" if side == "head" else "model.embed_tokens.weight"
        assert np.array_equal(found[name], plus(on_disk.arrays(base)[name], update))
    assert len(set(contents)) == 1


def test_an_adapter_that_leaves_a_tie_alone_keeps_it_whatever_is_said(tied_base, tmp_path):
    for tied in TIED:
        place = adapter(tmp_path / tied, task_type="CAUSAL_LM")
        _, config = merged(tmp_path / tied, place, tied_base, tied=tied)
        assert config.tie_word_embeddings is True


@pytest.mark.parametrize("tied", ["error", "both"])
def test_a_trained_table_on_one_side_follows_the_same_rules(tied_base, tmp_path, tied):
    place = adapter(tmp_path, tables(20, embed=False), modules_to_save=["lm_head"])
    if tied == "error":
        with pytest.raises(AdapterMismatch, match="shared with model"):
            open_job(place, str(tied_base))
        return
    found, _ = merged(tmp_path, place, tied_base, tied=tied)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert np.array_equal(found[name], numbers(20, 8, seed=71))


def test_a_trained_table_can_be_untied_from_the_other_side(tied_base, tmp_path):
    place = adapter(tmp_path, tables(20, embed=False), modules_to_save=["lm_head"])
    found, config = merged(tmp_path, place, tied_base, tied="untie")
    assert config.tie_word_embeddings is False
    assert np.array_equal(found["lm_head.weight"], numbers(20, 8, seed=71))
    table = on_disk.arrays(tied_base)["model.embed_tokens.weight"]
    assert np.array_equal(found["model.embed_tokens.weight"], table)


# ---------------------------------------------------------------- replicated layers


def test_replicated_layers_are_copies_with_an_update_each(base, tmp_path):
    spans = [[0, 2], [1, 3]]  # layers 0, 1, 1, 2
    updates = {LAYER.format(index): factors(seed=10 * index) for index in range(4)}
    place = adapter(
        tmp_path,
        keyed({path: (held.a, held.b) for path, held in updates.items()}),
        layer_replication=spans,
        target_modules=["q_proj"],
        task_type="CAUSAL_LM",
    )
    found, config = merged(tmp_path, place, base)
    assert config.num_hidden_layers == 4
    before = on_disk.arrays(base)
    for index, source in enumerate((0, 1, 1, 2)):
        for name, value in before.items():
            start = f"model.layers.{source}."
            if not name.startswith(start):
                continue
            copy = f"model.layers.{index}.{name.removeprefix(start)}"
            path = copy.removesuffix(".weight")
            expected = plus(value, delta(updates[path])[0]) if path in updates else value
            assert np.array_equal(found[copy], expected), copy
    outside = {name for name in before if ".layers." not in name}
    assert outside
    assert all(np.array_equal(found[name], before[name]) for name in outside)


def test_spans_that_leave_the_model_shallower_than_its_layers_are_refused(base, tmp_path):
    place = adapter(
        tmp_path,
        keyed({LAYER.format(0): pair()}),
        layer_replication=[[2, 3], [0, 1]],
        task_type="CAUSAL_LM",
    )
    with pytest.raises(AdapterMismatch, match="leaves layers out"):
        open_job(place, str(base))


def test_spans_beyond_the_last_layer_are_refused(base, tmp_path):
    place = adapter(tmp_path, layer_replication=[[0, 4]])
    with pytest.raises(AdapterMismatch, match="does not fit a base of 3 layers"):
        open_job(place, str(base))


def test_more_layers_than_any_model_has_are_refused(base, tmp_path):
    place = adapter(tmp_path, layer_replication=[[0, 3]] * (MOST_LAYERS // 3 + 1))
    with pytest.raises(AdapterMismatch, match="layer_replication asks for"):
        open_job(place, str(base))


def test_lists_of_one_entry_for_each_layer_are_replicated_with_them(tmp_path):
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    config = transformers.Qwen2Config(
        **SMALL, layer_types=kinds, use_sliding_window=True, sliding_window=4
    )
    model = transformers.Qwen2ForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    place = adapter(tmp_path, layer_replication=[[1, 3], [1, 2]], task_type="CAUSAL_LM")
    merged_files.merge_files(place, base=str(tmp_path / "base"), out=tmp_path / "merged")
    written = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert written["layer_types"] == [kinds[1], kinds[2], kinds[1]]
    assert written["num_hidden_layers"] == 3
    assert written["architectures"] == ["Qwen2ForCausalLM"]


def test_a_list_that_is_as_long_as_the_model_is_deep_by_chance_stays(tmp_path):
    """Three tokens end a text, and there are three layers."""
    base = llama(tmp_path / "base", eos_token_id=[5, 6, 7])
    place = adapter(tmp_path, layer_replication=[[0, 2], [1, 3]], task_type="CAUSAL_LM")
    _, config = merged(tmp_path, place, base)
    assert config.eos_token_id == [5, 6, 7]
