"""Live updates of every kind: they answer as PEFT's model does, and leave the base alone."""

import copy

import peft
import peft_made
import pytest
import torch
from test_peft_made import distance, marked, peft_answers_wrong

from lora_export import injection, live, models, opening, pipeline, recomputed, stages
from lora_export.errors import AdapterMismatch, InputError
from lora_export.injection import attach, detach, idle
from lora_export.lora import LoraLayer

ONE_MODEL = [
    (architecture, variant)
    for architecture, variant in peft_made.cases()
    if not peft_made.VARIANTS[variant].one_sided
    and peft_made.VARIANTS[variant].autocast
    and "replic" not in variant
    and not peft_answers_wrong(architecture, variant)
]


def unmerged(made):
    """Return the base with the adapter attached, as a run loads it."""
    job = opening.open_job(made.adapter, str(made.base))
    if job.config is not None:
        return stages.load_unmerged(job)
    model = type(made.live.get_base_model()).from_pretrained(made.base)
    attach(model, job.live)
    return model.eval()


def bits(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(("architecture", "variant"), marked(ONE_MODEL))
def test_attached_merged_and_detached_it_answers_as_it_should(tmp_path, architecture, variant):
    made = peft_made.make(architecture, variant, "float32", tmp_path)
    model = unmerged(made)
    limit = 5e-5 if made.variant.loose else 2e-5
    assert distance(peft_made.answer(model, made.inputs), made.logits) < limit
    merged = live.merge(model)
    assert distance(peft_made.answer(merged, made.inputs), made.logits) < limit
    assert not any(isinstance(m, LoraLayer | recomputed.Update) for m in merged.modules())
    with idle(model):
        switched_off = peft_made.answer(model, made.inputs)
    assert distance(switched_off, made.logits) > limit
    detach(model)
    assert not any(True for _ in recomputed.updates(model))


@pytest.fixture
def dora(tmp_path):
    made = peft_made.make("bert", "embedding-dora", "float32", tmp_path)
    return made, unmerged(made)


def test_detaching_gives_back_the_bases_own_bits(tmp_path, dora):
    made, model = dora
    base = models.load(made.base, model.config, provided=bits(model))
    detach(model)
    kept = {n: v for n, v in bits(base).items() if not n.startswith("classifier")}
    assert all(torch.equal(value, bits(model)[name]) for name, value in kept.items())


def test_a_model_with_recomputed_weights_is_not_saved_as_an_adapter(dora):
    with pytest.raises(InputError, match="no layer"):
        injection.extract(dora[1])


def test_a_wrapped_layer_still_shows_its_own_attributes(dora):
    layer = next(m for m in dora[1].modules() if isinstance(m, recomputed.Recomputed))
    assert layer.embedding_dim == layer.base.embedding_dim
    with pytest.raises(AttributeError):
        _ = layer.no_such_thing


def test_another_shape_is_refused_and_leaves_the_model_alone(tmp_path):
    made = peft_made.make("bert", "dora", "float32", tmp_path)
    job = opening.open_job(made.adapter, str(made.base))
    config = copy.deepcopy(job.config)
    config.hidden_size, config.intermediate_size = 48, 96
    model = models.blank(config).to_empty(device="cpu")
    with pytest.raises(AdapterMismatch, match="adapter"):
        attach(model, job.live)
    assert not any(recomputed.updates(model))


def test_a_run_proves_a_dora_adapter(tmp_path, tiny_base, classifier_of):
    torch.manual_seed(0)
    targets = ["query", "word_embeddings"]
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=targets, use_dora=True)
    model = peft.get_peft_model(classifier_of(tiny_base), config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.requires_grad:
                noise = 0.1 * torch.randn_like(value)
                value.copy_(value * (1 + noise) if "magnitude" in name else value + noise)
    model.save_pretrained(tmp_path / "adapter")
    certificate = pipeline.run(
        tmp_path / "adapter", base=str(tiny_base), out=tmp_path / "run", formats=("torchscript",)
    )
    slow = [v for v in certificate.verdicts if not v.passed and v.check != "latency"]
    assert slow == []
    notes = certificate.settings["notes"]
    assert any(note.startswith("1 weights") and "computed anew in" in note for note in notes)


def test_the_reference_of_a_model_with_recomputed_weights_is_exact(dora):
    made, model = dora
    model.requires_grad_(False)
    double = copy.deepcopy(model).double()
    reference = stages.exact(model)
    for _ in range(2):  # a call puts the weights that it replaced back where they were
        found, expected = (peft_made.answer(one, made.inputs) for one in (reference, double))
        assert found.dtype == torch.float64
        assert torch.equal(found, expected)
