"""What `convert` writes is read by PEFT itself: nothing missing, nothing over, same answers."""

import warnings

import peft
import peft_made
import pytest
import torch
from test_peft_made import distance

from lora_export.conversion import convert
from lora_export.errors import InputError

ARCHITECTURES = ("bert", "llama", "vit", "mixtral", "roberta")
VARIANTS = (
    "plain", "rslora", "rslora-patterns", "dora", "bias-all", "bias-lora-only", "lora-bias",
    "modules-to-save", "embedding", "embedding-dora", "conv", "conv-dora", "experts",
    "trainable-tokens", "kasa", "pissa", "bdlora", "adalora",
)  # fmt: skip
CASES = [
    (architecture, variant)
    for architecture, variant in peft_made.cases(*VARIANTS)
    if architecture in ARCHITECTURES[: 2 if variant in ("plain", "rslora", "dora") else None]
]


def loaded(made, place):
    """Return the answer of PEFT's model with the adapter in `place`, and what PEFT warned of."""
    base = made.architecture.load(made.base, torch.float32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(base, place)
    said = [str(w.message) for w in caught]
    return peft_made.answer(model, made.inputs), [s for s in said if "adapter keys" in s]


@pytest.mark.parametrize(("architecture", "variant"), CASES)
@pytest.mark.parametrize("through", ["peft", "native"])
def test_peft_reads_what_was_converted(tmp_path, architecture, variant, through):
    made = peft_made.make(architecture, variant, "float32", tmp_path)
    place = made.adapter
    if through == "native":
        convert(place, tmp_path / "one.safetensors", format="native")
        place = tmp_path / "one.safetensors"
    convert(place, tmp_path / "converted")
    answer, warned = loaded(made, tmp_path / "converted")
    assert warned == []
    assert distance(answer, made.logits) < (5e-5 if made.variant.loose else 1e-5)


@pytest.mark.parametrize(("architecture", "variant"), CASES)
def test_a_normalised_adapter_answers_alike_or_is_refused(tmp_path, architecture, variant):
    made = peft_made.make(architecture, variant, "float32", tmp_path)
    if any(name in variant for name in ("dora", "kasa", "pissa")):  # no sums of base and product
        with pytest.raises(InputError, match="cannot be normalised"):
            convert(made.adapter, tmp_path / "converted", normalise=True)
        assert not (tmp_path / "converted").exists()
        return
    written = convert(made.adapter, tmp_path / "converted", normalise=True)
    assert {pair.scale for pair in written.modules.values()} == {1.0}
    answer, warned = loaded(made, tmp_path / "converted")
    assert warned == []
    assert distance(answer, made.logits) < 1e-5
