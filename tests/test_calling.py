"""How models are called: inputs, outputs and axes, found by looking at the model and running it."""

import contextlib
import copy
import json

import families
import numpy as np
import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from lora_export import calling, inputs, models
from lora_export.errors import InputError
from lora_export.runners.eager import EagerRunner


def interface(name, **options):
    model = families.build(name)
    return model, calling.interface_of(model, families.tokens_of(model), **options)


def axes(specs):
    return {spec.name: spec.axes for spec in specs}


# ---------------------------------------------------------------- what goes in and comes out


@pytest.mark.parametrize(
    ("name", "taken", "given"),
    [
        ("bert-tokens", ("batch", "sequence"), {"logits": ("batch", "sequence", 5)}),
        ("bert-choices", ("batch", "choices", "sequence"), {"logits": ("batch", "choices")}),
        (
            "bert-spans",
            ("batch", "sequence"),
            {"start_logits": ("batch", "sequence"), "end_logits": ("batch", "sequence")},
        ),
        ("bert-mlm", ("batch", "sequence"), {"logits": ("batch", "sequence", 100)}),
        ("distilbert", ("batch", "sequence"), {"logits": ("batch", 2)}),
    ],
)
def test_the_axes_of_an_encoder_are_found(name, taken, given):
    _, found = interface(name)
    assert set(axes(found.signature.inputs).values()) == {taken}
    assert axes(found.signature.outputs) == given


def test_only_inputs_that_the_model_takes_are_its_inputs():
    names = [[spec.name for spec in interface(n)[1].signature.inputs] for n in ("bert", "mpnet")]
    assert names[0] == ["input_ids", "token_type_ids", "attention_mask"]
    assert names[1] == ["input_ids", "attention_mask"]


def test_a_decoder_takes_and_gives_keys_and_values_of_its_own_heads():
    _, found = interface("llama")
    assert axes(found.signature.inputs) == {
        "input_ids": ("batch", "sequence"),
        "attention_mask": ("batch", "total"),
        **{
            f"past_key_values.{layer}.{part}": ("batch", 2, "past", 8)  # 2 heads for 4 queries
            for layer in range(2)
            for part in ("key", "value")
        },
    }
    assert axes(found.signature.outputs)["logits"] == ("batch", "sequence", 100)
    assert axes(found.signature.outputs)["present.1.value"] == ("batch", 2, "total", 8)


def test_an_encoder_decoder_takes_both_caches():
    _, found = interface("t5")
    taken = axes(found.signature.inputs)
    assert taken["past_key_values.0.encoder.key"] == ("batch", 4, "past", 8)
    assert taken["past_key_values.0.decoder.key"] == ("batch", 4, "target_past", 8)
    assert axes(found.signature.outputs)["present.0.decoder.key"] == ("batch", 4, "target_total", 8)
    assert found.signature.start_token_id == 0


@pytest.mark.parametrize("name", ["gpt2", "bart"])
def test_without_a_cache_there_are_logits_alone(name):
    _, found = interface(name, cache=False)
    assert not found.signature.has_cache
    assert "logits" in axes(found.signature.outputs)
    assert not any(spec.name.startswith("present") for spec in found.signature.outputs)


def test_a_model_of_pictures_takes_pixels_of_its_size():
    _, found = interface("vit")
    assert axes(found.signature.inputs) == {"pixel_values": ("batch", 3, 16, 16)}
    assert axes(found.signature.outputs) == {"logits": ("batch", 3)}


# ---------------------------------------------------------------- what they compute


def answers(model, found, **arrays):
    return EagerRunner("own", found.bind(model), found.signature).run(arrays)


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt-neox", "llama", "gemma3", "bloom", "falcon"])
def test_a_cache_gives_what_all_tokens_at_once_give(name):
    """Prompts padded on the left, one step with a cache, against transformers' own forward."""
    model, found = interface(name)
    arrays = inputs.made(found.signature, 3, 9, "left", 0)
    mask, ids = arrays["attention_mask"], arrays["input_ids"]
    first = answers(
        model, found, **{**arrays, "input_ids": ids[:, :8], "attention_mask": mask[:, :8]}
    )
    kept = {n.replace("present", "past_key_values"): v for n, v in first.items() if n != "logits"}
    step = answers(model, found, input_ids=ids[:, 8:], attention_mask=mask, **kept)
    places = np.maximum(mask.cumsum(-1) - 1, 0)
    more = {} if name == "bloom" else {"position_ids": torch.from_numpy(places)}
    with torch.inference_mode():
        given = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
        expected = model(**given, **more, use_cache=False).logits.numpy()
    np.testing.assert_allclose(step["logits"][:, -1], expected[:, -1], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["t5", "bart", "mbart", "pegasus"])
def test_a_source_of_no_tokens_beside_its_cache_gives_what_the_source_gives(name):
    model, found = interface(name)
    arrays = inputs.made(found.signature, 3, 9, "right", 0, target=4)
    ids = arrays["decoder_input_ids"]
    first = answers(model, found, **{**arrays, "decoder_input_ids": ids[:, :3]})
    kept = {n.replace("present", "past_key_values"): v for n, v in first.items() if n != "logits"}
    step = answers(
        model,
        found,
        input_ids=arrays["input_ids"][:, :0],
        attention_mask=arrays["attention_mask"],
        decoder_input_ids=ids[:, 3:],
        **kept,
    )
    with torch.inference_mode():
        names = ("input_ids", "attention_mask", "decoder_input_ids")
        expected = model(**{n: torch.from_numpy(arrays[n]) for n in names}).logits.numpy()
    np.testing.assert_allclose(first["logits"], expected[:, :3], rtol=0, atol=2e-5)
    np.testing.assert_allclose(step["logits"][:, -1], expected[:, -1], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2", "t5"])
def test_the_reference_is_computed_in_float64_throughout(name, monkeypatch):
    """They narrow norms, angles or softmax to float32; then a reference is no better than that."""
    model, found = interface(name)
    double = copy.deepcopy(model).double()
    narrow = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.dtype is torch.float32:
                narrow.append(str(func))
            return result

    tensors = {
        spec.name: torch.from_numpy(inputs.made(found.signature, 2, 5, "right", 0)[spec.name])
        for spec in found.signature.inputs
    }
    bound = found.bind(double)
    with torch.inference_mode(), Watch():
        bound(*[t.double() if t.is_floating_point() else t for t in tensors.values()])
    assert narrow == []
    monkeypatch.setattr(calling, "_InDouble", contextlib.nullcontext)
    with torch.inference_mode(), Watch():
        bound(*[t.double() if t.is_floating_point() else t for t in tensors.values()])
    assert narrow


# ---------------------------------------------------------------- pooling


@pytest.fixture
def sentence_transformer(tmp_path):
    """`sentence_transformer(mode, *more)`: a folder that says how a BERT is pooled."""

    def make(mode="pooling_mode_mean_tokens", *more):
        kinds = ("Transformer", "Pooling", *more)
        modules = [{"type": f"sentence_transformers.models.{k}", "path": k} for k in kinds]
        (tmp_path / "modules.json").write_text(json.dumps(modules))
        (tmp_path / "Pooling").mkdir(exist_ok=True)
        (tmp_path / "Pooling/config.json").write_text(json.dumps({mode: True}))
        return tmp_path

    return make


def _vectors(folder):
    model = families.build("bert-features")
    found = calling.interface_of(model, families.tokens_of(model), folder=folder)
    arrays = inputs.made(found.signature, 3, 7, "right", 0)
    return arrays["attention_mask"], answers(model, found, **arrays)


@pytest.mark.parametrize(
    ("mode", "of"),
    [
        ("pooling_mode_mean_tokens", lambda states: states.mean(0)),
        ("pooling_mode_cls_token", lambda states: states[0]),
        ("pooling_mode_max_tokens", lambda states: states.max(0)),
        ("pooling_mode_lasttoken", lambda states: states[-1]),
    ],
)
def test_texts_are_pooled_as_the_folder_says(sentence_transformer, mode, of):
    mask, found = _vectors(sentence_transformer(mode))
    for row, attended in enumerate(mask.astype(bool)):
        expected = of(found["last_hidden_state"][row][attended])
        np.testing.assert_allclose(found["sentence_embedding"][row], expected, atol=1e-6)


def test_vectors_are_normalised_where_the_folder_says(sentence_transformer):
    _, found = _vectors(sentence_transformer("pooling_mode_mean_tokens", "Normalize"))
    lengths = np.linalg.norm(found["sentence_embedding"], axis=-1)
    np.testing.assert_allclose(lengths, 1, atol=1e-6)


@pytest.mark.parametrize(
    ("mode", "more", "message"),
    [
        ("pooling_mode_weightedmean_tokens", (), "pools by weightedmean"),
        ("pooling_mode_mean_tokens", ("Dense",), "of Transformer, Pooling, Dense"),
    ],
)
def test_a_pooling_that_is_not_known_is_refused(sentence_transformer, mode, more, message):
    with pytest.raises(InputError, match=message):
        calling.pooling_of(sentence_transformer(mode, *more))


def test_a_folder_without_modules_is_not_pooled(tmp_path):
    assert calling.pooling_of(tmp_path) == ""


def test_a_classifier_is_not_pooled(sentence_transformer):
    """A base's modules.json beside a model with a head says nothing about that head."""
    model = families.build("bert")
    folder = sentence_transformer()
    found = calling.interface_of(model, families.tokens_of(model), folder=folder)
    assert axes(found.signature.outputs) == {"logits": ("batch", 2)}


# ---------------------------------------------------------------- what cannot be called


def test_a_model_of_sound_is_refused_by_what_it_takes():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 32, "conv_dim": (8,), "conv_stride": (2,), "conv_kernel": (2,),
             "num_feat_extract_layers": 1, "num_conv_pos_embedding_groups": 2,
             "num_conv_pos_embeddings": 4}  # fmt: skip
    model = transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(**sizes))
    with pytest.raises(InputError, match="Wav2Vec2ForCTC takes input_values; only models that"):
        calling.interface_of(model, families.Tokens())


def test_a_state_that_is_no_keys_and_values_is_named():
    config = transformers.MambaConfig(
        vocab_size=100, hidden_size=32, state_size=4, num_hidden_layers=2, pad_token_id=1
    )
    model = transformers.MambaForCausalLM(config).eval()
    with pytest.raises(InputError, match=r"MambaForCausalLM.*--no-cache|does not run|not take"):
        calling.interface_of(model, families.Tokens())


def test_a_model_that_fails_on_its_own_inputs_is_an_input_error():
    """BART's classifier wants the same number of end tokens in every row: data, not shapes."""
    model, tokens = families.build("bart"), families.Tokens()
    classifier = transformers.BartForSequenceClassification(model.config).eval()
    with pytest.raises(InputError, match="BartForSequenceClassification does not run on input_ids"):
        calling.interface_of(classifier, tokens)


def test_a_tokenizer_of_another_model_is_refused():
    model = families.build("bert")
    model.config.vocab_size = 50
    with pytest.raises(InputError, match="the tokenizer knows 100 tokens, the model 50"):
        calling.interface_of(model, families.Tokens())


def test_a_decoder_that_classifies_needs_to_know_its_padding(tiny, tiny_base):
    """It looks for the last token that is not padding; a guess would pool at the wrong place."""
    model = tiny("gpt2-cls")
    tokens = models.tokenizer(tiny_base)
    model.config.vocab_size = len(tokens)
    model.config.pad_token_id = None
    with pytest.raises(InputError, match="GPT2ForSequenceClassification names a padding token"):
        calling.interface_of(model, tokens)


def test_a_decoder_without_a_padding_token_pads_with_its_end_token(tiny, tiny_base):
    tokens = models.tokenizer(tiny_base)
    tokens.pad_token, tokens.eos_token = None, "[SEP]"
    model = tiny("gpt2")
    model.resize_token_embeddings(len(tokens))
    model.config.pad_token_id = None
    tokens.model_input_names = ["input_ids", "attention_mask"]
    assert calling.interface_of(model, tokens).signature.pad_token_id == tokens.eos_token_id
