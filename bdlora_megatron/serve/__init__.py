"""Serving many adapters from one base model.

`ModelSlots` gives a model room for adapters that one batch can mix; `AdapterStore` brings them
there from disk. `SlotAllocator` and `HostCache` are the bookkeeping of both, plain Python. `engine`
runs requests with them on each rank, `api` answers HTTP, and `bdlora serve` starts both.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bdlora_megatron.serve.allocator import Placement, SlotAllocator
    from bdlora_megatron.serve.capacity import AdapterShard, SlotCapacity
    from bdlora_megatron.serve.cores import CoreShard, CoreSlots, open_basis
    from bdlora_megatron.serve.host_cache import HostCache
    from bdlora_megatron.serve.slots import ModelSlots
    from bdlora_megatron.serve.store import AdapterStore
    from bdlora_megatron.serve.store_types import AdapterKey, StoreOptions, StoreStats

__all__ = [
    "AdapterKey",
    "AdapterShard",
    "AdapterStore",
    "CoreShard",
    "CoreSlots",
    "HostCache",
    "ModelSlots",
    "Placement",
    "SlotAllocator",
    "SlotCapacity",
    "StoreOptions",
    "StoreStats",
    "open_basis",
]

_HOMES = {
    "host_cache": ("HostCache",),
    "allocator": ("Placement", "SlotAllocator"),
    "capacity": ("AdapterShard", "SlotCapacity"),
    "cores": ("CoreShard", "CoreSlots", "open_basis"),
    "slots": ("ModelSlots",),
    "store": ("AdapterStore",),
    "store_types": ("AdapterKey", "StoreOptions", "StoreStats"),
}


def __getattr__(name: str) -> Any:
    # On first use: the API server and the command line need neither torch nor Megatron-Core.
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
