"""Build Hugging Face models and tokenizers from a directory. The one place that knows transformers.

Never runs code that comes with a checkpoint, never touches the network.
"""

import contextlib
import copy
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_export import storage
from lora_export.companions import VOCABULARIES, has_tokenizer
from lora_export.errors import AdapterMismatch, InputError, LoraExportError, listed
from lora_export.records import Adapter, Signature, TensorSpec

# PEFT's task types -> transformers' tables from model type to class name
_TASK_TABLES = {
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "CAUSAL_LM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "SEQ_2_SEQ_LM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "FEATURE_EXTRACTION": "MODEL_MAPPING_NAMES",
}
MOST_LAYERS = 1000
MOST_LABELS = 1_000_000
TASKS = tuple(_TASK_TABLES)


def architecture_of(adapter: Adapter, base: Path) -> str:
    """Return the transformers class that the adapter was trained in.

    It is what the adapter states, else what its task type means for the base's model type, else
    the base's own class.

    Raises:
        InputError: none of the three says it.
    """
    if adapter.base.architecture:
        return adapter.base.architecture
    config = storage.read_json(base / "config.json")
    kind = config.get("model_type")
    if table := _TASK_TABLES.get(adapter.task_type or ""):
        from transformers.models.auto import modeling_auto

        if name := getattr(modeling_auto, table).get(str(kind)):
            return str(name)
    own = config.get("architectures")
    if isinstance(own, list) and own and isinstance(own[0], str):
        return own[0]
    raise InputError(f"{base}/config.json names no architecture, and neither does the adapter")


def config_of(base: Path, architecture: str, labels: tuple[str, ...], classes: int | None) -> Any:
    """Return the transformers config of `base` as `architecture`, with the label names in it."""
    from transformers import AutoConfig

    _refuse_extremes(storage.read_json(base / "config.json"), base)
    with quiet():
        config = _loaded(AutoConfig, base, "config")
    config.architectures = [architecture]
    if labels:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: index for index, label in enumerate(labels)}
    elif classes is not None and classes != config.num_labels:
        config.num_labels = classes
    return config


def _refuse_extremes(fields: Mapping[str, Any], base: Path) -> None:
    """Raise where a config asks for a model that would take for ever to build."""
    for name, value in fields.items():
        if isinstance(value, dict):
            _refuse_extremes(value, base)
        limit = MOST_LABELS if name == "num_labels" else MOST_LAYERS if "layer" in name else None
        if type(value) is int and limit is not None and value > limit:
            raise InputError(f"{base}/config.json: {name} is {value}; expected at most {limit}")


def class_count(adapter: Adapter) -> int | None:
    """Return the number of classes of the adapter's head, or None where it has no head."""
    if adapter.labels:
        return len(adapter.labels)
    biases = [v.shape[0] for n, v in adapter.replaced.items() if v.ndim == 2]
    return min(biases) if adapter.task_type in ("SEQ_CLS", "TOKEN_CLS") and biases else None


def load(
    base: Path,
    config: Any,
    *,
    provided: Mapping[str, Any] | None = None,
    all_used: bool = False,
) -> nn.Module:
    """Return the model in `base`, in eval mode and in the checkpoint's dtype.

    Args:
        base: Directory with config and weights.
        config: What `config_of` returned.
        provided: Names of tensors that the caller will fill in: the adapter's heads.
        all_used: Refuse a checkpoint that holds more than the model uses.

    Raises:
        InputError: the checkpoint holds tensors that the model would ignore.
        AdapterMismatch: a weight is neither in the checkpoint nor in `provided`, so the model
            would compute with random numbers.
    """
    kind = _model_class(config.architectures[0])
    with quiet():
        model, report = kind.from_pretrained(
            base,
            config=config,
            dtype="auto",
            local_files_only=True,
            ignore_mismatched_sizes=True,  # reported below, with what the caller provides left out
            output_loading_info=True,
        )
    if missing := set(report["missing_keys"]) - set(provided or {}):
        raise AdapterMismatch(
            listed(f"{base} and the adapter lack weights of {kind.__name__}", missing)
        )
    if all_used and (unused := set(report["unexpected_keys"])):
        hint = "; an adapter in it was never merged" if any("lora_" in n for n in unused) else ""
        raise InputError(listed(f"{base}: {kind.__name__} ignores these tensors{hint}", unused))
    if report["mismatched_keys"]:
        wrong = {str(entry[0]) for entry in report["mismatched_keys"]} - set(provided or {})
        if wrong:
            raise AdapterMismatch(listed(f"{base}: shapes differ from {kind.__name__}", wrong))
    result: nn.Module = model.eval()
    return result


def blank(config: Any) -> nn.Module:
    """Return the model of `config` on the meta device: names and shapes without weights."""
    try:
        with quiet(), torch.device("meta"):
            model: nn.Module = _model_class(config.architectures[0])(config)
    except LoraExportError:
        raise
    except Exception as error:  # the config is somebody's, and models raise as it comes
        raise InputError(f"no model can be built from the config: {_first_line(error)}") from error
    return model


def embeddings(model: nn.Module) -> list[str]:
    """Return the names of the weights of the input and output embeddings of `model`."""
    ends = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        with contextlib.suppress(NotImplementedError, AttributeError):
            ends.append(getattr(model, getter)())
    return [
        f"{path}.weight" for path, module in model.named_modules() if any(module is e for e in ends)
    ]


def tokenizer(base: Path) -> Any:
    """Return the tokenizer in the directory `base`; raises `InputError` where there is none."""
    from transformers import AutoTokenizer

    # Without a vocabulary transformers builds a tokenizer that turns every word into [UNK].
    if not has_tokenizer(base):
        raise InputError(f"no tokenizer in {base}: none of {', '.join(VOCABULARIES)}")
    with quiet():
        return _loaded(AutoTokenizer, base, "tokenizer")


class Tensors(nn.Module):
    """A model as a function of tensors: named inputs in order, the named outputs back."""

    def __init__(self, model: nn.Module, outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.outputs = outputs

    def call(self, inputs: dict[str, Tensor]) -> Tensor | tuple[Tensor, ...]:
        """Return the outputs for `inputs`: a tensor where there is one, else a tuple."""
        found = self.model(**inputs, return_dict=True)
        values = tuple(found[name] for name in self.outputs)
        return values[0] if len(values) == 1 else values


def as_tensors(model: nn.Module, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> nn.Module:
    """Return `model` as a `Tensors` whose `forward` takes arguments of just these names.

    Tracers read the names of a model's inputs from the signature of `forward`, so it is made to
    say them.
    """

    def forward(self: Tensors, *args: Tensor, **named: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.call(dict(zip(inputs, args, strict=False)) | named)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind) for name in ("self", *inputs)]
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return type("Tensors", (Tensors,), {"forward": forward})(model, outputs).eval()  # type: ignore[no-any-return]


def signature_of(model: nn.Module, tokens: Any) -> Signature:
    """Return the signature of `model`: inputs that both it and its tokenizer know, all outputs.

    The axes of the outputs are found by running the model at two shapes: one that follows the
    batch or the sequence is dynamic, any other is fixed.

    Raises:
        InputError: the model takes no token ids, or the tokenizer is not the model's.
    """
    accepted = inspect.signature(model.forward).parameters
    names = [name for name in tokens.model_input_names if name in accepted]
    if "input_ids" not in names or "attention_mask" not in names:
        raise InputError(f"{type(model).__name__} does not take input_ids and attention_mask")
    config: Any = model.config
    if len(tokens) > config.vocab_size:
        raise InputError(
            f"the tokenizer knows {len(tokens)} tokens, the model {config.vocab_size}: they do not "
            "belong together, or the embeddings were not resized"
        )
    if hasattr(config, "use_cache"):
        config.use_cache = False  # a cache is state, and not part of this signature
    _set_padding(tokens, config, type(model).__name__)
    pad = int(tokens.pad_token_id)
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{type(model).__name__}: encoder-decoder models are not exported yet")
    specs = tuple(TensorSpec(name, "int64", ("batch", "sequence")) for name in names)
    blank = Signature(specs, (), _max_length(model, tokens), config.vocab_size, pad)
    small, large = (_outputs(model, blank, *shape) for shape in ((2, 5), (3, 7)))
    sizes = {(2, 3): "batch", (5, 7): "sequence"}
    found = []
    for name, value in small.items():
        pairs = zip(value.shape, large[name].shape, strict=True)
        wide = torch.promote_types(value.dtype, torch.float32)  # how half precision is handed over
        axes = tuple(sizes.get((a, b), a) for a, b in pairs)
        found.append(TensorSpec(name, str(wide).removeprefix("torch."), axes))
    return replace(blank, outputs=tuple(found))


def _set_padding(tokens: Any, config: Any, architecture: str) -> None:
    """Give the tokenizer a padding token, where the model does not care which one.

    A decoder with a classification head finds the last token that is not padding, so there the
    config has to say which token that is; elsewhere the mask hides it.
    """
    known = getattr(config, "pad_token_id", None)
    if known is None and architecture.endswith("ForSequenceClassification"):
        raise InputError(
            f"neither the config nor the tokenizer of {architecture} names a padding token; add "
            "pad_token_id, as it was in training, to config.json"
        )
    if tokens.pad_token_id is None:
        tokens.pad_token = tokens.convert_ids_to_tokens(known) if known else tokens.eos_token
    if tokens.pad_token_id is None:
        raise InputError("the tokenizer has neither a padding nor an end token")


@torch.inference_mode()
def _outputs(model: nn.Module, signature: Signature, batch: int, length: int) -> dict[str, Tensor]:
    """Return every tensor that the model answers with, by name."""
    inputs = {spec.name: torch.ones(batch, length, dtype=torch.int64) for spec in signature.inputs}
    found = model(**inputs, return_dict=True)
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def _max_length(model: nn.Module, tokens: Any) -> int:
    """Return the longest sequence that positions and tokenizer allow."""
    config: Any = model.config
    positions = int(getattr(config, "max_position_embeddings", 0) or 512)
    for path, module in model.named_modules():
        if path.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa's family counts positions from padding_idx + 1.
            positions -= 0 if module.padding_idx is None else module.padding_idx + 1
    return min(positions, int(tokens.model_max_length))


def widened(model: nn.Module) -> nn.Module:
    """Return `model` in float32 where it is in half precision: CPU runtimes lack kernels for it."""
    half = any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters())
    return copy.deepcopy(model).float() if half else model


def module_classes(model: nn.Module) -> dict[str, str]:
    """Return the class name of every module of `model` by path."""
    return {path: type(module).__name__ for path, module in model.named_modules()}


def _model_class(architecture: str) -> Any:
    import transformers

    kind = getattr(transformers, architecture, None)
    # The abstract class has no config of its own, and once built it answers for every model of the
    # process that it can switch experts (transformers keeps that answer on the class).
    if (
        not isinstance(kind, type)
        or not issubclass(kind, transformers.PreTrainedModel)
        or kind.config_class is None
    ):
        raise InputError(f"transformers {transformers.__version__} has no model {architecture!r}")
    return kind


def _loaded(kind: Any, base: Path, what: str) -> Any:
    try:
        return kind.from_pretrained(base, local_files_only=True)
    except Exception as error:  # these files are somebody's, and transformers raises as it comes
        raise InputError(f"no usable {what} in {base}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' reports and bars: what they say is checked here instead."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
