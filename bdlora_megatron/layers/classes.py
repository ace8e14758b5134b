"""Which linear layers can carry an adapter, and which class takes the place of each."""

from __future__ import annotations

from megatron.core.extensions import transformer_engine as extension
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import nn

from bdlora_megatron.layers.linear import LoRAColumnParallelLinear, LoRARowParallelLinear
from bdlora_megatron.layers.lora_linear import LoRALinear

__all__ = ["LINEAR_CLASSES", "LORA_CLASSES", "lora_layer"]

#: Which layer takes the place of which Megatron-Core layer.
LORA_CLASSES: dict[type[nn.Module], type[LoRALinear]] = {
    ColumnParallelLinear: LoRAColumnParallelLinear,
    RowParallelLinear: LoRARowParallelLinear,
}

# Without Transformer Engine these names stand for mock objects, which nothing can subclass.
if isinstance(extension.TERowParallelLinear, type):
    from bdlora_megatron.layers.te_linear import TE_CLASSES

    LORA_CLASSES.update(TE_CLASSES)

#: For ``isinstance``: every layer that is, or derives from, one that can carry an adapter.
LINEAR_CLASSES: tuple[type[nn.Module], ...] = tuple(LORA_CLASSES)


def lora_layer(base: nn.Module) -> LoRALinear:
    """The adapter-carrying layer that takes the place of ``base``, still without an adapter.

    Raises:
        UnsupportedError: ``base`` is a subclass of a known layer, an MoE expert, or quantised.
    """
    kind = next(kind for kind in type(base).__mro__ if kind in LORA_CLASSES)
    return LORA_CLASSES[kind].from_base(base)
