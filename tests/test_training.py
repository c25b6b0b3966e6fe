"""The loop on a model of a few parameters: any cut of a batch, any stop, the same result."""

import argparse
import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from lora_export import methods, training
from lora_export.errors import InputError
from lora_export.records import Measurement
from lora_export.training import IGNORED, Settings

ROOT = Path(__file__).parent.parent
VOCABULARY, CLASSES = 11, 3


class Tiny(nn.Module):
    """A classifier, or with `by_token` a language model, over the mean of what came so far."""

    def __init__(self, by_token=False, dropout=0.0, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.by_token = by_token
        self.embedding = nn.Embedding(VOCABULARY, 6)
        self.inner = nn.Linear(6, 6)
        self.dropout = nn.Dropout(dropout)
        self.outer = nn.Linear(6, VOCABULARY if by_token else CLASSES)

    def forward(self, input_ids, attention_mask):
        mask = attention_mask[..., None]
        sums = (self.embedding(input_ids) * mask).cumsum(1) / mask.cumsum(1).clamp(min=1)
        hidden = self.dropout(torch.tanh(self.inner(sums)))
        return SimpleNamespace(logits=self.outer(hidden if self.by_token else hidden[:, -1]))


def _examples(count=37, by_token=False, seed=0):
    dice = random.Random(seed)
    found = []
    for _ in range(count):
        ids = [dice.randrange(1, VOCABULARY) for _ in range(dice.randint(2, 9))]
        hidden = dice.randint(1, len(ids) - 1)
        labels = [IGNORED] * hidden + ids[hidden:]
        found.append((ids, labels if by_token else ids[-1] % CLASSES))
    return found


def _accuracy(examples):
    def evaluate(model):
        answers = training.class_logits(model, examples, 0).argmax(-1)
        share = np.mean(answers == [label for _, label in examples])
        return [Measurement("accuracy", "dev", float(share), "share", len(examples))]

    return evaluate


def _nothing(model):
    return []


def _fit(folder, model=None, examples=None, evaluate=_nothing, resume=False, **settings):
    model = Tiny() if model is None else model
    examples = _examples() if examples is None else examples
    given = {"epochs": 2, "batch_size": 10, "lr": 0.05, "evaluate_every": 3} | settings
    history = training.fit(
        model, examples, Settings(**given), pad=0, evaluate=evaluate, folder=folder,
        identity={"data": "x"}, resume=resume,
    )  # fmt: skip
    return model, history


def _same_bits(one, other):
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


# ---------------------------------------------------------------- batches and loss


def test_batches_hold_every_example_once_and_depend_on_the_seed_alone():
    examples = _examples()
    cut = training.batches(examples, 8, seed=3)
    assert sorted(str(e) for batch in cut for e in batch) == sorted(map(str, examples))
    assert all(len(batch) <= 8 for batch in cut)
    assert cut == training.batches(examples, 8, seed=3)
    assert cut != training.batches(examples, 8, seed=4)


@pytest.mark.parametrize("by_token", [False, True])
def test_the_loss_is_the_cross_entropy_of_the_labels_that_count(by_token):
    examples = _examples(5, by_token)
    inputs, labels = training.collate(examples, 0)
    logits = Tiny(by_token)(**inputs).logits.detach().double().numpy()
    expected, count = 0.0, 0
    for row, (ids, label) in zip(logits, examples, strict=True):
        targets = [(row, label)]
        if by_token:
            targets = [(row[t - 1], label[t]) for t in range(1, len(ids)) if label[t] != IGNORED]
        for scores, target in targets:
            expected += np.log(np.exp(scores).sum()) - scores[target]
            count += 1
    found = training.loss_sum(torch.from_numpy(logits).float(), labels)
    assert float(found) == pytest.approx(expected, rel=1e-5)
    assert training.label_count(examples) == count


def test_padding_and_labels_of_the_prompt_do_not_count():
    model = Tiny(by_token=True)
    long, short = ([1, 2, 3, 4, 5, 6], [IGNORED] * 4 + [5, 6]), ([1, 2, 3], [IGNORED, 2, 3])
    alone = [training.likelihood(model, [one], 0) for one in (long, short)]
    both = training.likelihood(model, [long, short], 0)
    assert both[0] == pytest.approx(alone[0][0] + alone[1][0], rel=1e-6)
    assert both[1] == 4
    other = training.likelihood(model, [(long[0], [9, 9, IGNORED, IGNORED, 5, 6])], 0)
    assert other[1] == 3  # negative control: a label of the prompt that is not left out counts
    assert other[0] != pytest.approx(alone[0][0])


def test_answers_come_in_the_order_of_the_examples():
    model, examples = Tiny().eval(), _examples()
    found = training.class_logits(model, examples, 0, batch_size=4)
    for (ids, _), row in zip(examples, found, strict=True):
        alone = model(torch.tensor([ids]), torch.ones(1, len(ids))).logits[0]
        np.testing.assert_allclose(row, alone.detach().numpy(), atol=1e-6)


# ---------------------------------------------------------------- the loop


@pytest.mark.parametrize("by_token", [False, True])
def test_a_batch_in_micro_batches_gives_the_same_curve(tmp_path, by_token):
    """13 parts of at most 10 examples: some of one example, some of none."""
    examples = _examples(by_token=by_token)
    curves = [
        _fit(tmp_path / f"{cut}", Tiny(by_token), examples, accumulate=cut)[1].losses
        for cut in (1, 3, 13)
    ]
    assert len(curves[0]) == 8
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-5)
    np.testing.assert_allclose(curves[2], curves[0], rtol=1e-5)


def test_the_mean_of_the_parts_means_would_be_another_curve(tmp_path, monkeypatch):
    """The negative control of the one above: each part divided by its own labels."""
    examples = _examples(by_token=True)
    whole = _fit(tmp_path / "whole", Tiny(True), examples)[1].losses
    real = training.loss_sum

    def own_mean(logits, labels):
        return real(logits, labels) / (labels[:, 1:] != IGNORED).sum() * 5

    monkeypatch.setattr(training, "loss_sum", own_mean)
    cut = _fit(tmp_path / "cut", Tiny(True), examples, accumulate=3)[1].losses
    assert np.abs(np.subtract(cut, whole)).max() > 1e-2


def test_the_loss_is_that_of_the_whole_batch_before_the_step(tmp_path):
    examples = _examples(10)
    inputs, labels = training.collate(examples, 0)
    expected = training.loss_sum(Tiny()(**inputs).logits, labels).item() / 10
    assert _fit(tmp_path, examples=examples, epochs=1)[1].losses == [pytest.approx(expected)]


def test_it_learns(tmp_path):
    examples = _examples()
    _, history = _fit(tmp_path, evaluate=_accuracy(examples), epochs=20)
    assert history.evaluations[0][1][0].value < 0.6
    assert history.evaluations[-1][1][0].value > 0.7
    assert history.losses[-1] < 0.7 < 1 < history.losses[0]


def test_what_is_frozen_stays(tmp_path):
    model = Tiny()
    model.embedding.requires_grad_(False)
    kept = model.embedding.weight.detach().clone()
    _fit(tmp_path, model)
    assert torch.equal(model.embedding.weight, kept)
    assert not _same_bits(model, Tiny())


@pytest.mark.parametrize("stop_at", [1, 2])
def test_a_stopped_training_goes_on_to_the_same_bits(tmp_path, stop_at):
    """With dropout: the state of the random numbers is part of a checkpoint."""
    whole, unbroken = _fit(tmp_path / "whole", Tiny(dropout=0.3))
    calls = []

    def stop(model):
        calls.append(1)
        if len(calls) > stop_at:
            raise KeyboardInterrupt
        return []

    with pytest.raises(KeyboardInterrupt):
        _fit(tmp_path / "stopped", Tiny(dropout=0.3), evaluate=stop)
    torch.manual_seed(99)
    resumed, history = _fit(tmp_path / "stopped", Tiny(dropout=0.3, seed=5), resume=True)
    assert _same_bits(resumed, whole)
    assert history.losses == unbroken.losses
    assert [step for step, _ in history.evaluations] == [3, 6, 8]


def test_a_checkpoint_without_the_random_state_is_refused(tmp_path):
    """Accelerate would go on without a word, to other bits."""

    def stop(model):
        if (tmp_path / "stopped" / "checkpoint").is_dir():
            raise KeyboardInterrupt
        return []

    with pytest.raises(KeyboardInterrupt):
        _fit(tmp_path / "stopped", Tiny(dropout=0.3), evaluate=stop)
    (tmp_path / "stopped" / "checkpoint" / "random_states_0.pkl").write_bytes(b"damaged")
    with pytest.raises(InputError, match="state of the random numbers"):
        _fit(tmp_path / "stopped", Tiny(dropout=0.3), resume=True)


def test_a_checkpoint_holds_what_is_trained_and_no_more(tmp_path):
    from safetensors.torch import load_file

    model = Tiny()
    model.embedding.requires_grad_(False)
    _fit(tmp_path, model)
    kept = load_file(tmp_path / "checkpoint" / "model.safetensors")
    assert set(kept) == {"inner.weight", "inner.bias", "outer.weight", "outer.bias"}


def test_a_checkpoint_of_other_settings_is_refused_and_says_which(tmp_path):
    _fit(tmp_path)
    with pytest.raises(InputError, match=r"other settings: lr was 0\.05 and is 0\.01"):
        _fit(tmp_path, resume=True, lr=0.01)


def test_a_checkpoint_over_another_base_is_refused(tmp_path):
    def model(seed):
        made = Tiny(seed=seed)
        made.embedding.requires_grad_(False)
        return made

    _fit(tmp_path, model(0))
    with pytest.raises(InputError, match="other settings: frozen was"):
        _fit(tmp_path, model(1), resume=True)
    assert _fit(tmp_path, model(0), resume=True)[1].step == 8


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(InputError, match="is not empty; --resume goes on with a stopped run"):
        _fit(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_resuming_a_finished_run_says_so(tmp_path):
    _, history = _fit(tmp_path)
    training.write(tmp_path, {}, history, [])
    with pytest.raises(InputError, match="is finished"):
        _fit(tmp_path, resume=True)


def test_resuming_nothing_is_refused(tmp_path):
    with pytest.raises(InputError, match="nothing to resume"):
        _fit(tmp_path, resume=True)


def test_a_folder_that_holds_something_is_refused_and_a_stop_before_a_checkpoint_is_not(tmp_path):
    (tmp_path / training.PROGRESS).write_text("{}")
    (tmp_path / training.BEST).write_bytes(b"")
    (tmp_path / "notes.txt").write_text("a film")
    with pytest.raises(InputError, match="is not empty; --resume goes on"):
        _fit(tmp_path)
    (tmp_path / "notes.txt").unlink()
    _fit(tmp_path)


def _falling(values):
    rest = iter(values)
    return lambda model: [Measurement("accuracy", "dev", next(rest), "share", 1)]


def test_early_stopping_ends_the_training_and_keeps_the_best(tmp_path):
    values, seen = _falling([0.5, 0.9, 0.8, 0.7, 1.0]), []

    def evaluate(model):
        seen.append(methods.trained(model))
        return values(model)

    model, history = _fit(tmp_path, evaluate=evaluate, epochs=9, patience=2)
    assert (history.step, history.best) == (12, 0.9)
    assert (history.final[0], history.final[1][0].value) == (6, 0.9)
    training.write(tmp_path, {}, history, [])
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert (rows[-1]["name"], rows[-1]["value"], rows[-1]["step"]) == ("accuracy", 0.9, 6)
    last = seen.pop()
    assert all(torch.equal(seen[1][name], p) for name, p in model.named_parameters())
    assert not all(torch.equal(last[name], p) for name, p in model.named_parameters())


def test_without_patience_nothing_stops_it(tmp_path):
    _, history = _fit(tmp_path, evaluate=_falling([0.9] * 99), epochs=9)
    assert history.step == 36


def test_of_a_perplexity_the_lower_is_the_better(tmp_path):
    def evaluate(values):
        rest = iter(values)
        return lambda model: [Measurement("perplexity", "dev", next(rest), "per token", 1)]

    _, history = _fit(
        tmp_path, evaluate=evaluate([9.0, 7.0, 8.0, 8.0]), patience=2, epochs=9,
        monitor="perplexity",
    )  # fmt: skip
    assert history.best == 7.0
    assert history.step == 12


def test_a_monitored_metric_that_is_undefined_is_not_better(tmp_path):
    values = iter([None, 0.5, None, None])

    def evaluate(model):
        value = next(values)
        name = "accuracy" if value else "accuracy undefined"
        return [Measurement(name, "dev", value or 1, "share", 1)]

    _, history = _fit(tmp_path, evaluate=evaluate, patience=2, epochs=9)
    assert (history.step, history.best, history.final[0]) == (12, 0.5, 6)


def test_a_monitor_that_is_not_measured_is_refused(tmp_path):
    with pytest.raises(InputError, match="--monitor is 'F2'; the evaluation gives accuracy"):
        _fit(tmp_path, evaluate=_falling([1.0]), patience=1, monitor="F2")


def test_a_loss_that_is_no_number_ends_it_and_is_never_kept(tmp_path):
    model = Tiny()
    with torch.no_grad():
        model.outer.bias.fill_(float("nan"))
    with pytest.raises(InputError, match="the loss is nan at step 1; lower --lr"):
        _fit(tmp_path, model)
    assert not (tmp_path / "checkpoint").exists()


def test_nothing_to_learn_from_is_refused(tmp_path):
    with pytest.raises(InputError, match="1 of 2 examples have no label"):
        _fit(tmp_path, Tiny(True), [([1, 2], [IGNORED, IGNORED]), ([1, 2], [IGNORED, 2])])
    with pytest.raises(InputError, match="no examples"):
        _fit(tmp_path, examples=[])


def test_bfloat16_trains_and_the_model_is_as_before(tmp_path):
    model, history = _fit(tmp_path, precision="bf16", epochs=5)
    assert history.losses[-1] < history.losses[0]
    assert model(torch.tensor([[1, 2]]), torch.ones(1, 2)).logits.dtype == torch.float32


@pytest.mark.skipif(torch.accelerator.is_available(), reason="on a CPU alone it is refused")
def test_fp16_on_a_cpu_is_refused(tmp_path):
    """Accelerate ignores it there without a word, and the run would be recorded as fp16."""
    with pytest.raises(InputError, match="fp16 needs a GPU"):
        _fit(tmp_path, precision="fp16")


def test_a_variable_of_the_environment_does_not_change_the_cut(tmp_path, monkeypatch):
    plain = _fit(tmp_path / "plain")[1].losses
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert _fit(tmp_path / "with")[1].losses == plain


def test_running_statistics_are_part_of_a_checkpoint(tmp_path):
    class Normed(Tiny):
        def __init__(self, seed=0):
            super().__init__(seed=seed)
            self.norm = nn.BatchNorm1d(CLASSES)

        def forward(self, input_ids, attention_mask):
            return SimpleNamespace(
                logits=self.norm(super().forward(input_ids, attention_mask).logits)
            )

    whole, _ = _fit(tmp_path / "whole", Normed())
    calls = []

    def stop(model):
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return []

    with pytest.raises(KeyboardInterrupt):
        _fit(tmp_path / "stopped", Normed(), evaluate=stop)
    assert _same_bits(_fit(tmp_path / "stopped", Normed(5), resume=True)[0], whole)


def test_the_precision_of_products_is_put_back(tmp_path):
    seen = []

    def look(model):
        seen.append(torch.get_float32_matmul_precision())
        return []

    _fit(tmp_path, evaluate=look, matmul_precision="medium", max_steps=1)
    assert seen == ["medium"]
    assert torch.get_float32_matmul_precision() == "highest"


def test_processes_that_do_not_know_of_each_other_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="2 processes were started and Accelerate takes this one"):
        _fit(tmp_path)


def test_sharded_parameters_are_whole_again(tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, distribute_module

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = Tiny()
        model.embedding.requires_grad_(False)
        distribute_module(model, init_device_mesh("cpu", (1,)))
        assert all(isinstance(p, DTensor) for p in model.parameters())
        training._make_whole(model)
    finally:
        dist.destroy_process_group()
    assert not any(isinstance(p, DTensor) for p in model.parameters())
    assert _same_bits(model, Tiny())
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * 4


def test_parameters_that_stay_sharded_are_refused(tmp_path, monkeypatch):
    def shard(model):
        model.inner.bias = nn.Parameter(model.inner.bias.detach()[:3])

    monkeypatch.setattr(training, "_make_whole", shard)
    with pytest.raises(InputError, match="still sharded over the processes"):
        _fit(tmp_path)


def test_the_launcher_for_cpus_is_asked_how_many_processes_it_was_to_start(monkeypatch):
    import psutil

    started = []
    monkeypatch.setattr(training.os, "execv", lambda path, words: started.append(words))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_PORT", "29500")
    words = ["python", "bin/accelerate", "launch", "--cpu", "--num_processes", "3", "recipe.py"]
    monkeypatch.setattr(psutil.Process, "cmdline", lambda self: words)
    training.run(lambda: None)
    assert started[0][started[0].index("--nproc-per-node") + 1] == "3"
    monkeypatch.setattr(psutil.Process, "cmdline", lambda self: ["bash"])
    with pytest.raises(SystemExit, match="use: torchrun"):
        training.run(lambda: None)
    monkeypatch.setenv("WORLD_SIZE", "1")  # started by a launcher that does it
    training.run(lambda: None)
    assert len(started) == 1


# ---------------------------------------------------------------- settings and what is written


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"warmup": 1.0},
        {"patience": -1},
        {"precision": "half"},
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(InputError, match=f"{next(iter(wrong))} is"):
        Settings(**wrong)


def test_every_setting_is_an_option_and_comes_back():
    parser = argparse.ArgumentParser()
    training.add_arguments(parser, lr=0.5)
    assert training.settings_of(parser.parse_args([])) == Settings(lr=0.5)
    other = argparse.ArgumentParser()
    training.add_arguments(other, gradient_checkpointing=True)
    assert training.settings_of(other.parse_args([])).gradient_checkpointing
    words = ["--gradient-checkpointing", "--precision", "bf16", "--max-steps", "7"]
    expected = replace(Settings(lr=0.5), gradient_checkpointing=True, precision="bf16", max_steps=7)
    assert training.settings_of(parser.parse_args(words)) == expected


def test_the_optimizer_holds_what_the_formula_says(tmp_path):
    """AdamW: two float32 moments of each trained parameter, and a float32 step of each tensor."""
    model = Tiny()
    model.embedding.requires_grad_(False)
    _, history = _fit(tmp_path, model)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert history.optimizer_bytes == 8 * sum(p.numel() for p in trained) + 4 * len(trained)


def test_a_run_leaves_its_metrics_and_no_checkpoint(tmp_path, monkeypatch):
    examples = _examples()
    model, history = _fit(tmp_path, evaluate=_accuracy(examples))
    saved = methods.save(model, "head", tmp_path)
    words = ["sst2.py", "--out=/home/me/out", "--base", "/home/me/base", "--lr=3"]
    monkeypatch.setattr(sys, "argv", words)
    about = training.about("sst2", "head", Settings(), base="b")
    assert about["command"] == "python recipes/sst2.py --out=out --base base --lr=3"
    training.write(tmp_path, about, history, training.resources(model, history, saved))
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"trained.safetensors", "metrics.jsonl", "run.json"}
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["value"] for r in rows if r["name"] == "loss"] == history.losses
    assert [r["step"] for r in rows if r["name"] == "accuracy"] == [3, 6, 8]
    units = {row["name"]: row["unit"] for row in rows}
    assert units["peak memory"] == units["optimizer state"] == units["checkpoint size"] == "B"
    size = next(r["value"] for r in rows if r["name"] == "checkpoint size")
    assert size == saved.stat().st_size
    assert json.loads((tmp_path / "run.json").read_text())["processes"] == 1


@pytest.mark.slow
def test_two_processes_give_the_curve_of_one(tmp_path, tiny_base, sentences):
    """Within 8 times what cutting the batch otherwise changes on one process: the noise floor."""
    words = [
        "--base", tiny_base, "--data", sentences, "--epochs", 20, "--batch-size", 7,
        "--evaluate-every", 5, "--lr", 0.003, "--base-dropout", 0,
    ]  # fmt: skip
    two = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    curves = {}
    for name, launcher, more in (
        ("one", [sys.executable], []),
        ("cut", [sys.executable], ["--accumulate", 2]),
        ("two", two, []),
    ):
        out = tmp_path / name
        command = [*launcher, ROOT / "recipes" / "sst2.py", *words, *more, "--out", out]
        subprocess.run([str(word) for word in command], check=True, capture_output=True)
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        curves[name] = np.array([row["value"] for row in rows if row["name"] == "loss"])
        assert json.loads((out / "run.json").read_text())["processes"] == (1 + (name == "two"))
    assert curves["one"][-1] < 0.7 * curves["one"][0]
    floor = np.abs(curves["cut"] - curves["one"]).max()
    assert 0 < floor < 1e-4
    assert np.abs(curves["two"] - curves["one"]).max() <= 8 * floor
