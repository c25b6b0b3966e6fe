"""Take a LoRA adapter to a deployable artifact, with proof.

Train, in memory and without PEFT:

    from lora_export import LoraConfig, inject, save_adapter, trainable_parameters

    inject(model, LoraConfig(rank=8, alpha=16, targets=("query", "value")))
    print(trainable_parameters(model))
    ...                                              # any training loop
    save_adapter(model, "sst2.safetensors")

Ship, with a certificate:

    from lora_export import run

    certificate = run("sst2.safetensors", out="run")
    certificate.require()

Importing this package imports no torch; the names below load what they need when first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lora_export.adapter import load_adapter as load_adapter
    from lora_export.adapter import read_adapter as read_adapter
    from lora_export.adapter import save_adapter as save_adapter
    from lora_export.config import LoraConfig as LoraConfig
    from lora_export.errors import (
        AdapterMismatch as AdapterMismatch,
    )
    from lora_export.errors import (
        CheckFailed as CheckFailed,
    )
    from lora_export.errors import (
        ExportFailed as ExportFailed,
    )
    from lora_export.errors import (
        InputError as InputError,
    )
    from lora_export.errors import (
        LoraExportError as LoraExportError,
    )
    from lora_export.injection import attach as attach
    from lora_export.injection import detach as detach
    from lora_export.injection import heads as heads
    from lora_export.injection import inject as inject
    from lora_export.injection import trainable_parameters as trainable_parameters
    from lora_export.live import merge as merge
    from lora_export.lora import LoraConv1D as LoraConv1D
    from lora_export.lora import LoraLinear as LoraLinear
    from lora_export.pipeline import run as run
    from lora_export.records import Adapter as Adapter
    from lora_export.records import BaseRef as BaseRef
    from lora_export.records import Certificate as Certificate
    from lora_export.records import Verdict as Verdict
    from lora_export.tuning import tune as tune

_HOMES = {
    "LoraConfig": "config",
    "LoraLinear": "lora",
    "LoraConv1D": "lora",
    "inject": "injection",
    "heads": "injection",
    "trainable_parameters": "injection",
    "save_adapter": "adapter",
    "load_adapter": "adapter",
    "read_adapter": "adapter",
    "attach": "injection",
    "detach": "injection",
    "merge": "live",
    "run": "pipeline",
    "tune": "tuning",
    "Adapter": "records",
    "BaseRef": "records",
    "Certificate": "records",
    "Verdict": "records",
    "LoraExportError": "errors",
    "InputError": "errors",
    "AdapterMismatch": "errors",
    "ExportFailed": "errors",
    "CheckFailed": "errors",
}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"lora_export.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
