"""Whether numbers are finite, at the speed of memory."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["all_finite"]


def all_finite(*tensors: Tensor) -> bool:
    """Whether no tensor holds NaN or infinity.

    The least and the largest number tell, since NaN wins over both. Finding them is one vectorised
    pass, an order of magnitude faster on a CPU than `isfinite().all()`.

    Args:
        *tensors: Floating-point numbers, none of them empty.

    Returns:
        True if all numbers are finite.
    """
    return all(bool(torch.stack(torch.aminmax(tensor)).isfinite().all()) for tensor in tensors)
