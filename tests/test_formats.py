"""Adapter files, ours and PEFT's. PEFT is a test-only witness: it never runs in the package."""

import json
import re
from dataclasses import replace

import ml_dtypes
import numpy as np
import peft
import pytest
import safetensors.numpy
import torch

from lora_export import Adapter, BaseRef, LoraConfig, inject, read_adapter, storage
from lora_export.errors import InputError
from lora_export.formats import native
from lora_export.formats import peft as peft_directory
from lora_export.injection import attach, describe
from lora_export.records import Factors, Fingerprint, Reading
from lora_export.refusals import TABLE

PREFIX = "base_model.model."
QUERY = "bert.encoder.layer.0.attention.self.query"
VALUE = "bert.encoder.layer.1.attention.self.value"


def _adapter(seed=0):
    """An adapter with odd ranks, alphas and a head, as a caller could build it by hand."""
    random = np.random.default_rng(seed)

    def pair(rank, alpha):
        a, b = random.normal(size=(rank, 32)), random.normal(size=(32, rank))
        return Factors(a.astype(np.float32), b.astype(np.float32), alpha, alpha / rank)

    return Adapter(
        modules={QUERY: pair(4, 8.0), VALUE: pair(2, 4.5)},
        replaced={
            "classifier.bias": random.normal(size=2).astype(np.float32),
            "classifier.weight": random.normal(size=(2, 32)).astype(np.float32),
        },
        variant="lora",
        dropout=0.125,
        task_type="SEQ_CLS",
        base=BaseRef(
            "org/tiny",
            "main",
            "BertForSequenceClassification",
            Fingerprint("ab" * 32, 2, "F32"),
            {"bert.pooler.dense.bias": (32,), "classifier.weight": (2, 32), "scalar": ()},
        ),
        labels=("negative", "positive"),
        training={"seed": 1, "steps": 2},
    )


def _assert_same_tensors(left, right):
    assert left.modules.keys() == right.modules.keys()
    for path, pair in left.modules.items():
        other = right.modules[path]
        np.testing.assert_array_equal(pair.a, other.a)
        np.testing.assert_array_equal(pair.b, other.b)
        assert (pair.alpha, pair.scale) == (other.alpha, other.scale)
    assert left.replaced.keys() == right.replaced.keys()
    for name, value in left.replaced.items():
        np.testing.assert_array_equal(value, right.replaced[name])


# ---------------------------------------------------------------- round trips


def test_the_native_file_holds_the_whole_adapter(tmp_path):
    adapter, path = _adapter(), tmp_path / "a.safetensors"
    native.write(adapter, path)
    found = native.read(path)
    _assert_same_tensors(found, adapter)
    for name in ("variant", "dropout", "task_type", "base", "labels", "training"):
        assert getattr(found, name) == getattr(adapter, name)
    assert found.format == "native"


def test_the_peft_directory_holds_what_peft_has_a_place_for(tmp_path):
    adapter = _adapter()
    peft_directory.write(adapter, tmp_path / "a")
    found = peft_directory.read(tmp_path / "a")
    _assert_same_tensors(found, adapter)
    assert (found.variant, found.dropout, found.task_type) == ("lora", 0.125, "SEQ_CLS")
    assert found.base == BaseRef("org/tiny", "main")
    assert found.format == "peft"


def test_native_to_peft_and_back_loses_no_bit(tmp_path):
    native.write(_adapter(), tmp_path / "one")
    peft_directory.write(native.read(tmp_path / "one"), tmp_path / "two")
    native.write(peft_directory.read(tmp_path / "two"), tmp_path / "three")
    _assert_same_tensors(native.read(tmp_path / "three"), _adapter())


def test_a_rank_stabilised_adapter_stays_one(tmp_path):
    adapter = _adapter()
    modules = {
        path: replace(pair, scale=pair.alpha / pair.rank**0.5)
        for path, pair in adapter.modules.items()
    }
    adapter = replace(adapter, modules=modules, variant="rslora")
    native.write(adapter, tmp_path / "one")
    peft_directory.write(adapter, tmp_path / "two")
    for found in (native.read(tmp_path / "one"), peft_directory.read(tmp_path / "two")):
        assert found.variant == "rslora"
        _assert_same_tensors(found, adapter)


def test_an_adapter_without_a_base_id_stays_without(tmp_path):
    native.write(replace(_adapter(), base=BaseRef()), tmp_path / "a")
    assert native.read(tmp_path / "a").base == BaseRef()


@pytest.mark.parametrize("write", [native.write, peft_directory.write])
def test_the_same_adapter_gives_the_same_bytes(tmp_path, write):
    adapter = _adapter()
    shuffled = replace(
        adapter,
        modules=dict(reversed(adapter.modules.items())),
        replaced=dict(reversed(adapter.replaced.items())),
        training=dict(reversed(adapter.training.items())),
    )
    contents = []
    for name, each in (("one", adapter), ("two", shuffled)):
        write(each, tmp_path / name)
        place = tmp_path / name
        files = [place] if place.is_file() else sorted(place.iterdir())
        contents.append([file.read_bytes() for file in files])
    assert contents[0] == contents[1]


def test_the_native_file_has_pefts_tensor_names(tmp_path):
    native.write(_adapter(), tmp_path / "a")
    expected = {f"{PREFIX}{path}.lora_{side}.weight" for path in (QUERY, VALUE) for side in "AB"}
    expected |= {f"{PREFIX}classifier.weight", f"{PREFIX}classifier.bias"}
    assert safetensors.numpy.load_file(tmp_path / "a").keys() == expected


def test_a_format_is_recognised_by_its_files(tmp_path):
    native.write(_adapter(), tmp_path / "file")
    peft_directory.write(_adapter(), tmp_path / "folder")
    found = {
        (place.name, module.__name__.rsplit(".", 1)[-1]): module.detect(place)
        for place in (tmp_path / "file", tmp_path / "folder", tmp_path / "nowhere")
        for module in (native, peft_directory)
    }
    assert {key for key, is_it in found.items() if is_it} == {
        ("file", "native"),
        ("folder", "peft"),
    }


@pytest.mark.parametrize("metadata", [5, ["x"], None, "lora_export.config"])
def test_recognising_a_damaged_file_never_raises(tmp_path, metadata):
    text = json.dumps({"__metadata__": metadata}).encode()
    (tmp_path / "x").write_bytes(len(text).to_bytes(8, "little") + text)
    assert native.detect(tmp_path / "x") is False


# ---------------------------------------------------------------- PEFT reads what we write


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("bert", {"targets": ("query", "value"), "modules_to_save": ("classifier",)}),
        ("bert", {"targets": ("query", "value")}),
        # PEFT matches modules_to_save by the end of the name, so `classifier` alone would also
        # claim `pre_classifier`.
        ("distilbert", {"targets": "q_lin", "modules_to_save": ("pre_classifier", "classifier")}),
        ("roberta", {"modules_to_save": ("classifier",)}),
        ("opt", {"targets": ("q_proj", "fc1"), "rank_pattern": {"fc1": 2}}),
        ("llama", {"alpha_pattern": {"*.layers.0.*": 3.0}, "variant": "rslora"}),
        pytest.param(
            "gpt2",
            {"targets": ("c_attn", "mlp.c_proj"), "rank_pattern": {"*.h.1.*": 3}},
            # PEFT sets it right by itself; an adapter does not know the class of a base's layer.
            marks=pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
        ),
    ],
    ids=["head", "no head", "head of two", "head with two layers", "ranks", "alphas", "conv1d"],
)
def test_peft_loads_what_we_write(tiny, fill, logits, tmp_path, family, settings):
    model = tiny(family)
    inject(model, LoraConfig(4, 6, **settings))
    fill(model)
    task = "CAUSAL_LM" if family in ("opt", "llama", "gpt2") else "SEQ_CLS"
    peft_directory.write(describe(model, task_type=task), tmp_path / "a")

    config = peft.PeftConfig.from_pretrained(tmp_path / "a")
    empty = peft.get_peft_model(tiny(family), config)
    result = peft.set_peft_model_state_dict(empty, peft.load_peft_weights(tmp_path / "a"))
    assert result.unexpected_keys == []
    trained = [key for key in result.missing_keys if "lora_" in key or "modules_to_save" in key]
    assert trained == []

    loaded = peft.PeftModel.from_pretrained(tiny(family), tmp_path / "a")
    expected = logits(model)
    assert not torch.allclose(logits(tiny(family)), expected, atol=1e-2)
    torch.testing.assert_close(logits(loaded), expected, atol=2e-6, rtol=1e-6)


# ---------------------------------------------------------------- we read what PEFT writes


def _saved_by_peft(model, path, **settings):
    """A PEFT model with random B, saved; and the model itself."""
    random = torch.Generator().manual_seed(5)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                noise = torch.empty_like(parameter).normal_(0, 0.2, generator=random)
                parameter.add_(noise) if "lora_" not in name else parameter.copy_(noise)
    wrapped.save_pretrained(path)
    return wrapped.eval()


PEFT_CASES = {
    "plain": ("bert", {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value"]}),
    "patterns": (
        "bert",
        {
            "r": 4, "lora_alpha": 8, "target_modules": ["query", "value", "intermediate.dense"],
            "rank_pattern": {"layer.0.attention.self.query": 2, "intermediate.dense": 3},
            "alpha_pattern": {"layer.1.attention.self.value": 5, "intermediate.dense": 1.5},
        },
    ),
    "rslora": (
        "distilbert",
        {"r": 5, "lora_alpha": 3, "use_rslora": True, "target_modules": ["q_lin", "lin2"]},
    ),
    "head": (
        "bert",
        {
            "task_type": "SEQ_CLS", "r": 2, "lora_alpha": 4, "target_modules": ["key"],
            "modules_to_save": ["classifier"],
        },
    ),
    "head of two layers": (
        "roberta",
        {"r": 2, "target_modules": ["key"], "modules_to_save": ["classifier"]},
    ),
    "all-linear": ("llama", {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}),
    "regex": ("opt", {"r": 2, "target_modules": r".*layers\.1.*\.(q|v)_proj"}),
    "conv1d": (
        "gpt2",
        {"r": 3, "lora_alpha": 9, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
    ),
}  # fmt: skip
EACH_CASE = pytest.mark.parametrize(("family", "settings"), PEFT_CASES.values(), ids=PEFT_CASES)


@EACH_CASE
def test_an_adapter_saved_by_peft_gives_pefts_logits(tiny, logits, tmp_path, family, settings):
    wrapped = _saved_by_peft(tiny(family), tmp_path / "a", **settings)
    model = tiny(family)
    attach(model, read_adapter(tmp_path / "a"))
    expected = logits(wrapped)
    assert not torch.allclose(logits(tiny(family)), expected, atol=1e-2)
    torch.testing.assert_close(logits(model), expected, atol=2e-6, rtol=1e-6)


@EACH_CASE
def test_an_adapter_saved_by_peft_has_pefts_updates(tiny, tmp_path, family, settings):
    wrapped = _saved_by_peft(tiny(family), tmp_path / "a", **settings)
    adapter = read_adapter(tmp_path / "a")
    layers = {
        name.removeprefix(PREFIX): module
        for name, module in wrapped.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert layers.keys() == adapter.modules.keys()
    for path, layer in layers.items():
        a = layer.lora_A["default"].weight.detach().double().numpy()
        b = layer.lora_B["default"].weight.detach().double().numpy()
        pair = adapter.modules[path]
        np.testing.assert_array_equal(
            pair.scale * (pair.b.astype(np.float64) @ pair.a.astype(np.float64)),
            layer.scaling["default"] * (b @ a),
        )


# PEFT looks for the named base on the hub, which is out of reach here.
@pytest.mark.filterwarnings("ignore:Could not find a config file in org/base:UserWarning")
def test_the_base_that_peft_names_is_kept_with_the_class_that_it_trained(tiny, tmp_path):
    model = tiny("bert")
    model.config.name_or_path = "org/base"
    model.name_or_path = "org/base"
    _saved_by_peft(model, tmp_path / "a", target_modules=["query"], revision="v2")
    assert read_adapter(tmp_path / "a").base == BaseRef(
        "org/base", "v2", "BertForSequenceClassification"
    )


def test_a_bias_that_the_config_promises_and_the_file_lacks_is_noted(tmp_path):
    _peft_files(tmp_path, config={"bias": "all"})
    assert "bias='all'" in read_adapter(tmp_path).notes[0]


# ---------------------------------------------------------------- refusals


def _tensors():
    random = np.random.default_rng(3)
    return {
        f"{PREFIX}{QUERY}.lora_A.weight": random.normal(size=(2, 32)).astype(np.float32),
        f"{PREFIX}{QUERY}.lora_B.weight": random.normal(size=(32, 2)).astype(np.float32),
    }


def _peft_files(folder, config=None, tensors=None):
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", **(config or {})}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    tensors = _tensors() if tensors is None else tensors
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def _refused(folder, message, **files):
    with pytest.raises(InputError, match=message):
        read_adapter(_peft_files(folder, **files))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_named_and_counted(tmp_path, value):
    tensors = _tensors()
    tensors[f"{PREFIX}{QUERY}.lora_B.weight"][3, :] = value
    _refused(tmp_path, r"query\.lora_B\.weight: 2 of 64 values are NaN", tensors=tensors)


@pytest.mark.parametrize("side", ["A", "B"])
def test_half_a_pair_is_refused(tmp_path, side):
    tensors = _tensors()
    del tensors[f"{PREFIX}{QUERY}.lora_{side}.weight"]
    _refused(tmp_path, rf"self\.query: lora_{side} is missing", tensors=tensors)


def test_a_rank_that_differs_from_the_config_is_refused(tmp_path):
    _refused(tmp_path, "config says rank 8, the tensors have rank 2", config={"r": 8})


def test_a_rank_pattern_that_differs_from_the_tensors_is_refused(tmp_path):
    _refused(tmp_path, "config says rank 3", config={"rank_pattern": {"query": 3}})


def test_factors_that_do_not_fit_each_other_are_refused(tmp_path):
    tensors = _tensors()
    tensors[f"{PREFIX}{QUERY}.lora_B.weight"] = np.ones((32, 3), np.float32)
    _refused(tmp_path, r"lora_A \(2, 32\) and lora_B \(32, 3\) do not form a pair", tensors=tensors)


# What a config may say wrong, field by field, stands in test_peft_config.py.
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "config says use_dora, the file holds no lora_magnitude_vector"),
        ({"lora_bias": True}, r"config says lora_bias, the file holds no lora_B\.bias"),
        ({"kasa_config": {"beta": 1}}, "config says kasa_config, the file holds no lora_diag"),
        ({"peft_type": "ADALORA", "init_r": 2}, "says peft_type ADALORA, the file holds no lora_E"),
        ({"peft_type": "LOHA"}, rf"{TABLE['peft-type'].case} \(peft_type is 'LOHA'\)"),
        ({"alora_invocation_tokens": [1, 2]}, TABLE["alora"].why),
        ({"arrow_config": {"top_k": 2}}, TABLE["arrow"].why),
        ({"use_qalora": True}, TABLE["qalora"].why),
        ({"r": 0}, "config: r is 0"),
        ({"lora_alpha": None}, "config: lora_alpha is None"),
        ({"lora_alpha": -4}, "config: lora_alpha is -4"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf"),
        ({"alpha_pattern": {"query": -1}}, "alpha"),
        ({"alpha_pattern": {"query": "much"}}, "alpha"),
        ({"alpha_pattern": ["query"]}, "alpha_pattern"),
        ({"rank_pattern": ["query"]}, "rank_pattern"),
        ({"rank_pattern": {"(": 2}}, r"rank_pattern holds .* regular expression"),
        ({"lora_dropout": "some"}, "lora_dropout"),
        ({"lora_dropout": 1.5}, "lora_dropout"),
    ],
    ids=str,
)
def test_a_config_that_cannot_be_merged_exactly_is_refused(tmp_path, config, message):
    _refused(tmp_path, message, config=config)


def test_patterns_whose_order_decides_are_refused(tmp_path):
    patterns = {"query": 2, "self.query": 4}
    _refused(tmp_path, TABLE["pattern-order"].why, config={"alpha_pattern": patterns})


@pytest.mark.parametrize(("order", "alpha"), [("first", 2), ("last", 4)])
def test_patterns_whose_order_decides_are_read_in_the_order_that_the_caller_says(
    tmp_path, order, alpha
):
    patterns = {"query": 2, "self.query": 4}
    _peft_files(tmp_path, config={"alpha_pattern": patterns})
    pair = read_adapter(tmp_path, reading=Reading(pattern_order=order)).modules[QUERY]
    assert (pair.alpha, pair.scale) == (alpha, alpha / 2)


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        (f"{PREFIX}{QUERY}.lora_C.weight", (2, 2), TABLE["unknown-tensor"].case),
        (f"{PREFIX}{QUERY}.lora_A.base_layer.x.weight", (2, 2), TABLE["unknown-tensor"].case),
        ("lora_A.weight", (2, 32), TABLE["unknown-tensor"].case),
        (f"{PREFIX}bert.x.lora_embedding_A", (2, 2), "bert.x: lora_embedding_B is missing"),
        (f"{PREFIX}{QUERY}.lora_embedding_B", (32, 2), "lora_embedding_A is missing"),
        (
            f"{PREFIX}{QUERY}.lora_magnitude_vector",
            (32,),
            "the file holds lora_magnitude_vector, the config ",
        ),
        (f"{PREFIX}{QUERY}.lora_B.bias", (32,), "the file holds lora_B.bias, the config "),
        (f"{PREFIX}{QUERY}.lora_diag", (2,), "the file holds lora_diag, the config "),
        (f"{PREFIX}{QUERY}.lora_E", (2, 1), "the file holds lora_E, the config "),
        (
            f"{PREFIX}bert.x.token_adapter.trainable_tokens_delta",
            (2, 32),
            "bert.x: the file holds trained rows, the config names none",
        ),
    ],
)
def test_a_tensor_that_is_not_understood_is_refused_by_name(tmp_path, key, shape, message):
    tensors = {**_tensors(), key: np.ones(shape, np.float32)}
    _refused(tmp_path, re.escape(message), tensors=tensors)


# Each of these was refused once.
def test_a_pair_without_pefts_prefix_is_read_with_a_note(tmp_path):
    tensors = {key.removeprefix(PREFIX): value for key, value in _tensors().items()}
    adapter = read_adapter(_peft_files(tmp_path, tensors=tensors))
    assert adapter.modules.keys() == {QUERY}
    assert any("2 tensors have no prefix" in note for note in adapter.notes)


@pytest.mark.parametrize("end", ["modules_to_save.default.weight", "weight"])
def test_a_trained_head_is_read_with_and_without_pefts_wrapper(tmp_path, end):
    tensors = {**_tensors(), f"{PREFIX}classifier.{end}": np.ones((2, 2), np.float32)}
    adapter = read_adapter(_peft_files(tmp_path, tensors=tensors))
    assert adapter.replaced.keys() == {"classifier.weight"}


def test_a_whole_weight_under_the_name_of_pefts_wrapper_is_read(tmp_path):
    tensors = {**_tensors(), f"{PREFIX}{VALUE}.base_layer.weight": np.ones((2, 2), np.float32)}
    adapter = read_adapter(_peft_files(tmp_path, tensors=tensors))
    assert adapter.replaced.keys() == {f"{VALUE}.weight"}


@pytest.mark.parametrize("kind", [np.int64, np.int8, np.bool_])
def test_factors_that_are_no_floats_are_refused(tmp_path, kind):
    tensors = {name: np.ones_like(value, kind) for name, value in _tensors().items()}
    _refused(tmp_path, "lora_A", tensors=tensors)


@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_factors_keep_the_dtype_of_the_file(tmp_path, kind):
    """Widened early, an adapter would be saved larger than it was; they are widened when used."""
    tensors = {name: value.astype(kind) for name, value in _tensors().items()}
    _peft_files(tmp_path)
    storage.write_safetensors(
        tmp_path / "adapter_model.safetensors",
        [storage.NewTensor.of(name, value) for name, value in tensors.items()],
        {},
    )
    pair = read_adapter(tmp_path).modules[QUERY]
    assert (pair.a.dtype, pair.b.dtype) == (kind, kind)
    np.testing.assert_array_equal(pair.a, tensors[f"{PREFIX}{QUERY}.lora_A.weight"])


def test_a_file_with_heads_only_is_refused(tmp_path):
    tensors = {f"{PREFIX}classifier.weight": np.ones((2, 32), np.float32)}
    _refused(tmp_path, "no lora_A and lora_B tensors at all", tensors=tensors)


@pytest.mark.parametrize(
    "fault",
    [
        "lora_A is missing",
        r"classifier\.bias: 1 of 2 values are NaN",
        rf"{QUERY}\.lora_C: {re.escape(TABLE['unknown-tensor'].case)}",
        r"no\.pair: lora_B is missing",
    ],
)
def test_all_faults_of_the_tensors_are_listed_at_once(tmp_path, fault):
    _refused(tmp_path, fault, tensors=_faulty())


@pytest.mark.parametrize(
    "fault",
    [
        "config: r is -1",
        "lora_dropout is 2",
        TABLE["qalora"].why,
        "expected true or false",
        # The tensors are looked at by themselves, whatever the config.
        r"classifier\.bias: 1 of 2 values are NaN",
        rf"{QUERY}\.lora_C: {re.escape(TABLE['unknown-tensor'].case)}",
    ],
)
def test_all_faults_of_the_config_are_listed_at_once(tmp_path, fault):
    config = {"r": -1, "lora_dropout": 2, "use_qalora": True, "use_dora": "yes"}
    _refused(tmp_path, fault, config=config, tensors=_faulty())


def _faulty():
    tensors = _tensors()
    del tensors[f"{PREFIX}{QUERY}.lora_A.weight"]
    tensors["no.pair.lora_A.weight"] = np.ones((2, 4), np.float32)
    tensors[f"{PREFIX}{QUERY}.lora_C"] = np.ones(1, np.float32)
    tensors[f"{PREFIX}classifier.bias"] = np.array([np.nan, 1], np.float32)
    return tensors


def test_a_pickle_that_is_no_archive_is_refused_and_never_opened(tmp_path):
    _peft_files(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(InputError, match=TABLE["pickle"].remedy) as caught:
        read_adapter(tmp_path)
    assert "adapter_model.bin" in str(caught.value)


def test_a_pickle_of_tensors_reads_as_the_safetensors_file_does(tmp_path):
    for name in ("safe", "old"):
        (tmp_path / name).mkdir()
        _peft_files(tmp_path / name)
    tensors = {name: torch.from_numpy(value) for name, value in _tensors().items()}
    torch.save(tensors, tmp_path / "old" / "adapter_model.bin")
    (tmp_path / "old" / "adapter_model.safetensors").unlink()
    safe, old = (read_adapter(tmp_path / name) for name in ("safe", "old"))
    _assert_same_tensors(safe, old)
    assert (safe.variant, safe.notes) == (old.variant, old.notes)
    assert safe.sha256 != old.sha256


def test_a_peft_directory_without_weights_is_refused(tmp_path):
    _peft_files(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    neither = r"neither adapter_model\.safetensors nor adapter_model\.bin"
    with pytest.raises(InputError, match=neither):
        read_adapter(tmp_path)


def test_a_config_that_is_no_json_is_refused(tmp_path):
    _peft_files(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        read_adapter(tmp_path)


def _rewrite(path, **metadata):
    """Change metadata of a native file; None takes an entry away."""
    with safetensors.safe_open(path, "numpy") as file:
        fields = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    fields |= {f"lora_export.{name}": value for name, value in metadata.items()}
    kept = {name: value for name, value in fields.items() if value is not None}
    safetensors.numpy.save_file(tensors, path, kept)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"schema": "2"}, "adapter schema 2; this version reads 1"),
        ({"schema": None}, "adapter schema None"),
        ({"schema": "{"}, "metadata lora_export.schema is not JSON"),
        ({"config": "[]"}, "is damaged"),
        ({"base": "[]"}, "is damaged"),
        ({"base": '{"colour": 1}'}, r"lora_export\.base is damaged"),
        ({"base": '{"fingerprint": {"sha256": "0"}}'}, r"lora_export\.base is damaged"),
        ({"base": '{"fingerprint": 5}'}, r"lora_export\.base is damaged"),
        ({"tensors": '[["a", [1]]]'}, r"lora_export\.tensors is damaged"),
        ({"tensors": '{"a": 1}'}, r"lora_export\.tensors is damaged"),
        ({"tensors": '{"a": [1, -1]}'}, r"lora_export\.tensors is damaged"),
        ({"tensors": '{"a": [1, true]}'}, r"lora_export\.tensors is damaged"),
        ({"labels": "5"}, "labels"),
        ({"labels": '"negative"'}, "labels"),
        ({"training": "[1]"}, "training"),
    ],
    ids=str,
)
def test_damaged_or_newer_metadata_is_refused(tmp_path, metadata, message):
    native.write(_adapter(), tmp_path / "a")
    _rewrite(tmp_path / "a", **metadata)
    with pytest.raises(InputError, match=message):
        read_adapter(tmp_path / "a")


def test_a_truncated_native_file_says_so(tmp_path):
    native.write(_adapter(), tmp_path / "a")
    content = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(content[:-1])
    with pytest.raises(InputError, match="truncated"):
        read_adapter(tmp_path / "a")


def test_an_lfs_pointer_in_place_of_an_adapter_says_so(tmp_path):
    (tmp_path / "a.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(InputError, match="Git LFS pointer"):
        read_adapter(tmp_path / "a.safetensors")


@pytest.mark.parametrize("kind", [np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.int32])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_an_alpha_of_kohya_is_a_number_of_any_dtype(tmp_path, kind, shape):
    """sd-scripts stores torch.tensor(alpha), which is a whole number where alpha is one."""
    tensors = {
        "lora_te_x.lora_down.weight": np.ones((2, 8), np.float32),
        "lora_te_x.lora_up.weight": np.ones((8, 2), np.float32),
        "lora_te_x.alpha": np.full(shape, 4, kind),
    }
    made = [storage.NewTensor.of(name, value) for name, value in tensors.items()]
    storage.write_safetensors(tmp_path / "k.safetensors", made, {})
    (pair,) = read_adapter(tmp_path / "k.safetensors").modules.values()
    assert (pair.alpha, pair.scale) == (4.0, 2.0)
