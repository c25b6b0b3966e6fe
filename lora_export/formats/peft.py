"""A directory written by PEFT: adapter_config.json and adapter_model.safetensors."""

from pathlib import Path

from lora_export import peft_names, storage
from lora_export.errors import InputError
from lora_export.records import Adapter, BaseRef

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def detect(path: Path) -> bool:
    """Return whether `path` is a directory with PEFT's config file."""
    return (path / CONFIG).is_file()


def read(path: Path) -> Adapter:
    """Return the adapter in the directory at `path`.

    Raises:
        InputError: a file is missing or damaged, or holds what cannot be merged exactly.
    """
    config = storage.read_json(path / CONFIG)
    weights = path / WEIGHTS
    if not weights.is_file() and (path / "adapter_model.bin").is_file():
        raise InputError(f"{path} holds a pickle (adapter_model.bin); save it as safetensors first")
    infos, _ = storage.read_header(weights)
    tensors = {name: info.array() for name, info in infos.items()}
    modules, replaced, variant = peft_names.read(tensors, config, str(path))
    notes = []
    if config.get("bias", "none") != "none" and not any(n.endswith(".bias") for n in replaced):
        notes.append(f"the config says bias={config['bias']!r}, but the file holds no bias")
    return Adapter(
        modules=modules,
        replaced=replaced,
        variant=variant,
        dropout=peft_names.dropout_of(config, str(path)),
        task_type=config.get("task_type"),
        base=BaseRef(config.get("base_model_name_or_path"), config.get("revision")),
        format="peft",
        sha256=storage.sha256(weights),
        notes=tuple(notes),
    )


def write(adapter: Adapter, path: Path) -> None:
    """Write `adapter` as a directory that PEFT loads with no missing and no unexpected key.

    Raises:
        InputError: `path` exists.
    """
    storage.refuse_existing(path, overwrite=False)
    path.mkdir()
    config = peft_names.config_of(adapter)
    if not adapter.replaced and adapter.task_type in peft_names.WITH_HEADS:
        config["task_type"] = None  # PEFT would look for the head in the file
    storage.write_json(path / CONFIG, config)
    tensors = peft_names.tensors_of(adapter)
    storage.write_safetensors(
        path / WEIGHTS,
        [storage.NewTensor.of(name, value) for name, value in tensors.items()],
        {"format": "pt"},
    )
