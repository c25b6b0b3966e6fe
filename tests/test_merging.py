"""What a merge leaves on disk, held against the same merge in memory."""

import json

import live_made
import numpy as np
import on_disk
import pytest
import torch
import transformers
from blake3 import blake3
from hand_made import edit_tensors

from lora_export import LoraConfig, heads, inject, merged_files, merging, save_adapter, storage
from lora_export.config import ALL_LINEAR
from lora_export.errors import InputError
from lora_export.live import merge
from lora_export.opening import open_job
from lora_export.records import BaseRef
from lora_export.storage import Checkpoint


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
    operations = {name: told["operation"] for name, told in known["tensors"].items()}
    placed = [name for name, operation in operations.items() if operation == "place"]
    assert placed == ["classifier.bias", "classifier.weight"]
    assert operations.keys() == Checkpoint.open(from_files[0]).tensors.keys()
    assert known["schema"] == 2
    assert known["versions"].keys() == {"numpy", "ml_dtypes", "blake3"}


def test_provenance_holds_the_digest_of_every_tensor(from_files):
    known = json.loads((from_files[0] / "lora_export.json").read_text())
    for name, info in Checkpoint.open(from_files[0]).tensors.items():
        assert known["tensors"][name]["blake3"] == blake3(info.read()).hexdigest()


def test_the_recorded_files_are_the_files(from_files):
    folder = from_files[0]
    there = {file.name: file for file in storage.digest_tree(folder)}
    there.pop("lora_export.json")
    assert {file.name: file for file in merging.recorded_files(folder)} == there


def test_a_provenance_without_files_is_refused(tmp_path):
    (tmp_path / "lora_export.json").write_text('{"files": {}, "companions": {}}')
    with pytest.raises(InputError, match="names no files"):
        merging.recorded_files(tmp_path)


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
    certificate = merged_files.merge_files(path, out=tmp_path / "merged")
    assert certificate.ok
    assert set(certificate.outputs) == set(storage.digest_tree(tmp_path / "merged"))
    assert merged_files.verify_merged(tmp_path / "merged", path).ok
    shards = sorted(file.name for file in base.glob("*.safetensors"))
    assert len(shards) > 1
    assert sorted(file.name for file in (tmp_path / "merged").glob("*.safetensors")) == shards
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(plain), logits(merge(live)))


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_a_causal_model_merges_from_files(tiny, fill, logits, tmp_path, family):
    tiny(family).save_pretrained(tmp_path / "base")
    model = tiny(family)
    inject(model, LoraConfig(rank=4, alpha=8.0, targets=(ALL_LINEAR,)))
    fill(model)
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


MADE_FROM_ALL_OF_A_WEIGHT = {
    "dora": ("dora", {}),
    "pissa": ("plain", {"init_lora_weights": "pissa"}),
    "olora": ("plain", {"init_lora_weights": "olora"}),
}


@pytest.mark.parametrize("kind", ["plain", *MADE_FROM_ALL_OF_A_WEIGHT])
def test_a_weight_that_is_not_finite_is_refused_by_name_with_its_count(tmp_path, kind):
    case, more = MADE_FROM_ALL_OF_A_WEIGHT.get(kind, (kind, {}))
    family, tensors, config = live_made.CASES[case]
    base, name = live_made.base_of(family, tmp_path), f"{live_made.K}.weight"

    def spoil(arrays):
        arrays[name][3, 5] = np.nan

    edit_tensors(base / "model.safetensors", spoil)
    adapter = on_disk.peft_folder(tmp_path / "adapter", tensors, **config, **more)
    count = {"plain": 1, "dora": 32}.get(kind, 512)  # DoRA takes a row, a decomposition everything
    message = rf"{name}: {count} of 512 merged weights are not finite in F32"
    with pytest.raises(InputError, match=message):
        merged_files.merge_files(adapter, base=str(base), out=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
