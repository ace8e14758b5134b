"""Devices, process groups, and what a program communicates.

``cpu`` lets Megatron-Core run without CUDA, ``parallel`` starts its process groups, ``collectives``
counts what passes through them.
"""

from bdlora_megatron.runtime.collectives import Collective, CollectiveLog, record_collectives
from bdlora_megatron.runtime.cpu import cpu_is_enabled, enable_cpu
from bdlora_megatron.runtime.parallel import device, model_parallel

__all__ = [
    "Collective",
    "CollectiveLog",
    "cpu_is_enabled",
    "device",
    "enable_cpu",
    "model_parallel",
    "record_collectives",
]
