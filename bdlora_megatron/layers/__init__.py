"""Megatron-Core's tensor-parallel linear layers with adapters inside.

``linear`` subclasses the layers, ``adapters`` holds the arithmetic of the three layouts, ``apply``
and ``spec`` put them into a built or a new model, ``load`` fills them from an adapter, ``collect``
makes an adapter of them, ``save`` saves the model's own. ``slots`` and ``pools`` let a layer serve
several adapters in one batch.
"""

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
from bdlora_megatron.layers.save import save_adapter
from bdlora_megatron.layers.spec import lora_spec

__all__ = [
    "LoRAColumnParallelLinear",
    "LoRALinear",
    "LoRARowParallelLinear",
    "LoadOptions",
    "adapters_disabled",
    "apply_lora",
    "collect_adapter",
    "freeze_base",
    "load_adapter",
    "lora_layers",
    "lora_spec",
    "merge_adapters",
    "remove_lora",
    "save_adapter",
    "unmerge_adapters",
]
