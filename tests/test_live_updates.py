"""Live updates by hand-made adapters: the merged model's answers, and what does not fit."""

import numpy as np
import on_disk
import pytest
import torch
from live_made import CASES, Q, answer, load
from on_disk import factors, keyed, numbers, pair
from torch import nn

from lora_export import load_adapter, merge, merged_files, peft_names, recomputed
from lora_export.errors import AdapterMismatch, InputError
from lora_export.injection import attach, detach, extract, idle
from lora_export.records import CONV, EMBEDDING, EXPERTS, Adapter, Factors, Rows

EACH = pytest.mark.parametrize("case", CASES)


@pytest.fixture
def made(bases, tmp_path):
    """`made(case)`: family, the live model, and that which the adapter was merged into."""

    def make(case):
        family, tensors, config = CASES[case]
        place = on_disk.peft_folder(tmp_path / "adapter", tensors, **config)
        certificate = merged_files.merge_files(
            place, base=str(bases(family)), out=tmp_path / "merged"
        )
        assert certificate.ok
        live = load(family, bases(family))
        load_adapter(live, place)
        return family, live, load(family, tmp_path / "merged")

    return make


def state(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@EACH
def test_a_live_model_answers_as_the_merged_one(made, bases, case):
    family, live, merged = made(case)
    expected = answer(family, merged)
    size = expected.abs().max()
    assert (answer(family, load(family, bases(family))) - expected).abs().max() > 1e-3 * size
    assert (answer(family, live.eval()) - expected).abs().max() < 2e-5 * size


@EACH
def test_merging_in_memory_gives_the_bytes_of_the_files(made, case):
    _, live, merged = made(case)
    found, expected = state(merge(live)), state(merged)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].numpy().tobytes() == value.numpy().tobytes(), name


@EACH
def test_taken_off_the_base_is_what_it_was(made, bases, case):
    family, live, _ = made(case)
    detach(live)
    found, expected = state(live), state(load(family, bases(family)))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@EACH
def test_switched_off_only_what_is_stored_whole_remains(made, bases, case):
    family, live, _ = made(case)
    changed = answer(family, live.eval())
    with idle(live):
        silent = answer(family, live)
    if case != "head":
        assert torch.equal(silent, answer(family, load(family, bases(family))))
    assert not torch.equal(silent, changed)
    assert torch.equal(answer(family, live), changed)


@EACH
def test_an_adapter_can_be_put_on_again(made, case):
    family, live, _ = made(case)
    expected = answer(family, live.eval())
    _, tensors, config = CASES[case]
    attach(live, peft_names.read(tensors, on_disk.fields(**config), "a"))
    assert torch.equal(answer(family, live.eval()), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_adapter_in_half_precision_is_read_into_a_wider_model(bases, tmp_path, dtype):
    kind = on_disk.BF16 if dtype == torch.bfloat16 else np.float16
    wide = on_disk.peft_folder(tmp_path / "wide", keyed({Q: pair(32, 32)}))
    tensors = {n: v.astype(kind) for n, v in keyed({Q: pair(32, 32)}).items()}
    narrow = on_disk.peft_folder(tmp_path / "narrow", tensors)
    found = []
    for place in (wide, narrow):
        model = load("llama", bases("llama"))
        load_adapter(model, place)
        found.append(answer("llama", model))
    assert torch.equal(*found)


def test_updates_without_a_layer_are_not_saved_as_an_adapter(made):
    _, live, _ = made("embedding")
    with pytest.raises(InputError, match="convert their file instead"):
        extract(live)


@EACH
def test_what_is_recomputed_is_not_trained(made, case):
    _, live, _ = made(case)
    trained = {name for name, parameter in live.named_parameters() if parameter.requires_grad}
    assert not any("parametrizations" in name for name in trained)


# ---------------------------------------------------------------- what does not fit


class Tiny(nn.Module):
    """One layer of each kind."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.conv = nn.Conv1d(3, 4, 3)
        self.linear = nn.Linear(8, 12, bias=False)
        self.stack = nn.Module()
        self.stack.w = nn.Parameter(torch.ones(3, 8, 8))
        self.tied = nn.Linear(8, 20, bias=False)
        self.tied.weight = self.embed.weight


def of(kind, a, b, **more):
    return Factors(numbers(*a), numbers(*b), 4.0, 2.0, kind, **more)


MISFITS = {
    "a wider embedding": ({"embed": of(EMBEDDING, (2, 21), (8, 2))}, {}, "lora"),
    "another kernel": ({"conv": of(CONV, (2, 3, 2), (4, 2, 1))}, {}, "lora"),
    "another layer": ({"linear": factors(8, 8, magnitude=numbers(8))}, {}, "lora+dora"),
    "no such module": ({"nowhere": of(EMBEDDING, (2, 20), (8, 2))}, {}, "lora"),
    "square experts": ({"stack.w": of(EXPERTS, (3, 2, 8), (3, 8, 2))}, {}, "lora"),
    "more experts": ({"stack.w": of(EXPERTS, (4, 2, 8), (4, 6, 2))}, {}, "lora"),
    "a bias where there is none": ({"linear": factors(12, 8, bias=numbers(12))}, {}, "lora"),
    "a tied embedding": ({"embed": of(EMBEDDING, (2, 20), (8, 2))}, {}, "lora"),
    "rows of nothing": ({}, {"nowhere": Rows((1,), numbers(1, 8))}, "lora"),
    "a row beyond the last": ({}, {"linear": Rows((12,), numbers(1, 8))}, "lora"),
    "rows of another width": ({}, {"linear": Rows((1,), numbers(1, 7))}, "lora"),
}


@pytest.mark.parametrize(("modules", "rows", "variant"), MISFITS.values(), ids=MISFITS)
def test_what_does_not_fit_is_a_mismatch_and_the_model_stays_as_it_was(modules, rows, variant):
    model = Tiny()
    before = state(model)
    with pytest.raises(AdapterMismatch):
        attach(model, Adapter(modules, {}, variant, rows=rows))
    assert not list(recomputed.updates(model))
    after = state(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
