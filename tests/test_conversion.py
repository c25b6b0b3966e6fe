"""Adapters written in another format: PEFT loads them whole, and they compute what they did."""

import json
import warnings

import numpy as np
import on_disk
import peft
import pytest
import torch
from live_made import CASES, K, Q, answer, load, small
from on_disk import keyed, pair

from lora_export import (
    BaseRef,
    LoraConfig,
    formats,
    inject,
    merged_files,
    read_adapter,
    save_adapter,
)
from lora_export.conversion import convert
from lora_export.errors import InputError
from lora_export.records import Reading
from lora_export.refusals import TABLE

EACH = pytest.mark.parametrize("case", CASES)
REFUSED = {"dora"}  # when normalised


def by_peft(family, base, folder):
    """The model with the adapter live in it, as PEFT loads it; nothing is missing, nothing left."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False")
        warnings.filterwarnings("ignore", "Unsupported layer type")
        config = peft.PeftConfig.from_pretrained(folder)
        empty = peft.get_peft_model(load(family, base), config)
        weights = peft.load_peft_weights(folder)
        result = peft.set_peft_model_state_dict(empty, weights)
        assert result.unexpected_keys == []
        marks = ("lora_", "modules_to_save", "token_adapter.trainable_tokens_delta")
        assert [key for key in result.missing_keys if any(m in key for m in marks)] == []
        return peft.PeftModel.from_pretrained(load(family, base), folder).eval()


@pytest.fixture
def made(bases, tmp_path):
    """`made(case)`: family, base, adapter, and the model that it was merged into."""

    def make(case):
        family, tensors, config = CASES[case]
        base = bases(family)
        adapter = on_disk.peft_folder(tmp_path / "adapter", tensors, **config)
        certificate = merged_files.merge_files(adapter, base=str(base), out=tmp_path / "merged")
        assert certificate.ok
        return family, base, adapter, load(family, tmp_path / "merged")

    return make


@EACH
@pytest.mark.parametrize("normalise", [False, True], ids=["as it is", "normalised"])
def test_peft_loads_what_was_converted_and_answers_the_same(made, tmp_path, case, normalise):
    family, base, adapter, merged = made(case)
    if normalise and case in REFUSED:
        with pytest.raises(InputError, match="cannot be normalised"):
            convert(adapter, tmp_path / "out", normalise=True)
        assert not (tmp_path / "out").exists()
        return
    convert(adapter, tmp_path / "out", normalise=normalise)
    expected = answer(family, merged)
    found = answer(family, by_peft(family, base, tmp_path / "out"))
    size = expected.abs().max()
    assert (answer(family, load(family, base)) - expected).abs().max() > 1e-3 * size
    assert (found - expected).abs().max() < 2e-5 * size


# AdaLoRA's diagonal is multiplied into B, which is rounded then.
@pytest.mark.parametrize("case", [case for case in CASES if case != "adalora"])
@pytest.mark.parametrize("to", ["peft", "native"])
def test_what_was_converted_merges_to_the_same_bytes(made, tmp_path, case, to):
    _, base, adapter, _ = made(case)
    convert(adapter, tmp_path / "out", format=to)
    merged_files.merge_files(tmp_path / "out", base=str(base), out=tmp_path / "again")
    for file in sorted((tmp_path / "merged").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


# ---------------------------------------------------------------- other formats


def of_mlx(folder, scale=3.0):
    folder.mkdir()
    a, b = small(pair(32, 32))
    tensors = {f"{Q}.lora_a": np.ascontiguousarray(a.T), f"{Q}.lora_b": np.ascontiguousarray(b.T)}
    on_disk.save(folder / "adapters.safetensors", tensors)
    config = {"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": scale}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder, Reading(), scale


def of_loralib(folder):
    folder.mkdir()
    tensors = keyed({Q: small(pair(32, 32))}, "", (".lora_A", ".lora_B"))
    return on_disk.save(folder / "a.safetensors", tensors), Reading(alpha=5.0), 2.5


def of_diffusers(folder):
    folder.mkdir()
    a, b = small(pair(32, 32))
    name = f"text_encoder.{Q}.lora_linear_layer"
    tensors = {f"{name}.down.weight": a, f"{name}.up.weight": b}
    return on_disk.save(folder / "a.safetensors", tensors), Reading(), 1.0


@pytest.mark.parametrize("make", [of_mlx, of_loralib, of_diffusers])
@pytest.mark.parametrize("to", ["peft", "native"])
def test_an_adapter_of_another_format_keeps_its_scale_and_its_factors(tmp_path, make, to):
    source, reading, scale = make(tmp_path / "source")
    written = convert(source, tmp_path / "out", format=to, reading=reading)
    (found,) = read_adapter(tmp_path / "out").modules.values()
    assert found.scale == scale == next(iter(written.modules.values())).scale
    for held, side in zip((found.a, found.b), small(pair(32, 32)), strict=True):
        assert np.array_equal(held, side)


@pytest.mark.parametrize("scale", [0.0, -1.0])
@pytest.mark.parametrize("to", ["peft", "native"])
def test_a_scale_that_no_alpha_gives_is_refused_or_can_be_read_again(tmp_path, scale, to):
    source, _, _ = of_mlx(tmp_path / "source", scale)
    try:
        convert(source, tmp_path / "out", format=to)
    except InputError:
        assert not (tmp_path / "out").exists()
    else:
        (found,) = read_adapter(tmp_path / "out").modules.values()
        assert found.scale == scale


def test_peft_loads_an_adapter_of_mlx_once_it_is_converted(bases, tmp_path):
    source, _, scale = of_mlx(tmp_path / "source")
    convert(source, tmp_path / "out")
    live = by_peft("llama", bases("llama"), tmp_path / "out")
    plain = load("llama", bases("llama"))
    a, b = (torch.from_numpy(side) for side in small(pair(32, 32)))
    with torch.no_grad():
        plain.get_submodule(Q).weight.add_(scale * (b @ a))
    torch.testing.assert_close(answer("llama", live), answer("llama", plain), atol=1e-4, rtol=1e-5)


def test_underscored_names_are_not_written(tmp_path):
    a, b = pair()
    tensors = {"lora_te_a_b.lora_down.weight": a, "lora_te_a_b.lora_up.weight": b}
    source = on_disk.save(tmp_path / "a.safetensors", tensors)
    with pytest.raises(InputError) as caught:
        convert(source, tmp_path / "out")
    assert TABLE["flat-names"].why in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_ours_keeps_everything_in_our_format(tiny, fill, tmp_path):
    model = tiny("bert")
    inject(model, LoraConfig(rank=3, variant="rslora", modules_to_save=("classifier",)))
    about = {"base": BaseRef("org/tiny", "v1"), "labels": ("no", "yes"), "training": {"seed": 1}}
    save_adapter(fill(model), tmp_path / "a.safetensors", **about)
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", format="native")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


# ---------------------------------------------------------------- writing


def source_of(folder):
    return on_disk.peft_folder(folder / "source", keyed({Q: pair()}))


@pytest.mark.parametrize("format", ["loralib", "mlx", "kohya"])
def test_a_format_that_is_read_only_is_not_written(tmp_path, format):
    assert format in formats.names()
    with pytest.raises(InputError, match=f"adapters are not written as {format}"):
        convert(source_of(tmp_path), tmp_path / "out", format=format)


def test_an_existing_output_is_left_alone_unless_told(tmp_path):
    source = source_of(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(InputError, match="exists"):
        convert(source, tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "mine"


def test_an_output_of_ours_is_replaced_when_told(tmp_path):
    source = source_of(tmp_path)
    convert(source, tmp_path / "out")
    on_disk.peft_folder(tmp_path / "source", keyed({K: pair()}))
    convert(source, tmp_path / "out", overwrite=True)
    assert read_adapter(tmp_path / "out").modules.keys() == {K}


def test_the_source_is_never_the_output(tmp_path):
    source = source_of(tmp_path)
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    with pytest.raises(InputError):
        convert(source, source, overwrite=True)
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before


def test_a_damaged_adapter_leaves_nothing_behind(tmp_path):
    source = source_of(tmp_path)
    weights = source / on_disk.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(InputError):
        convert(source, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


@pytest.mark.parametrize("to", ["peft", "native"])
def test_the_same_adapter_gives_the_same_bytes(tmp_path, to):
    source = source_of(tmp_path)
    contents = []
    for name in ("one", "two"):
        convert(source, tmp_path / name, format=to)
        place = tmp_path / name
        files = [place] if place.is_file() else sorted(place.iterdir())
        contents.append([file.read_bytes() for file in files])
    assert contents[0] == contents[1]


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_an_alpha_that_is_no_number_above_zero_is_refused(tmp_path, alpha):
    """mlx-lm's files say a scale and an alpha, and then the caller says which alpha is meant."""
    source, _, _ = of_mlx(tmp_path / "source")
    config = {"lora_parameters": {"rank": 2, "scale": 3.0, "alpha": 4.0}}
    (source / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="alpha"):
        convert(source, tmp_path / "out", reading=Reading(alpha=alpha))
    assert not (tmp_path / "out").exists()
