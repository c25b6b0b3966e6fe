"""What a checkpoint's own names and shapes tell of its model; and when they do not tell enough."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import on_disk
import pytest
from hand_made import edit_tensors
from on_disk import factors, keyed, numbers, pair

from lora_export import LoraConfig, heads, inject, merged_files, save_adapter, storage
from lora_export.adapter import read_adapter
from lora_export.architecture import (
    CONV1D,
    LINEAR,
    Architecture,
    Layer,
    Link,
    as_trained,
    names_of,
    read_off,
    stack,
)
from lora_export.errors import AdapterMismatch
from lora_export.formats import native
from lora_export.opening import open_job
from lora_export.plan import MERGE, plan
from lora_export.records import CONV, EMBEDDING, EXPERTS, Adapter, BaseRef, Factors, Promises, Rows

CONFIG = {"architectures": ["TinyForCausalLM"], "num_hidden_layers": 3, "hidden_size": 8}
Q = "model.layers.{}.attn.q_proj"


def tensors(layers=3, bias=False, shape=(12, 8)):
    """A stack of layers with one linear map each, an embedding and a head."""
    found = {"model.embed_tokens.weight": numbers(20, 8), "lm_head.weight": numbers(20, 8)}
    for index in range(layers):
        found[f"{Q.format(index)}.weight"] = numbers(*shape, seed=index)
        if bias:
            found[f"{Q.format(index)}.bias"] = numbers(shape[0] if bias == "out" else shape[1])
    return found


def adapter(modules=None, **changes):
    made = {"modules": {Q.format(1): factors(12)}, "replaced": {}, "variant": "lora"}
    return Adapter(**(made | ({} if modules is None else {"modules": modules}) | changes))


@pytest.fixture
def seen(tmp_path):
    """`seen(adapter, tensors, **config)`: what is read off a base that holds these tensors."""

    def read(held, given=None, **config):
        base = on_disk.bases(tmp_path / "base", tensors() if given is None else given)
        return read_off(held, base, CONFIG | config)

    return read


# ---------------------------------------------------------------- what is told


def test_a_linear_map_in_a_stack_is_told(seen):
    found = seen(adapter())
    assert found.layers[Q.format(1)] == Layer(LINEAR)
    assert found.names[f"{Q.format(1)}.weight"] == (Link(*[f"{Q.format(1)}.weight"] * 2),)
    assert found.name == "TinyForCausalLM"


def test_every_tensor_on_disk_is_one_of_the_model(seen):
    found, held = seen(adapter()), tensors()
    assert found.shapes == {name: value.shape for name, value in held.items()}
    assert {(link.stored, link.tensor) for link in found.links} == {(n, n) for n in held}
    assert not found.ties
    assert not found.unfollowed


@pytest.mark.parametrize(
    ("bias", "shape", "kind"),
    [
        (False, (12, 8), LINEAR), (False, (8, 8), LINEAR),
        ("out", (12, 8), LINEAR), ("out", (8, 12), LINEAR),
        ("in", (8, 12), CONV1D), ("in", (12, 8), CONV1D),
    ],
)  # fmt: skip
def test_a_conv1d_is_told_from_a_linear_map_by_its_bias(seen, bias, shape, kind):
    """HF's Conv1D is stored as (in, out), and its bias is as long as its columns."""
    rows, columns = shape if kind == LINEAR else shape[::-1]
    found = seen(adapter({Q.format(1): factors(rows, columns)}), tensors(3, bias, shape))
    assert found.layers[Q.format(1)].kind == kind


@pytest.mark.parametrize(("bias", "kind"), [("out", LINEAR), ("in", CONV1D)])
def test_a_square_weight_is_judged_by_its_neighbours(seen, bias, kind):
    held = tensors(3, "out", (8, 8))
    for index in range(3):
        held[f"model.layers.{index}.mlp.weight"] = numbers(16, 8)
        held[f"model.layers.{index}.mlp.bias"] = numbers(16 if bias == "out" else 8)
    assert seen(adapter({Q.format(1): factors()}), held).layers[Q.format(1)].kind == kind


def test_a_square_weight_with_a_bias_and_without_neighbours_could_lie_either_way(seen):
    assert seen(adapter({Q.format(1): factors()}), tensors(3, "out", (8, 8))) is None


def test_a_square_weight_whose_neighbours_disagree_could_lie_either_way(seen):
    held = tensors(3, "out", (8, 8))
    for index in range(3):
        for name, length in (("up", 16), ("down", 8)):
            held[f"model.layers.{index}.{name}.weight"] = numbers(16, 8)
            held[f"model.layers.{index}.{name}.bias"] = numbers(length)
    assert seen(adapter({Q.format(1): factors()}), held) is None


def test_neighbours_in_another_layer_do_not_count(seen):
    held = tensors(3, "out", (8, 8))
    held["model.layers.2.mlp.weight"], held["model.layers.2.mlp.bias"] = numbers(16, 8), numbers(16)
    assert seen(adapter({Q.format(1): factors()}), held) is None


def test_a_trained_bias_in_the_stack_is_told(seen):
    name = f"{Q.format(2)}.bias"
    found = seen(adapter(replaced={name: numbers(12)}), tensors(3, "out"))
    assert found.names[name] == (Link(name, name),)


def test_an_update_with_a_bias_needs_one_in_the_base(seen):
    modules = {Q.format(1): factors(12, bias=numbers(12))}
    assert seen(adapter(modules), tensors(3, "out")) is not None
    assert seen(adapter(modules), tensors(3)) is None


@pytest.mark.parametrize(
    ("task", "architecture"),
    [
        ("CAUSAL_LM", "TinyForCausalLM"), ("CAUSAL_LM", "TinyLMHeadModel"),
        ("SEQ_CLS", "TinyForSequenceClassification"), ("TOKEN_CLS", "TinyForTokenClassification"),
        ("QUESTION_ANS", "TinyForQuestionAnswering"),
        ("SEQ_2_SEQ_LM", "TinyForConditionalGeneration"), (None, "TinyModel"),
    ],
)  # fmt: skip
def test_a_task_that_the_base_is_made_for_asks_for_nothing_more(seen, task, architecture):
    assert seen(adapter(task_type=task), architectures=[architecture]) is not None
    if task is not None:
        assert seen(adapter(task_type=task), architectures=["TinyModel"]) is None


# ---------------------------------------------------------------- when the model has to be asked


def _of(kind, a, b):
    return Factors(numbers(*a), numbers(*b), 4.0, 2.0, kind)


ASKS = {
    "an embedding": adapter({"model.embed_tokens": _of(EMBEDDING, (2, 20), (8, 2))}),
    "a convolution": adapter({Q.format(0): _of(CONV, (2, 8, 3), (12, 2, 1))}),
    "experts": adapter({"model.layers.0.w": _of(EXPERTS, (2, 2, 8), (2, 8, 2))}),
    "the head, which may be tied": adapter({"lm_head": factors(20)}),
    "a name that is not on disk": adapter({"model.layers.1.attn.query": factors(12)}),
    "a name without the prefix": adapter({"layers.1.attn.q_proj": factors(12)}),
    "a layer beyond the last": adapter({Q.format(3): factors(12)}),
    "trained rows": adapter(rows={"model.embed_tokens": Rows((1,), numbers(1, 8))}),
    "a head of its own": adapter(replaced={"score.weight": numbers(2, 8)}),
    "a head in place of the base's": adapter(replaced={"lm_head.weight": numbers(20, 8)}),
    "a tensor of another shape": adapter(replaced={f"{Q.format(0)}.weight": numbers(3, 8)}),
    "underscores for dots": adapter(flat_names=True),
    "replicated layers": adapter(fields={"layer_replication": [[0, 2], [1, 3]]}),
    "labels, which may be others": adapter(labels=("no", "yes")),
    "another class": adapter(base=BaseRef(architecture="OtherForCausalLM")),
    "another task": adapter(task_type="SEQ_CLS"),
    "a task that nobody knows": adapter(task_type="CAUSAL"),
    "a module saved whole that the file lacks": adapter(promises=Promises((), ("lm_head",))),
}  # fmt: skip


@pytest.mark.parametrize("held", ASKS.values(), ids=ASKS)
def test_the_model_is_asked_about(seen, held):
    assert seen(held) is None


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": []}, {"architectures": None}, {"architectures": ["A", "B"]},
        {"architectures": "TinyForCausalLM"}, {"architectures": [5]}, {"num_hidden_layers": 5},
    ],
)  # fmt: skip
def test_the_model_is_asked_where_the_config_says(seen, config):
    assert seen(adapter(), **config) is None


def test_a_stack_with_a_gap_is_no_stack(seen):
    held = tensors()
    del held[f"{Q.format(0)}.weight"]
    assert seen(adapter(), held) is None


def test_a_stack_that_is_incomplete_is_no_stack(seen):
    assert seen(adapter(), tensors(2)) is None


def test_a_stack_is_incomplete_though_another_number_of_the_config_is_its_length(seen):
    """Two of three layers are on disk, and there are two heads of attention."""
    assert seen(adapter(), tensors(2), num_attention_heads=2) is None


def test_the_number_of_layers_may_stand_in_a_part_of_the_config(seen):
    config = {"num_hidden_layers": None, "text_config": {"num_hidden_layers": 3}}
    assert seen(adapter(), **config) is not None


def test_an_attention_of_torch_is_left_to_the_model(seen):
    held = tensors()
    for index in range(3):
        held[f"model.layers.{index}.attn.in_proj_weight"] = numbers(24, 8)
    assert seen(adapter(), held) is None


def test_a_weight_that_is_no_matrix_is_left_to_the_model(seen):
    assert seen(adapter(), tensors(3, False, (12, 8, 1))) is None


# ---------------------------------------------------------------- the values


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((), (1, 1, 1)), ((5,), (1, 5, 1)), ((5, 3), (1, 5, 3)), ((2, 5, 3), (2, 5, 3)),
        ((2, 5, 3, 4), (1, 2, 60)), ((2, 5, 3, 4, 2), (1, 2, 120)),
    ],
)  # fmt: skip
def test_a_tensor_is_seen_as_a_stack_of_matrices(shape, expected):
    assert stack(shape) == expected
    assert math.prod(stack(shape)) == math.prod(shape)


def test_the_kernel_of_a_convolution_is_part_of_its_columns():
    assert stack((4, 3, 5), CONV) == (1, 4, 15)


def test_the_names_of_an_adapter_are_those_of_the_tensors_that_it_changes():
    held = adapter(
        {
            "linear": factors(12, bias=numbers(12)),
            "embed": Factors(*pair(8, 20), 4.0, 2.0, EMBEDDING),
            "conv": Factors(numbers(2, 3, 5), numbers(4, 2, 1), 4, 2, CONV),
            "mlp.w": Factors(numbers(3, 2, 8), numbers(3, 6, 2), 4, 2, EXPERTS),
        },
        replaced={"score.weight": numbers(2, 8)},
        rows={"wte": Rows((1, 2), numbers(2, 8))},
    )
    assert names_of(held) == {
        "linear.weight": (12, 8), "linear.bias": (12,), "embed.weight": (8, 20),
        "conv.weight": (4, 15), "mlp.w": (3, 6, 8), "score.weight": (2, 8), "wte.weight": (2, 8),
    }  # fmt: skip


def test_a_tied_tensor_is_stored_under_the_name_of_any_that_shares_it():
    pairs = frozenset(["head", "embed"])
    found = Architecture(
        "M", {"head": (2,), "embed": (2,), "own": (2,)}, {}, (Link("e", "embed"), Link("o", "own")),
        {}, ties={"head": pairs, "embed": pairs},
    )  # fmt: skip
    assert found.stored_for("head") == found.stored_for("embed") == [Link("e", "embed")]
    assert found.stored_for("own") == [Link("o", "own")]
    assert found.stored_for("nowhere") == []
    assert found.tied("own") == {"own"}


# ---------------------------------------------------------------- a Conv1D is merged as one


def test_an_update_of_a_conv1d_that_was_read_off_is_transposed(tmp_path):
    base = on_disk.bases(tmp_path, tensors(3, "in", (8, 12)))
    held = adapter({Q.format(1): factors(12)})
    steps = plan(held, base, read_off(held, base, CONFIG)).of(MERGE)
    assert [(step.name, step.parts[0].transposed) for step in steps] == [
        (f"{Q.format(1)}.weight", True)
    ]


# ---------------------------------------------------------------- nothing heavy is loaded


@pytest.fixture(scope="module")
def llama(tiny, tmp_path_factory):
    """A tiny Llama on disk, and an adapter of PEFT's layout beside it."""
    folder = tmp_path_factory.mktemp("llama")
    tiny("llama").save_pretrained(folder / "base")
    path = "model.layers.1.self_attn.q_proj"
    on_disk.peft_folder(
        folder / "adapter",
        keyed({path: pair(32, 32)}),
        target_modules=["q_proj"],
        task_type="CAUSAL_LM",
    )
    return folder


WATCHED = """
import json, sys
from lora_export.cli import main
for words in json.loads(sys.argv[1]):
    try:
        main(words)
    except SystemExit as end:
        assert end.code == 0, (words, end.code)
    heavy = sorted({"transformers", "peft", "onnx", "safetensors"} & sys.modules.keys())
    assert not heavy, (words, heavy)
"""


def test_no_transformers_is_loaded_where_the_checkpoint_tells(llama, tmp_path):
    adapter, base, out = (str(p) for p in (llama / "adapter", llama / "base", tmp_path / "out"))
    given = ("--adapter", adapter, "--base", base)
    commands = [
        ("inspect", adapter, "--base", base),
        ("merge", *given, "--out", out, "--dry-run", "--quiet"),
        ("merge", *given, "--out", out, "--quiet"),
        ("verify", out, *given, "--quiet"),
        ("convert", adapter, "--out", str(tmp_path / "converted")),
    ]
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, json.dumps(commands)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_what_is_merged_without_transformers_is_right(llama, tmp_path):
    certificate = merged_files.merge_files(
        llama / "adapter", base=str(llama / "base"), out=tmp_path / "merged"
    )
    assert certificate.ok
    before, after = on_disk.arrays(llama / "base"), on_disk.arrays(tmp_path / "merged")
    changed = "model.layers.1.self_attn.q_proj.weight"
    exact = before[changed].astype(np.float64) + on_disk.delta(factors(32, 32))[0]
    assert np.array_equal(after[changed], exact.astype(np.float32))
    assert before.keys() == after.keys()
    for name in before.keys() - {changed}:
        assert before[name].tobytes() == after[name].tobytes()
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]


# ---------------------------------------------------------------- as the adapter says

CLASSIFIERS = {
    "bert": "bert",
    "roberta": "roberta",
    "distilbert": "distilbert",
    "llama-cls": "model",
}


def trained(tiny, fill, folder, family):
    """A headless base, and an adapter of ours for it."""
    model = tiny(family)
    getattr(model, CLASSIFIERS[family]).save_pretrained(folder / "base")
    model = type(model).from_pretrained(folder / "base").eval()
    inject(model, LoraConfig(rank=4, modules_to_save=heads(model)))
    path, base = folder / "adapter.safetensors", BaseRef(id=str(folder / "base"))
    save_adapter(fill(model), path, base=base, labels=("no", "yes"), task_type="SEQ_CLS")
    return path


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_what_the_adapter_says_of_its_model_is_what_transformers_would(
    tiny, fill, tmp_path, family
):
    path, silent = trained(tiny, fill, tmp_path, family), tmp_path / "silent.safetensors"
    found = read_adapter(path)
    native.write(replace(found, base=replace(found.base, tensors={})), silent)
    assert open_job(path).config is None
    assert open_job(silent).config is not None
    digests = []
    for adapter, out in ((path, tmp_path / "told"), (silent, tmp_path / "asked")):
        assert merged_files.merge_files(adapter, out=out).ok
        digests.append({file.name: file.digest for file in storage.digest_tree(out)})
        digests[-1].pop("lora_export.json")  # names the adapter's file
    assert digests[0] == digests[1]
    assert digests[0].keys() >= {"model.safetensors", "config.json"}


def test_no_torch_is_loaded_where_the_adapter_tells(tiny, fill, tmp_path):
    given = ("--adapter", str(trained(tiny, fill, tmp_path, "bert")))
    out = str(tmp_path / "merged")
    commands = [("merge", *given, "--out", out, "--quiet"), ("verify", out, *given, "--quiet")]
    done = subprocess.run(
        [sys.executable, "-c", WATCHED.replace('"peft"', '"torch"'), json.dumps(commands)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize("change", ["lost", "other shape"])
def test_a_base_that_is_not_what_the_adapter_says_is_not_taken_for_it(tiny, fill, tmp_path, change):
    path = trained(tiny, fill, tmp_path, "bert")
    name = "encoder.layer.1.output.dense.bias"

    def damage(arrays):
        value = arrays.pop(name)
        if change == "other shape":
            arrays[name] = np.append(value, value[:1])

    edit_tensors(tmp_path / "base" / "model.safetensors", damage)
    with pytest.raises(AdapterMismatch, match=rf"{name}"):
        open_job(path)


def test_a_head_without_labels_is_left_to_transformers(tiny, fill, tmp_path):
    path = trained(tiny, fill, tmp_path, "bert")
    adapter = replace(read_adapter(path), labels=())
    base = storage.Checkpoint.open(tmp_path / "base")
    fields = storage.read_json(tmp_path / "base" / "config.json")
    assert as_trained(adapter, base, fields) is None
    assert as_trained(read_adapter(path), base, fields) is not None


def test_an_update_of_what_may_be_tied_is_left_to_transformers(tiny, tmp_path):
    model = tiny("llama")
    model.save_pretrained(tmp_path / "base")
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    says = BaseRef(architecture="LlamaForCausalLM", tensors=shapes)
    base = storage.Checkpoint.open(tmp_path / "base")
    fields = storage.read_json(tmp_path / "base" / "config.json")
    path = "model.layers.0.self_attn.q_proj"
    assert as_trained(adapter({path: factors(32, 32)}, base=says), base, fields) is not None
    assert as_trained(adapter({"lm_head": factors(100, 32)}, base=says), base, fields) is None
