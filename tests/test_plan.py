import dataclasses

import numpy as np
import pytest
import torch
import transformers

from lora_export import BaseRef, LoraConfig, inject, models, save_adapter, storage
from lora_export.adapter import read_adapter
from lora_export.architecture import names_of
from lora_export.errors import AdapterMismatch
from lora_export.opening import open_job
from lora_export.plan import COPY, MERGE, PLACE, Choices, plan
from lora_export.records import Adapter, Factors
from lora_export.refusals import TABLE
from lora_export.resolving import architecture
from lora_export.storage import Checkpoint


@pytest.fixture(scope="module")
def job(tiny_base, tiny_adapter, tmp_path_factory):
    path, _ = tiny_adapter(tmp_path_factory.mktemp("adapter"), str(tiny_base))
    return open_job(path)


def planned(job, **changes):
    adapter = dataclasses.replace(job.adapter, **changes)
    return plan(adapter, job.checkpoint, seen_by(job, adapter))


def seen_by(job, adapter, checkpoint=None):
    """The architecture of the job's model, as it lies in a checkpoint."""
    return architecture(model_of(job), checkpoint or job.checkpoint, names_of(adapter))


def model_of(job):
    """The job's model without weights, as transformers builds it: the plan did not need it."""
    assert job.config is None
    named = models.architecture_of(job.adapter, job.base)
    return models.blank(models.config_of(job.base, named, job.adapter.labels, None))


def tensors_of(job):
    return set(model_of(job).state_dict())


def test_every_base_tensor_is_in_a_step_or_dropped(job):
    sources = {step.source for step in job.plan.steps} | job.plan.dropped.keys()
    assert job.checkpoint.tensors.keys() <= sources


def test_every_tensor_of_the_architecture_is_written(job):
    assert {step.name for step in job.plan.steps} == tensors_of(job)


def test_each_module_of_the_adapter_has_one_merge(job):
    assert all(len(step.modules) == len(step.parts) == 1 for step in job.plan.of(MERGE))
    merged = sorted(step.modules[0] for step in job.plan.of(MERGE))
    assert merged == sorted(job.adapter.modules)


def test_the_head_is_placed(job):
    assert {step.name for step in job.plan.of(PLACE)} == {"classifier.weight", "classifier.bias"}


def test_names_get_the_prefix_that_the_architecture_needs(job):
    copied = {step.source: step.name for step in job.plan.of(COPY)}
    assert copied["embeddings.LayerNorm.weight"] == "bert.embeddings.LayerNorm.weight"


def test_an_unknown_module_is_named_with_its_neighbours(job):
    modules = dict(job.adapter.modules)
    modules["bert.encoder.layer.0.attention.self.qurey"] = next(iter(modules.values()))
    with pytest.raises(AdapterMismatch, match=r"self\.qurey\.weight: no such tensor .*self\.query"):
        planned(job, modules=modules)


def test_another_shape_is_a_mismatch(job):
    path, pair = next(iter(job.adapter.modules.items()))
    wide = Factors(np.ones((4, 99), np.float32), pair.b, pair.alpha, pair.scale)
    with pytest.raises(AdapterMismatch, match=r"adapter is for \(out, in\) \(\d+, 99\)"):
        planned(job, modules={**job.adapter.modules, path: wide})


def test_a_missing_head_is_a_mismatch(job):
    with pytest.raises(AdapterMismatch, match=r"classifier\.weight: neither the base nor the ad"):
        planned(job, replaced={})


def test_a_replaced_tensor_of_another_shape_is_a_mismatch(job):
    replaced = {**job.adapter.replaced, "classifier.weight": np.ones((3, 32), np.float32)}
    with pytest.raises(AdapterMismatch, match=r"classifier\.weight: adapter has shape \(3, 32\)"):
        planned(job, replaced=replaced)


def test_a_replaced_tensor_without_a_place_is_a_mismatch(job):
    replaced = {**job.adapter.replaced, "score.weight": np.ones((2, 32), np.float32)}
    with pytest.raises(AdapterMismatch, match=r"score\.weight: no such tensor"):
        planned(job, replaced=replaced)


def test_all_faults_are_listed_at_once(job):
    modules = dict(job.adapter.modules)
    modules["nowhere"] = next(iter(modules.values()))
    with pytest.raises(AdapterMismatch, match=r"classifier\.bias.*classifier\.weight.*nowhere"):
        planned(job, modules=modules, replaced={})


def test_another_base_is_a_mismatch(job, tiny_base, tmp_path):
    model = transformers.BertModel.from_pretrained(tiny_base)
    with torch.no_grad():
        model.encoder.layer[1].output.dense.weight[0, 0] += 1e-3
    model.save_pretrained(tmp_path)
    other = Checkpoint.open(tmp_path)
    with pytest.raises(AdapterMismatch, match="is not the one that this adapter was trained on"):
        plan(job.adapter, other, seen_by(job, job.adapter, other))
    choices = Choices(allow_base_mismatch=True)
    allowed = plan(job.adapter, other, seen_by(job, job.adapter, other), choices)
    assert allowed.notes[0].startswith("allowed by the caller")


def test_a_narrow_base_that_was_widened_for_training_is_recognised(
    tiny_base, classifier_of, fill, tmp_path
):
    base = tmp_path / "bf16"
    transformers.BertModel.from_pretrained(tiny_base).bfloat16().save_pretrained(base)
    transformers.AutoTokenizer.from_pretrained(tiny_base).save_pretrained(base)
    model = transformers.BertForSequenceClassification.from_pretrained(base, dtype="float32")
    inject(model, LoraConfig(modules_to_save=("classifier",)))
    file = tmp_path / "a.safetensors"
    save_adapter(fill(model), file, base=BaseRef(id=str(base)), task_type="SEQ_CLS")
    notes = open_job(file).plan.notes
    assert notes == ("the base has the fingerprint that the adapter was trained on",)


def test_a_base_without_a_recorded_fingerprint_is_noted(job):
    base = dataclasses.replace(job.adapter.base, fingerprint=None)
    assert "identity of the base unchecked" in planned(job, base=base).notes[0]


def test_old_layer_norm_names_are_understood(job, tmp_path):
    old = {}
    for name, info in job.checkpoint.tensors.items():
        legacy = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        old[legacy.replace("LayerNorm.bias", "LayerNorm.beta")] = info.array()
    storage.write_safetensors(
        tmp_path / storage.SINGLE, [storage.NewTensor.of(n, a) for n, a in old.items()], {}
    )
    base = Checkpoint.open(tmp_path)
    steps = plan(job.adapter, base, seen_by(job, job.adapter, base)).steps
    assert {step.name for step in steps} == tensors_of(job)


def test_lora_on_a_tied_weight_is_refused(tiny, tmp_path):
    model = tiny("opt")
    model.save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    pair = Factors(np.ones((2, 32), np.float32), np.ones((100, 2), np.float32), 4.0, 2.0)
    adapter, base = Adapter({"lm_head": pair}, {}, "lora"), Checkpoint.open(tmp_path)
    found = architecture(models.blank(config), base, names_of(adapter))
    with pytest.raises(AdapterMismatch, match=r"lm_head: .*shared with model\.dec") as caught:
        plan(adapter, base, found)
    assert TABLE["tied"].why in str(caught.value)


def test_one_trained_layer_is_enough(tiny_base, tiny_adapter, tmp_path):
    from lora_export.injection import lora_layers

    path, model = tiny_adapter(tmp_path, str(tiny_base))
    with torch.no_grad():
        for layer in list(lora_layers(model).values())[1:]:
            layer.lora_B.zero_()
    about = {"base": BaseRef(id=str(tiny_base)), "task_type": "SEQ_CLS"}
    save_adapter(model, path, **about)
    assert len(open_job(path).plan.of(MERGE)) == len(lora_layers(model))


def test_the_adapter_on_disk_is_what_is_planned(job, tiny_base):
    assert read_adapter(job.source).modules.keys() == job.adapter.modules.keys()
    assert job.plan.architecture == "BertForSequenceClassification"
