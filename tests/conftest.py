"""Tiny seeded models, adapters and a tiny base on disk, all built from configs.

Random-init models hide trouble, because their logits hardly depend on the input. So the weights
are scaled up here, and an adapter's B is never left at zero.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read by huggingface_hub when it is first imported
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

from lora_export import BaseRef, LoraConfig, inject, save_adapter
from lora_export.injection import lora_layers

VOCABULARY = 100
LABELS = ("negative", "positive")
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = """
the a an of and to in is it that this was for with as on but not be by are or from at has have
film movie story plot actor cast scene script music screen director drama comedy ending
good great fine best funny charming smart warm sweet lovely brilliant moving fresh
bad worst dull boring awful weak flat silly cheap empty tired ugly slow
very too so just never always more most less no all one two some any its his her they you we i
like love hate see feel make made think work works ##s ##ed ##ing ##ly , . ! ? '
"""

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


# ---------------------------------------------------------------- models in memory


def _encoder(**more: object) -> dict[str, object]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        **more,
    }


def _bert() -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**_encoder()))


def _roberta() -> nn.Module:
    config = transformers.RobertaConfig(**_encoder(type_vocab_size=1))
    return transformers.RobertaForSequenceClassification(config)


def _distilbert() -> nn.Module:
    config = transformers.DistilBertConfig(
        vocab_size=VOCABULARY, dim=32, n_layers=2, n_heads=4, hidden_dim=64,
        max_position_embeddings=64,
    )  # fmt: skip
    return transformers.DistilBertForSequenceClassification(config)


def _gpt2(kind: str = "GPT2LMHeadModel") -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64,
        bos_token_id=2, eos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    return getattr(transformers, kind)(config)


def _opt() -> nn.Module:
    config = transformers.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.OPTForCausalLM(config)


def _llama(kind: str = "LlamaForCausalLM", **more: object) -> nn.Module:
    config = transformers.LlamaConfig(**_encoder(num_key_value_heads=2, pad_token_id=0, **more))
    return getattr(transformers, kind)(config)


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "bert": _bert,
    "distilbert": _distilbert,
    "roberta": _roberta,
    "gpt2": _gpt2,
    "gpt2-cls": lambda: _gpt2("GPT2ForSequenceClassification"),
    "opt": _opt,
    "llama": _llama,
    "llama-tied": lambda: _llama(tie_word_embeddings=True),
    "llama-cls": lambda: _llama("LlamaForSequenceClassification"),
}


@torch.no_grad()
def scale_up(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give `model` weights large enough that its logits depend on its input."""
    random = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.empty_like(parameter).normal_(0, 1, generator=random)
        if parameter.ndim > 1:
            parameter.copy_(0.25 * noise)
        else:
            parameter.add_(0.1 * noise)
    return model


def build(family: str, seed: int = 0) -> nn.Module:
    """Return a seeded model of two layers and width 32, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = FAMILIES[family]()
    return scale_up(model, seed).eval()


@torch.no_grad()
def fill_in(model: nn.Module, seed: int = 0) -> nn.Module:
    """Stand in for training: nonzero A and B, and a moved head."""
    random = torch.Generator().manual_seed(1000 + seed)
    for layer in lora_layers(model).values():
        for factor in (layer.lora_A, layer.lora_B):
            factor.normal_(0, 0.2, generator=random)
    ours = {id(p) for x in lora_layers(model).values() for p in (x.lora_A, x.lora_B)}
    for parameter in model.parameters():
        if parameter.requires_grad and id(parameter) not in ours:
            noise = torch.empty_like(parameter).normal_(0, 0.3, generator=random)
            parameter.add_(noise)
    return model


def padded_rows() -> dict[str, Tensor]:
    """Return three rows of token ids of different length, padded on the right."""
    random = torch.Generator().manual_seed(7)
    ids = torch.randint(5, VOCABULARY - 1, (3, 9), generator=random)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    mask[2, 3:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def answer_of(model: nn.Module) -> Tensor:
    """Return the logits of `model` for the fixed rows, in eval mode; the mode is put back."""
    training = model.training
    result: Tensor = model.eval()(**padded_rows()).logits
    model.train(training)
    return result


POSITIVE = ["a great film", "the best cast", "i love it", "warm and charming", "very funny music"]
NEGATIVE = ["a bad film", "the worst cast", "i hate it", "dull and boring", "very silly music"]


@pytest.fixture(scope="session")
def tiny() -> Callable[..., nn.Module]:
    """`tiny(family, seed=0)`: a fresh small model with weights that matter."""
    return build


@pytest.fixture(scope="session")
def fill() -> Callable[..., nn.Module]:
    """`fill(model, seed=0)`: random A, B and heads in place, as if trained."""
    return fill_in


@pytest.fixture(scope="session")
def rows() -> Callable[[], dict[str, Tensor]]:
    """`rows()`: token ids and mask of three rows with padding."""
    return padded_rows


@pytest.fixture(scope="session")
def logits() -> Callable[[nn.Module], Tensor]:
    """`logits(model)`: what the model answers for the fixed rows."""
    return answer_of


# ---------------------------------------------------------------- a base and an adapter on disk


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a headless BERT and a WordPiece tokenizer. Shared: do not write to it."""
    root = tmp_path_factory.mktemp("base")
    vocabulary = {word: index for index, word in enumerate((*SPECIALS, *WORDS.split()))}
    config = transformers.BertConfig(**_encoder(vocab_size=len(vocabulary)))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = transformers.BertModel(config)
    scale_up(model, 3).save_pretrained(root)
    tokenizer = transformers.BertTokenizerFast(vocab=vocabulary, model_max_length=64)
    tokenizer.save_pretrained(root)
    return root


@pytest.fixture(scope="session")
def classifier_of() -> Callable[..., nn.Module]:
    """`classifier_of(base, seed=0)`: BertForSequenceClassification over the checkpoint in `base`.

    The head is random, seeded.
    """

    def load(base: Path, seed: int = 0) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = transformers.BertForSequenceClassification.from_pretrained(base)
        return model.eval()

    return load


@pytest.fixture(scope="session")
def tiny_adapter(
    tiny_base: Path, classifier_of: Callable[..., nn.Module]
) -> Callable[..., tuple[Path, nn.Module]]:
    """`tiny_adapter(folder, base_id=None, seed=0, **config)`: the path of `sst2.safetensors`.

    Returns the path and the live model that it was saved from. `config` are fields of LoraConfig.
    """

    def make(
        folder: Path, base_id: str | None = None, seed: int = 0, **config: object
    ) -> tuple[Path, nn.Module]:
        defaults = {"rank": 4, "alpha": 8.0, "modules_to_save": ("classifier",)}
        model = classifier_of(tiny_base, seed)
        inject(model, LoraConfig(**{**defaults, **config}))
        fill_in(model, seed)
        path = folder / "sst2.safetensors"
        base = BaseRef(id=base_id)
        save_adapter(model, path, base=base, labels=LABELS, task_type="SEQ_CLS")
        return path, model

    return make


# ---------------------------------------------------------------- for tests of several files


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`bases(family)`: a directory with the tiny base of that family of live_made.py."""
    from live_made import base_of

    root = tmp_path_factory.mktemp("bases")
    return lambda family: base_of(family, root)


@pytest.fixture
def call(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """`call(*words)`: run the command line in an empty folder; its exit code, stdout, stderr."""
    from lora_export import cli, timing

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(timing, "LEAST_ROUNDS", 20)
    monkeypatch.setattr(timing, "MOST_ROUNDS", 20)

    def run(*words: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit, match=r"^\d+$") as ended:
            cli.main([str(word) for word in words])
        printed = capsys.readouterr()
        return int(str(ended.value.code)), printed.out, printed.err

    return run


@pytest.fixture(scope="session")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.tsv (60 sentences) and dev.tsv (10), positive and negative."""
    folder = tmp_path_factory.mktemp("sentences")
    rows = [(text, 1) for text in POSITIVE] + [(text, 0) for text in NEGATIVE]
    lines = "".join(f"{text} \t{label}\n" for text, label in rows)
    for name, times in (("train", 6), ("dev", 1)):
        (folder / f"{name}.tsv").write_text("sentence\tlabel\n" + lines * times)
    return folder
