"""The float32 copies that a mixed-precision optimizer keeps of the factors it trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = ["main_weights"]


@contextmanager
def main_weights(model: nn.Module) -> Iterator[None]:
    """Put the optimizer's float32 copies in the factors' places inside the ``with`` block.

    A factor stays where there is no copy, or only this rank's share of one, as with Megatron's
    distributed optimizer; it is then what the model computes with.

    Args:
        model: The model, wrapped or not.

    Yields:
        Nothing.
    """
    factors: list[Any] = list(model.parameters())
    copies = [
        (factor, factor.data, factor.main_param.data)
        for factor in factors
        if getattr(factor, "main_param", None) is not None
        and not getattr(factor, "main_param_sharded", False)
    ]
    for factor, _, main in copies:
        factor.data = main
    try:
        yield
    finally:
        for factor, own, _ in copies:
            factor.data = own
