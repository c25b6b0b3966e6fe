import re

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import torch

from lora_export import (
    AdapterMismatch,
    BaseRef,
    LoraConfig,
    formats,
    inject,
    load_adapter,
    read_adapter,
    save_adapter,
    storage,
)
from lora_export.errors import InputError
from lora_export.injection import detach, extract, lora_layers

TARGETS = {
    "bert": ("query", "value"),
    "distilbert": ("q_lin", "lin1"),
    "gpt2": ("c_attn", "mlp.c_proj"),
    "opt": ("q_proj", "fc2"),
    "llama": ("q_proj", "down_proj"),
}


def _trained(tiny, fill, family="bert", seed=0, **settings):
    model = tiny(family)
    head = ("classifier",) if hasattr(model, "classifier") else ()
    defaults = {"rank": 3, "alpha": 7.5, "targets": TARGETS[family], "modules_to_save": head}
    inject(model, LoraConfig(**{**defaults, **settings}))
    return fill(model, seed)


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora", "rslora+dora"])
@pytest.mark.parametrize("family", TARGETS)
def test_a_reloaded_adapter_gives_the_same_logits_bit_for_bit(
    tiny, fill, logits, tmp_path, family, variant
):
    model = _trained(tiny, fill, family, variant=variant)
    save_adapter(model, tmp_path / "a.safetensors")
    again = tiny(family)
    load_adapter(again, tmp_path / "a.safetensors")
    assert not torch.equal(logits(again), logits(tiny(family)))
    assert torch.equal(logits(again), logits(model))


def test_patterns_of_rank_and_alpha_survive_the_file(tiny, fill, logits, tmp_path):
    patterns = {"rank_pattern": {"*.layer.0.*": 5}, "alpha_pattern": {"value": 2.25}}
    model = _trained(tiny, fill, **patterns)
    save_adapter(model, tmp_path / "a")
    again = tiny("bert")
    load_adapter(again, tmp_path / "a")
    assert torch.equal(logits(again), logits(model))


def test_the_same_adapter_gives_the_same_bytes(tiny, fill, tmp_path):
    for name in ("one", "two"):
        about = {"base": BaseRef("org/tiny"), "labels": ("no", "yes"), "training": {"b": 1, "a": 2}}
        save_adapter(_trained(tiny, fill), tmp_path / name, **about)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_loading_and_saving_again_gives_the_same_bytes(tiny, fill, tmp_path):
    save_adapter(_trained(tiny, fill), tmp_path / "one")
    model = tiny("bert")
    load_adapter(model, tmp_path / "one")
    save_adapter(model, tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_the_file_holds_the_factors_and_the_head_and_nothing_else(tiny, fill, tmp_path):
    model = _trained(tiny, fill)
    save_adapter(model, tmp_path / "a")
    expected = {
        f"base_model.model.{path}.lora_{side}.weight": layer.get_parameter(f"lora_{side}")
        for path, layer in lora_layers(model).items()
        for side in "AB"
    }
    expected |= {
        f"base_model.model.classifier.{name}": parameter
        for name, parameter in model.classifier.named_parameters()
    }
    found = safetensors.numpy.load_file(tmp_path / "a")
    assert found.keys() == expected.keys()
    for name, parameter in expected.items():
        np.testing.assert_array_equal(found[name], parameter.detach().numpy())


def test_what_is_said_about_an_adapter_is_kept(tiny, fill, tmp_path):
    model = _trained(tiny, fill)
    saved = save_adapter(
        model, tmp_path / "a", base=BaseRef("org/tiny", "v1"), labels=("no", "yes"),
        task_type="SEQ_CLS", training={"seed": 3},
    )  # fmt: skip
    found = read_adapter(tmp_path / "a")
    assert found.labels == ("no", "yes")
    assert (found.task_type, found.training) == ("SEQ_CLS", {"seed": 3})
    assert (found.base.id, found.base.revision) == ("org/tiny", "v1")
    assert found.base == saved.base
    assert found.base.architecture == "BertForSequenceClassification"


def test_the_digest_of_the_file_is_kept_with_what_was_read(tiny, fill, tmp_path):
    save_adapter(_trained(tiny, fill), tmp_path / "a")
    assert read_adapter(tmp_path / "a").sha256 == storage.sha256(tmp_path / "a")


def test_the_fingerprint_is_that_of_the_bases_file(tiny_adapter, tiny_base, tmp_path):
    path, _ = tiny_adapter(tmp_path, targets=("query",))
    adapter = read_adapter(path)
    infos, _ = storage.read_header(tiny_base / "model.safetensors")
    touched = [infos[f"{name.removeprefix('bert.')}.weight"] for name in adapter.modules]
    expected = storage.fingerprint(
        (f"bert.{info.name}", info.dtype, info.shape, info.read()) for info in touched
    )
    assert adapter.base.fingerprint == expected


def test_the_fingerprint_changes_with_a_weight_of_the_base(tiny, fill, tmp_path):
    marks = []
    for change in (0.0, 1e-6):
        model = _trained(tiny, fill)
        with torch.no_grad():
            next(iter(lora_layers(model).values())).weight[0, 0].add_(change)
        marks.append(save_adapter(model, tmp_path / f"{change}").base.fingerprint)
    assert marks[0].sha256 != marks[1].sha256


def test_an_existing_file_is_replaced(tiny, fill, tmp_path):
    (tmp_path / "a").write_text("old")
    save_adapter(_trained(tiny, fill), tmp_path / "a")
    assert read_adapter(tmp_path / "a").modules
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_failed_save_leaves_the_old_file(tiny, fill, tmp_path, monkeypatch):
    save_adapter(_trained(tiny, fill), tmp_path / "a")
    before = (tmp_path / "a").read_bytes()

    def full(path, *_):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "write_safetensors", full)
    with pytest.raises(InputError, match="No space left on device"):
        save_adapter(_trained(tiny, fill, seed=1), tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_missing_folders_are_made(tiny, fill, tmp_path):
    save_adapter(_trained(tiny, fill), tmp_path / "new" / "folder" / "a")
    assert (tmp_path / "new" / "folder" / "a").is_file()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_is_not_finite_is_not_saved(tiny, fill, tmp_path, value):
    model = _trained(tiny, fill)
    with torch.no_grad():
        next(iter(lora_layers(model).values())).lora_B[0, 0] = value
    with pytest.raises(InputError, match="lora_B"):
        save_adapter(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_plain_model_cannot_be_saved_as_an_adapter(tiny, tmp_path):
    with pytest.raises(InputError, match="has no LoRA layers"):
        save_adapter(tiny("bert"), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_an_untrained_adapter_can_be_saved_and_loaded(tiny, logits, tmp_path):
    """A run that starts from nothing saves before its first step; only merging it is refused."""
    model = tiny("opt")
    inject(model, LoraConfig(targets=("q_proj",)))
    save_adapter(model, tmp_path / "a.safetensors")
    adapter = load_adapter(tiny("opt"), tmp_path / "a.safetensors")
    assert all(pair.is_zero for pair in adapter.modules.values())
    again = tiny("opt")
    load_adapter(again, tmp_path / "a.safetensors")
    assert torch.equal(logits(again), logits(model))


def test_a_missing_path_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match=r"no adapter at .*nowhere"):
        read_adapter(tmp_path / "nowhere")


def test_an_unknown_format_name_is_refused(tmp_path):
    with pytest.raises(InputError, match="'lycoris' is not one of the formats"):
        read_adapter(tmp_path, format="lycoris")


@pytest.mark.parametrize("make", ["folder", "tensors"])
def test_a_file_in_no_known_format_is_refused_with_the_known_ones(tmp_path, make):
    path = tmp_path / "a"
    if make == "folder":
        path.mkdir()
    else:
        safetensors.numpy.save_file({"w": np.ones(2, np.float32)}, path)
    known = re.escape(", ".join(formats.names()))
    with pytest.raises(InputError, match=rf"none of the known adapter formats \({known}\)"):
        read_adapter(path)


def test_a_damaged_file_says_so_itself(tmp_path):
    (tmp_path / "a").write_bytes(b"rubbish rubbish rubbish")
    with pytest.raises(InputError, match=r"is not a safetensors file, or it is truncated"):
        read_adapter(tmp_path / "a")


def test_a_named_format_is_used_as_told(tiny, fill, tmp_path):
    save_adapter(_trained(tiny, fill), tmp_path / "a")
    assert read_adapter(tmp_path / "a", format="native").format == "native"
    with pytest.raises(InputError, match=r"adapter_config\.json"):
        read_adapter(tmp_path / "a", format="peft")


def test_an_adapter_of_another_model_is_a_mismatch(tiny, fill, tmp_path):
    save_adapter(_trained(tiny, fill), tmp_path / "a")
    with pytest.raises(AdapterMismatch, match=r"does not fit this model: .*near: distilbert"):
        load_adapter(tiny("distilbert"), tmp_path / "a")


def test_loading_returns_the_adapter_that_the_model_now_holds(tiny, fill, tmp_path):
    save_adapter(_trained(tiny, fill), tmp_path / "a")
    model = tiny("bert")
    adapter = load_adapter(model, tmp_path / "a")
    held = extract(model)
    for path, pair in adapter.modules.items():
        np.testing.assert_array_equal(pair.b, held.modules[path].b)


def test_files_can_be_switched_on_one_base(tiny, fill, logits, tmp_path):
    expected = {}
    for seed, settings in enumerate(({"rank": 2}, {"rank": 5, "targets": ("key",)})):
        model = _trained(tiny, fill, seed=seed, **settings)
        save_adapter(model, tmp_path / f"{seed}")
        expected[seed] = logits(model)
    base, model = logits(tiny("bert")), tiny("bert")
    for seed in (0, 1, 0):
        load_adapter(model, tmp_path / f"{seed}")
        assert torch.equal(logits(model), expected[seed])
    detach(model)
    assert torch.equal(logits(model), base)


def test_a_path_may_be_a_string(tiny, fill, tmp_path):
    save_adapter(_trained(tiny, fill), str(tmp_path / "a"))
    assert read_adapter(str(tmp_path / "a")).modules


def test_a_model_built_from_lora_layers_by_hand_is_saved_whole(tmp_path):
    """Layers used as drop-ins, without inject: what is trainable beside them is stored too."""
    from torch import nn

    from lora_export import LoraLinear

    def build():
        torch.manual_seed(1)
        return nn.Sequential(LoraLinear(6, 5, rank=2), nn.ReLU(), nn.Linear(5, 3))

    model, x = build(), torch.randn(4, 6)
    with torch.no_grad():
        model[0].lora_B.normal_()
        model[2].bias.normal_()
    adapter = save_adapter(model, tmp_path / "a.safetensors")
    assert adapter.replaced.keys() == {"2.weight", "2.bias"}
    again = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    again[0].load_state_dict({k: v for k, v in model[0].state_dict().items() if "lora" not in k})
    load_adapter(again, tmp_path / "a.safetensors")
    assert torch.equal(again(x), model(x))
