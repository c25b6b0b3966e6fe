"""Build Hugging Face models and tokenizers from a directory. The one place that knows transformers.

Never runs code that comes with a checkpoint, never touches the network.
"""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_export import storage
from lora_export.companions import VOCABULARIES, has_tokenizer
from lora_export.errors import (
    AdapterMismatch,
    InputError,
    LoraExportError,
    first_line,
    listed,
)
from lora_export.records import Adapter

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
        raise InputError(f"no model can be built from the config: {first_line(error)}") from error
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


def processor(base: Path, model: nn.Module) -> Any | None:
    """Return the tokenizer of `model` in the directory `base`; None for a model of pictures.

    Raises:
        InputError: the model takes token ids, and there is no tokenizer.
    """
    return None if takes_pictures(model) else tokenizer(base)


def takes_pictures(model: nn.Module) -> bool:
    """Return whether the input of `model` is pixels."""
    return getattr(model, "main_input_name", None) == "pixel_values"


def tokenizer(base: Path) -> Any:
    """Return the tokenizer in the directory `base`; raises `InputError` where there is none."""
    from transformers import AutoTokenizer

    # Without a vocabulary transformers builds a tokenizer that turns every word into [UNK].
    if not has_tokenizer(base):
        raise InputError(f"no tokenizer in {base}: none of {', '.join(VOCABULARIES)}")
    with quiet():
        return _loaded(AutoTokenizer, base, "tokenizer")


def in_precision(model: nn.Module, precision: str) -> nn.Module:
    """Return `model` in the dtype that exporters start from for `precision`, as a copy if need be.

    The copy holds all weights; `weightless.hollow` is the same without them.
    """
    dtype = dtype_in(model, precision)
    return model if dtype is None else copy.deepcopy(model).to(dtype)


def dtype_in(model: nn.Module, precision: str) -> torch.dtype | None:
    """Return the dtype that `model` is converted to for `precision`; None where it stays as it is.

    "fp16" and "bf16" are what they say; everything else begins in float32, to which half precision
    is widened without loss: CPU runtimes lack kernels for it, and eight bits are made of float32.
    """
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if dtype is torch.float32 and not kinds & {torch.bfloat16, torch.float16}:
        return None
    return None if kinds == {dtype} else dtype


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
        raise InputError(f"no usable {what} in {base}: {first_line(error)}") from error


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
