"""Adapters that old versions of PEFT wrote, merged, and held against what PEFT itself answered.

`fixtures/make_peft_versions.py` made them and says how. The answers are those of the live,
unmerged model, in float64.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from lora_export import merged_files

ROOT = Path(__file__).parent / "fixtures" / "peft_versions"
CASES = sorted(place.parent for place in ROOT.glob("0.*/*/adapter_config.json"))
# With bias "lora_only" PEFT 0.7 and 0.8 train no bias, 0.9 to 0.20 lose it on saving.
UNSAVED = [p for p in CASES if p.name == "bias-lora-only" and p.parent.name in ("0.8.2", "0.19.1")]
LOST = [place for place in UNSAVED if place.parent.name == "0.19.1"]
# Weights are rounded once to float32; the rest of the way is float64.
TOLERANCE = 2e-6


def name_of(place):
    return f"{place.name} of {place.parent.name}"


def base_of(place):
    return ROOT / json.loads((place / "adapter_config.json").read_text())["base_model_name_or_path"]


def merge(place, out):
    certificate = merged_files.merge_files(place, base=str(base_of(place)), out=out)
    assert certificate.ok, [v for v in certificate.verdicts if not v.passed]
    return certificate


@torch.no_grad()
def answer(folder):
    """What plain transformers answers with the model in `folder`, computed in float64."""
    kind = json.loads((folder / "config.json").read_text())["architectures"][0]
    # The default grouped product of experts does not know float64.
    more = {"experts_implementation": "eager"} if "Mixtral" in kind else {}
    model, report = getattr(transformers, kind).from_pretrained(
        folder, output_loading_info=True, **more
    )
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    logits = model.eval().double()(**rows(kind)).logits.numpy()
    return logits[:, -1] if logits.ndim == 3 else logits


def rows(kind):
    """The input that the script gave to PEFT's model."""
    if "ViT" in kind:
        state = np.random.RandomState(zlib.crc32(b"pixels"))
        return {"pixel_values": torch.from_numpy(state.standard_normal((2, 3, 8, 8)))}
    ids = torch.from_numpy(np.random.RandomState(5).randint(3, 24, (2, 6)))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def stored_answer(place):
    with np.load(place / "logits.npz") as file:
        return file["logits"]


@pytest.mark.parametrize("place", [p for p in CASES if p not in LOST], ids=name_of)
def test_the_merged_model_answers_as_the_live_one_of_that_version_did(tmp_path, place):
    merge(place, tmp_path / "merged")
    expected = stored_answer(place)
    assert np.abs(answer(tmp_path / "merged") - expected).max() <= TOLERANCE


@pytest.mark.parametrize("place", UNSAVED, ids=name_of)
def test_a_bias_that_peft_did_not_save_is_missed_aloud_and_nothing_else_is(tmp_path, place):
    notes = merge(place, tmp_path / "merged").settings["notes"]
    assert [note for note in notes if "bias" in note and "lora_only" in note], notes
    merge(place.parent / "head", tmp_path / "without")  # the same pairs and the same head
    tensors = [
        safetensors.numpy.load_file(tmp_path / name / "model.safetensors")
        for name in ("merged", "without")
    ]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(np.array_equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    if place in LOST:
        assert np.abs(answer(tmp_path / "merged") - stored_answer(place)).max() > 1e-3


@pytest.mark.parametrize("place", [p for p in CASES if p.parent.name == "0.19.1"], ids=name_of)
def test_the_answers_would_show_a_lost_update(tmp_path, place):
    """Without its low-rank part the model answers something else by far."""
    adapter = tmp_path / "a"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_bytes((place / "adapter_config.json").read_bytes())
    tensors = safetensors.numpy.load_file(place / "adapter_model.safetensors")
    zeroed = {n: np.zeros_like(v) if "_B" in n else v for n, v in tensors.items()}
    safetensors.numpy.save_file(zeroed, adapter / "adapter_model.safetensors")
    merged_files.merge_files(adapter, base=str(base_of(place)), out=tmp_path / "merged")
    assert np.abs(answer(tmp_path / "merged") - stored_answer(place)).max() > 1000 * TOLERANCE


def test_every_version_of_the_set_is_there():
    """A set that was not checked out would pass the tests above by being empty."""
    versions = {place.parent.name for place in CASES}
    assert versions == {
        "0.2.0", "0.4.0", "0.8.2", "0.10.0", "0.11.1", "0.15.2", "0.18.1", "0.19.1", "0.21.2",
    }  # fmt: skip
    assert len(UNSAVED) == 2
