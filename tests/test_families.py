"""Every architecture and task in every format, at every shape: no code of the package names one."""

import copy

import families
import pytest
import transformers
from families import FAMILIES

from lora_export import calling, checks, exporters, inputs, models, pipeline, placing
from lora_export.checks import parity, structure, weights
from lora_export.errors import ExportFailed
from lora_export.records import REFERENCE, UNMERGED, Evidence, Recording
from lora_export.runners.eager import EagerRunner

QUICK = {
    ("llama", "onnx"), ("bert-choices", "onnx"), ("t5", "torchscript"), ("gpt2", "torchscript"),
    ("vit", "torchscript"), ("deberta-v2", "torchscript"), ("bert-spans", "pt2"),
}  # fmt: skip
REFUSED = {
    ("bloom", "torchscript"): "Could not export Python function call 'GeLUFunction'",
    ("t5", "aoti"): "cannot take the source of no tokens",
}
WHOLE = ("onnx", "torchscript", "pt2")  # of the others a few families
SOME = ("distilbert", "llama", "t5", "vit")
CASES = [(family, name) for name in WHOLE for family in FAMILIES]
CASES += [(family, "openvino") for family in SOME]
CASES += [("llama", "aoti"), ("t5", "aoti")]  # half a minute of compiling each


def marked(cases):
    return [pytest.param(*c, marks=() if c in QUICK else pytest.mark.slow) for c in cases]


def exported(family, name, folder):
    """Return the evidence of one family in one format."""
    if name == "openvino":
        pytest.importorskip("openvino")
    model = families.build(family)
    interface = calling.interface_of(model, families.tokens_of(model))
    signature = interface.signature
    exporter = exporters.load(name)
    path = folder / f"model{exporter.SUFFIX}"
    example = inputs.example(signature)
    about = {"made by": "a test"}
    exporter.export(exporters.Request(interface.bind(model), signature, example, about, path))
    runners = {
        REFERENCE: EagerRunner(REFERENCE, interface.bind(copy.deepcopy(model).double()), signature),
        UNMERGED: EagerRunner(UNMERGED, interface.bind(model), signature),
        name: exporter.open_runner(path, 1),
    }
    batches = inputs.grid_batches(signature, seed=3)
    recordings = {
        title: Recording(title, runner.precision, tuple(runner.run(b.arrays) for b in batches))
        for title, runner in runners.items()
    }
    with models.quiet():
        model.save_pretrained(folder / "merged")
    artifact = exporters.describe(name, path)
    return Evidence(
        signature=signature,
        artifacts=(artifact,),
        batches=batches,
        recordings=recordings,
        placements=placing.placements_of(model, interface, folder / "merged", artifact, path),
    )


@pytest.mark.parametrize(("family", "name"), marked(c for c in CASES if c not in REFUSED))
def test_it_computes_what_the_model_computes_at_every_shape(family, name, tmp_path):
    evidence = exported(family, name, tmp_path)
    for verdict in (*parity.judge(evidence), *structure.judge(evidence), *weights.judge(evidence)):
        assert verdict.passed, verdict.note
        assert verdict.compared > 0


@pytest.mark.parametrize(("family", "name"), REFUSED)
def test_what_a_format_cannot_hold_is_an_error_that_names_it(family, name, tmp_path):
    with pytest.raises(ExportFailed, match=REFUSED[family, name]):
        exported(family, name, tmp_path)


def test_the_parity_of_another_models_file_fails(tmp_path):
    """The control: the same architecture with other weights is seen in every output."""
    evidence = exported("gpt2", "torchscript", tmp_path)
    other = families.build("gpt2", seed=1)
    interface = calling.interface_of(other, families.tokens_of(other))
    runner = EagerRunner("torchscript", interface.bind(other), interface.signature)
    answers = tuple(runner.run(batch.arrays) for batch in evidence.batches)
    wrong = Recording("torchscript", "float32", answers)
    swapped = Evidence(
        signature=evidence.signature,
        artifacts=evidence.artifacts,
        batches=evidence.batches,
        recordings={**evidence.recordings, "torchscript": wrong},
    )
    for output in evidence.signature.outputs:
        assert not checks._output("parity", "torchscript", output.name, swapped).passed


@pytest.fixture
def merged(tmp_path, tiny_base):
    """`merged(family)`: a folder with that model and a tokenizer that fits it."""

    def make(family):
        folder = tmp_path / "merged"
        families.build(family).save_pretrained(folder)
        known = transformers.AutoTokenizer.from_pretrained(tiny_base).get_vocab()
        tokens = transformers.BertTokenizerFast(
            vocab={word: index for word, index in known.items() if index < 100},
            model_input_names=["input_ids", "attention_mask"],
            model_max_length=64,
        )
        tokens.save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize(
    "family",
    ["llama", "vit"]
    + [pytest.param(f, marks=pytest.mark.slow) for f in ("bart", "bert-choices", "gpt2-cls")],
)
def test_one_command_exports_it_and_every_verdict_passes(merged, tmp_path, family):
    out = tmp_path / "model.pt"
    certificate = pipeline.export_file("torchscript", model=merged(family), out=out)
    assert certificate.ok, [v for v in certificate.verdicts if not v.passed]
    peak = {m.subject: m.value for m in certificate.measurements if m.name == "peak memory"}
    whole = peak.pop("torchscript, model included")
    # The second is left out where an earlier test of this process held more.
    assert peak.keys() <= {"torchscript, above the model"}
    assert all(0 < above < whole for above in peak.values())
    beside = tmp_path / "model.pt.tokenizer"
    assert (beside / "tokenizer.json").is_file()
