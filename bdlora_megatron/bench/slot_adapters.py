"""The contenders' adapters in slots, for steps whose requests use several."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from bdlora_megatron.bench.plan import BenchPlan, Setting, Variant
from bdlora_megatron.config import Layout
from bdlora_megatron.layers import collect_adapter, lora_layers
from bdlora_megatron.layers.slots import LayerSlots
from bdlora_megatron.serve.capacity import SlotCapacity
from bdlora_megatron.serve.slots import ModelSlots

__all__ = ["SlotAdapters"]


class SlotAdapters:
    """Slots of one model for each contender, exchanged in no time.

    Each contender has pools of its own, as wide as its rank: in shared ones, S-LoRA would send the
    widest contender's.

    Args:
        model: Whose layers get them.
        plan: Sizes and contenders.
    """

    def __init__(self, model: Any, plan: BenchPlan) -> None:
        self._model = model
        self._plan = plan
        self._slots: dict[Variant, ModelSlots] = {}
        self._layers: dict[Variant, dict[str, LayerSlots]] = {}

    def take_over(self, variant: Variant) -> None:
        """Fill a contender's slots with the adapter that the model's layers hold, and take it out.

        Every slot holds the same factors, in rows of its own: what a step costs does not depend on
        what they are.

        Collectives: those of ``collect_adapter``.
        """
        if not self._plan.mixed:
            return
        assert variant.layout is not None
        adapter = collect_adapter(self._model, variant.label)
        for _, layer in lora_layers(self._model):
            layer.adapter = None
        number = max(self._plan.adapters)
        width = variant.rank // self._plan.tp if variant.layout is Layout.BDLORA else variant.rank
        capacity = SlotCapacity(
            max_loras=number,
            max_lora_rank=width,
            layouts=(variant.layout,),
            target_modules=self._plan.target_modules,
        )
        slots = self._slots[variant] = ModelSlots(self._model, capacity)
        shard = slots.shard(adapter, variant.layout)
        for key in range(number):
            slots.load(key, shard)
        self._layers[variant] = {
            n: s.slots for n, s in lora_layers(self._model) if s.slots is not None
        }
        self.choose(None)

    def choose(self, variant: Variant | None) -> None:
        """Put one contender's slots into the layers."""
        chosen = {} if variant is None else self._layers.get(variant, {})
        for name, layer in lora_layers(self._model):
            layer.slots = chosen.get(name)

    def serving(
        self, variant: Variant, setting: Setting
    ) -> Callable[[], AbstractContextManager[None]]:
        """What a step runs inside.

        Args:
            variant: Whose slots.
            setting: How many requests, and how many adapters they take in turn.

        Returns:
            A function that describes the batch, as a server does before each step, and gives the
            context in which the model runs it; nothing of that where the step takes no slots.
        """
        number = setting.adapters
        if number is None or variant not in self._slots:
            return nullcontext
        slots = self._slots[variant]
        token_slot = torch.arange(setting.batch, device=slots.device, dtype=torch.int32) % number
        return lambda: slots.serving(slots.batch(token_slot), range(number))
