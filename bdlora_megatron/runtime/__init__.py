"""Devices, process groups, and what a program communicates.

``cpu`` lets Megatron-Core run without CUDA, ``parallel`` starts its process groups, ``collectives``
counts what passes through them, ``versions`` knows where releases of Megatron-Core differ.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bdlora_megatron.runtime.collectives import Collective, CollectiveLog, record_collectives
    from bdlora_megatron.runtime.cpu import cpu_is_enabled, enable_cpu
    from bdlora_megatron.runtime.parallel import (
        device,
        from_first_rank,
        model_parallel,
        refuse_together,
    )

__all__ = [
    "Collective",
    "CollectiveLog",
    "cpu_is_enabled",
    "device",
    "enable_cpu",
    "from_first_rank",
    "model_parallel",
    "record_collectives",
    "refuse_together",
]

_HOMES = {
    "collectives": ("Collective", "CollectiveLog", "record_collectives"),
    "cpu": ("cpu_is_enabled", "enable_cpu"),
    "parallel": ("device", "from_first_rank", "model_parallel", "refuse_together"),
}


def __getattr__(name: str) -> Any:
    # On first use: the command line asks `versions` before it imports torch or Megatron-Core.
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
