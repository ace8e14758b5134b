"""How a model is told that it answers and does not train."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

try:
    # Since 0.19; before, a model looked at whether it was given a cache.
    from megatron.core.inference.utils import InferenceMode
except ImportError:
    InferenceMode = None

__all__ = ["inference"]


@contextmanager
def inference() -> Iterator[None]:
    """Call a model with an inference context inside, as Megatron-Core's engines do.

    Elsewhere, 0.19 computes the logits of all tokens where those of the last ones were asked for.
    """
    mine = InferenceMode is not None and not InferenceMode.is_active()
    if mine:
        InferenceMode.set_active()
    try:
        yield
    finally:
        if mine:
            InferenceMode.unset_active()
