"""Text written by exported decoders, against `generate` of transformers, token for token."""

import families
import numpy as np
import pytest
import torch

from lora_export import calling, exporters, inputs
from lora_export.errors import InputError
from lora_export.exporters import Request
from lora_export.generating import Sampling, generate
from lora_export.runners.eager import EagerRunner


def made(name, **options):
    model = families.build(name)
    model.generation_config.eos_token_id = model.generation_config.forced_eos_token_id = None
    return model, calling.interface_of(model, families.tokens_of(model), **options)


def prompts(signature, padding="left"):
    arrays = inputs.made(signature, 3, 7, padding, 1)
    return arrays["input_ids"], arrays["attention_mask"]


def by_transformers(model, ids, mask, **options):
    given = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
    found = model.generate(**given, **{"do_sample": False, **options}).numpy()
    return found[:, 1 if model.config.is_encoder_decoder else ids.shape[1] :]


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt-neox", "llama", "qwen3", "gemma3", "bloom"])
def test_the_likeliest_tokens_are_those_of_transformers(name):
    model, found = made(name)
    ids, mask = prompts(found.signature)
    runner = EagerRunner("own", found.bind(model), found.signature)
    written = generate(runner, found.signature, ids, mask, max_new_tokens=6)
    np.testing.assert_array_equal(written, by_transformers(model, ids, mask, max_new_tokens=6))


@pytest.mark.parametrize("name", ["t5", "bart", "pegasus"])
def test_an_encoder_decoder_writes_what_transformers_writes(name):
    model, found = made(name)
    ids, mask = prompts(found.signature, "right")
    runner = EagerRunner("own", found.bind(model), found.signature)
    written = generate(runner, found.signature, ids, mask, max_new_tokens=6)
    expected = by_transformers(model, ids, mask, max_new_tokens=6)
    np.testing.assert_array_equal(written, expected)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_without_the_cache_it_writes_the_same(name):
    model, found = made(name)
    ids, mask = prompts(found.signature, "left" if name == "llama" else "right")
    runner = EagerRunner("own", found.bind(model), found.signature)
    options = {"max_new_tokens": 6, "cached": False}
    written = generate(runner, found.signature, ids, mask, **options)
    expected = by_transformers(model, ids, mask, max_new_tokens=6)
    np.testing.assert_array_equal(written, expected)


@pytest.mark.parametrize(
    "fields",
    [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_k": 0, "top_p": 0.7}, {"seed": 5, "top_p": 0.9}],
)
def test_tokens_that_are_drawn_are_those_of_transformers(fields):
    sampling = Sampling(**fields)
    model, found = made("llama")
    ids, mask = prompts(found.signature)
    runner = EagerRunner("own", found.bind(model), found.signature)
    written = generate(runner, found.signature, ids, mask, max_new_tokens=6, sampling=sampling)
    torch.manual_seed(sampling.seed)
    warped = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    expected = by_transformers(model, ids, mask, do_sample=True, max_new_tokens=6, **warped)
    np.testing.assert_array_equal(written, expected)


def test_another_seed_draws_other_tokens():
    model, found = made("llama")
    ids, mask = prompts(found.signature)
    runner = EagerRunner("own", found.bind(model), found.signature)
    drawn = [
        generate(runner, found.signature, ids, mask, sampling=Sampling(temperature=3.0, seed=seed))
        for seed in (0, 1)
    ]
    assert (drawn[0] != drawn[1]).any()


def test_a_row_that_has_ended_is_padded():
    model, found = made("gpt2")
    ids, mask = prompts(found.signature)
    runner = EagerRunner("own", found.bind(model), found.signature)
    free = generate(runner, found.signature, ids, mask, max_new_tokens=6)
    end = int(free[0, 1])
    written = generate(runner, found.signature, ids, mask, max_new_tokens=6, end=[end])
    model.generation_config.eos_token_id = end
    np.testing.assert_array_equal(written, by_transformers(model, ids, mask, max_new_tokens=6))
    assert (written[0, list(free[0]).index(end) + 1 :] == found.signature.pad_token_id).all()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.slow
def test_onnxruntime_writes_what_transformers_writes(name, tmp_path):
    model, found = made(name)
    onnx = exporters.load("onnx")
    example = inputs.example(found.signature)
    path = tmp_path / "model.onnx"
    onnx.export(Request(found.bind(model), found.signature, example, {"a": "b"}, path))
    runner = onnx.open_runner(tmp_path / "model.onnx", 1)
    ids, mask = prompts(found.signature)
    written = generate(runner, found.signature, ids, mask, max_new_tokens=12)
    np.testing.assert_array_equal(written, by_transformers(model, ids, mask, max_new_tokens=12))


def test_an_artifact_without_a_cache_is_refused():
    model, found = made("gpt2", cache=False)
    runner = EagerRunner("own", found.bind(model), found.signature)
    with pytest.raises(InputError, match="takes no cache: export it without --no-cache"):
        generate(runner, found.signature, *prompts(found.signature))


def test_a_prompt_of_a_decoder_that_ends_in_padding_is_refused():
    model, found = made("gpt2")
    runner = EagerRunner("own", found.bind(model), found.signature)
    with pytest.raises(InputError, match="padded on the left"):
        generate(runner, found.signature, *prompts(found.signature, "right"))


@pytest.mark.parametrize("fields", [{"temperature": 0.0}, {"top_k": -1}, {"top_p": 0.0}])
def test_a_way_of_drawing_that_makes_no_sense_is_refused(fields):
    with pytest.raises(InputError, match="temperature > 0"):
        Sampling(**fields)
