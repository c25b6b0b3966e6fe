"""Build Hugging Face models and tokenizers from a directory. The one place that knows transformers.

Never runs code that comes with a checkpoint, never touches the network.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_export import storage
from lora_export.errors import AdapterMismatch, InputError, listed
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
    if table := _TASK_TABLES.get(adapter.task_type or ""):
        from transformers.models.auto import modeling_auto

        if name := getattr(modeling_auto, table).get(config.get("model_type")):
            return str(name)
    if own := config.get("architectures"):
        return str(own[0])
    raise InputError(f"{base}/config.json names no architecture, and neither does the adapter")


def config_of(base: Path, architecture: str, labels: tuple[str, ...], classes: int | None) -> Any:
    """Return the transformers config of `base` as `architecture`, with the label names in it."""
    from transformers import AutoConfig

    with _quiet():
        config = _loaded(AutoConfig, base, "config")
    config.architectures = [architecture]
    if labels:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: index for index, label in enumerate(labels)}
    elif classes is not None and classes != config.num_labels:
        config.num_labels = classes
    return config


def class_count(adapter: Adapter) -> int | None:
    """Return the number of classes of the adapter's head, or None where it has no head."""
    if adapter.labels:
        return len(adapter.labels)
    biases = [v.shape[0] for n, v in adapter.replaced.items() if v.ndim == 2]
    return min(biases) if adapter.task_type in ("SEQ_CLS", "TOKEN_CLS") and biases else None


def load(base: Path, config: Any, *, provided: Mapping[str, Any] | None = None) -> nn.Module:
    """Return the model in `base`, in eval mode and in the checkpoint's dtype.

    Args:
        base: Directory with config and weights.
        config: What `config_of` returned.
        provided: Names of tensors that the caller will fill in: the adapter's heads.

    Raises:
        AdapterMismatch: a weight is neither in the checkpoint nor in `provided`, so the model
            would compute with random numbers.
    """
    kind = _model_class(config.architectures[0])
    with _quiet():
        model, report = kind.from_pretrained(
            base, config=config, dtype="auto", local_files_only=True, output_loading_info=True
        )
    if missing := set(report["missing_keys"]) - set(provided or {}):
        raise AdapterMismatch(
            listed(f"{base} and the adapter lack weights of {kind.__name__}", missing)
        )
    if report["mismatched_keys"]:
        wrong = {str(entry[0]) for entry in report["mismatched_keys"]} - set(provided or {})
        if wrong:
            raise AdapterMismatch(listed(f"{base}: shapes differ from {kind.__name__}", wrong))
    result: nn.Module = model.eval()
    return result


def blank(config: Any) -> nn.Module:
    """Return the model of `config` on the meta device: names and shapes without weights."""
    with _quiet(), torch.device("meta"):
        model: nn.Module = _model_class(config.architectures[0])(config)
    return model


def tokenizer(base: Path) -> Any:
    """Return the tokenizer in the directory `base`."""
    from transformers import AutoTokenizer

    with _quiet():
        return _loaded(AutoTokenizer, base, "tokenizer")


def module_classes(model: nn.Module) -> dict[str, str]:
    """Return the class name of every module of `model` by path."""
    return {path: type(module).__name__ for path, module in model.named_modules()}


def _model_class(architecture: str) -> Any:
    import transformers

    kind = getattr(transformers, architecture, None)
    if kind is None or not hasattr(kind, "from_pretrained"):
        raise InputError(f"transformers {transformers.__version__} has no model {architecture!r}")
    return kind


def _loaded(kind: Any, base: Path, what: str) -> Any:
    try:
        return kind.from_pretrained(base, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"no usable {what} in {base}: {error}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' load reports and bars: what they say is checked here instead."""
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
