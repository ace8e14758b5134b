"""Serving many adapters from one base model.

`ModelSlots` gives a model room for adapters that one batch can mix; `AdapterStore` brings them
there from disk. `SlotLedger` and `HostCache` are the bookkeeping of both, plain Python.
"""

from bdlora_megatron.serve.host_cache import HostCache
from bdlora_megatron.serve.ledger import Placement, SlotLedger
from bdlora_megatron.serve.room import AdapterShare, SlotRoom
from bdlora_megatron.serve.slots import ModelSlots
from bdlora_megatron.serve.store import AdapterStore
from bdlora_megatron.serve.store_types import AdapterKey, StoreOptions, StoreStats

__all__ = [
    "AdapterKey",
    "AdapterShare",
    "AdapterStore",
    "HostCache",
    "ModelSlots",
    "Placement",
    "SlotLedger",
    "SlotRoom",
    "StoreOptions",
    "StoreStats",
]
