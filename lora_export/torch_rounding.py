"""`rounding` for torch's tensors, and these as numpy's."""

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from lora_export import rounding
from lora_export.records import Array

# safetensors' name -> torch's
TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip


def as_array(tensor: Tensor) -> Array:
    """Return `tensor` as a numpy array of its own dtype; bfloat16 is that of ml_dtypes."""
    found = tensor.detach().cpu().contiguous()
    if found.dtype == torch.bfloat16:  # which numpy does not take from torch
        return found.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return np.asarray(found.numpy())


def round_once(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Return float64 `exact` in `dtype`, rounded once, on the same device; no gradient goes back.

    Raises:
        InputError: `exact` is not finite, or overflows `dtype`.
    """
    name = next(name for name, known in TORCH_DTYPES.items() if known == dtype)
    array = rounding.round_once(exact.detach().cpu().numpy(), name)
    if dtype == torch.bfloat16:  # which torch does not take from numpy
        return torch.from_numpy(array.view(np.int16)).view(dtype).to(exact.device)
    return torch.from_numpy(array).to(exact.device)
