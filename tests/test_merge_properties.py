"""What must not show in a merged weight: order, shards, threads, how wide the adapter was."""

import contextlib
import json
import tempfile
from pathlib import Path

import numpy as np
import on_disk
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from on_disk import BF16, PREFIX, numbers, rounded

from lora_export import merged_files, storage

FEW = settings(max_examples=25, deadline=None, derandomize=True)
PATH = "model.layers.{}.attn.{}"
FLOATS = [np.dtype(np.float32), np.dtype(np.float16), BF16]


@st.composite
def jobs(draw):
    """The tensors of a base, those of an adapter, and its config; all small."""
    layers, out, width = (draw(st.integers(1, n)) for n in (3, 9, 9))
    rank, seed = draw(st.integers(1, 4)), draw(st.integers(0, 999))
    kind, dtype = draw(st.sampled_from(["lora", "rslora", "dora"])), draw(st.sampled_from(FLOATS))
    base = {"model.embed_tokens.weight": numbers(11, width, dtype=dtype)}
    tensors = {}
    for index in range(layers):
        for name in ("q", "v"):
            path = PATH.format(index, name)
            own = seed + 7 * index + ord(name)
            # Thirds are held exactly by no float, so rounding has something to do.
            base[f"{path}.weight"] = (numbers(out, width, seed=own) / 3).astype(dtype)
            if draw(st.booleans()):
                tensors[f"{PREFIX}{path}.lora_A.weight"] = numbers(rank, width, seed=own)
                tensors[f"{PREFIX}{path}.lora_B.weight"] = numbers(out, rank, seed=own + 1)
                if kind == "dora":
                    length = np.abs(numbers(out, seed=own))
                    tensors[f"{PREFIX}{path}.lora_magnitude_vector"] = length
    if not tensors:  # at least one pair
        tensors[f"{PREFIX}{PATH.format(0, 'q')}.lora_A.weight"] = numbers(rank, width)
        tensors[f"{PREFIX}{PATH.format(0, 'q')}.lora_B.weight"] = numbers(out, rank)
        kind = "lora" if kind == "dora" else kind
    config = {
        "r": rank, "lora_alpha": draw(st.sampled_from([0.1, 1, 3, 16])),
        "use_rslora": kind == "rslora", "use_dora": kind == "dora",
    }  # fmt: skip
    return base, tensors, config


@contextlib.contextmanager
def folder():
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def merged(place, base, tensors, config, shards=None):
    """Merge into a base in one file, or in shards; return the bytes of every tensor."""
    layers = len({name.split(".")[2] for name in base if ".layers." in name})
    fields = {"architectures": ["TinyForCausalLM"], "num_hidden_layers": layers}
    on_disk.base_folder(place / "base", base, **fields)
    if shards is not None:
        cut(place / "base", base, shards)
    on_disk.peft_folder(place / "adapter", tensors, **config)
    certificate = merged_files.merge_files(
        place / "adapter", base=str(place / "base"), out=place / "merged"
    )
    assert certificate.ok, [v for v in certificate.verdicts if not v.passed]
    found = storage.Checkpoint.open(place / "merged").tensors
    return {name: (info.dtype, info.shape, info.read()) for name, info in found.items()}


def cut(base, tensors, shards):
    """Write the tensors of a base as shards, told by the number of each."""
    (base / storage.SINGLE).unlink()
    weight_map = {}
    for number in sorted(set(shards.values())):
        name = f"model-{number:05}.safetensors"
        held = {n: tensors[n] for n in tensors if shards[n] == number}
        on_disk.save(base / name, held)
        weight_map |= dict.fromkeys(held, name)
    (base / storage.INDEX).write_text(json.dumps({"weight_map": weight_map}))


@FEW
@given(jobs(), st.randoms(use_true_random=False))
def test_the_order_of_the_adapters_tensors_changes_no_byte(job, random):
    base, tensors, config = job
    names = list(tensors)
    random.shuffle(names)
    with folder() as one, folder() as other:
        plain = merged(one, base, tensors, config)
        assert merged(other, base, {name: tensors[name] for name in names}, config) == plain
        files = [place / "merged" / storage.SINGLE for place in (one, other)]
        assert files[0].read_bytes() == files[1].read_bytes()


@FEW
@given(jobs(), st.data())
def test_the_shards_of_the_base_change_no_byte_of_any_tensor(job, data):
    base, tensors, config = job
    shards = {name: data.draw(st.integers(1, 3), name) for name in base}
    with folder() as one, folder() as other:
        plain = merged(one, base, tensors, config)
        assert merged(other, base, tensors, config, shards) == plain
        # Every tensor stays in its shard.
        index = storage.read_json(other / "merged" / storage.INDEX)["weight_map"]
        assert index == storage.read_json(other / "base" / storage.INDEX)["weight_map"]


@FEW
@given(jobs(), st.sampled_from([np.dtype(np.float16), BF16, np.dtype(np.float64)]))
def test_how_wide_the_adapter_is_stored_changes_no_byte(job, dtype):
    base, tensors, config = job
    with folder() as one, folder() as other:
        plain = merged(one, base, tensors, config)
        narrow = {name: value.astype(dtype) for name, value in tensors.items()}
        assert all((narrow[name] == tensors[name]).all() for name in tensors)
        assert merged(other, base, narrow, config) == plain


@FEW
@given(jobs(), st.integers(2, 4))
def test_the_number_of_threads_changes_no_byte(job, threads):
    base, tensors, config = job
    before = torch.get_num_threads()
    try:
        with folder() as one, folder() as other:
            torch.set_num_threads(1)
            plain = merged(one, base, tensors, config)
            torch.set_num_threads(threads)
            assert merged(other, base, tensors, config) == plain
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_the_number_of_threads_changes_no_byte_of_a_wide_weight():
    """A sum is cut among threads only where it is long."""
    dice, before = np.random.default_rng(0), torch.get_num_threads()
    a, b = dice.normal(size=(64, 700)), dice.normal(size=(600, 64))
    path = PATH.format(0, "q")
    base = {f"{path}.weight": dice.normal(size=(600, 700)).astype(np.float32)}
    tensors = on_disk.keyed({path: (a.astype(np.float32), b.astype(np.float32))})
    found = []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            with folder() as place:
                found.append(merged(place, base, tensors, {"r": 64, "lora_alpha": 3.3}))
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]


@FEW
@given(jobs())
def test_every_element_is_the_float64_value_rounded_once(job):
    base, tensors, config = job
    with folder() as place:
        found = merged(place, base, tensors, config)
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    for name, value in base.items():
        key = PREFIX + name.removesuffix(".weight")
        expected = value
        if f"{key}.lora_A.weight" in tensors:
            a, b = (tensors[f"{key}.lora_{side}.weight"].astype(np.float64) for side in "AB")
            exact = value.astype(np.float64) + scale * (b @ a)
            if config["use_dora"]:
                length = np.linalg.norm(exact, axis=1, keepdims=True)
                magnitude = tensors[f"{key}.lora_magnitude_vector"][:, None]
                exact = exact * (magnitude / np.where(length == 0, 1, length))
            expected = rounded(exact, value.dtype)
        held = np.frombuffer(found[name][2], value.dtype).reshape(value.shape)
        # At an exact tie float64's own noise decides; it is at most one step of the dtype then.
        differs = held != expected
        if differs.any():
            assert differs.mean() < 0.1
            gap = np.abs(held.astype(np.float64) - exact)[differs]
            other = np.abs(expected.astype(np.float64) - exact)[differs]
            np.testing.assert_allclose(gap, other, rtol=1e-9)


@FEW
@given(jobs(), st.booleans())
def test_an_adapter_whose_b_is_zero_leaves_every_byte_of_the_base(job, negative):
    base, tensors, config = job
    zero = np.float32(-0.0 if negative else 0.0)
    silent = {
        name: np.full_like(value, zero) if "lora_B" in name else value
        for name, value in tensors.items()
        if "magnitude" not in name
    }
    before = {
        name: (storage.dtype_name(value), value.shape, value.tobytes())
        for name, value in base.items()
    }
    with folder() as place:
        assert merged(place, base, silent, {**config, "use_dora": False}) == before


def test_a_zero_of_the_base_keeps_its_sign_where_b_is_zero():
    """Minus zero plus zero is plus zero: another byte, though the same value."""
    path = PATH.format(0, "q")
    weight = numbers(4, 5)
    weight[1, 2] = -0.0
    a, b = numbers(2, 5), np.zeros((4, 2), np.float32)
    with folder() as place:
        base = {f"{path}.weight": weight}
        found = merged(place, base, on_disk.keyed({path: (a, b)}), {})
    assert found[f"{path}.weight"][2] == weight.tobytes()
