"""What is trained of a model, by the method's name, and the file that holds just that.

The LoRA family trains low-rank pairs and the modules to save (see `variants/`), `full` every
parameter, `bitfit` every bias and the head (arXiv:2106.10199, section 3), `head` the head alone.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lora_export import publishing
from lora_export.adapter import save_adapter
from lora_export.config import TRAINABLE, LoraConfig
from lora_export.errors import AdapterMismatch, InputError, listed
from lora_export.injection import inject, parameters_of

_WHOLE: dict[str, Callable[[str], bool]] = {
    "full": lambda name: True,
    "bitfit": lambda name: name.rpartition(".")[2] == "bias",
    "head": lambda name: False,
}
METHODS = (*TRAINABLE, *_WHOLE)


def adapt(model: nn.Module, method: str, config: LoraConfig) -> None:
    """Make trainable, in place, what `method` trains, and freeze the rest.

    Of `config` the methods that are not of the LoRA family read `modules_to_save` alone: the head.

    Raises:
        InputError: the method is unknown, or nothing is left to train, or `inject` refuses.
    """
    if method in TRAINABLE:
        inject(model, replace(config, variant=method))
        return
    if method not in _WHOLE:
        raise InputError(f"method is {method!r}; expected one of {', '.join(METHODS)}")
    whole = parameters_of(model, config.modules_to_save)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_WHOLE[method](name) or name in whole)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(f"{method} leaves nothing to train: the model has no such parameter")


def save(model: nn.Module, method: str, folder: Path, **about: Any) -> Path:
    """Write what `method` trained below `folder`; return the file or directory.

    That is `adapter.safetensors` for the LoRA family (`about` goes to `save_adapter`), `model/` as
    transformers writes it for full fine-tuning, else `trained.safetensors`, the trained tensors
    under the model's own names, which `load_trained` reads.
    """
    if method in TRAINABLE:
        save_adapter(model, folder / "adapter.safetensors", **about)
        return folder / "adapter.safetensors"
    if method == "full":
        with publishing.staged(folder / "model", overwrite=True) as place:
            model.save_pretrained(place)  # type: ignore[operator]
        return folder / "model"
    with publishing.staged(folder / "trained.safetensors", overwrite=True) as place:
        save_file(trained(model), place)
    return folder / "trained.safetensors"


def trained(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the trainable parameters of `model` by name, on the CPU."""
    return {
        name: _whole(parameter.detach()).to("cpu", copy=True).contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def _whole(tensor: Tensor) -> Tensor:
    """Return `tensor`, gathered from all processes where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def load_trained(model: nn.Module, path: Path) -> None:
    """Put the tensors of a file that `save` wrote into `model`.

    Raises:
        AdapterMismatch: the model lacks one of them, or its shape differs; nothing is changed then.
    """
    tensors, parameters = load_file(path), dict(model.named_parameters())
    faults = [
        f"{name}: expected {tuple(value.shape)}, found "
        f"{tuple(parameters[name].shape) if name in parameters else 'nothing'}"
        for name, value in tensors.items()
        if name not in parameters or parameters[name].shape != value.shape
    ]
    if faults:
        raise AdapterMismatch(listed(f"{path.name} does not fit this model", faults))
    model.load_state_dict(tensors, strict=False)
