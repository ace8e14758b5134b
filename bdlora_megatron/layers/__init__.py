"""Megatron-Core's tensor-parallel linear layers with adapters inside.

``linear`` subclasses the layers, ``adapters`` holds the arithmetic of the three layouts, ``apply``
and ``spec`` put them into a built or a new model, ``load`` fills them from an adapter, ``collect``
makes an adapter of them; ``bdlora_megatron.export`` writes it. ``activation`` tells an Activated
LoRA's layers which tokens they act on. ``slots`` and ``pools`` let a layer
serve several adapters in one batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bdlora_megatron.layers.activation import act_on, active_tokens
from bdlora_megatron.layers.anatomy import number_layers
from bdlora_megatron.layers.apply import (
    adapters_disabled,
    apply_lora,
    freeze_base,
    lora_layers,
    merge_adapters,
    remove_lora,
    unmerge_adapters,
)
from bdlora_megatron.layers.collect import collect_adapter
from bdlora_megatron.layers.linear import LoRAColumnParallelLinear, LoRARowParallelLinear
from bdlora_megatron.layers.load import LoadOptions, load_adapter
from bdlora_megatron.layers.lora_linear import LoRALinear
from bdlora_megatron.layers.spec import lora_spec

if TYPE_CHECKING:
    from bdlora_megatron.export import save_adapter

__all__ = [
    "LoRAColumnParallelLinear",
    "LoRALinear",
    "LoRARowParallelLinear",
    "LoadOptions",
    "act_on",
    "active_tokens",
    "adapters_disabled",
    "apply_lora",
    "collect_adapter",
    "freeze_base",
    "load_adapter",
    "lora_layers",
    "lora_spec",
    "merge_adapters",
    "number_layers",
    "remove_lora",
    "save_adapter",
    "unmerge_adapters",
]


def __getattr__(name: str) -> Any:
    # It knows file formats, which nothing in here does; its public name has long been this one.
    if name == "save_adapter":
        from bdlora_megatron.export import save_adapter

        return save_adapter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
