"""Faults that would go unseen: each is planted in real files, and must not end in exit 0."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from hand_made import edit_tensors

from lora_export import (
    LoraConfig,
    heads,
    inject,
    merged_files,
    models,
    pipeline,
    read_adapter,
    save_adapter,
    storage,
    timing,
)
from lora_export.architecture import names_of
from lora_export.errors import AdapterMismatch, InputError
from lora_export.formats import peft
from lora_export.opening import DTYPES, Options, open_job
from lora_export.plan import plan
from lora_export.records import Adapter, BaseRef, TensorSpec
from lora_export.refusals import TABLE
from lora_export.resolving import architecture


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(timing, "LEAST_ROUNDS", 10)
    monkeypatch.setattr(timing, "MOST_ROUNDS", 10)


@pytest.fixture
def adapter(tiny_base, tiny_adapter, tmp_path):
    return tiny_adapter(tmp_path, str(tiny_base))[0]


@pytest.fixture
def peft_adapter(adapter, tmp_path):
    """The same adapter as PEFT would have written it, with its usual list of heads."""
    folder = tmp_path / "peft"
    peft.write(read_adapter(adapter), folder)
    edit_json(folder / "adapter_config.json", modules_to_save=["classifier", "score"])
    return folder


def edit_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_the_unplanted_adapter_merges(peft_adapter, tmp_path):
    assert merged_files.merge_files(peft_adapter, out=tmp_path / "merged").ok


def test_an_unmerged_model_is_not_exported(tiny_base, classifier_of, fill, tmp_path):
    """Its base weights have their usual names, so it would load, and lose its adapter."""
    model = classifier_of(tiny_base)
    inject(model, LoraConfig(modules_to_save=heads(model)))
    fill(model).save_pretrained(tmp_path / "d")
    transformers.AutoTokenizer.from_pretrained(tiny_base).save_pretrained(tmp_path / "d")
    with pytest.raises(InputError, match="an adapter in it was never merged"):
        pipeline.export_file("torchscript", model=tmp_path / "d", out=tmp_path / "m.pt")


def test_an_unmerged_model_is_no_base(adapter, tiny_base, classifier_of, fill, tmp_path):
    model = classifier_of(tiny_base)
    inject(model, LoraConfig(targets=("query",)))
    fill(model).save_pretrained(tmp_path / "d")
    with pytest.raises(AdapterMismatch, match="the base holds an unmerged adapter"):
        open_job(adapter, str(tmp_path / "d"))


def test_a_lost_head_is_not_replaced_by_the_bases_own(
    peft_adapter, tiny_base, classifier_of, tmp_path
):
    base = tmp_path / "base"
    classifier_of(tiny_base, seed=9).save_pretrained(base)

    def lose(arrays):
        for name in [n for n in arrays if "classifier" in n]:
            del arrays[name]

    edit_tensors(peft_adapter / "adapter_model.safetensors", lose)
    with pytest.raises(AdapterMismatch, match="classifier: trained whole by the config, absent"):
        open_job(peft_adapter, str(base))


def lose_layer(arrays):
    for name in [n for n in arrays if "layer.1." in n]:
        del arrays[name]


def test_a_lost_layer_that_the_config_names_in_full_is_refused(adapter):
    edit_tensors(adapter, lose_layer)
    with pytest.raises(AdapterMismatch, match=r"layer\.1\.\S+: adapted by the config, absent"):
        open_job(adapter)


def test_a_lost_layer_that_the_config_names_by_its_end_is_noted(peft_adapter):
    edit_tensors(peft_adapter / "adapter_model.safetensors", lose_layer)
    edit_json(peft_adapter / "adapter_config.json", target_modules=["query", "value"])
    notes = " ".join(open_job(peft_adapter).plan.notes)
    assert "the file has no pair for them: bert.encoder.layer.1.attention.self.query" in notes


def test_two_tensors_for_one_place_are_refused(peft_adapter):
    def double(arrays):
        name = next(n for n in arrays if n.endswith("lora_A.weight"))
        arrays[name.replace(".weight", ".default.weight")] = arrays[name] * 2

    edit_tensors(peft_adapter / "adapter_model.safetensors", double)
    with pytest.raises(InputError, match="a second lora_A for"):
        open_job(peft_adapter)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("use_rslora", "false", "use_rslora is 'false'; expected true or false"),
        ("new_variant_2027", {"on": True}, TABLE["unknown-field"].why),
        ("new_variant_2027", {"on": True}, "new_variant_2027 is {'on': True}"),
        ("task_type", ["a"], r"task_type is \['a'\]; expected a text"),
        ("base_model_name_or_path", 5, "base_model_name_or_path is 5; expected a text"),
        ("revision", 5, "revision is 5; expected a text"),
        ("alpha_pattern", {"(": 1}, r"alpha_pattern holds '\('.* regular expression"),
    ],
)
def test_a_config_that_is_not_understood_is_refused(peft_adapter, field, value, message):
    edit_json(peft_adapter / "adapter_config.json", **{field: value})
    with pytest.raises(InputError, match=message):
        open_job(peft_adapter)


def test_a_task_that_is_not_known_is_not_guessed(peft_adapter):
    """The base has no head and the task names no class: nothing says what the head belongs to."""
    edit_json(peft_adapter / "adapter_config.json", task_type="SEQUENCE_CLASSIFICATION")
    with pytest.raises(AdapterMismatch, match=r"classifier\.weight: no such tensor"):
        open_job(peft_adapter)


def test_a_merge_that_was_altered_is_not_exported(adapter, tmp_path):
    merged_files.merge_files(adapter, out=tmp_path / "merged")

    def alter(arrays):
        arrays["classifier.weight"] = arrays["classifier.weight"] * 3

    edit_tensors(tmp_path / "merged" / "model.safetensors", alter)
    with pytest.raises(InputError, match=r"changed after it was merged: model\.safetensors"):
        pipeline.export_file("torchscript", model=tmp_path / "merged", out=tmp_path / "m.pt")


@pytest.mark.slow
def test_a_file_that_is_swapped_while_a_run_measures_fails(adapter, tmp_path, quick, monkeypatch):
    whole = timing.measure

    def swap(*arguments, **options):
        (staged,) = tmp_path.glob(".run.staging-*/files/run")
        (staged / "model.pt").write_bytes(b"another model")
        return whole(*arguments, **options)

    monkeypatch.setattr(timing, "measure", swap)
    certificate = pipeline.run(adapter, out=tmp_path / "run", formats=["torchscript"])
    failed = {(v.check, v.subject) for v in certificate.verdicts if not v.passed}
    assert ("intact", "files") in failed


@pytest.mark.slow
def test_a_span_model_is_exported_with_both_ends(tiny_base, fill, tmp_path, quick):
    model = transformers.BertForQuestionAnswering.from_pretrained(tiny_base)
    inject(model, LoraConfig(modules_to_save=heads(model)))
    save_adapter(fill(model), tmp_path / "qa.safetensors", base=BaseRef(id=str(tiny_base)))
    formats = ("onnx",)
    certificate = pipeline.run(tmp_path / "qa.safetensors", out=tmp_path / "run", formats=formats)
    assert not [v for v in certificate.verdicts if not v.passed and v.check != "latency"]
    import onnxruntime

    session = onnxruntime.InferenceSession(str(tmp_path / "run" / "model.onnx"))
    assert [node.name for node in session.get_outputs()] == ["start_logits", "end_logits"]


def test_a_head_of_any_size_keeps_its_labels_without_being_told(tiny_base, fill, tmp_path):
    names = {0: "bad", 1: "fair", 2: "good"}
    model = transformers.BertForSequenceClassification.from_pretrained(tiny_base, id2label=names)
    inject(model, LoraConfig(modules_to_save=heads(model)))
    save_adapter(fill(model), tmp_path / "a.safetensors")
    assert merged_files.merge_files(
        tmp_path / "a.safetensors", base=str(tiny_base), out=tmp_path / "merged"
    ).ok
    assert transformers.AutoConfig.from_pretrained(tmp_path / "merged").id2label == names


def test_one_side_of_a_tie_is_not_replaced_alone(tiny, tmp_path):
    tiny("gpt2").save_pretrained(tmp_path / "base")
    adapter = Adapter(
        modules={},
        replaced={"lm_head.weight": np.ones((100, 32), np.float32)},
        variant="lora",
    )
    config = transformers.AutoConfig.from_pretrained(tmp_path / "base")
    base = storage.Checkpoint.open(tmp_path / "base")
    found = architecture(models.blank(config), base, names_of(adapter))
    message = rf"lm_head\.weight: {TABLE['tied'].case} \(shared with transformer\.wte\.weight\)"
    with pytest.raises(AdapterMismatch, match=message):
        plan(adapter, base, found)


def test_a_base_whose_config_is_nonsense_is_an_input_error(
    adapter, peft_adapter, tiny_base, tmp_path
):
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    for change in ({"hidden_size": 31}, {"hidden_size": "wide"}, {"hidden_act": "no such"}):
        shutil.copy(tiny_base / "config.json", base / "config.json")
        edit_json(base / "config.json", **change)
        with pytest.raises(InputError, match="config"):
            open_job(peft_adapter, str(base))
        # This one names the tensors of its model, so that only a run has to build that.
        with pytest.raises(InputError, match="config"):
            pipeline.run(adapter, base=str(base), out=tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_a_model_of_sound_is_refused_by_what_it_takes(tiny_base, tmp_path):
    config = transformers.WhisperConfig(
        vocab_size=112, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, begin_suppress_tokens=None,
    )  # fmt: skip
    transformers.WhisperForConditionalGeneration(config).save_pretrained(tmp_path / "whisper")
    transformers.AutoTokenizer.from_pretrained(tiny_base).save_pretrained(tmp_path / "whisper")
    with pytest.raises(InputError, match="WhisperForConditionalGeneration takes input_features"):
        pipeline.export_file("onnx", model=tmp_path / "whisper", out=tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()


def test_an_adapter_is_not_taken_for_a_merged_model(peft_adapter, tmp_path):
    with pytest.raises(InputError, match="it is an adapter; run `lora-export merge` first"):
        pipeline.export_file("onnx", model=peft_adapter, out=tmp_path / "m.onnx")


@pytest.mark.slow
def test_threads_of_the_caller_are_given_back(adapter, tmp_path, quick):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        pipeline.run(adapter, out=tmp_path / "run", formats=["torchscript"])
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_everything_that_went_in_is_in_the_certificate(adapter, tmp_path, quick):
    (tmp_path / "mine.tsv").write_text("sentence\tlabel\na good film\t1\na bad film\t0\n")
    certificate = pipeline.run(
        adapter, out=tmp_path / "run", data=tmp_path / "mine.tsv", formats=["torchscript"]
    )
    names = {file.name for file in certificate.inputs}
    assert {
        "sst2.safetensors", "mine.tsv", "base/config.json", "base/model.safetensors",
        "base/tokenizer.json",
    } <= names  # fmt: skip
    assert certificate.settings["formats"] == ["torchscript"]
    assert certificate.settings["inputs"] == "2 sentences and 14 shapes"


def test_wide_outputs_are_compared_on_fewer_inputs(tiny, tiny_base, monkeypatch, tmp_path):
    from lora_export import inputs

    signature = inputs.Signature(
        (), (TensorSpec("logits", "float32", ("batch", "sequence", 1000)),), 64, 99, 0
    )
    signature = dataclasses.replace(
        signature,
        inputs=tuple(
            TensorSpec(name, "int64", ("batch", "sequence"))
            for name in ("input_ids", "attention_mask")
        ),
    )
    batches = inputs.grid_batches(signature, 0)
    monkeypatch.setattr(inputs, "MOST_VALUES", 2 * 40_000)
    kept = inputs.within_budget(batches, signature)
    assert 0 < len(kept) < len(batches)
    assert sum(batch.mask.size for batch in kept) <= 40


def test_a_dtype_that_is_not_known_is_not_taken_for_keep(adapter):
    known = ", ".join(["keep", *DTYPES])
    with pytest.raises(InputError, match=f"dtype is 'int8'; expected one of {known}"):
        open_job(adapter, options=Options(dtype="int8"))


def test_the_command_offers_the_dtypes_that_a_merge_knows():
    from lora_export.cli.merge import command

    (option,) = [p for p in command.params if p.name == "dtype"]
    assert list(option.type.choices) == ["keep", *DTYPES]


def test_a_neighbour_with_a_longer_suffix_is_no_part_of_an_artifact(adapter, tmp_path):
    from lora_export import exporters

    merged_files.merge_files(adapter, out=tmp_path / "merged")
    pipeline.export_file("torchscript", model=tmp_path / "merged", out=tmp_path / "model.pt")
    (tmp_path / "model.pt2").write_bytes(b"another artifact")
    files = exporters.describe("torchscript", tmp_path / "model.pt").files
    assert [file.name for file in files] == ["model.pt"]
