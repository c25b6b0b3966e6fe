"""The table of refusals: every entry is raised by some input, in the smallest form of it."""

import ast
import json
import pickle
import types
from pathlib import Path

import numpy as np
import on_disk
import pytest
import torch
import transformers
from on_disk import PREFIX, factors, keyed, numbers, pair
from torch import nn

import lora_export
from lora_export import conversion, opening, read_adapter, refusals, resolving
from lora_export.architecture import (
    CONV1D,
    EXPERTS,
    LINEAR,
    OTHER,
    Architecture,
    Layer,
    Link,
    names_of,
)
from lora_export.errors import LoraExportError
from lora_export.plan import plan
from lora_export.records import CONV, EMBEDDING, Adapter, Factors
from lora_export.refusals import TABLE, refused

ROOT = Path(lora_export.__file__).parent


# ---------------------------------------------------------------- what is refused in the file


def read(folder, tensors=None, **config):
    """Read an adapter of PEFT's with one good pair, but for what is said."""
    tensors = keyed({"layer": pair()}) if tensors is None else tensors
    return read_adapter(on_disk.peft_folder(folder / "adapter", tensors, **config))


def an_unknown_tensor(folder):
    read(folder, {**keyed({"layer": pair()}), f"{PREFIX}layer.lora_C": numbers(2)})


def a_pickle_with_code(folder):
    (folder / "a").mkdir()
    (folder / "a" / on_disk.CONFIG).write_text(json.dumps(on_disk.fields()))
    torch.save({"layer.lora_A": types.SimpleNamespace()}, folder / "a" / "adapter_model.bin")
    read_adapter(folder / "a")


def two_adapters(folder):
    one = keyed({"layer": pair()}, ends=(".lora_A.one.weight", ".lora_B.one.weight"))
    two = keyed({"other": pair()}, ends=(".lora_A.two.weight", ".lora_B.two.weight"))
    read(folder, one | two)


def a_merged_linear(folder):
    """Two slices of rank 2 stand in A, one of them in each row of B."""
    read(folder, keyed({"layer": (numbers(4, 8), numbers(16, 2))}), r=2)


def bare_tensors(folder):
    read_adapter(on_disk.save(folder / "bare.safetensors", keyed({"layer": pair()})))


def an_adapter_of_mlx(folder):
    tensors = {"layer.lora_a": numbers(8, 2), "layer.lora_b": numbers(2, 8)}
    on_disk.save(folder / "adapters.safetensors", tensors)
    settings = {"lora_parameters": {"rank": 2, "scale": 2.0, "alpha": 4.0}}
    (folder / on_disk.CONFIG).write_text(json.dumps(settings))
    read_adapter(folder)


def experts_of_unsloth(folder):
    read(
        folder,
        keyed({"mlp.experts": (numbers(6, 8), numbers(8, 6))}),
        target_parameters=["mlp.experts.w"],
        auto_mapping={"unsloth_fixed": True},
    )


def underscored_names(folder):
    tensors = {"lora_te_a_b.lora_down.weight": pair()[0], "lora_te_a_b.lora_up.weight": pair()[1]}
    conversion.convert(on_disk.save(folder / "kohya.safetensors", tensors), folder / "out")


def a_picture_model(folder):
    tensors = {"lora_unet_a.lora_down.weight": pair()[0], "lora_unet_a.lora_up.weight": pair()[1]}
    read_adapter(on_disk.save(folder / "kohya.safetensors", tensors))


# ---------------------------------------------------------------- what is refused in the base


class Odd(transformers.PreTrainedModel):
    """A model of one layer, of whatever kind."""

    config_class = transformers.PretrainedConfig
    made = None

    def __init__(self, config):
        super().__init__(config)
        self.layer = type(self).made()


def planned_in(folder, make, modules):
    """Plan the merge into a model with the one layer that `make` gives."""
    kind = type("Odd", (Odd,), {"made": staticmethod(make)})
    model = kind(transformers.PretrainedConfig())
    base, adapter = on_disk.saved(model, folder), Adapter(modules, {}, "lora")
    plan(adapter, base, resolving.architecture(model, base, names_of(adapter)))


def a_convolution_in_groups(folder):
    update = Factors(numbers(2, 2, 3), numbers(4, 2, 1), 4.0, 2.0, CONV)
    planned_in(folder, lambda: nn.Conv1d(4, 4, 3, groups=2), {"layer": update})


def a_convolution_that_pads_by_reflection(folder):
    update = Factors(numbers(2, 4, 3), numbers(4, 2, 1), 4.0, 2.0, CONV)
    make = lambda: nn.Conv1d(4, 4, 3, padding=1, padding_mode="reflect")  # noqa: E731
    planned_in(folder, make, {"layer": update})


def an_embedding_that_is_rescaled(folder):
    update = Factors(numbers(2, 6), numbers(4, 2), 4.0, 2.0, EMBEDDING)
    planned_in(folder, lambda: nn.Embedding(6, 4, max_norm=1.0), {"layer": update})


def an_attention_of_torch(folder):
    modules = {"layer.out_proj": factors(4, 4)}
    planned_in(folder, lambda: nn.MultiheadAttention(4, 2), modules)


def a_norm(folder):
    planned_in(folder, lambda: nn.LayerNorm(4), {"layer": factors(4, 4)})


def a_bias_where_there_is_none(folder):
    modules = {"layer": factors(bias=numbers(8))}
    planned_in(folder, lambda: nn.Linear(8, 8, bias=False), modules)


def planned(folder, modules, tensors, fields=None, **known):
    """Plan the merge into a base that is known by hand."""
    base = on_disk.bases(folder / "base", tensors)
    adapter = Adapter(modules, {}, "lora", fields=fields or {})
    told = {
        "name": "Model",
        "shapes": {name: value.shape for name, value in tensors.items()},
        "layers": {path: Layer(LINEAR) for path in modules},
        "links": tuple(Link(name, name) for name in tensors),
        "names": {name: (Link(name, name),) for name in names_of(adapter)},
        **known,
    }
    plan(adapter, base, Architecture(**told))


def one_layer(folder, value=None, fields=None, **known):
    tensors = {"layer.weight": numbers(8, 8) if value is None else value}
    planned(folder, {"layer": factors()}, tensors, fields, **known)


def a_random_start(folder):
    one_layer(folder, fields={"init_lora_weights": "pissa_niter_4"})


def square_experts(folder):
    update = Factors(numbers(3, 2, 8), numbers(3, 8, 2), 4.0, 2.0, EXPERTS)
    planned(folder, {"mlp.w": update}, {"mlp.w": numbers(3, 8, 8)}, layers={"mlp": Layer(OTHER)})


def a_conversion_that_is_not_followed(folder):
    one_layer(folder, unfollowed={"layer.weight": "PermuteForRope"})


def tied_weights(folder):
    pairs = frozenset(["layer.weight", "head.weight"])
    one_layer(folder, ties=dict.fromkeys(pairs, pairs))


def a_base_of_integers(folder):
    one_layer(folder, np.ones((8, 8), np.int8))


# ---------------------------------------------------------------- the table

CASES = {
    "peft-type": lambda folder: read(folder, peft_type="LOHA"),
    "alora": lambda folder: read(folder, alora_invocation_tokens=[1]),
    "arrow": lambda folder: read(folder, arrow_config={"top_k": 1}),
    "qalora": lambda folder: read(folder, use_qalora=True),
    "residual-base": a_random_start,
    "unknown-field": lambda folder: read(folder, use_lora_of_2030=True),
    "unknown-tensor": an_unknown_tensor,
    "pickle": a_pickle_with_code,
    "several-adapters": two_adapters,
    "pattern-order": lambda folder: read(folder, alpha_pattern={"layer": 1, "l.*": 2}),
    "rank-mismatch": lambda folder: read(folder, r=3),
    "merged-linear": a_merged_linear,
    "no-alpha": bare_tensors,
    "mlx-alpha": an_adapter_of_mlx,
    "expert-layout": square_experts,
    "expert-b": experts_of_unsloth,
    "flat-names": underscored_names,
    "conv-groups": a_convolution_in_groups,
    "conv-padding": a_convolution_that_pads_by_reflection,
    "max-norm": an_embedding_that_is_rescaled,
    "attention": an_attention_of_torch,
    "no-bias": a_bias_where_there_is_none,
    "layer-kind": a_norm,
    "conversion": a_conversion_that_is_not_followed,
    "quantised-base": a_base_of_integers,
    "tied": tied_weights,
    "diffusion": a_picture_model,
}


def test_no_entry_is_without_an_input_that_raises_it():
    assert CASES.keys() == TABLE.keys()


@pytest.mark.parametrize("name", CASES)
def test_what_is_refused_is_refused_with_case_reason_and_remedy(tmp_path, name):
    with pytest.raises(LoraExportError) as caught:
        CASES[name](tmp_path)
    entry = TABLE[name]
    for text in (entry.case, entry.why, entry.remedy):
        assert text in str(caught.value)
    # One fault was planted, so one case is named.
    assert [other for other, e in TABLE.items() if e.why in str(caught.value)] == [name]


def test_what_every_case_was_made_from_is_merged(tmp_path):
    """Else a case could be refused for the way in which it was made."""
    assert read(tmp_path).modules.keys() == {"layer"}
    planned_in(tmp_path / "linear", lambda: nn.Linear(8, 8), {"layer": factors()})
    one_layer(tmp_path / "known")
    update = Factors(numbers(2, 4, 3), numbers(4, 2, 1), 4.0, 2.0, CONV)
    planned_in(tmp_path / "conv", lambda: nn.Conv1d(4, 4, 3), {"layer": update})
    table = Factors(numbers(2, 6), numbers(4, 2), 4.0, 2.0, EMBEDDING)
    planned_in(tmp_path / "embedding", lambda: nn.Embedding(6, 4), {"layer": table})


# ---------------------------------------------------------------- further ways into an entry


def an_update_of_a_norm_with_a_magnitude(folder):
    modules = {"layer": factors(magnitude=numbers(8))}
    planned(folder, modules, {"layer.weight": numbers(8, 8)}, layers={"layer": Layer(EMBEDDING)})


def kasa_on_conv1d(folder):
    base = on_disk.bases(folder / "base", {"layer.weight": numbers(8, 8)})
    adapter = Adapter({"layer": factors(diagonal=numbers(2))}, {}, "lora+kasa")
    found = Architecture(
        "Model",
        {"layer.weight": (8, 8)},
        {"layer": Layer(CONV1D)},
        (Link("layer.weight", "layer.weight"),),
        {"layer.weight": (Link("layer.weight", "layer.weight"),)},
    )
    plan(adapter, base, found)


def a_quantised_base(folder):
    tensors, config = {"layer.weight": numbers(8, 8)}, {"quantization_config": {"bits": 4}}
    base = on_disk.base_folder(folder / "base", tensors, architectures=["Model"], **config)
    adapter = on_disk.peft_folder(folder / "adapter", keyed({"layer": pair()}))
    opening.open_job(adapter, str(base))


def a_pickle_of_before_torch_1_6(folder):
    (folder / "a.bin").write_bytes(pickle.dumps({"layer.lora_A": [1.0]}))
    read_adapter(folder / "a.bin", format="loralib")


def one_side_of_a_tied_head(folder):
    base = on_disk.bases(folder / "base", {"layer.weight": numbers(8, 8)})
    adapter = Adapter({}, {"head.weight": numbers(8, 8)}, "lora")
    pairs = frozenset(["layer.weight", "head.weight"])
    links = (Link("layer.weight", "layer.weight"),)
    names = {"head.weight": (Link("head.weight", "head.weight"),)}
    shapes = dict.fromkeys(pairs, (8, 8))
    plan(
        adapter, base, Architecture("M", shapes, {}, links, names, ties=dict.fromkeys(pairs, pairs))
    )


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("layer-kind", an_update_of_a_norm_with_a_magnitude),
        ("layer-kind", kasa_on_conv1d),
        ("quantised-base", a_quantised_base),
        ("pickle", a_pickle_of_before_torch_1_6),
        ("tied", one_side_of_a_tied_head),
        ("residual-base", lambda folder: one_layer(folder, fields={"init_lora_weights": "corda"})),
        ("residual-base", lambda folder: one_layer(folder, fields={"init_lora_weights": "LoftQ"})),
    ],
)
def test_what_else_is_refused_names_the_same_case(tmp_path, name, make):
    with pytest.raises(LoraExportError) as caught:
        make(tmp_path)
    assert TABLE[name].why in str(caught.value)


# ---------------------------------------------------------------- the source


def sources():
    for file in sorted(ROOT.rglob("*.py")):
        if file.name != "refusals.py":
            yield file.relative_to(ROOT).as_posix(), ast.parse(file.read_text("utf-8"))


def test_every_refusal_in_the_source_names_an_entry():
    named, looked_up = set(), set()
    for _, tree in sources():
        for call in ast.walk(tree):
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "refused":
                first = call.args[0]
                if isinstance(first, ast.Constant):
                    named.add(first.value)
                else:
                    looked_up.add(ast.unparse(first).rpartition(".")[2])
    assert named
    assert named <= TABLE.keys()
    # Looked up are the cases of config fields, and those of layers; both are told by CASES.
    assert looked_up <= {"case", "refusal"}


def test_every_entry_is_named_in_the_source():
    words = {
        node.value
        for _, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert TABLE.keys() <= words


def test_a_name_without_an_entry_is_a_mistake_of_the_program():
    with pytest.raises(KeyError):
        refused("no such case")


# ---------------------------------------------------------------- the text


@pytest.mark.parametrize("name", TABLE)
def test_an_entry_is_one_line_each_without_a_full_stop(name):
    entry = TABLE[name]
    for text in (entry.case, entry.why, entry.remedy):
        assert text
        assert text == text.strip()
        assert "\n" not in text
        assert not text.endswith(".")


def test_a_message_says_where_and_what_was_found():
    entry = TABLE["alora"]
    reasons = f"{entry.why}; {entry.remedy}"
    assert refused("alora") == f"{entry.case}: {reasons}"
    assert refused("alora", "layer") == f"layer: {entry.case}: {reasons}"
    assert refused("alora", "layer", "x is 1") == f"layer: {entry.case} (x is 1): {reasons}"


def test_no_two_entries_say_the_same():
    for text in ("case", "why"):
        found = [getattr(entry, text) for entry in refusals.TABLE.values()]
        assert len(set(found)) == len(found)
