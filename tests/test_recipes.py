"""The recipe on a tiny base: what it writes, and that a stopped run goes on as if it never was."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
import transformers

from lora_export import merged_files, read_adapter

ROOT = Path(__file__).parent.parent
POSITIVE = ["a great film", "the best cast", "i love it", "warm and charming", "very funny music"]
NEGATIVE = ["a bad film", "the worst cast", "i hate it", "dull and boring", "very silly music"]


@pytest.fixture(scope="module")
def recipe():
    """The recipe as a module: it is a script, and no part of the package."""
    spec = importlib.util.spec_from_file_location("sst2_lora", ROOT / "recipes" / "sst2_lora.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["sst2_lora"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rows = [(text, 1) for text in POSITIVE] + [(text, 0) for text in NEGATIVE]
    lines = "".join(f"{text} \t{label}\n" for text, label in rows)
    for name, times in (("train", 6), ("dev", 1)):
        (folder / f"{name}.tsv").write_text("sentence\tlabel\n" + lines * times)
    return folder


@pytest.fixture
def train(recipe, tiny_base, data, tmp_path, monkeypatch):
    def run(*more, base=tiny_base, out="sst2.safetensors"):
        words = ["--base", base, "--data", data, "--out", tmp_path / out, "--epochs", 3]
        words += ["--batch-size", 8, "--checkpoint-every", 5, "--lr", 0.01, *more]
        monkeypatch.setattr(sys, "argv", ["sst2_lora.py", *map(str, words)])
        recipe.main()
        return tmp_path / out

    return run


def test_it_learns_and_writes_a_self_contained_adapter(train, tmp_path):
    path = train("--epochs", 30)
    adapter = read_adapter(path)
    assert adapter.labels == ("negative", "positive")
    assert adapter.base.architecture == "BertForSequenceClassification"
    assert adapter.training["dev_accuracy"] >= 0.9
    assert adapter.training["trainable_ratio"] < 1
    assert str(tmp_path) not in json.dumps(dict(adapter.training))


def test_it_writes_metrics_and_a_plot_and_removes_its_checkpoint(train, tmp_path):
    train()
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"sst2.safetensors", "sst2-metrics.json", "sst2-training.png"}
    found = json.loads((tmp_path / "sst2-metrics.json").read_text())
    assert len(found["loss_by_step"]) == found["steps"] == 24
    assert found["dev_accuracy_by_step"][-1] == [24, found["dev_accuracy"]]
    assert (tmp_path / "sst2-training.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_seed_gives_the_same_adapter_and_another_does_not(train):
    values = [
        next(iter(read_adapter(train("--seed", seed, out=f"{n}.safetensors")).modules.values())).b
        for n, seed in enumerate((1, 1, 2))
    ]
    assert (values[0] == values[1]).all()
    assert (values[0] != values[2]).any()


def test_a_stopped_run_goes_on_to_the_same_adapter(train, recipe, monkeypatch, tmp_path):
    whole = read_adapter(train(out="whole.safetensors"))
    real, calls = recipe.accuracy, []

    def stop_at_the_third(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(recipe, "accuracy", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        train(out="stopped.safetensors")
    assert (tmp_path / "stopped.checkpoint").is_file()
    monkeypatch.setattr(recipe, "accuracy", real)
    resumed = read_adapter(train("--resume", out="stopped.safetensors"))
    for path, pair in whole.modules.items():
        assert (pair.a == resumed.modules[path].a).all(), path
        assert (pair.b == resumed.modules[path].b).all(), path


def test_a_checkpoint_of_other_settings_is_refused(train, recipe, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    real = recipe.accuracy
    monkeypatch.setattr(recipe, "accuracy", lambda *a: stop() if len(a[1]) < 0 else real(*a))
    monkeypatch.setattr(recipe, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        train()
    with pytest.raises(SystemExit, match="was written with other settings"):
        train("--resume", "--rank", 4)


def test_resuming_nothing_is_refused(train):
    with pytest.raises(SystemExit, match="nothing to resume"):
        train("--resume")


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
    path = train("--targets", "q_lin,v_lin", "--rank", 2, base=base)
    adapter = read_adapter(path)
    assert len(adapter.modules) == 4
    assert {name.split(".")[0] for name in adapter.replaced} == {"pre_classifier", "classifier"}
    assert merged_files.merge_files(path, base=str(base), out=tmp_path / "merged").ok
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert isinstance(plain, transformers.DistilBertForSequenceClassification)
    assert torch.isfinite(plain.classifier.weight).all()
