"""Adapter files as strangers publish them: each is merged by the formula, or refused by its name.

Every file is made by hand. What a merge must give is computed here, in float64, from the tensors
that went into the file; whatever was odd must stand in the certificate's notes.
"""

import contextlib
import json
import pickle
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from safetensors.torch import save_file

from lora_export import merged_files, pipeline
from lora_export.errors import AdapterMismatch, InputError, LoraExportError

PREFIX = "base_model.model."
CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 123456\n"
QUERY = "bert.encoder.layer.0.attention.self.query"
VALUE = "bert.encoder.layer.1.attention.self.value"
ATTN = "transformer.h.0.attn.c_attn"  # stored (32, 96)
FC = "transformer.h.1.mlp.c_fc"  # stored (32, 128)
SQUARE = "transformer.h.0.attn.c_proj"  # stored (32, 32): which way round no shape can tell


# ---------------------------------------------------------------- making files


@pytest.fixture(scope="module")
def bases(tiny, tiny_base, tmp_path_factory):
    """`bases(family)`: a directory with a small base; "headless" is a BERT without a head."""
    root = tmp_path_factory.mktemp("bases")

    def place(family):
        if family == "headless":
            return tiny_base
        if not (root / family).is_dir():
            tiny(family).save_pretrained(root / family)
        return root / family

    return place


@pytest.fixture
def bert(bases):
    return bases("bert")


@pytest.fixture
def gpt2(bases):
    return bases("gpt2")


@pytest.fixture
def headless(bases):
    return bases("headless")


def pair(out=32, width=32, rank=4, seed=0):
    """A trained pair: A (rank, in) and B (out, rank)."""
    dice = np.random.default_rng((seed, out, width, rank))
    a, b = dice.normal(0, 0.3, (rank, width)), dice.normal(0, 0.3, (out, rank))
    return a.astype(np.float32), b.astype(np.float32)


def update(a, b, scale):
    """The formula, in float64: what the pair adds to a weight (out, in)."""
    return scale * (b.astype(np.float64) @ a.astype(np.float64))


def pairs(modules, prefix=PREFIX, ends=(".lora_A.weight", ".lora_B.weight")):
    """The tensors of the pairs in `modules`, under PEFT's names or others like them."""
    tensors = {}
    for path, (a, b) in modules.items():
        tensors[f"{prefix}{path}{ends[0]}"], tensors[f"{prefix}{path}{ends[1]}"] = a, b
    return tensors


def fields(**changes):
    """The few fields that every config has; a change to `...` takes the field away."""
    made = {
        "peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": [QUERY, VALUE],
        "bias": "none", "modules_to_save": None, "fan_in_fan_out": False, "lora_dropout": 0.0,
        "inference_mode": True, "task_type": None, "base_model_name_or_path": None,
    }  # fmt: skip
    return {name: value for name, value in {**made, **changes}.items() if value is not ...}


def write(folder, tensors, **changes):
    """Write an adapter directory and return it."""
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(fields(**changes)))
    safetensors.numpy.save_file(tensors, folder / WEIGHTS)
    return folder


def usual(seed=0):
    """Two pairs of rank 4 for the small BERT, by module path."""
    return {QUERY: pair(seed=seed), VALUE: pair(seed=seed + 1)}


def head(labels=2, seed=9):
    dice = np.random.default_rng(seed)
    return {
        "classifier.weight": dice.normal(size=(labels, 32)).astype(np.float32),
        "classifier.bias": dice.normal(size=labels).astype(np.float32),
    }


def with_prefix(tensors):
    return {PREFIX + name: value for name, value in tensors.items()}


# ---------------------------------------------------------------- holding results against them


def merged(adapter, base, **options):
    """Merge into a directory beside the adapter; return its tensors and the notes."""
    return merged_to(adapter.parent / "merged", adapter, base, **options)


def merged_to(out, adapter, base, **options):
    """Merge into the directory `out`; return its tensors and the notes."""
    certificate = merged_files.merge_files(adapter, base=str(base), out=out, **options)
    assert certificate.ok, [v for v in certificate.verdicts if not v.passed]
    transformers.AutoConfig.from_pretrained(out)
    return safetensors.numpy.load_file(out / "model.safetensors"), certificate.settings["notes"]


def holds(found, base, updates, placed=None, prefix=""):
    """Assert that `found` is the base plus `updates`, each rounded once, and nothing else.

    Args:
        found: Tensors of the merged model, by name.
        base: The base's directory.
        updates: What to add, by tensor name in the merged model, as the tensor is stored.
        placed: Tensors that must be the adapter's own.
        prefix: What names of the merged model have before those of the base, where they differ.
    """
    before = safetensors.numpy.load_file(base / "model.safetensors")
    before = {name if name in found else prefix + name: value for name, value in before.items()}
    placed = placed or {}
    assert found.keys() == before.keys() | placed.keys()
    assert updates.keys() <= before.keys()
    for name, value in found.items():
        if name in placed:
            assert np.array_equal(value, placed[name]), name
            continue
        expected = before[name]
        if name in updates:
            expected = (expected.astype(np.float64) + updates[name]).astype(expected.dtype)
            assert not np.array_equal(expected, before[name]), f"{name}: the test changes nothing"
        assert value.dtype == expected.dtype
        assert value.tobytes() == expected.tobytes(), name


def told(notes, *patterns):
    """Assert that one note matches all of `patterns`, in any case of letters."""
    for note in notes:
        if all(re.search(pattern, note, re.IGNORECASE) for pattern in patterns):
            return
    raise AssertionError(f"no note says {patterns}: {notes}")


def contents(folder):
    return {
        file.relative_to(folder): file.read_bytes() if file.is_file() else None
        for file in folder.rglob("*")
    }


def refusal_of(folder, adapter, base, error=LoraExportError, **options):
    """Assert that merging is refused and writes nothing; return the message."""
    before = contents(folder)
    with pytest.raises(error) as caught:
        merged_files.merge_files(adapter, base=base and str(base), out=folder / "merged", **options)
    assert contents(folder) == before
    return str(caught.value)


def refused(folder, adapter, base, *patterns, **options):
    """Assert that merging is refused with words that match `patterns`, and writes nothing."""
    message = refusal_of(folder, adapter, base, **options)
    for pattern in patterns:
        assert re.search(pattern, message, re.IGNORECASE), message


def deltas(modules, scale=2.0):
    return {f"{path}.weight": update(a, b, scale) for path, (a, b) in modules.items()}


def test_an_ordinary_adapter_merges_and_its_notes_name_no_oddity(bert, tmp_path):
    found, notes = merged(write(tmp_path / "a", pairs(usual())), bert)
    holds(found, bert, deltas(usual()))
    odd = "rank|prefix|bias|head|untrained|task|targets|fan_in"
    assert not [note for note in notes if re.search(odd, note)], notes


# ---------------------------------------------------------------- 1: wrapped several times


def test_a_model_that_was_wrapped_three_times_merges_by_what_its_file_holds(gpt2, tmp_path):
    """The config is that of the last wrapping; pairs of the earlier ones have another rank."""
    a4, b4 = pair(96, 32, rank=4)
    a8, b8 = pair(128, 32, rank=8)
    tensors = pairs({ATTN: (a4, b4), FC: (a8, b8)}, prefix=3 * PREFIX)
    adapter = write(tmp_path / "a", tensors, target_modules=["c_attn"], fan_in_fan_out=True)
    found, notes = merged(adapter, gpt2)
    expected = {f"{ATTN}.weight": update(a4, b4, 8 / 4).T, f"{FC}.weight": update(a8, b8, 8 / 8).T}
    holds(found, gpt2, expected)
    told(notes, "rank", r"\b8\b", r"\b4\b")
    told(notes, "base_model")


def test_a_rank_that_the_config_denies_for_its_own_target_is_refused(gpt2, tmp_path):
    tensors = pairs({ATTN: pair(96, 32, rank=8)})
    adapter = write(tmp_path / "a", tensors, target_modules=["c_attn"], fan_in_fan_out=True)
    refused(tmp_path, adapter, gpt2, "rank", r"\b8\b", r"\b4\b", "c_attn", error=InputError)


def test_a_rank_that_the_config_denies_for_a_target_named_by_an_expression_is_refused(
    bert, tmp_path
):
    adapter = write(tmp_path / "a", pairs({QUERY: pair(rank=2)}), target_modules=r".*\.query")
    refused(tmp_path, adapter, bert, "rank", r"\b2\b", r"\b4\b", error=InputError)


def test_ranks_and_alphas_of_single_modules_follow_the_patterns(bert, tmp_path):
    modules = {QUERY: pair(rank=2), VALUE: pair(rank=4)}
    patterns = {"rank_pattern": {"query": 2}, "alpha_pattern": {"layer.1.attention.self.value": 5}}
    found, _ = merged(write(tmp_path / "a", pairs(modules), **patterns), bert)
    expected = deltas({QUERY: modules[QUERY]}, 8 / 2) | deltas({VALUE: modules[VALUE]}, 5 / 4)
    holds(found, bert, expected)


# ---------------------------------------------------------------- 2: MergedLinear


@pytest.mark.parametrize(
    "enabled",
    [(True, False, True), (True, True, True), (False, True, False), (True, True, False)],
    ids=str,
)
def test_a_merged_linear_of_peft_02_updates_only_its_enabled_slices(gpt2, tmp_path, enabled):
    groups, dice = sum(enabled), np.random.default_rng(2)
    a = dice.normal(size=(2 * groups, 32)).astype(np.float32)
    b = dice.normal(size=(32 * groups, 2, 1)).astype(np.float32)
    adapter = write(
        tmp_path / "a", pairs({ATTN: (a, b)}), target_modules=["c_attn"], fan_in_fan_out=True,
        r=2, enable_lora=list(enabled), merge_weights=False,
    )  # fmt: skip
    exact, group = np.zeros((96, 32)), 0
    for part, on in enumerate(enabled):
        if on:
            rows, columns = slice(32 * group, 32 * group + 32), slice(2 * group, 2 * group + 2)
            exact[32 * part : 32 * part + 32] = update(a[columns], b[rows, :, 0], 8 / 2)
            group += 1
    found, _ = merged(adapter, gpt2)
    holds(found, gpt2, {f"{ATTN}.weight": exact.T})


# ---------------------------------------------------------------- 3: a bias that was lost


@pytest.mark.parametrize("kind", ["lora_only", "all"])
def test_a_trained_bias_that_is_not_in_the_file_is_missed_aloud(bert, tmp_path, kind):
    found, notes = merged(write(tmp_path / "a", pairs(usual()), bias=kind), bert)
    holds(found, bert, deltas(usual()))
    told(notes, "bias", kind)


@pytest.mark.parametrize("kind", ["lora_only", "all"])
def test_the_bias_of_a_head_does_not_stand_for_the_biases_that_were_lost(bert, tmp_path, kind):
    tensors = pairs(usual()) | with_prefix(head())
    _, notes = merged(write(tmp_path / "a", tensors, bias=kind, task_type="SEQ_CLS"), bert)
    told(notes, "bias", kind)


@pytest.mark.parametrize("end", [".bias", ".base_layer.bias"])
def test_a_trained_bias_replaces_that_of_the_base(bert, tmp_path, end):
    bias = np.linspace(-1, 1, 32, dtype=np.float32)
    tensors = {**pairs(usual()), f"{PREFIX}{QUERY}{end}": bias}
    found, _ = merged(write(tmp_path / "a", tensors, bias="lora_only"), bert)
    holds(found, bert, deltas(usual()), {f"{QUERY}.bias": bias})


# ---------------------------------------------------------------- 4 and 5: heads


def test_a_head_in_the_file_is_placed_though_the_config_names_none(bert, tmp_path):
    adapter = write(tmp_path / "a", pairs(usual()) | with_prefix(head()), modules_to_save=None)
    found, notes = merged(adapter, bert)
    holds(found, bert, deltas(usual()), head())
    told(notes, "modules_to_save", "classifier")


def test_a_head_that_only_the_file_has_makes_a_headless_base_a_classifier(headless, tmp_path):
    tensors = pairs(usual()) | with_prefix(head(labels=3))
    found, _ = merged(write(tmp_path / "a", tensors, task_type="SEQ_CLS"), headless)
    holds(found, headless, deltas(usual()), head(labels=3), prefix="bert.")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert model.config.num_labels == 3


def test_a_head_of_more_classes_takes_the_place_of_the_bases_own(bert, tmp_path):
    tensors = pairs(usual()) | with_prefix(head(labels=5))
    found, _ = merged(write(tmp_path / "a", tensors, task_type="SEQ_CLS"), bert)
    holds(found, bert, deltas(usual()), head(labels=5))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert model.config.num_labels == 5


def test_a_head_that_neither_task_nor_base_explains_is_refused_by_its_name(headless, tmp_path):
    adapter = write(tmp_path / "a", pairs(usual()) | with_prefix(head()), task_type=None)
    refused(tmp_path, adapter, headless, r"classifier\.weight", error=AdapterMismatch)


def test_the_class_that_peft_recorded_instead_of_a_task_explains_the_head(headless, tmp_path):
    mapping = {
        "base_model_class": "BertForSequenceClassification",
        "parent_library": "transformers.models.bert.modeling_bert",
    }
    tensors = pairs(usual()) | with_prefix(head())
    adapter = write(tmp_path / "a", tensors, task_type=None, auto_mapping=mapping)
    found, _ = merged(adapter, headless)
    holds(found, headless, deltas(usual()), head(), prefix="bert.")


def test_modules_to_save_may_name_modules_that_the_model_does_not_have(bert, tmp_path):
    """PEFT's own default for a classifier does so always."""
    tensors = pairs(usual()) | with_prefix(head())
    names = ["classifier", "score"]
    adapter = write(tmp_path / "a", tensors, modules_to_save=names, task_type="SEQ_CLS")
    found, _ = merged(adapter, bert)
    holds(found, bert, deltas(usual()), head())


def test_what_a_bare_name_captured_beside_the_head_is_placed_too(bases, tmp_path):
    """PEFT matches names by their end without a dot: `classifier` takes `pre_classifier` along."""
    path = "distilbert.transformer.layer.0.attention.q_lin"
    whole = head() | {
        "pre_classifier.weight": np.full((32, 32), 0.5, np.float32),
        "pre_classifier.bias": np.full(32, 0.25, np.float32),
    }
    adapter = write(
        tmp_path / "a", pairs({path: pair()}) | with_prefix(whole),
        modules_to_save=["classifier"], target_modules=["q_lin"], task_type="SEQ_CLS",
    )  # fmt: skip
    base = bases("distilbert")
    found, _ = merged(adapter, base)
    holds(found, base, deltas({path: pair()}), whole)


def test_lists_with_many_duplicates_are_read_as_sets(bert, tmp_path):
    tensors = pairs(usual()) | with_prefix(head())
    adapter = write(
        tmp_path / "a", tensors,
        modules_to_save=22 * ["classifier", "score"], target_modules=5 * ["query", "value"],
    )  # fmt: skip
    found, _ = merged(adapter, bert)
    holds(found, bert, deltas(usual()), head())


def test_pefts_copies_of_a_heads_bias_do_not_count_as_a_second_head(bert, tmp_path):
    """With bias "all" a wrapped head is written three times; the plain name is the trained one."""
    copies = {
        "classifier.modules_to_save.bias": head()["classifier.bias"],
        "classifier.original_module.bias": np.zeros(2, np.float32),
    }
    tensors = pairs(usual()) | with_prefix(head() | copies)
    found, _ = merged(write(tmp_path / "a", tensors, bias="all", task_type="SEQ_CLS"), bert)
    holds(found, bert, deltas(usual()), head())


def test_a_copy_that_contradicts_the_heads_bias_is_refused(bert, tmp_path):
    copies = {"classifier.modules_to_save.bias": head()["classifier.bias"] + 1}
    adapter = write(tmp_path / "a", pairs(usual()) | with_prefix(head() | copies), bias="all")
    refused(tmp_path, adapter, bert, "classifier", error=InputError)


LAYER = {"model.layers.0.self_attn.q_proj": pair()}
SAVED = {"target_modules": [*LAYER], "modules_to_save": ["embed_tokens", "lm_head"]}


def tables(rows, *seeds):
    """Trained tables of an input embedding and of a language head, equal for equal seeds."""
    names = ("model.embed_tokens.weight", "lm_head.weight")
    return {
        name: np.random.default_rng(seed).normal(size=(rows, 32)).astype(np.float32)
        for name, seed in zip(names, seeds, strict=False)
    }


def test_tables_with_added_tokens_enlarge_the_vocabulary(bases, tmp_path):
    base, saved_whole = bases("llama"), tables(104, 1, 2)
    found, _ = merged(write(tmp_path / "a", pairs(LAYER) | with_prefix(saved_whole), **SAVED), base)
    holds(found, base, deltas(LAYER), saved_whole)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "merged")
    assert config.vocab_size == 104


def test_an_embedding_with_added_tokens_without_the_head_is_refused_before_writing(bases, tmp_path):
    tensors = pairs(LAYER) | with_prefix(tables(104, 1))
    adapter = write(tmp_path / "a", tensors, **{**SAVED, "modules_to_save": ["embed_tokens"]})
    message = refusal_of(tmp_path, adapter, bases("llama"))
    assert "lm_head" in message
    assert "104" in message
    assert "staging" not in message


def test_equal_tables_on_both_sides_of_a_tie_keep_the_tie_and_the_bases_name(bases, tmp_path):
    base, both = bases("llama-tied"), tables(100, 1, 1)
    found, _ = merged(write(tmp_path / "a", pairs(LAYER) | with_prefix(both), **SAVED), base)
    del both["lm_head.weight"]
    holds(found, base, deltas(LAYER), both)


# ---------------------------------------------------------------- 6: fan_in_fan_out


def test_a_linear_layer_is_not_transposed_because_the_config_says_so(bert, tmp_path):
    found, _ = merged(write(tmp_path / "a", pairs(usual()), fan_in_fan_out=True), bert)
    holds(found, bert, deltas(usual()))


@pytest.mark.parametrize(
    ("path", "out"), [(ATTN, 96), (SQUARE, 32)], ids=["by its shape", "by the layer's kind alone"]
)
def test_a_conv1d_is_transposed_though_the_config_denies_it(gpt2, tmp_path, path, out):
    a, b = pair(out, 32)
    adapter = write(tmp_path / "a", pairs({path: (a, b)}), target_modules=[path])
    found, _ = merged(adapter, gpt2)
    holds(found, gpt2, {f"{path}.weight": update(a, b, 2.0).T})


def test_a_layout_that_the_config_gets_wrong_is_noted(bert, tmp_path):
    _, notes = merged(write(tmp_path / "a", pairs(usual()), fan_in_fan_out=True), bert)
    told(notes, "fan_in_fan_out")


# ---------------------------------------------------------------- 7: target_modules


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["Query", "Value"]], ids=str)
def test_targets_that_are_none_of_the_files_modules_are_noted_and_the_file_decides(
    bert, tmp_path, targets
):
    found, notes = merged(write(tmp_path / "a", pairs(usual()), target_modules=targets), bert)
    holds(found, bert, deltas(usual()))
    told(notes, "target_modules")


def test_a_target_that_does_not_exist_beside_others_is_noted(bert, tmp_path):
    targets = [QUERY, VALUE, "W_pack"]
    found, notes = merged(write(tmp_path / "a", pairs(usual()), target_modules=targets), bert)
    holds(found, bert, deltas(usual()))
    told(notes, "target", "W_pack")


def test_a_target_that_matched_more_than_was_meant_is_merged_wherever_it_matched(bert, tmp_path):
    """`dense` is in every block of a BERT, and in its pooler as well."""
    modules = {
        "bert.encoder.layer.0.attention.output.dense": pair(),
        "bert.encoder.layer.0.intermediate.dense": pair(64, 32),
        "bert.encoder.layer.0.output.dense": pair(32, 64),
        "bert.pooler.dense": pair(seed=3),
    }
    found, _ = merged(write(tmp_path / "a", pairs(modules), target_modules=["dense"]), bert)
    holds(found, bert, deltas(modules))


@pytest.mark.parametrize(
    "targets", [r".*layer\.0.*query|.*layer\.1.*value", "query", "all-linear", None], ids=str
)
def test_targets_may_be_an_expression_or_missing(bert, tmp_path, targets):
    found, _ = merged(write(tmp_path / "a", pairs(usual()), target_modules=targets), bert)
    holds(found, bert, deltas(usual()))


# ---------------------------------------------------------------- 8: two weight files


def test_safetensors_win_over_a_pickle_beside_them_and_that_is_said(bert, tmp_path):
    adapter = write(tmp_path / "a", pairs(usual()))
    other = {name: torch.from_numpy(value) for name, value in pairs(usual(seed=50)).items()}
    torch.save(other, adapter / PICKLE)
    found, notes = merged(adapter, bert)
    holds(found, bert, deltas(usual()))
    told(notes, re.escape(PICKLE))


# ---------------------------------------------------------------- 9: a head that is nowhere


def test_a_classifier_whose_head_is_nowhere_is_refused_by_its_tensors(headless, tmp_path):
    adapter = write(tmp_path / "a", pairs(usual()), task_type="SEQ_CLS")
    names = (r"classifier\.weight", r"classifier\.bias")
    refused(tmp_path, adapter, headless, *names, error=AdapterMismatch)


def test_a_head_that_the_file_lacks_may_be_the_bases_own(bert, tmp_path):
    found, _ = merged(write(tmp_path / "a", pairs(usual()), task_type="SEQ_CLS"), bert)
    holds(found, bert, deltas(usual()))


def test_an_adapter_without_a_task_merges_into_a_headless_base_without_inventing_a_head(
    headless, tmp_path
):
    """Its names still begin with `bert.`, as those of the classifier that it was trained in."""
    adapter = write(tmp_path / "a", pairs(usual()), task_type=None)
    found, notes = merged(adapter, headless)
    assert not [name for name in found if "classifier" in name]
    bare = {name.removeprefix("bert."): value for name, value in deltas(usual()).items()}
    holds({n.removeprefix("bert."): v for n, v in found.items()}, headless, bare)
    told(notes, "prefix|head|bert")


# ---------------------------------------------------------------- 10: zeros


def test_an_untrained_adapter_gives_the_base_and_says_why(bert, tmp_path):
    modules = {path: (a, np.zeros_like(b)) for path, (a, b) in usual().items()}
    found, notes = merged(write(tmp_path / "a", pairs(modules)), bert)
    holds(found, bert, {})
    told(notes, "untrained")


def test_an_untrained_adapter_ends_a_run(bert, tmp_path):
    modules = {path: (a, np.zeros_like(b)) for path, (a, b) in usual().items()}
    adapter = write(tmp_path / "a", pairs(modules))
    before = contents(tmp_path)
    with pytest.raises(InputError, match="untrained"):
        pipeline.run(adapter, base=str(bert), out=tmp_path / "run")
    assert contents(tmp_path) == before


def test_modules_that_were_never_trained_are_named_and_the_others_merged(bert, tmp_path):
    a, b = pair()
    modules = {QUERY: (a, np.zeros_like(b)), VALUE: pair(seed=1)}
    found, notes = merged(write(tmp_path / "a", pairs(modules)), bert)
    holds(found, bert, deltas({VALUE: modules[VALUE]}))
    told(notes, "zero|untrained", r"query|\b1\b")


# ---------------------------------------------------------------- 11: odd numbers


@pytest.mark.parametrize(
    ("rank", "alpha"),
    [(64, 16), (1, 1), (1, 32), (3, 7), (7, 10), (10, 1), (4, 16.0), (4, 12.5), (8, 0.8)],
)
def test_any_rank_and_any_alpha_give_alpha_over_rank(bert, tmp_path, rank, alpha):
    modules = {QUERY: pair(rank=rank)}
    given = {"r": rank, "lora_alpha": alpha, "target_modules": ["query"]}
    found, _ = merged(write(tmp_path / "a", pairs(modules), **given), bert)
    holds(found, bert, deltas(modules, alpha / rank))


@pytest.mark.parametrize("kind", [np.float16, np.float64, "bfloat16"], ids=str)
def test_factors_of_any_width_are_taken_at_their_exact_value(bert, tmp_path, kind):
    a, b = pair()
    if kind == "bfloat16":
        halves = {n: torch.from_numpy(v).bfloat16() for n, v in pairs({QUERY: (a, b)}).items()}
        adapter = write(tmp_path / "a", {}, target_modules=["query"])
        save_file(halves, adapter / WEIGHTS)
        a, b = (value.float().numpy() for value in halves.values())
    else:
        a, b = a.astype(kind), b.astype(kind)
        adapter = write(tmp_path / "a", pairs({QUERY: (a, b)}), target_modules=["query"])
    found, _ = merged(adapter, bert)
    holds(found, bert, deltas({QUERY: (a, b)}))


# ---------------------------------------------------------------- 12: which base


@pytest.mark.parametrize("name", [None, ..., ""], ids=["null", "absent", "empty"])
def test_a_base_that_the_adapter_does_not_name_must_be_passed(tmp_path, name):
    adapter = write(tmp_path / "a", pairs(usual()), base_model_name_or_path=name)
    refused(tmp_path, adapter, None, "--base", error=InputError)


def test_a_base_that_is_somebodys_folder_must_be_passed(tmp_path):
    name = "/home/somebody/models/my-bert"
    adapter = write(tmp_path / "a", pairs(usual()), base_model_name_or_path=name)
    refused(tmp_path, adapter, None, "somebody", "--base", error=InputError)


def test_the_base_that_is_passed_wins_over_the_one_that_is_named(bert, tmp_path):
    name = "/home/somebody/models/my-bert"
    adapter = write(tmp_path / "a", pairs(usual()), base_model_name_or_path=name)
    found, _ = merged(adapter, bert)
    holds(found, bert, deltas(usual()))
    assert "somebody" not in (tmp_path / "merged" / "lora_export.json").read_text()


# ---------------------------------------------------------------- 13: fields nobody knows


def test_unknown_fields_that_are_not_set_are_ignored(bert, tmp_path):
    empty = {"quux": None, "frob": False, "blobs": [], "blub": {}, "blip": "", "blop": 0}
    adapter = write(tmp_path / "a", pairs(usual()), inference_mode=False, **empty)
    found, _ = merged(adapter, bert)
    holds(found, bert, deltas(usual()))


def test_unknown_fields_that_are_set_are_refused_by_name(bert, tmp_path):
    adapter = write(tmp_path / "a", pairs(usual()), use_quux=True, frobnicate={"a": 1})
    refused(tmp_path, adapter, bert, "use_quux", "frobnicate", error=InputError)


def test_a_config_of_seven_fields_is_enough(bert, tmp_path):
    few = dict.fromkeys(
        ("bias", "inference_mode", "fan_in_fan_out", "base_model_name_or_path"), ...
    )
    found, _ = merged(write(tmp_path / "a", pairs(usual()), **few), bert)
    holds(found, bert, deltas(usual()))


# ---------------------------------------------------------------- 14: no adapters at all


def test_a_pointer_in_place_of_the_weights_says_so(bert, tmp_path):
    adapter = write(tmp_path / "a", pairs(usual()))
    (adapter / WEIGHTS).write_text(LFS)
    refused(tmp_path, adapter, bert, "LFS pointer", re.escape(WEIGHTS), error=InputError)


def test_a_pointer_in_place_of_a_pickle_says_so(bert, tmp_path):
    adapter = write(tmp_path / "a", pairs(usual()))
    (adapter / WEIGHTS).unlink()
    (adapter / PICKLE).write_text(LFS)
    refused(tmp_path, adapter, bert, "LFS pointer", re.escape(PICKLE), error=InputError)


def test_a_pointer_in_place_of_the_config_says_so(bert, tmp_path):
    adapter = write(tmp_path / "a", pairs(usual()))
    (adapter / CONFIG).write_text(LFS)
    refused(tmp_path, adapter, bert, "LFS pointer", re.escape(CONFIG), error=InputError)


def test_a_pointer_in_place_of_the_base_says_so(bert, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(bert, base)
    (base / "model.safetensors").write_text(LFS)
    adapter = write(tmp_path / "a", pairs(usual()))
    refused(tmp_path, adapter, base, "LFS pointer", error=InputError)


def test_a_config_without_weights_says_so(bert, tmp_path):
    adapter = write(tmp_path / "a", pairs(usual()))
    (adapter / WEIGHTS).unlink()
    refused(tmp_path, adapter, bert, re.escape(WEIGHTS), error=InputError)


@pytest.mark.parametrize("whole", [True, False], ids=["a directory", "a file"])
def test_weights_without_a_config_need_an_alpha(bert, tmp_path, whole):
    adapter = write(tmp_path / "a", pairs(usual()))
    (adapter / CONFIG).unlink()
    place = adapter if whole else adapter / WEIGHTS
    refused(tmp_path, place, bert, rf"{re.escape(CONFIG)}|--alpha", error=InputError)


def test_weights_without_a_config_merge_with_the_alpha_that_is_given(bert, tmp_path):
    modules = {QUERY: pair(rank=4), VALUE: pair(rank=2)}
    place = tmp_path / "weights.safetensors"
    safetensors.numpy.save_file(pairs(modules), place)
    found, notes = merged(place, bert, alpha=6.0)
    expected = deltas({QUERY: modules[QUERY]}, 6 / 4) | deltas({VALUE: modules[VALUE]}, 6 / 2)
    holds(found, bert, expected)
    told(notes, "alpha", r"\b6\b")


def test_a_format_that_the_caller_insists_on_is_the_one_that_is_read(bert, tmp_path):
    adapter = write(tmp_path / "a", pairs(usual()))
    refused(tmp_path, adapter, bert, "adapters.safetensors", adapter_format="mlx", error=InputError)
    found, _ = merged(adapter, bert, adapter_format="peft")
    holds(found, bert, deltas(usual()))


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_a_file_of_an_adapters_folder_means_the_folder(bert, tmp_path, name):
    adapter = write(tmp_path / "a", pairs(usual()))
    found, _ = merged_to(tmp_path / "merged", adapter / name, bert)
    holds(found, bert, deltas(usual()))


def test_what_a_trainer_leaves_beside_an_adapter_is_not_opened(bert, tmp_path):
    adapter = write(tmp_path / "a", pairs(usual()))
    mark = tmp_path / "executed"
    for name in ("training_args.bin", "optimizer.pt", "rng_state.pth", "scheduler.pt"):
        torch.save({"x": Touch(mark)}, adapter / name)
    (adapter / "README.md").write_text("---\nbase_model: org/x\n---\n")
    found, _ = merged(adapter, bert)
    holds(found, bert, deltas(usual()))
    assert not mark.exists()


def test_a_folder_whose_adapters_lie_deeper_names_them(bert, tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("checkpoint-500", "checkpoint-1000"):
        write(tmp_path / "a" / name, pairs(usual()))
    refused(tmp_path, tmp_path / "a", bert, "checkpoint-500", error=InputError)


@pytest.mark.parametrize("made", [True, False], ids=["empty", "absent"])
def test_a_folder_with_nothing_in_it_is_no_adapter(bert, tmp_path, made):
    if made:
        (tmp_path / "a").mkdir()
    refused(tmp_path, tmp_path / "a", bert, "adapter|no such", error=InputError)


def test_a_whole_model_is_no_adapter(bert, tmp_path):
    refused(tmp_path, bert, bert, "adapter", error=InputError)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"LORA"', "\x00\x01"], ids=repr)
def test_a_config_that_is_no_object_is_refused(bert, tmp_path, text):
    adapter = write(tmp_path / "a", pairs(usual()))
    (adapter / CONFIG).write_text(text)
    refused(tmp_path, adapter, bert, re.escape(CONFIG), error=InputError)


def test_a_truncated_file_says_so(bert, tmp_path):
    adapter = write(tmp_path / "a", pairs(usual()))
    (adapter / WEIGHTS).write_bytes((adapter / WEIGHTS).read_bytes()[:-100])
    refused(tmp_path, adapter, bert, "truncated", error=InputError)


@pytest.mark.parametrize("side", ["A", "B"])
def test_a_file_with_one_half_of_each_pair_names_the_missing_half(bert, tmp_path, side):
    tensors = {name: v for name, v in pairs(usual()).items() if f"lora_{side}" in name}
    other = "B" if side == "A" else "A"
    adapter = write(tmp_path / "a", tensors)
    refused(tmp_path, adapter, bert, f"lora_{other}", "query", "value", error=InputError)


@pytest.mark.parametrize("kind", ["LOHA", "LOKR", "IA3", "PROMPT_TUNING", "OFT", "lora", "QUUX"])
def test_another_method_is_refused_by_its_name(bert, tmp_path, kind):
    adapter = write(tmp_path / "a", pairs(usual()), peft_type=kind)
    refused(tmp_path, adapter, bert, "peft_type", kind, error=InputError)


def test_an_adapter_for_another_model_is_refused_by_what_does_not_fit(gpt2, tmp_path):
    adapter = write(tmp_path / "a", pairs(usual()))
    refused(tmp_path, adapter, gpt2, "attention.self.query", error=AdapterMismatch)


def test_an_adapter_for_a_wider_model_is_refused_with_both_shapes(bert, tmp_path):
    adapter = write(tmp_path / "a", pairs({QUERY: pair(48, 48)}))
    refused(tmp_path, adapter, bert, "query", "48", "32", error=AdapterMismatch)


# ---------------------------------------------------------------- task_type


def test_a_misspelt_task_is_noted_and_the_bases_own_class_is_used(bert, tmp_path):
    tensors = pairs(usual()) | with_prefix(head())
    found, notes = merged(write(tmp_path / "a", tensors, task_type="SEQUENCE_CLASSIFICATION"), bert)
    holds(found, bert, deltas(usual()), head())
    told(notes, "SEQUENCE_CLASSIFICATION")


def test_a_misspelt_task_whose_head_the_base_has_no_place_for_is_refused(headless, tmp_path):
    tensors = pairs(usual()) | with_prefix(head())
    adapter = write(tmp_path / "a", tensors, task_type="SEQUENCE_CLASSIFICATION")
    refused(tmp_path, adapter, headless, r"classifier|SEQUENCE_CLASSIFICATION")


# ---------------------------------------------------------------- names of tensors


@pytest.mark.parametrize(
    "prefix",
    [
        "", "module.", "_orig_mod.", f"module.{PREFIX}", f"_orig_mod.{PREFIX}",
        f"module._orig_mod.{PREFIX}", f"{PREFIX}module.", f"{PREFIX}_orig_mod.",
        2 * PREFIX, 3 * PREFIX,
    ],
)  # fmt: skip
def test_prefixes_that_peft_would_not_load_are_taken_off_and_noted(bert, tmp_path, prefix):
    whole = {prefix + name: value for name, value in head().items()}
    adapter = write(tmp_path / "a", pairs(usual(), prefix=prefix) | whole)
    found, notes = merged(adapter, bert)
    holds(found, bert, deltas(usual()), head())
    told(notes, "prefix")


@pytest.mark.parametrize("name", ["default", "sentiment", "adapter_1", "v2-final"])
def test_the_adapters_own_name_may_stand_in_its_keys(bert, tmp_path, name):
    ends = (f".lora_A.{name}.weight", f".lora_B.{name}.weight")
    found, _ = merged(write(tmp_path / "a", pairs(usual(), ends=ends)), bert)
    holds(found, bert, deltas(usual()))


def test_a_head_under_the_adapters_name_is_placed(bert, tmp_path):
    whole = {
        PREFIX + name.replace("classifier.", "classifier.modules_to_save.default."): value
        for name, value in head().items()
    }
    found, _ = merged(write(tmp_path / "a", pairs(usual()) | whole), bert)
    holds(found, bert, deltas(usual()), head())


def test_two_adapters_in_one_file_are_refused_by_their_names(bert, tmp_path):
    tensors = {}
    for seed, name in enumerate(("positive", "negative")):
        tensors |= pairs(usual(seed), ends=(f".lora_A.{name}.weight", f".lora_B.{name}.weight"))
    adapter = write(tmp_path / "a", tensors)
    refused(tmp_path, adapter, bert, "positive", "negative", error=InputError)


def test_one_module_twice_under_different_prefixes_is_refused(bert, tmp_path):
    tensors = pairs(usual()) | pairs(usual(seed=20), prefix=2 * PREFIX)
    refused(tmp_path, write(tmp_path / "a", tensors), bert, "query", error=InputError)


def test_an_adapter_of_the_headless_model_merges_into_the_one_with_a_head(gpt2, tmp_path):
    a, b = pair(96, 32)
    path = ATTN.removeprefix("transformer.")
    tensors = pairs({path: (a, b)})
    adapter = write(tmp_path / "a", tensors, target_modules=["c_attn"], fan_in_fan_out=True)
    found, notes = merged(adapter, gpt2)
    holds(found, gpt2, {f"{ATTN}.weight": update(a, b, 2.0).T})
    told(notes, "transformer|prefix")


def test_a_base_whose_file_lacks_the_models_prefix_is_matched(gpt2, tmp_path):
    """So is the file that the hub holds under the name of gpt2."""
    base = tmp_path / "base"
    shutil.copytree(gpt2, base)
    tensors = safetensors.numpy.load_file(base / "model.safetensors")
    tensors = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    safetensors.numpy.save_file(tensors, base / "model.safetensors", {"format": "pt"})
    a, b = pair(96, 32)
    adapter = write(
        tmp_path / "a", pairs({ATTN: (a, b)}), target_modules=["c_attn"], fan_in_fan_out=True,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    found, _ = merged(adapter, base)
    bare = {name.removeprefix("transformer."): value for name, value in found.items()}
    holds(bare, base, {f"{ATTN}.weight".removeprefix("transformer."): update(a, b, 2.0).T})
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    weight = model.get_submodule(ATTN).weight.detach().numpy()
    assert np.array_equal(weight, bare["h.0.attn.c_attn.weight"])


def test_a_base_that_is_named_as_before_version_1_is_matched(headless, tmp_path):
    """Old checkpoints say gamma and beta, and carry a buffer that nobody needs any more."""
    base = tmp_path / "base"
    shutil.copytree(headless, base)
    tensors = safetensors.numpy.load_file(base / "model.safetensors")
    tensors = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): value
        for name, value in tensors.items()
    }
    tensors["embeddings.position_ids"] = np.arange(64, dtype=np.int64)[None]
    safetensors.numpy.save_file(tensors, base / "model.safetensors", {"format": "pt"})
    tensors = pairs(usual()) | with_prefix(head())
    adapter = write(tmp_path / "a", tensors, task_type="SEQ_CLS")
    assert merged_files.merge_files(adapter, base=str(base), out=tmp_path / "merged").ok
    _, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "merged", output_loading_info=True
    )
    assert not report["missing_keys"]


# ---------------------------------------------------------------- pickles


def in_torch(tensors):
    return {name: torch.from_numpy(value) for name, value in tensors.items()}


def pickled(folder, content, **options):
    """Write an adapter directory whose weights are a pickle of `content`."""
    adapter = write(folder, {})
    (adapter / WEIGHTS).unlink()
    torch.save(content, adapter / PICKLE, **options)
    return adapter


def test_a_pickle_of_tensors_is_read(bert, tmp_path):
    tensors = in_torch(pairs(usual()) | with_prefix(head()))
    found, _ = merged(pickled(tmp_path / "a", tensors), bert)
    holds(found, bert, deltas(usual()), head())


def test_transposed_and_shared_tensors_in_a_pickle_have_their_own_values(bert, tmp_path):
    (a, b), (_, other) = usual().values()
    wide = torch.from_numpy(np.stack([b, other]))  # two B in one storage
    tensors = {
        f"{PREFIX}{QUERY}.lora_A.weight": torch.from_numpy(a.T.copy()).T,
        f"{PREFIX}{QUERY}.lora_B.weight": wide[0],
        f"{PREFIX}{VALUE}.lora_A.weight": torch.nn.Parameter(torch.from_numpy(a)),
        f"{PREFIX}{VALUE}.lora_B.weight": wide[1],
    }
    found, _ = merged(pickled(tmp_path / "a", tensors), bert)
    holds(found, bert, deltas({QUERY: (a, b), VALUE: (a, other)}))


def test_bfloat16_in_a_pickle_is_read(bert, tmp_path):
    tensors = {name: value.bfloat16() for name, value in in_torch(pairs(usual())).items()}
    found, _ = merged(pickled(tmp_path / "a", tensors), bert)
    halves = {
        path: tuple(torch.from_numpy(side).bfloat16().float().numpy() for side in sides)
        for path, sides in usual().items()
    }
    holds(found, bert, deltas(halves))


class Touch:
    """Makes a file where it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("how", ["torch", "torch before 1.6", "pickle"])
def test_code_in_a_pickle_is_not_run(bert, tmp_path, how):
    mark = tmp_path / "executed"
    content = {**in_torch(pairs(usual())), "payload": Touch(mark)}
    adapter = pickled(
        tmp_path / "a", content, _use_new_zipfile_serialization=how != "torch before 1.6"
    )
    if how == "pickle":
        (adapter / PICKLE).write_bytes(pickle.dumps(content))
    refused(tmp_path, adapter, bert, re.escape(PICKLE), "pickle", error=InputError)
    assert not mark.exists()
    with contextlib.suppress(pickle.UnpicklingError, RuntimeError):
        torch.load(adapter / PICKLE, weights_only=False)
    assert mark.exists(), "the file would not have done anything"


def test_a_pickle_from_before_torch_1_6_is_refused_with_a_way_out(bert, tmp_path):
    adapter = pickled(
        tmp_path / "a", in_torch(pairs(usual())), _use_new_zipfile_serialization=False
    )
    refused(tmp_path, adapter, bert, re.escape(PICKLE), "safetensors", error=InputError)


@pytest.mark.parametrize(
    "shapes", [((4, 2**36), (32, 4)), ((2**20, 32), (32, 2**20)), ((4, 32), (2**40, 4))], ids=str
)
def test_a_tensor_that_is_spread_out_of_one_number_takes_no_memory(bert, tmp_path, shapes):
    """Terabytes by shape, four bytes in the file."""
    one = torch.ones(1)
    names = (f"{PREFIX}{QUERY}.lora_A.weight", f"{PREFIX}{QUERY}.lora_B.weight")
    tensors = {name: one.expand(shape) for name, shape in zip(names, shapes, strict=True)}
    adapter = pickled(tmp_path / "a", tensors)
    start = time.monotonic()
    refused(tmp_path, adapter, bert, "lora_[AB]", error=InputError)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    "content",
    [[1, 2], {}, {"epoch": 3}, {"lora_A.weight": [1.0, 2.0]}, torch.ones(3), "adapter"],
    ids=["list", "nothing", "number", "list of numbers", "one tensor", "text"],
)
def test_a_pickle_without_named_tensors_is_refused(bert, tmp_path, content):
    adapter = pickled(tmp_path / "a", content)
    refused(tmp_path, adapter, bert, re.escape(PICKLE), error=InputError)


@pytest.mark.parametrize("kept", [0, 1, 100, -200])
def test_a_truncated_pickle_is_refused(bert, tmp_path, kept):
    adapter = pickled(tmp_path / "a", in_torch(pairs(usual())))
    (adapter / PICKLE).write_bytes((adapter / PICKLE).read_bytes()[:kept])
    refused(tmp_path, adapter, bert, re.escape(PICKLE), error=InputError)


# ---------------------------------------------------------------- loralib


LORALIB = (".lora_A", ".lora_B")


def saved(folder, name, tensors):
    """Write `tensors` as the kind of file that `name` says."""
    if name.endswith(".safetensors"):
        safetensors.numpy.save_file(tensors, folder / name)
    else:
        torch.save(in_torch(tensors), folder / name)
    return folder / name


@pytest.mark.parametrize("name", ["lora.pt", "lora.pth", "lora.safetensors"])
def test_a_state_dict_of_loralib_merges_with_the_alpha_that_is_given(bert, tmp_path, name):
    tensors = pairs(usual(), prefix="", ends=LORALIB)
    found, notes = merged(saved(tmp_path, name, tensors), bert, alpha=16.0)
    holds(found, bert, deltas(usual(), 16 / 4))
    told(notes, "alpha", "16")


@pytest.mark.parametrize("name", ["lora.pt", "lora.safetensors"])
def test_a_state_dict_of_loralib_needs_an_alpha(bert, tmp_path, name):
    adapter = saved(tmp_path, name, pairs(usual(), prefix="", ends=LORALIB))
    refused(tmp_path, adapter, bert, "--alpha", error=InputError)


def test_biases_and_heads_beside_loralibs_pairs_are_placed(bert, tmp_path):
    """loralib's own saving keeps biases where training changed them, and people add the head."""
    whole = head() | {f"{QUERY}.bias": np.linspace(-1, 1, 32, dtype=np.float32)}
    adapter = saved(tmp_path, "lora.pt", pairs(usual(), prefix="", ends=LORALIB) | whole)
    found, _ = merged(adapter, bert, alpha=8.0)
    holds(found, bert, deltas(usual()), whole)


def test_a_merged_linear_of_loralib_with_unknown_slices_is_refused_as_such(gpt2, tmp_path):
    """Two of three slices, and nothing in the file says which."""
    dice = np.random.default_rng(4)
    a = dice.normal(size=(4, 32)).astype(np.float32)
    b = dice.normal(size=(64, 2)).astype(np.float32)
    adapter = saved(tmp_path, "lora.pt", pairs({ATTN: (a, b)}, prefix="", ends=LORALIB))
    refused(tmp_path, adapter, gpt2, "c_attn", "enable_lora|slices|MergedLinear", alpha=8.0)


def test_an_embedding_of_loralib_is_told_by_the_base(bert, tmp_path):
    """Its tensors have the names that a linear layer's have."""
    path = "bert.embeddings.word_embeddings"
    a, b = pair(32, 100)
    adapter = saved(tmp_path, "lora.pt", pairs({path: (a, b)}, prefix="", ends=LORALIB))
    found, _ = merged(adapter, bert, alpha=8.0)
    holds(found, bert, {f"{path}.weight": update(a, b, 2.0).T})


def test_a_convolution_of_loralib_is_refused_rather_than_merged_at_a_wrong_scale(tmp_path):
    """Its A is (rank * kernel, in * kernel): the rank cannot be read from its rows."""
    family_of("ViTForImageClassification").save_pretrained(tmp_path / "base")
    path = "vit.embeddings.patch_embeddings.projection"
    tensors = pairs({path: pair(16 * 4, 3 * 4, rank=2 * 4)}, prefix="", ends=LORALIB)
    adapter = saved(tmp_path, "lora.pt", tensors)
    refused(tmp_path, adapter, tmp_path / "base", "projection", alpha=8.0)


def test_a_config_named_for_merged_linear_without_its_3d_tensors_is_an_ordinary_one(bert, tmp_path):
    adapter = write(tmp_path / "a", pairs(usual()), enable_lora=None, merge_weights=False)
    found, _ = merged(adapter, bert)
    holds(found, bert, deltas(usual()))


# ---------------------------------------------------------------- mlx-lm


def mlx(folder, modules, **parameters):
    """Write what mlx-lm writes: transposed factors, and a config of its own."""
    folder.mkdir()
    tensors = {}
    for path, (a, b) in modules.items():
        tensors[f"{path}.lora_a"] = np.ascontiguousarray(a.T)
        tensors[f"{path}.lora_b"] = np.ascontiguousarray(b.T)
    safetensors.numpy.save_file(tensors, folder / "adapters.safetensors")
    config = {
        "model": "org/some-4bit-model", "fine_tune_type": "lora", "num_layers": 2, "seed": 0,
        "lora_parameters": {"rank": 4, "dropout": 0.0, "scale": 10.0, **parameters},
        "adapter_path": "adapters", "iters": 100, "train": True,
    }  # fmt: skip
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


LLAMA = {
    "model.layers.0.self_attn.q_proj": pair(seed=1),
    "model.layers.1.mlp.down_proj": pair(32, 64, seed=2),
}


def test_an_adapter_of_mlx_merges_with_its_own_scale(bases, tmp_path):
    base = bases("llama")
    found, _ = merged(mlx(tmp_path / "a", LLAMA), base)
    holds(found, base, deltas(LLAMA, 10.0))


def test_a_dora_of_mlx_merges_with_its_magnitude(bases, tmp_path):
    base, adapter = bases("llama"), mlx(tmp_path / "a", LLAMA)
    tensors = safetensors.numpy.load_file(adapter / "adapters.safetensors")
    stored = safetensors.numpy.load_file(base / "model.safetensors")
    expected = {}
    for seed, (path, (a, b)) in enumerate(LLAMA.items()):
        size = np.random.default_rng(seed).uniform(0.5, 2, len(b)).astype(np.float32)
        tensors[f"{path}.m"] = size
        weight = stored[f"{path}.weight"].astype(np.float64)
        whole = weight + update(a, b, 10.0)
        norm = np.sqrt((whole**2).sum(axis=1))
        expected[f"{path}.weight"] = (size / norm)[:, None] * whole - weight
    safetensors.numpy.save_file(tensors, adapter / "adapters.safetensors")
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(config | {"fine_tune_type": "dora"}))
    found, _ = merged(adapter, base)
    holds(found, base, expected)


def test_an_alpha_beside_mlxs_scale_means_two_things_and_is_refused(bases, tmp_path):
    """Until 2024 the scale was multiplied by alpha / rank, since then alpha is ignored."""
    adapter = mlx(tmp_path / "a", LLAMA, alpha=16)
    refused(tmp_path, adapter, bases("llama"), "alpha", "scale", error=InputError)


def test_an_alpha_beside_mlxs_scale_counts_where_the_caller_says_so(bases, tmp_path):
    base = bases("llama")
    found, notes = merged(mlx(tmp_path / "a", LLAMA, alpha=16), base, alpha=16.0)
    holds(found, base, deltas(LLAMA, 10.0 * 16 / 4))
    told(notes, "alpha", "scale")


def test_an_adapter_of_mlx_without_its_config_is_refused(bases, tmp_path):
    adapter = mlx(tmp_path / "a", LLAMA)
    (adapter / CONFIG).unlink()
    refused(tmp_path, adapter, bases("llama"), re.escape(CONFIG), "scale", error=InputError)


def test_a_full_fine_tune_of_mlx_is_no_adapter(bases, tmp_path):
    adapter = mlx(tmp_path / "a", LLAMA)
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(config | {"fine_tune_type": "full"}))
    refused(tmp_path, adapter, bases("llama"), "full", error=InputError)


# ---------------------------------------------------------------- kohya and diffusers


KOHYA = (".lora_down.weight", ".lora_up.weight")


def flat(path):
    return path.replace(".", "_")


def kohya(modules, alphas, prefix="lora_te_"):
    tensors = {}
    for (path, (a, b)), alpha in zip(modules.items(), alphas, strict=True):
        tensors |= pairs({flat(path): (a, b)}, prefix, KOHYA)
        if alpha is not None:
            tensors[f"{prefix}{flat(path)}.alpha"] = np.array(alpha, np.float32)
    return tensors


@pytest.mark.parametrize("prefix", ["lora_te_", "lora_te1_"])
def test_underscored_names_of_kohya_are_resolved_by_the_base(bases, tmp_path, prefix):
    """Names of this model have underscores of their own: self_attn, down_proj."""
    base, tensors = bases("llama"), kohya(LLAMA, (8, 1), prefix)
    found, _ = merged(saved(tmp_path, "lora.safetensors", tensors), base)
    first, second = LLAMA
    expected = deltas({first: LLAMA[first]}, 8 / 4) | deltas({second: LLAMA[second]}, 1 / 4)
    holds(found, base, expected)


def test_a_module_of_kohya_without_alpha_has_scale_one_and_that_is_said(bases, tmp_path):
    base, tensors = bases("llama"), kohya(LLAMA, (None, 8))
    found, notes = merged(saved(tmp_path, "lora.safetensors", tensors), base)
    first, second = LLAMA
    expected = deltas({first: LLAMA[first]}, 1.0) | deltas({second: LLAMA[second]}, 8 / 4)
    holds(found, base, expected)
    told(notes, "alpha")


def test_an_underscored_name_that_is_no_module_is_refused(bases, tmp_path):
    modules = {"model.layers.9.self_attn.q_proj": pair()}
    adapter = saved(tmp_path, "lora.safetensors", kohya(modules, (8,)))
    refused(tmp_path, adapter, bases("llama"), "layers_9", error=AdapterMismatch)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """The text model of a picture pipeline, with the names that the hub's files have."""
    root = tmp_path_factory.mktemp("clip")
    config = transformers.CLIPTextConfig(
        vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=16, bos_token_id=97, eos_token_id=98,
    )  # fmt: skip
    transformers.CLIPTextModel(config).save_pretrained(root)
    tensors = safetensors.numpy.load_file(root / "model.safetensors")
    bare = {name.removeprefix("text_model."): value for name, value in tensors.items()}
    renamed = {f"text_model.{name}": value for name, value in bare.items()}
    safetensors.numpy.save_file(renamed, root / "model.safetensors", {"format": "pt"})
    return root


CLIP = {
    "text_model.encoder.layers.0.self_attn.q_proj": pair(seed=5),
    "text_model.encoder.layers.1.mlp.fc1": pair(64, 32, seed=6),
}


def test_the_text_model_of_a_picture_pipeline_takes_an_adapter_of_kohya(clip, tmp_path):
    tensors = kohya(CLIP, (4, 8))
    found, _ = merged(saved(tmp_path, "lora.safetensors", tensors), clip)
    first, second = CLIP
    expected = deltas({first: CLIP[first]}, 1.0) | deltas({second: CLIP[second]}, 2.0)
    holds(found, clip, expected)


@pytest.mark.parametrize(
    "ends",
    [
        (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
        (".lora.down.weight", ".lora.up.weight"),
        (".lora_A.weight", ".lora_B.weight"),
    ],
    ids=["0.21", "0.23", "0.26"],
)
def test_the_text_encoder_of_diffusers_is_merged_at_scale_one(clip, tmp_path, ends):
    tensors = pairs(CLIP, "text_encoder.", ends)
    found, notes = merged(saved(tmp_path, "pytorch_lora_weights.safetensors", tensors), clip)
    holds(found, clip, deltas(CLIP, 1.0))
    told(notes, "alpha")


@pytest.mark.parametrize(
    "key", ["lora_unet_down_blocks_0_attentions_0_proj_in", "unet.down_blocks.0.attentions.0.to_k"]
)
def test_updates_of_a_picture_model_are_refused_as_such(clip, tmp_path, key):
    tensors = kohya(CLIP, (4, 8)) | pairs({key: pair()}, prefix="", ends=KOHYA)
    adapter = saved(tmp_path, "lora.safetensors", tensors)
    refused(tmp_path, adapter, clip, "U-Net|diffus", error=InputError)


def test_a_folder_of_diffusers_is_recognised(clip, tmp_path):
    (tmp_path / "a").mkdir()
    tensors = pairs(CLIP, "text_encoder.", (".lora.down.weight", ".lora.up.weight"))
    saved(tmp_path / "a", "pytorch_lora_weights.safetensors", tensors)
    found, _ = merged(tmp_path / "a", clip)
    holds(found, clip, deltas(CLIP, 1.0))


# ---------------------------------------------------------------- the families of the sample


def family_of(name):
    """Return a small model of one of the families that adapters in the wild are made for."""
    small = {
        "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 24, "max_position_embeddings": 32,
    }  # fmt: skip
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    decoder = {**small, **tokens, "num_key_value_heads": 1}
    sizes = {
        "BloomForCausalLM": {
            **tokens, "vocab_size": 40, "hidden_size": 16, "n_layer": 1, "n_head": 2,
        },
        "T5ForConditionalGeneration": {
            "vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2,
        },
        "WhisperForConditionalGeneration": {
            **tokens, "vocab_size": 40, "num_mel_bins": 8, "d_model": 16, "encoder_layers": 1,
            "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
            "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_source_positions": 20,
            "max_target_positions": 20, "decoder_start_token_id": 3,
        },
        "BertForTokenClassification": small,
        "RobertaForSequenceClassification": {**small, "type_vocab_size": 1},
        "Qwen2ForCausalLM": decoder, "MistralForCausalLM": decoder,
        "GemmaForCausalLM": {**decoder, "head_dim": 8}, "PhiForCausalLM": {**small, **tokens},
        "GPTNeoXForCausalLM": {**small, **tokens},
        "ViTForImageClassification": {
            "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 24, "image_size": 8, "patch_size": 4, "num_labels": 3,
        },
    }  # fmt: skip
    kind = getattr(transformers, name)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return kind(kind.config_class(**sizes[name]))


@pytest.mark.parametrize(
    ("name", "targets", "task"),
    [
        ("BloomForCausalLM", ["query_key_value"], "CAUSAL_LM"),
        ("T5ForConditionalGeneration", ["q", "v"], "SEQ_2_SEQ_LM"),
        ("WhisperForConditionalGeneration", ["q_proj", "v_proj"], None),
        ("BertForTokenClassification", ["query", "value"], "TOKEN_CLS"),
        ("RobertaForSequenceClassification", ["query", "value"], "SEQ_CLS"),
        ("Qwen2ForCausalLM", ["q_proj", "k_proj", "up_proj"], "CAUSAL_LM"),
        ("MistralForCausalLM", ["q_proj", "v_proj"], "CAUSAL_LM"),
        ("GemmaForCausalLM", ["o_proj", "down_proj"], "CAUSAL_LM"),
        ("PhiForCausalLM", ["dense", "fc1"], "CAUSAL_LM"),
        ("GPTNeoXForCausalLM", ["query_key_value"], "CAUSAL_LM"),
        ("ViTForImageClassification", ["q_proj", "v_proj"], None),
    ],
)
def test_every_family_of_the_sample_merges_by_the_formula(tmp_path, name, targets, task):
    model = family_of(name)
    model.save_pretrained(tmp_path / "base")
    modules = {
        path: pair(*module.weight.shape, seed=index)
        for index, (path, module) in enumerate(model.named_modules())
        if path.rpartition(".")[2] in targets
    }
    assert modules
    adapter = write(tmp_path / "a", pairs(modules), target_modules=targets, task_type=task)
    found, _ = merged(adapter, tmp_path / "base")
    stored = safetensors.numpy.load_file(tmp_path / "base" / "model.safetensors")
    assert found.keys() == stored.keys()
    changed = {key for key in found if found[key].tobytes() != stored[key].tobytes()}
    assert len(changed) == len(modules)
    after = getattr(transformers, name).from_pretrained(tmp_path / "merged").state_dict()
    for path, value in model.state_dict().items():
        expected = value.numpy()
        if path.removesuffix(".weight") in modules and path.endswith(".weight"):
            exact = expected.astype(np.float64) + update(*modules[path[: -len(".weight")]], 2.0)
            expected = exact.astype(np.float32)
        assert np.array_equal(after[path].numpy(), expected), path


def test_an_adapter_with_the_names_of_an_older_transformers_merges(tmp_path):
    """The library has since renamed the layers of this model; files keep the old names."""
    family_of("ViTForImageClassification").save_pretrained(tmp_path / "base")
    stored = safetensors.numpy.load_file(tmp_path / "base" / "model.safetensors")
    path = "vit.encoder.layer.0.attention.attention.query"
    assert f"{path}.weight" in stored
    modules = {path: pair(16, 16)}
    adapter = write(tmp_path / "a", pairs(modules), target_modules=["query"])
    found, _ = merged(adapter, tmp_path / "base")
    holds(found, tmp_path / "base", deltas(modules))
