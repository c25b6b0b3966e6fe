"""Adapters as PEFT writes them, in every shape it knows, merged right to the last bit.

The oracle is `peft_made.reference`, which shares no code with the package and is itself held
against PEFT first, in float64.
"""

import copy
import json
import warnings

import numpy as np
import peft_made
import pytest
import torch
from peft_made import VARIANTS, cases, half_ulp
from safetensors.torch import load_file

from lora_export import merged_files
from lora_export.errors import AdapterMismatch

# All variants on the first, all architectures in the second, and what has few cases; else slow.
QUICK_ARCHITECTURES = ("bert", "llama")
QUICK_VARIANTS = ("plain",)
QUICK_CASES = (  # where PEFT's names or configs are odd, or none of the above will do
    ("gpt-neox", "modules-to-save"),
    ("gpt2-cls", "dora"),
    ("gpt2-cls", "pissa"),
    ("gpt2", "lora-bias"),
    ("mixtral", "all-linear"),
    ("roberta", "all-linear"),
    ("roberta", "bias-all"),
    ("vit", "bias-lora-only"),
)
NOISE = 1e-14  # of float64, in sums of products that are about one
LOOSE = 1e-5  # of a float32 decomposition of such weights

PEFT_DOUBLES = "PEFT's merge adds the delta of tied weights twice, once under each name"
PEFT_SPARES_ONE = "PEFT's merge changes both sides of the tie, its forward pass only one"
PEFT_FORGETS = "PEFT's forward pass leaves out the bias of a head that is tied to trained tokens"


def marked(pairs, *more):
    return [
        pytest.param(*pair, *more, id="-".join((*pair, *more)), marks=_marks(*pair))
        for pair in pairs
    ]


def _marks(architecture, variant):
    quick = variant in QUICK_VARIANTS or architecture in QUICK_ARCHITECTURES
    quick = quick or (architecture, variant) in QUICK_CASES
    return () if quick or len(VARIANTS[variant].applies) <= 3 else pytest.mark.slow


def peft_merges_wrong(architecture, variant):
    """Return the reason for which PEFT's own merge is no third party here."""
    if VARIANTS[variant].one_sided:
        return PEFT_SPARES_ONE
    return PEFT_DOUBLES if variant == "tied-embedding" else ""


def peft_answers_wrong(architecture, variant):
    """Return the reason for which PEFT's live model is no third party here."""
    return PEFT_FORGETS if architecture == "bert-mlm" and "trainable-tokens" in variant else ""


# On a float32 base these are "plain" and "dora" again.
WIDE = [(a, v) for a, v in cases() if VARIANTS[v].autocast]
TWO_SIDED = [(a, v) for a, v in WIDE if not VARIANTS[v].one_sided]
ONE_SIDED = [(a, v) for a, v in WIDE if VARIANTS[v].one_sided]
NARROW = [
    (architecture, variant)
    for architecture, variant in cases(
        "plain", "dora", "narrow", "narrow-dora", "modules-to-save", "rslora-patterns",
        "embedding-dora", "conv-dora", "experts", "lora-bias-bias-all", "trainable-tokens",
        "bdlora", "adalora-pruned", "pissa", "olora", "kasa",
    )
    if architecture in ("distilbert", "bert-headless", "gpt2-cls", "llama", "t5", "vit")
    or "experts" in variant
]  # fmt: skip
RESIDUAL = cases("pissa", "olora")


# ---------------------------------------------------------------- the reference against PEFT


def base_of(made):
    """Return the base's tensors as they stand in a merged model that nothing has changed."""
    config = json.loads((made.adapter / "adapter_config.json").read_text())
    tensors = load_file(made.base / "model.safetensors")
    tensors = peft_made.replicated(tensors, config.get("layer_replication"))
    return {n: x for n, x in tensors.items() if not made.architecture.drops(n)}


def whole(made, changed):
    """Return all tensors of the merged model by the names that they have under a head."""
    tensors = {n: x.double().numpy() for n, x in base_of(made).items()} | changed
    if not made.architecture.headless:
        return tensors
    model = made.live.get_base_model()
    parts = {name for name, _ in model.named_children()}
    trunk = f"{model.base_model_prefix}."
    return {n if n.partition(".")[0] in parts else trunk + n: x for n, x in tensors.items()}


def distance(found, wanted):
    """Return how far two answers lie apart, measured by the larger one's size."""
    return float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max())


@pytest.mark.parametrize(("architecture", "variant"), marked(WIDE))
def test_the_reference_merges_and_answers_as_peft_does(tmp_path, architecture, variant):
    made = peft_made.make(architecture, variant, "float32", tmp_path)
    changed = peft_made.reference(made.base, made.adapter, untie=made.variant.one_sided)
    weights, live = whole(made, changed), peft_made.reloaded(made)
    if not peft_answers_wrong(architecture, variant):
        inputs = {n: x.double() if x.is_floating_point() else x for n, x in made.inputs.items()}
        found = peft_made.answer(peft_made.plain(made, weights, tmp_path / "plain"), inputs)
        # Some models, such as Gemma, go through float32 inside.
        limit = 5e-5 if made.variant.loose else 3e-6
        wanted = peft_made.answer(live, inputs)
        assert distance(found, wanted) < limit
        base = made.architecture.load(made.base, torch.float64)
        assert distance(peft_made.answer(base, inputs), wanted) > 100 * limit
    if not peft_merges_wrong(architecture, variant):
        merged = peft_made.merged_by_peft(live, tmp_path / "by-peft")
        assert weights.keys() == merged.keys()
        limit = LOOSE if made.variant.loose else NOISE
        far = [n for n in weights if not np.allclose(weights[n], merged[n], rtol=0, atol=limit)]
        assert not far


# ---------------------------------------------------------------- the merge against the reference


def merge(made, out, base=None, **options):
    certificate = merged_files.merge_files(
        made.adapter, base=str(base or made.base), out=out, **options
    )
    assert certificate.ok
    return out


def check_weights(made, out, dtype, changed, base=None):
    """Assert that `changed` stand in `out` rounded once, and all the others bit for bit."""
    found = load_file(out / "model.safetensors")
    kept = base_of(made) if base is None else load_file(base / "model.safetensors")
    prefix = made.live.get_base_model().base_model_prefix  # may precede a headless base's names
    places = {
        name: place
        for name in kept.keys() | changed.keys()
        for place in {name, f"{prefix}.{name}"} & found.keys()
    }
    assert not (kept.keys() | changed.keys()) - places.keys(), "missing"
    assert not found.keys() - set(places.values()), "nobody's"
    slack = NOISE + (LOOSE if made.variant.loose and base is None else 0)
    for name, place in places.items():
        value = found[place]
        assert value.dtype == peft_made.DTYPES[dtype], name
        if name in changed:
            limit = half_ulp(changed[name], dtype) + slack
            assert value.shape == changed[name].shape, name
            assert np.all(np.abs(value.double().numpy() - changed[name]) <= limit), name
        else:
            assert torch.equal(bits_of(value), bits_of(kept[name])), name


def bits_of(tensor):
    return tensor.contiguous().flatten().view(torch.uint8)


def check_answers(made, out):
    """Assert that `out`, loaded by transformers alone, answers as PEFT's live model."""
    kind = type(made.live.get_base_model())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, report = kind.from_pretrained(out, output_loading_info=True)
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    found = peft_made.answer(model, made.inputs)
    assert distance(found, made.logits) < (5e-5 if made.variant.loose else 1e-5)


@pytest.mark.parametrize(("architecture", "variant"), marked(TWO_SIDED))
def test_a_merge_is_the_reference_rounded_once(tmp_path, architecture, variant):
    made = peft_made.make(architecture, variant, "float32", tmp_path)
    out = merge(made, tmp_path / "merged")
    check_weights(made, out, "float32", peft_made.reference(made.base, made.adapter))
    if not peft_answers_wrong(architecture, variant):
        check_answers(made, out)


@pytest.mark.parametrize(
    ("architecture", "variant", "dtype"),
    [*marked(NARROW, "bfloat16"), *marked(NARROW, "float16")],
)
def test_a_narrow_base_is_merged_with_one_rounding(tmp_path, architecture, variant, dtype):
    made = peft_made.make(architecture, variant, dtype, tmp_path)
    out = merge(made, tmp_path / "merged")
    check_weights(made, out, dtype, peft_made.reference(made.base, made.adapter))


@pytest.mark.parametrize(("architecture", "variant"), marked(ONE_SIDED))
def test_one_side_of_tied_weights_is_refused(tmp_path, architecture, variant):
    made = peft_made.make(architecture, variant, "float32", tmp_path)
    with pytest.raises(AdapterMismatch, match="tied"):
        merge(made, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(("architecture", "variant"), marked(ONE_SIDED))
def test_one_side_of_tied_weights_is_merged_when_untied(tmp_path, architecture, variant):
    made = peft_made.make(architecture, variant, "float32", tmp_path)
    out = merge(made, tmp_path / "merged", tied="untie")
    changed = peft_made.reference(made.base, made.adapter, untie=True)
    # Which of several tied tensors must be written out, the model's own class decides.
    spare = changed.keys() - load_file(out / "model.safetensors").keys() - base_of(made).keys()
    check_weights(made, out, "float32", {n: x for n, x in changed.items() if n not in spare})
    check_answers(made, out)


@pytest.mark.parametrize(("architecture", "variant"), marked(ONE_SIDED))
def test_an_update_of_one_side_goes_to_both_when_asked(tmp_path, architecture, variant):
    made = peft_made.make(architecture, variant, "float32", tmp_path)
    out = merge(made, tmp_path / "merged", tied="both")
    check_weights(made, out, "float32", peft_made.reference(made.base, made.adapter))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("architecture", "variant"), marked(RESIDUAL))
def test_a_residual_base_is_taken_as_it_is(tmp_path, architecture, variant, dtype):
    made = peft_made.make(architecture, variant, dtype, tmp_path)
    base = tmp_path / "residual"
    copy.deepcopy(made.live).unload().save_pretrained(base)
    out = merge(made, tmp_path / "merged", base, residual_base=True)
    changed = peft_made.reference(base, made.adapter, residual_base=True)
    check_weights(made, out, dtype, changed, base)
    if dtype == "float32":
        check_answers(made, out)
