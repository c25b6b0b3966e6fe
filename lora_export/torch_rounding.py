"""`rounding` for torch's tensors."""

import numpy as np
import torch
from torch import Tensor

from lora_export import rounding

# safetensors' name -> torch's
TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip


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
