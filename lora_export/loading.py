"""Load a merged model as any user would, and look at what it consists of."""

from pathlib import Path

from torch import nn

from lora_export import merging, models, storage
from lora_export.companions import PROVENANCE
from lora_export.errors import InputError, listed
from lora_export.records import Adapter, Modules, lora_names


def load_merged(folder: Path, *, altered: bool = False) -> nn.Module:
    """Load the merged model in `folder` as any user would: with plain transformers.

    With `altered`, one that was changed after the merge is loaded too: to find out where.

    Raises:
        InputError: it holds no model, one that was changed after the merge, or tensors that the
            model does not use: an adapter that was never merged, for instance.
        AdapterMismatch: weights are missing.
    """
    if not folder.is_dir():
        raise InputError(f"no merged model in {folder}: run `lora-export merge` first")
    if not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").is_file()
        hint = "it is an adapter; run `lora-export merge` first" if adapter else "no config.json"
        raise InputError(f"no model in {folder}: {hint}")
    if not altered:
        _refuse_altered(folder)
    architecture = models.architecture_of(Adapter({}, {}, "lora"), folder)
    config = models.config_of(folder, architecture, (), None)
    models.blank(config)  # says what is wrong with it; the loader raises as it comes
    return models.load(folder, config, all_used=True)


def _refuse_altered(folder: Path) -> None:
    """Refuse weights that are not the ones that the merge wrote and audited."""
    if not (folder / PROVENANCE).is_file():
        return
    written = merging.recorded_files(folder)
    weights = {file.name: file.digest for file in written if file.name.endswith(".safetensors")}
    now = {
        name: storage.digest(folder / name).digest for name in weights if (folder / name).is_file()
    }
    if changed := [name for name, digest in weights.items() if now.get(name) != digest]:
        raise InputError(listed(f"{folder} was changed after it was merged", changed))


def modules_of(model: nn.Module) -> Modules:
    """Return the module tree of the merged `model`, and that of its architecture."""
    plain = models.blank(model.config)
    names, known = ((*m.state_dict(), *dict(m.named_modules())) for m in (model, plain))
    return Modules(
        expected=models.module_classes(plain),
        found=models.module_classes(model),
        lora_names=lora_names(names, known),
    )
