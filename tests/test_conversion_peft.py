"""What `convert` writes is read by PEFT itself: nothing missing, nothing over, same answers."""

import warnings

import peft
import peft_made
import pytest
import torch
from conftest import padded_rows
from live_made import load
from test_peft_made import distance

from lora_export import LoraConfig, inject, load_adapter, merge, merged_files, save_adapter
from lora_export.conversion import convert
from lora_export.errors import InputError
from lora_export.injection import lora_layers

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


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
@pytest.mark.parametrize("variant", ["rslora", "dora", "rslora+dora"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_peft_trains_what_a_layer_trains_and_a_merge_of_the_file_gives_its_weight(
    bases, fill, tmp_path, family, variant
):
    """Logits, gradients of every factor after one step back, and the bits of the merged files."""
    ours = load(family, bases(family))
    targets = {"bert": ("query", "output.dense"), "gpt2": ("c_attn", "c_proj")}[family]
    inject(ours, LoraConfig(3, 7.5, targets=targets, variant=variant))
    save_adapter(fill(ours), tmp_path / "one.safetensors")
    convert(tmp_path / "one.safetensors", tmp_path / "peft")
    theirs = peft.PeftModel.from_pretrained(
        load(family, bases(family)), tmp_path / "peft", is_trainable=True
    )
    answers = [model(**padded_rows()).logits for model in (ours, theirs)]
    assert distance(*(answer.detach() for answer in answers)) < 1e-5
    for answer in answers:
        answer.square().mean().backward()
    found = dict(theirs.named_parameters())
    names = {"lora_A": "lora_A.default.weight", "lora_B": "lora_B.default.weight"}
    names["lora_magnitude_vector"] = "lora_magnitude_vector.default.weight"
    for path, layer in lora_layers(ours).items():
        assert all(factor.grad.any() for factor in layer.factors().values())
        for name, factor in layer.factors().items():
            slope = found[f"base_model.model.{path}.{names[name]}"].grad
            assert distance(factor.grad, slope) < 1e-4, (path, name)

    again = load(family, bases(family))
    load_adapter(again, tmp_path / "peft")
    merged_files.merge_files(tmp_path / "peft", base=str(bases(family)), out=tmp_path / "merged")
    written = load(family, tmp_path / "merged").state_dict()
    for path, weight in merge(again).state_dict().items():
        assert torch.equal(written[path], weight), path
    for path, layer in lora_layers(ours).items():
        assert torch.equal(written[f"{path}.weight"], layer.merged_weight()), path
