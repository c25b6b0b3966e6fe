"""What is said of an adapter: its numbers, and which loaders would get it wrong."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import on_disk
import pytest
from on_disk import (
    EMBED,
    EXPERT,
    KINDS,
    LAYER,
    PREFIX,
    adalora,
    delta,
    factors,
    fields,
    fused,
    keyed,
    numbers,
    pair,
)

from lora_export import inspection, peft_names, peft_writing, read_adapter
from lora_export.opening import open_job
from lora_export.records import EXPERTS as EXPERT_KIND
from lora_export.records import Adapter, BaseRef, Fingerprint, Reading


def read(tensors=None, **config):
    held = keyed({LAYER: pair()}) if tensors is None else tensors
    return peft_names.read(held, fields(**config), "a")


EACH_KIND = pytest.mark.parametrize(("tensors", "config"), KINDS.values(), ids=KINDS)


# ---------------------------------------------------------------- the facts


def test_the_facts_are_those_of_the_adapter():
    modules = {"a": factors(), "b": factors(rank=3), "c": factors(alpha=0.0, scale=0.0)}
    found = inspection.facts(
        Adapter(
            modules,
            {"score.weight": numbers(2, 8)},
            "rslora",
            task_type="SEQ_CLS",
            base=BaseRef("org/base", "v1", "Model", Fingerprint("ab", 2, "F32")),
            labels=("no", "yes"),
            training={"seed": 3},
            format="native",
            sha256="cd",
            notes=("a note",),
            ignored={"x": "why"},
        )
    )
    assert {name: found[name] for name in found if name != "misread by"} == {
        "format": "native", "variant": "rslora", "task": "SEQ_CLS", "base": "org/base",
        "revision": "v1", "architecture": "Model",
        "fingerprint": {"sha256": "ab", "tensors": 2, "dtype": "F32"}, "labels": ["no", "yes"],
        "low-rank modules": 3, "kinds": {"linear": 3}, "ranks": {"2": 2, "3": 1},
        "parameters": 2 * 32 + 48, "tensors stored whole": {"score.weight": [2, 8]},
        "trained rows": {}, "ignored": {"x": "why"}, "untrained modules": ["c"],
        "training": {"seed": 3}, "sha256": "cd", "notes": ["a note"],
    }  # fmt: skip


@EACH_KIND
def test_the_facts_of_every_kind_can_be_written_as_json(tensors, config):
    adapter = read(tensors, **config)
    found = json.loads(json.dumps(inspection.facts(adapter)))
    assert found["low-rank modules"] == len(adapter.modules)
    assert json.dumps(inspection.modules(adapter))


@EACH_KIND
def test_the_norm_of_an_update_is_that_of_the_product(tensors, config):
    adapter = read(tensors, **config)
    entries = {entry["module"]: entry for entry in inspection.modules(adapter)}
    assert entries.keys() == adapter.modules.keys()
    for path, held in adapter.modules.items():
        expected = float(np.linalg.norm(delta(held).ravel()))
        assert entries[path]["delta_norm"] == pytest.approx(expected, rel=1e-12)
        assert entries[path]["zero"] is False
        assert (entries[path]["rank"], entries[path]["scale"]) == (held.rank, held.scale)


def test_the_norm_of_a_pruned_adalora_counts_its_diagonal():
    (held,) = read(adalora(3), peft_type="ADALORA", init_r=12).modules.values()
    expected = float(np.linalg.norm(delta(held).ravel()))
    assert inspection.delta_norm(held) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("scale", [0.0, -2.0])
def test_a_norm_is_never_negative(scale):
    held = factors(scale=scale)
    assert inspection.delta_norm(held) == pytest.approx(np.linalg.norm(delta(held)[0]), rel=1e-12)


@pytest.mark.parametrize("side", ["a", "b"])
def test_an_untrained_module_is_said_to_be_zero(side):
    held = dataclasses.replace(factors(), **{side: np.zeros_like(getattr(factors(), side))})
    adapter = Adapter({"a": held, "b": factors()}, {}, "lora")
    assert [entry["zero"] for entry in inspection.modules(adapter)] == [True, False]
    assert inspection.facts(adapter)["untrained modules"] == ["a"]


@pytest.mark.parametrize("path", [LAYER, "layers.0.self_attn.q_proj"])
def test_with_a_base_the_size_is_a_share_of_the_bases_weight(tiny, tmp_path, path):
    tiny("llama").save_pretrained(tmp_path / "base")
    place = on_disk.peft_folder(tmp_path / "a", keyed({path: pair(32, 32)}))
    job = open_job(place, str(tmp_path / "base"))
    (entry,) = inspection.modules(read_adapter(place), job)
    weight = on_disk.arrays(tmp_path / "base")[f"{LAYER}.weight"].astype(np.float64)
    (held,) = job.adapter.modules.values()
    expected = np.linalg.norm(delta(held)[0]) / np.linalg.norm(weight)
    assert entry["relative"] == pytest.approx(expected, rel=1e-12)


# ---------------------------------------------------------------- other loaders


def scales_in(loader, adapter):
    """The scale that a loader takes for every module, from the file that PEFT would write."""
    config = peft_writing.config_of(adapter)
    found = {}
    for path, held in adapter.modules.items():
        rank = config["r"] if loader == "vLLM" else held.rank  # llama.cpp: of the tensor
        stabilised = config["use_rslora"] and loader == "vLLM"
        found[path] = config["lora_alpha"] / (rank**0.5 if stabilised else rank)
    return found


def made(*numbers_of, variant="lora"):
    """An adapter with a module for each pair of rank and alpha."""
    modules = {}
    for index, (rank, alpha) in enumerate(numbers_of):
        scale = alpha / (rank**0.5 if variant == "rslora" else rank)
        modules[f"m{index}.q"] = factors(rank=rank, alpha=alpha, scale=scale)
    return Adapter(modules, {}, variant, format="peft")


ABOUT_SCALES = {"alpha / rank", "one alpha"}


@pytest.mark.parametrize("variant", ["lora", "rslora"])
@pytest.mark.parametrize(
    "held",
    [
        [(2, 4.0)], [(2, 4.0), (2, 4.0)], [(2, 4.0), (2, 8.0)], [(2, 4.0), (4, 4.0)],
        [(2, 4.0), (4, 8.0)], [(1, 4.0), (1, 2.0)], [(2, 4.0), (4, 8.0), (8, 1.0)],
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("loader", ["vLLM", "llama.cpp"])
def test_a_loader_is_named_exactly_where_it_would_take_another_scale(loader, held, variant):
    adapter = made(*held, variant=variant)
    wrong = any(
        scale != pytest.approx(adapter.modules[path].scale, rel=1e-12)
        for path, scale in scales_in(loader, adapter).items()
    )
    reasons = inspection.misreadings(adapter).get(loader, [])
    named = any(text in reason for text in ABOUT_SCALES for reason in reasons)
    assert named == wrong, reasons


def with_row():
    tensors = keyed({LAYER: pair()})
    return tensors | {f"{PREFIX}{EMBED}.token_adapter.trainable_tokens_delta": numbers(1, 8)}


TRAPS = {
    "DoRA": (read(*[KINDS["dora"][0]], **KINDS["dora"][1]), "DoRA", {"vLLM", "llama.cpp"}),
    "a bias": (
        read(KINDS["bias of lora_B"][0], lora_bias=True),
        "lora_bias",
        {"vLLM", "llama.cpp", "mlx-lm"},
    ),
    "a head": (
        read(KINDS["head"][0], modules_to_save=["score"]),
        "stored whole",
        {"vLLM", "llama.cpp", "mlx-lm"},
    ),
    "rows": (
        read(with_row(), trainable_token_indices=[3]),
        "trained rows",
        {"vLLM", "llama.cpp", "mlx-lm"},
    ),
    "an embedding": (read(KINDS["embedding"][0]), "embeddings", {"llama.cpp"}),
    "a convolution": (
        read(KINDS["convolution of two axes"][0]),
        "convolutions",
        {"vLLM", "llama.cpp", "mlx-lm"},
    ),
    "experts": (
        read(keyed({EXPERT: fused()}), target_parameters=["experts.w"]),
        "fused experts",
        {"mlx-lm"},
    ),
    "PiSSA": (
        read(init_lora_weights="pissa"),
        "unchanged base",
        {"vLLM", "llama.cpp", "mlx-lm"},
    ),
    "OLoRA": (
        read(init_lora_weights="olora"),
        "unchanged base",
        {"vLLM", "llama.cpp", "mlx-lm"},
    ),
    "KaSA": (
        read(KINDS["kasa"][0], kasa_config={"beta": 1}),
        "KaSA",
        {"vLLM", "llama.cpp", "mlx-lm"},
    ),
    "AdaLoRA": (
        read(adalora(3), peft_type="ADALORA", init_r=12),
        "AdaLoRA",
        {"vLLM", "llama.cpp", "mlx-lm"},
    ),
    "names without a prefix": (
        read(keyed({LAYER: pair()}, "")),
        "no tensor of these names",
        {"PEFT", "vLLM"},
    ),
    "a module that is no target": (
        read(target_modules=["v_proj"]),
        "outside of target_modules",
        {"PEFT"},
    ),
}


@pytest.mark.parametrize(("adapter", "text", "loaders"), TRAPS.values(), ids=TRAPS)
def test_what_a_loader_does_not_know_is_said_of_it(adapter, text, loaders):
    found = inspection.misreadings(adapter)
    assert {loader for loader, why in found.items() if any(text in w for w in why)} == loaders


@pytest.mark.parametrize(("adapter", "text", "loaders"), TRAPS.values(), ids=TRAPS)
def test_what_an_adapter_does_not_have_is_not_said_of_it(adapter, text, loaders):
    plain = inspection.misreadings(dataclasses.replace(read(), format="peft"))
    assert not any(text in why for reasons in plain.values() for why in reasons)


def test_a_plain_adapter_of_peft_is_misread_by_mlx_alone():
    adapter = dataclasses.replace(read(target_modules=["q_proj"]), format="peft")
    assert inspection.misreadings(adapter).keys() == {"mlx-lm"}


def test_files_of_other_formats_are_misread_by_those_who_do_not_know_them(tmp_path):
    a, b = pair()
    tensors = {"x.lora_a": np.ascontiguousarray(a.T), "x.lora_b": np.ascontiguousarray(b.T)}
    (tmp_path / "mlx").mkdir()
    on_disk.save(tmp_path / "mlx" / "adapters.safetensors", tensors)
    config = {"lora_parameters": {"rank": 2, "scale": 2.0}}
    (tmp_path / "mlx" / "adapter_config.json").write_text(json.dumps(config))
    found = inspection.misreadings(read_adapter(tmp_path / "mlx"))
    assert found.keys() >= {"PEFT", "vLLM", "llama.cpp"}
    assert "mlx-lm" not in found
    bare = on_disk.save(tmp_path / "bare.safetensors", keyed({"x": pair()}))
    found = inspection.misreadings(read_adapter(bare, reading=Reading(alpha=2.0)))
    assert any("alpha" in why for why in found["PEFT"])


def test_the_facts_list_what_the_loaders_would_misread():
    adapter = read(*[KINDS["dora"][0]], **KINDS["dora"][1])
    listed = inspection.facts(adapter)["misread by"]
    assert {"loader": "vLLM", "why": "refuses DoRA"} in listed
    assert len(listed) == sum(map(len, inspection.misreadings(adapter).values()))


def test_the_norms_of_experts_are_summed_over_all_of_them():
    adapter = read(keyed({EXPERT: fused()}), target_parameters=["experts.w"])
    (held,) = adapter.modules.values()
    assert held.kind == EXPERT_KIND
    squares = sum(float((expert**2).sum()) for expert in delta(held))
    assert inspection.delta_norm(held) == pytest.approx(squares**0.5, rel=1e-12)


def test_looking_at_an_adapter_loads_no_torch(tmp_path):
    on_disk.peft_folder(tmp_path / "a", keyed({LAYER: pair()}))
    source = (
        "import sys; from lora_export import inspection, read_adapter; "
        f"inspection.facts(read_adapter({str(tmp_path / 'a')!r})); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", source], check=True)
