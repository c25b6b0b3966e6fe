import json
import shutil

import pytest
import safetensors.torch
import torch
import transformers

from lora_export import Adapter, AdapterMismatch, BaseRef, models, read_adapter
from lora_export.errors import InputError
from lora_export.injection import attach

CLASSIFIER = "BertForSequenceClassification"
HEAD = ("classifier.weight", "classifier.bias")


def _adapter(**fields):
    return Adapter({}, {}, "lora", **fields)


@pytest.fixture
def base(tiny_base, tmp_path):
    """A copy of the tiny base that a test may damage."""
    return shutil.copytree(tiny_base, tmp_path / "base")


def _edit(folder, **fields):
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def _config(base, architecture=CLASSIFIER, labels=(), classes=None):
    return models.config_of(base, architecture, labels, classes)


# ---------------------------------------------------------------- which class


def test_the_architecture_that_the_adapter_states_comes_first(tiny_base):
    stated = _adapter(task_type="TOKEN_CLS", base=BaseRef(architecture="BertForMultipleChoice"))
    assert models.architecture_of(stated, tiny_base) == "BertForMultipleChoice"


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("SEQ_CLS", "BertForSequenceClassification"),
        ("TOKEN_CLS", "BertForTokenClassification"),
        ("QUESTION_ANS", "BertForQuestionAnswering"),
        ("CAUSAL_LM", "BertLMHeadModel"),
        ("FEATURE_EXTRACTION", "BertModel"),
    ],
)
def test_the_task_comes_second(base, task, expected):
    _edit(base, architectures=["BertForPreTraining"])
    assert models.architecture_of(_adapter(task_type=task), base) == expected


def test_the_bases_own_class_comes_last(base):
    _edit(base, architectures=["BertForPreTraining"])
    assert models.architecture_of(_adapter(task_type=None), base) == "BertForPreTraining"


def test_a_task_that_is_not_known_says_nothing(base):
    """That it is passed over is noted where the job is opened."""
    _edit(base, architectures=["BertForPreTraining"])
    adapter = _adapter(task_type="SEQUENCE_CLASSIFICATION")
    assert models.architecture_of(adapter, base) == "BertForPreTraining"


def test_a_base_without_a_class_is_refused(base):
    _edit(base, architectures=None)
    with pytest.raises(InputError, match="names no architecture, and neither does the adapter"):
        models.architecture_of(_adapter(), base)


# ---------------------------------------------------------------- the config


def test_the_labels_of_the_adapter_go_into_the_config(tiny_base):
    config = _config(tiny_base, labels=("bad", "fair", "good"))
    assert config.id2label == {0: "bad", 1: "fair", 2: "good"}
    assert config.label2id == {"bad": 0, "fair": 1, "good": 2}
    assert config.num_labels == 3
    assert config.architectures == [CLASSIFIER]


def test_the_number_of_classes_is_used_where_there_are_no_labels(tiny_base):
    assert _config(tiny_base, classes=5).num_labels == 5


def test_the_bases_labels_stay_where_the_adapter_has_none(base):
    _edit(base, id2label={"0": "no", "1": "yes"}, label2id={"no": 0, "yes": 1})
    assert _config(base, classes=2).id2label == {0: "no", 1: "yes"}


def test_the_file_is_not_changed(tiny_base):
    before = (tiny_base / "config.json").read_bytes()
    _config(tiny_base, labels=("a", "b", "c"))
    assert (tiny_base / "config.json").read_bytes() == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"cannot read .*config\.json"),
        ("{", r"config\.json is not JSON"),
        ('{"model_type": "no-such-model"}', "no usable config"),
    ],
)
def test_an_unusable_config_is_an_input_error(base, content, message):
    path = base / "config.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(InputError, match=message):
        _config(base)


@pytest.mark.parametrize(
    ("shapes", "fields", "expected"),
    [
        ({}, {"labels": ("a", "b", "c")}, 3),
        ({"classifier.weight": (4, 32), "classifier.bias": (4,)}, {"task_type": "SEQ_CLS"}, 4),
        (
            {"classifier.dense.weight": (32, 32), "classifier.out_proj.weight": (3, 32)},
            {"task_type": "SEQ_CLS"},
            3,
        ),
        ({"lm_head.weight": (100, 32)}, {"task_type": "CAUSAL_LM"}, None),
        ({}, {"task_type": "SEQ_CLS"}, None),
    ],
    ids=["labels", "one layer", "two layers", "language model", "no head"],
)
def test_the_number_of_classes_is_read_from_the_adapter(shapes, fields, expected):
    replaced = {name: torch.zeros(shape).numpy() for name, shape in shapes.items()}
    assert models.class_count(Adapter({}, replaced, "lora", **fields)) == expected


# ---------------------------------------------------------------- loading


def test_loading_gives_the_checkpoints_weights(tiny_base):
    model = models.load(tiny_base, _config(tiny_base), provided=dict.fromkeys(HEAD))
    stored = safetensors.torch.load_file(tiny_base / "model.safetensors")
    assert type(model).__name__ == CLASSIFIER
    assert not model.training
    found = model.bert.state_dict()
    assert all(torch.equal(found[name], value) for name, value in stored.items())


def test_a_weight_that_nobody_provides_is_a_mismatch(tiny_base):
    with pytest.raises(
        AdapterMismatch, match=rf"lack weights of {CLASSIFIER}: {HEAD[1]}; {HEAD[0]}"
    ):
        models.load(tiny_base, _config(tiny_base))


def test_only_what_nobody_provides_is_named(tiny_base):
    with pytest.raises(AdapterMismatch, match=rf"{CLASSIFIER}: classifier\.bias$"):
        models.load(tiny_base, _config(tiny_base), provided={HEAD[0]: None})


def test_a_weight_that_the_base_lost_is_a_mismatch(base):
    tensors = safetensors.torch.load_file(base / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.weight"]
    safetensors.torch.save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(AdapterMismatch, match=r"bert\.encoder\.layer\.1\.output\.dense\.weight"):
        models.load(base, _config(base), provided=dict.fromkeys(HEAD))


@pytest.fixture
def three_classes(tmp_path):
    """A checkpoint whose own head has three classes."""
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, num_labels=3,
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "three")
    return tmp_path / "three"


def test_a_head_of_another_size_is_a_mismatch(three_classes):
    with pytest.raises(AdapterMismatch, match=r"shapes differ from .*: classifier\.bias"):
        models.load(three_classes, _config(three_classes, labels=("no", "yes")))


def test_a_head_of_another_size_may_be_provided_by_the_adapter(three_classes):
    config = _config(three_classes, labels=("no", "yes"))
    model = models.load(three_classes, config, provided=dict.fromkeys(HEAD))
    assert model.classifier.weight.shape == (2, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_checkpoints_dtype_is_kept(tiny_base, tmp_path, dtype):
    model = transformers.BertModel.from_pretrained(tiny_base, dtype=dtype)
    model.save_pretrained(tmp_path / "typed")
    loaded = models.load(
        tmp_path / "typed", _config(tmp_path / "typed"), provided=dict.fromkeys(HEAD)
    )
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}


def test_an_unknown_class_is_an_input_error(tiny_base):
    with pytest.raises(InputError, match=r"transformers \S+ has no model 'BertForCooking'"):
        models.load(tiny_base, _config(tiny_base, "BertForCooking"))


@pytest.mark.parametrize(
    "name", ["BertConfig", "AdamW", "logging", "__version__", "PreTrainedModel"]
)
def test_only_classes_of_models_are_built(tiny_base, name):
    with pytest.raises(InputError, match=f"has no model '{name}'"):
        models.blank(_config(tiny_base, name))


def test_a_base_and_its_adapter_give_the_trained_logits(tiny_adapter, tiny_base, logits, tmp_path):
    path, trained = tiny_adapter(tmp_path)
    adapter = read_adapter(path)
    config = _config(tiny_base, models.architecture_of(adapter, tiny_base), adapter.labels)
    model = models.load(tiny_base, config, provided=adapter.replaced)
    attach(model, adapter)
    assert torch.equal(logits(model), logits(trained))


def test_loading_leaves_transformers_logging_as_it_was(tiny_base):
    logging = transformers.utils.logging
    logging.set_verbosity_info()
    logging.enable_progress_bar()
    try:
        _config(tiny_base)
        assert logging.get_verbosity() == logging.INFO
        assert logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity_error()
        logging.disable_progress_bar()


# ---------------------------------------------------------------- without weights


def test_a_blank_model_has_names_and_shapes_and_no_weights(tiny_base):
    config = _config(tiny_base, labels=("a", "b", "c"))
    blank = models.blank(config)
    loaded = models.load(tiny_base, config, provided=dict.fromkeys(HEAD))
    assert {p.device.type for p in blank.parameters()} == {"meta"}
    shapes = [{n: v.shape for n, v in m.state_dict().items()} for m in (blank, loaded)]
    assert shapes[0] == shapes[1]


def test_module_classes_are_named_by_path(tiny_base):
    classes = models.module_classes(models.blank(_config(tiny_base)))
    assert classes[""] == CLASSIFIER
    assert classes["bert.encoder.layer.1.attention.self.query"] == "Linear"


# ---------------------------------------------------------------- tokenizer


def test_the_tokenizer_of_the_base_is_loaded(tiny_base):
    tokenizer = models.tokenizer(tiny_base)
    words = tokenizer.convert_ids_to_tokens(tokenizer("a good movie!").input_ids)
    assert words == ["[CLS]", "a", "good", "movie", "!", "[SEP]"]


def test_a_directory_without_a_tokenizer_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="no tokenizer in"):
        models.tokenizer(tmp_path)


def test_a_model_without_a_tokenizer_is_an_input_error(base):
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        (base / name).unlink(missing_ok=True)
    with pytest.raises(InputError, match="no tokenizer in"):
        models.tokenizer(base)
