"""recipes/sst2.py on a tiny base: each method, what it writes, killed runs."""

import contextlib
import importlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from lora_export import merged_files, methods, read_adapter
from lora_export.errors import AdapterMismatch, InputError

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def recipe():
    return importlib.import_module("sst2")


@pytest.fixture
def train(recipe, tiny_base, sentences, tmp_path, monkeypatch):
    def run(*more, base=tiny_base, out="run"):
        words = ["--base", base, "--data", sentences, "--out", tmp_path / out, "--epochs", 3]
        words += ["--batch-size", 8, "--evaluate-every", 5, "--lr", 0.01, *more]
        monkeypatch.setattr(sys, "argv", ["sst2.py", *map(str, words)])
        recipe.main()
        return tmp_path / out

    return run


def _rows(folder, name):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["name"] == name]


def _on_the_hub(monkeypatch, **splits):
    import datasets

    made = {name: datasets.Dataset.from_dict(columns) for name, columns in splits.items()}
    monkeypatch.setattr(datasets, "load_dataset", lambda *words: {"sst2": made}[words[-1]])


def test_data_sets_of_the_hub_are_read(recipe, monkeypatch):
    columns = {"sentence": ["good film"], "label": [1]}
    _on_the_hub(monkeypatch, train=columns, validation=columns)
    assert list(recipe.load_data("nyu-mll/glue:sst2")) == [(["good film"], [1])] * 2


def test_a_data_set_of_the_hub_without_the_columns_is_refused(recipe, monkeypatch):
    _on_the_hub(monkeypatch, train={"sentence": ["good film"], "label": [1]})
    with pytest.raises(InputError, match="'validation'; expected the splits train and"):
        list(recipe.load_data("nyu-mll/glue:sst2"))
    _on_the_hub(monkeypatch, train={"text": ["good film"], "label": [1]})
    with pytest.raises(InputError, match=r"sst2 is no folder; as .*'sentence'"):
        list(recipe.load_data("nyu-mll/glue:sst2"))


def test_it_learns_and_writes_a_self_contained_adapter(train, tmp_path):
    folder = train("--epochs", 10)
    assert {file.name for file in folder.iterdir()} == {
        "adapter.safetensors", "metrics.jsonl", "run.json",
    }  # fmt: skip
    adapter = read_adapter(folder / "adapter.safetensors")
    assert adapter.labels == ("negative", "positive")
    assert adapter.base.architecture == "BertForSequenceClassification"
    assert _rows(folder, "accuracy")[-1]["value"] >= 0.9
    assert _rows(folder, "Matthews correlation")[-1]["samples"] == 10
    assert str(tmp_path) not in json.dumps(dict(adapter.training))
    assert str(tmp_path) not in (folder / "run.json").read_text()


@pytest.mark.parametrize(
    ("method", "file"),
    [
        ("rslora", "adapter.safetensors"),
        ("full", "model"),
        ("bitfit", "trained.safetensors"),
        ("head", "trained.safetensors"),
    ],
)
def test_each_method_trains_what_it_says_and_leaves_the_rest(
    train, method, file, tiny_base, classifier_of
):
    folder = train("--method", method, "--epochs", 1)
    counts = {name: _rows(folder, f"{name}parameters")[0]["value"] for name in ("trainable ", "")}
    plain = classifier_of(tiny_base)
    shapes = {name: parameter.numel() for name, parameter in plain.named_parameters()}
    head = sum(size for name, size in shapes.items() if name.startswith("classifier."))
    biases = sum(size for name, size in shapes.items() if name.endswith("bias"))
    expected = {
        "full": sum(shapes.values()),
        "bitfit": biases + shapes["classifier.weight"],
        "head": head,
    }
    if method in expected:
        assert counts["trainable "] == expected[method]
        assert counts[""] == sum(shapes.values())
    else:
        assert head < counts["trainable "] < counts[""] / 2
    assert (folder / file).exists()
    size = _rows(folder, "checkpoint size")[0]
    assert size["subject"] == file
    assert size["value"] >= 4 * counts["trainable "]


def test_what_a_method_trained_loads_again(train, tiny_base, classifier_of):
    path = train("--method", "bitfit") / "trained.safetensors"
    model = classifier_of(tiny_base)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    methods.load_trained(model, path)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert "bert.encoder.layer.0.output.dense.bias" in changed
    assert all(name.endswith("bias") or name.startswith("classifier") for name in changed)
    with pytest.raises(AdapterMismatch, match=r"classifier.bias: expected \(2,\), found nothing"):
        methods.load_trained(model.bert, path)


def test_the_same_seed_gives_the_same_adapter_and_another_does_not(train):
    values = []
    for n, seed in enumerate((1, 1, 2)):
        adapter = read_adapter(train("--seed", seed, out=f"{n}") / "adapter.safetensors")
        values.append(next(iter(adapter.modules.values())).b)
    assert (values[0] == values[1]).all()
    assert (values[0] != values[2]).any()


def test_a_checkpoint_of_other_settings_is_refused(train, monkeypatch):
    def stop(*arguments, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(methods, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        train()
    with pytest.raises(InputError, match="was written with other settings: options was"):
        train("--resume", "--rank", 4)


def test_the_dropout_of_the_base_is_an_option(recipe, train, monkeypatch):
    seen = []
    real = methods.adapt

    def look(model, *more):
        seen.append(model.config.hidden_dropout_prob)
        real(model, *more)

    monkeypatch.setattr(methods, "adapt", look)
    train("--epochs", 1, "--base-dropout", 0, out="without")
    train("--epochs", 1, out="with")
    assert seen == [0, 0.1]


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(train, tiny_base, sentences, tmp_path):
    """SIGKILL at any moment, more than once: nothing is caught, nothing is said farewell to."""
    whole = train("--epochs", 60, out="whole")
    command = [
        sys.executable, ROOT / "recipes" / "sst2.py", "--base", tiny_base, "--data", sentences,
        "--out", tmp_path / "killed", "--epochs", 60, "--batch-size", 8, "--evaluate-every", 5,
        "--lr", 0.01,
    ]  # fmt: skip
    progress = tmp_path / "killed" / "progress.json"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    kills = 0
    for least in (20, 200):
        resumed = ["--resume"] if kills else []
        process = subprocess.Popen(list(map(str, [*command, *resumed])), **quiet)
        while process.poll() is None:
            with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
                if json.loads(progress.read_text())["step"] >= least:
                    process.kill()
                    break
            time.sleep(0.01)
        kills += process.wait() == -signal.SIGKILL
    assert kills == 2
    subprocess.run(list(map(str, [*command, "--resume"])), check=True, capture_output=True)
    one, other = (load_file(tmp_path / n / "adapter.safetensors") for n in ("whole", "killed"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert _rows(whole, "loss") == _rows(tmp_path / "killed", "loss")


def test_another_family_trains_and_merges(train, tiny, tiny_base, tmp_path):
    """DistilBERT is the base that most tutorials use; here it is built from its config."""
    base = tmp_path / "distilbert"
    transformers.DistilBertModel(
        transformers.DistilBertConfig(
            vocab_size=112, dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=64
        )
    ).save_pretrained(base)
    transformers.BertTokenizerFast.from_pretrained(
        tiny_base, model_input_names=["input_ids", "attention_mask"]
    ).save_pretrained(base)
    path = train("--targets", "q_lin,v_lin", "--rank", 2, base=base) / "adapter.safetensors"
    adapter = read_adapter(path)
    assert len(adapter.modules) == 4
    assert {name.split(".")[0] for name in adapter.replaced} == {"pre_classifier", "classifier"}
    assert merged_files.merge_files(path, base=str(base), out=tmp_path / "merged").ok
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert isinstance(plain, transformers.DistilBertForSequenceClassification)
    assert torch.isfinite(plain.classifier.weight).all()
