import json

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from lora_export import LoraConfig, heads, inject, pipeline, save_adapter, storage
from lora_export.config import ALL_LINEAR
from lora_export.errors import InputError
from lora_export.injection import lora_layers
from lora_export.live import merge
from lora_export.opening import open_job
from lora_export.records import BaseRef
from lora_export.storage import Checkpoint

CLASSIFIERS = ["bert", "distilbert", "roberta", "gpt2-cls", "llama-cls"]
GENERATORS = ["gpt2", "opt", "llama"]


def adapted(tiny, fill, family, **config):
    return fill(inject_all(tiny(family), **config))


def inject_all(model, **config):
    inject(model, LoraConfig(rank=4, alpha=8.0, targets=(ALL_LINEAR,), **config))
    return model


def tree(model):
    return {path: type(module) for path, module in model.named_modules()}


@pytest.mark.parametrize("family", [*CLASSIFIERS, *GENERATORS])
def test_the_merged_module_tree_is_the_bases(tiny, fill, family):
    assert tree(merge(adapted(tiny, fill, family))) == tree(tiny(family))


@pytest.mark.parametrize("family", [*CLASSIFIERS, *GENERATORS])
def test_the_merged_model_computes_what_the_unmerged_one_does(tiny, fill, logits, family):
    model = adapted(tiny, fill, family)
    exact = logits(adapted(tiny, fill, family).double())
    noise = (logits(model).double() - exact).abs().max()
    assert (logits(merge(model)).double() - exact).abs().max() <= 8 * noise
    assert (logits(tiny(family)).double() - exact).abs().max() > 1000 * noise


@pytest.mark.parametrize("family", GENERATORS)
def test_generation_gives_the_same_tokens_before_and_after(tiny, fill, rows, family):
    model = adapted(tiny, fill, family)
    prompt = {name: value[:1] for name, value in rows().items()}
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    before = model.generate(**prompt, **options)
    assert torch.equal(before, merge(model).generate(**prompt, **options))
    assert not torch.equal(before, tiny(family).generate(**prompt, **options))


def test_a_merged_weight_is_the_float64_value_rounded_once(tiny, fill):
    model = adapted(tiny, fill, "bert")
    merged = merge(model)
    for path, layer in lora_layers(model).items():
        a, b = (t.detach().numpy().astype(np.float64) for t in (layer.lora_A, layer.lora_B))
        exact = layer.weight.numpy().astype(np.float64) + 2.0 * (b @ a)
        found = merged.get_submodule(path).weight.numpy()
        assert np.array_equal(found, exact.astype(np.float32)), path


def test_merging_leaves_the_model_alone(tiny, fill, logits):
    model = adapted(tiny, fill, "bert")
    before = logits(model)
    merge(model)
    assert torch.equal(logits(model), before)
    assert lora_layers(model)


def test_merging_in_place_changes_the_model_itself(tiny, fill):
    model = adapted(tiny, fill, "bert")
    assert merge(model, in_place=True) is model
    assert not lora_layers(model)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_kept(tiny, fill, training):
    merged = merge(adapted(tiny, fill, "bert").train(training))
    assert {module.training for module in merged.modules()} == {training}


def test_a_layer_that_is_merged_already_is_not_merged_twice(tiny, fill):
    model = adapted(tiny, fill, "bert")
    expected = merge(model).state_dict()
    for layer in lora_layers(model).values():
        layer.merge()
    found = merge(model).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_nothing_to_merge_is_an_error():
    with pytest.raises(InputError, match="nothing to merge"):
        merge(nn.Sequential(nn.Linear(2, 2)))


def test_a_value_that_is_not_finite_is_an_error_and_nothing_changes(tiny, fill):
    model = adapted(tiny, fill, "bert")
    last = list(lora_layers(model).values())[-1]
    with torch.no_grad():
        last.lora_B[0, 0] = float("nan")
    with pytest.raises(InputError, match="merged weights are not finite"):
        merge(model, in_place=True)
    assert len(lora_layers(model)) == len(lora_layers(adapted(tiny, fill, "bert")))


# ---------------------------------------------------------------- files


@pytest.fixture(scope="module")
def from_files(tiny_base, tiny_adapter, tmp_path_factory):
    folder = tmp_path_factory.mktemp("merge")
    path, model = tiny_adapter(folder, str(tiny_base))
    certificate = merged_files.merge_files(path, out=folder / "merged")
    return folder / "merged", model, certificate


def test_the_merged_directory_loads_with_plain_transformers(from_files, logits):
    folder, model, _ = from_files
    plain, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits(plain), logits(merge(model)))


def test_the_merged_directory_says_nothing_of_lora_but_in_its_provenance(from_files):
    folder = from_files[0]
    names = [file for file in folder.iterdir() if file.name != "lora_export.json"]
    assert names
    assert not [file.name for file in names if b"lora" in file.read_bytes().lower()]


def test_the_config_carries_labels_and_architecture(from_files):
    config = transformers.AutoConfig.from_pretrained(from_files[0])
    assert config.id2label == {0: "negative", 1: "positive"}
    assert config.architectures == ["BertForSequenceClassification"]


def test_the_tokenizer_comes_along(from_files, tiny_base):
    text = "a great film"
    ids = [
        transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
        for folder in (from_files[0], tiny_base)
    ]
    assert ids[0] == ids[1]


def test_files_and_memory_give_the_same_bits(from_files):
    folder, model, _ = from_files
    written = Checkpoint.open(folder)
    for name, value in merge(model).state_dict().items():
        assert np.array_equal(written.tensors[name].array(), value.numpy()), name


def test_the_same_inputs_give_the_same_bytes(from_files, tmp_path):
    first = from_files[0]
    merged_files.merge_files(first.parent / "sst2.safetensors", out=tmp_path / "again")
    assert storage.digest_tree(tmp_path / "again") == storage.digest_tree(first)


def test_provenance_names_inputs_and_scale(from_files):
    known = json.loads((from_files[0] / "lora_export.json").read_text())
    assert known["adapter"]["sha256"] == storage.sha256(from_files[0].parent / "sst2.safetensors")
    assert known["merged"]
    for tensor, updates in known["merged"].items():
        assert updates == {tensor.removesuffix(".weight"): {"rank": 4, "scale": 2.0}}
    assert known["placed"] == ["classifier.bias", "classifier.weight"]


@pytest.mark.parametrize(
    ("dtype", "torch_dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)]
)
def test_another_dtype_is_rounded_once_from_float64(from_files, tmp_path, dtype, torch_dtype):
    adapter = from_files[0].parent / "sst2.safetensors"
    certificate = merged_files.merge_files(adapter, out=tmp_path / "narrow", dtype=dtype)
    assert certificate.ok
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "narrow", dtype="auto"
    )
    assert {p.dtype for p in model.parameters()} == {torch_dtype}


def test_a_sharded_base_keeps_its_shards(tiny_base, tiny_adapter, logits, tmp_path):
    base = tmp_path / "sharded"
    model = transformers.BertModel.from_pretrained(tiny_base)
    model.save_pretrained(base, max_shard_size="40KB")
    path, live = tiny_adapter(tmp_path, str(base))
    assert merged_files.merge_files(path, out=tmp_path / "merged").ok
    shards = sorted(file.name for file in base.glob("*.safetensors"))
    assert len(shards) > 1
    assert sorted(file.name for file in (tmp_path / "merged").glob("*.safetensors")) == shards
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(plain), logits(merge(live)))


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_a_causal_model_merges_from_files(tiny, fill, logits, tmp_path, family):
    tiny(family).save_pretrained(tmp_path / "base")
    model = adapted(tiny, fill, family)
    base = BaseRef(id=str(tmp_path / "base"))
    save_adapter(model, tmp_path / "a.safetensors", base=base, task_type="CAUSAL_LM")
    assert merged_files.merge_files(tmp_path / "a.safetensors", out=tmp_path / "merged").ok
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(plain), logits(merge(model)))


@pytest.mark.parametrize("kind", ["DistilBertForMaskedLM", "RobertaForMaskedLM"])
def test_the_language_head_of_a_pretrained_base_is_dropped_with_a_reason(
    fill, logits, tmp_path, kind
):
    """What the hub holds under a base's name is mostly a masked language model."""
    family = kind.removesuffix("ForMaskedLM")
    small = {"vocab_size": 100, "max_position_embeddings": 64}
    sizes = (
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
        if family == "DistilBert"
        else {
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 64, "type_vocab_size": 1,
        }
    )  # fmt: skip
    config = getattr(transformers, f"{family}Config")(**small, **sizes)
    getattr(transformers, kind)(config).save_pretrained(tmp_path / "base")
    classifier = getattr(transformers, f"{family}ForSequenceClassification")
    model = classifier.from_pretrained(tmp_path / "base").eval()
    inject(model, LoraConfig(rank=4, modules_to_save=heads(model)))
    path = tmp_path / "a.safetensors"
    save_adapter(fill(model), path, base=BaseRef(id=str(tmp_path / "base")))
    job = open_job(path)
    assert job.plan.dropped
    assert set(job.plan.dropped.values()) == {f"not a tensor of {classifier.__name__}"}
    assert merged_files.merge_files(path, out=tmp_path / "merged").ok
    plain, report = classifier.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits(plain), logits(merge(model)))
