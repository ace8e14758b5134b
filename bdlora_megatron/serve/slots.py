"""The slots of a whole model: adapters that are on the device and can be mixed in one batch.

A model gets pools for a number of adapters, or for a number of bytes, in each of its decoder's
linear layers. A step then runs under ``serving``, which tells all layers at once which slot each
token uses.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property

from torch import Tensor, nn

from bdlora_megatron.config import Layout
from bdlora_megatron.convert.adapter import Adapter, ModuleKey
from bdlora_megatron.convert.adapter.lazy import module_facts
from bdlora_megatron.errors import BDLoRAError, CapacityError, ConfigError, TargetError
from bdlora_megatron.layers.apply import lora_layers, replace_module
from bdlora_megatron.layers.classes import lora_layer
from bdlora_megatron.layers.load import (
    check_covered,
    decoder_linears,
    fit,
    in_models_names,
)
from bdlora_megatron.layers.lora_linear import LoRALinear
from bdlora_megatron.layers.pools import LayerCapacity, LayerShard, pool_bytes
from bdlora_megatron.layers.slots import LayerSlots, ServingStep
from bdlora_megatron.ops import GroupedBatch, SlotTables
from bdlora_megatron.serve.allocator import SlotAllocator
from bdlora_megatron.serve.capacity import AdapterShard, SlotCapacity

__all__ = ["ModelSlots"]


class ModelSlots:
    """The slots of all layers of a model, and which adapter is in which.

    Every rank must make the same calls in the same order; then all of them hold the same adapter in
    the same slot. No call communicates.
    """

    def __init__(self, model: nn.Module, capacity: SlotCapacity | None = None) -> None:
        """Give a model's layers slots, all empty.

        Args:
            model: A ``GPTModel``, or any module that holds Megatron-Core decoder layers. It carries
                no adapter of its own.
            capacity: How much to hold.

        Raises:
            CapacityError: ``lora_memory_bytes`` does not hold one adapter of ``max_rank``.
            ConfigError: The model carries adapters, or has slots already.
            TargetError: The model has none of the targeted layers.
        """
        self.capacity = capacity = capacity or SlotCapacity()
        self.step = ServingStep(implementation=capacity.implementation)
        self._captured: dict[int, GroupedBatch] = {}
        self._model = model
        taken = [n for n, layer in lora_layers(model) if layer.adapter or layer.slots]
        if taken:
            raise ConfigError(
                f"{len(taken)} layers carry an adapter or slots already, {taken[0]} for one; take "
                "them out with remove_lora() first"
            )
        self._decoder = decoder_linears(model)
        self._linears = [
            target
            for target in self._decoder
            if target.full_name.rpartition(".")[2] in capacity.target_modules
        ]
        if not self._linears:
            raise TargetError(f"the model has no decoder layers called {capacity.target_modules}")
        layers = [_lora_layer(target.module) for target in self._linears]
        self._places = list(zip(layers, self._linears, strict=True))
        rows = self._rows()
        self.allocator = SlotAllocator(
            capacity.max_loras, rows=rows, max_rows=capacity.max_lora_rank
        )
        self.layers: dict[str, LayerSlots] = {}
        for layer, target in self._places:
            layer.slots = LayerSlots(
                layer, target.geometry, self._layer_capacity(layer, rows), self.step
            )
            self.layers[target.full_name] = layer.slots
            if layer is not target.module:
                replace_module(model, target.module, layer)
        self._tables = SlotTables(
            [table for slots in self.layers.values() for table in slots.tables]
        )
        self._exchanged: set[int] = set()
        self.device, self.tp_group = layers[0].weight.device, layers[0].tp_group

    @property
    def num_slots(self) -> int:
        """Slots N."""
        return self.capacity.max_loras

    def keys_of_layers(self) -> Iterator[tuple[str, Mapping[str, ModuleKey]]]:
        """The layers by their full names, and for each the modules of its projections."""
        for target in self._linears:
            yield target.full_name, target.keys

    @cached_property
    def memory_bytes(self) -> int:
        """Bytes of all pools on this rank."""
        return self._bytes(self.allocator.rows)

    @cached_property
    def largest_bytes(self) -> int:
        """The most bytes that one adapter takes on this rank."""
        return self._bytes(self.capacity.max_lora_rank)

    def detach(self) -> None:
        """Put the plain layers back and drop the pools."""
        for _, layer in list(lora_layers(self._model)):
            if layer.slots is not None:
                replace_module(self._model, layer, layer.to_base())

    def _rows(self) -> int:
        """Rows of the pools.

        Raises:
            CapacityError: ``lora_memory_bytes`` does not hold one adapter of ``max_rank``.
        """
        capacity = self.capacity
        most = capacity.max_loras * capacity.max_lora_rank
        if capacity.lora_memory_bytes is None:
            return most
        rows = bisect_right(range(most + 1), capacity.lora_memory_bytes, key=self._bytes) - 1
        if rows < capacity.max_lora_rank:
            raise CapacityError(
                f"lora_memory_bytes={capacity.lora_memory_bytes} holds {rows} rank rows, and one "
                f"adapter may take max_lora_rank={capacity.max_lora_rank}; set "
                f"lora_memory_bytes={self.largest_bytes} or more"
            )
        return rows

    def _bytes(self, rows: int) -> int:
        """Bytes of pools with so many rows, in all layers together."""
        return sum(
            pool_bytes(layer, target.geometry, self._layer_capacity(layer, rows))
            for layer, target in self._places
        )

    def _layer_capacity(self, layer: LoRALinear, rows: int) -> LayerCapacity:
        capacity = self.capacity
        return LayerCapacity(
            num_slots=capacity.max_loras,
            rows=rows,
            max_rank=capacity.max_lora_rank,
            dtype=capacity.dtype or layer.weight.dtype,
            own=capacity.own,
            exchanged=capacity.exchanged,
        )

    # --- loading -----------------------------------------------------------------------------

    def shard(self, adapter: Adapter, layout: Layout = Layout.BDLORA) -> AdapterShard:
        """Cut this rank's shard of an adapter, module after module.

        Changes nothing, so that a thread may call it while the model runs.

        Args:
            adapter: What to cut, as the readers return it; its modules may load on access.
            layout: How the ranks hold it. ``bdlora`` serves any adapter without communication; a
                vanilla one then costs each rank the whole of its dense factor.

        Returns:
            The shard, in pinned memory where the device is CUDA. An Activated LoRA's tells its
            invocation tokens; it acts on the tokens that ``batch`` is told, and from where on is
            the caller's to say (``active_from``).

        Raises:
            CapacityError: A module takes more rows than there is room for.
            ConfigError: There is no room for the layout, or the model's vocabulary does not have
                an invocation token.
            TargetError: The adapter holds modules without slots.
        """
        layout = Layout(layout)
        if layout not in self.capacity.layouts:
            choices = tuple(kind.value for kind in self.capacity.layouts)
            raise ConfigError(
                f"layout {layout.value!r}, but the slots hold {choices}; add it to "
                "SlotCapacity.layouts"
            )
        adapter = in_models_names(adapter, self._decoder)
        self._check_modules(adapter)
        self._check_invocation(adapter)
        shards: dict[str, LayerShard] = {}
        for target in self._linears:
            keys = {name: key for name, key in target.keys.items() if key in adapter.modules}
            if keys:
                slots = self.layers[target.full_name]
                shards[target.full_name] = self._layer_shard(slots, adapter, keys, layout)
        if not shards:
            raise TargetError(f"adapter {adapter.name!r} has no module on this rank's layers")
        return AdapterShard.of(
            shards,
            exchanged=layout is Layout.SLORA,
            invocation_tokens=adapter.invocation_tokens,
        )

    def check(self, adapter: Adapter, layout: Layout = Layout.BDLORA) -> None:
        """Refuse what ``shard`` would refuse, as far as shapes tell; no module is loaded.

        Args:
            adapter: As for ``shard``.
            layout: Likewise.

        Raises:
            CapacityError: As ``shard`` does.
            ConfigError: Likewise.
            TargetError: Likewise.
        """
        self.shard(replace(adapter, modules=module_facts(adapter)), layout)

    def _layer_shard(
        self,
        slots: LayerSlots,
        adapter: Adapter,
        keys: Mapping[str, ModuleKey],
        layout: Layout,
    ) -> LayerShard:
        tp_size = slots.tp_group.size()
        projections = {projection.name: projection for projection in slots.geometry.projections}
        modules = {
            name: fit(adapter.modules[key], projections[name], layout, tp_size)
            for name, key in keys.items()
        }
        names = " and ".join(map(str, keys.values()))
        try:
            shard = slots.shard(modules, layout)
        except BDLoRAError as error:
            raise type(error)(f"adapter {adapter.name!r}, {names}: {error}") from error
        if shard.rows > self.capacity.max_lora_rank:
            ranks = sorted({adapter.modules[key].rank for key in keys.values()})
            raise CapacityError(
                f"adapter {adapter.name!r} takes {shard.rows} rank rows on each rank ({names}, "
                f"rank {ranks}), and slots have room for {self.capacity.max_lora_rank}; set "
                f"max_lora_rank={shard.rows} or more"
            )
        on_meta = any(factors.A.is_meta for factors in modules.values())
        return shard.pin_memory() if self.device.type == "cuda" and not on_meta else shard

    def _check_modules(self, adapter: Adapter) -> None:
        check_covered(self._model, adapter, self._decoder)
        known = {key for target in self._linears for key in target.keys.values()}
        here = {key.layer for key in known}
        without = [key for key in adapter.modules if key.layer in here and key not in known]
        if without:
            raise TargetError(
                f"adapter {adapter.name!r} changes {without[0]} and {len(without) - 1} more modules"
                f" that have no slots; add them to SlotCapacity.target_modules="
                f"{self.capacity.target_modules}"
            )

    def _check_invocation(self, adapter: Adapter) -> None:
        tokens, model = adapter.invocation_tokens, self._model
        size = getattr(model, "unpadded_vocab_size", getattr(model, "vocab_size", None))
        if tokens and size is not None and max(tokens) >= size:
            raise ConfigError(
                f"adapter {adapter.name!r} acts from its invocation tokens {list(tokens)} on, and "
                f"the model's ids end at {size - 1}; is it an adapter for another base model, or "
                "for a tokenizer with added tokens?"
            )

    def load(self, key: Hashable, shard: AdapterShard) -> int | None:
        """Put an adapter into a slot, emptying idle ones if there is no other way.

        Args:
            key: What to call it.
            shard: What ``shard`` gave on this rank.

        Returns:
            Its slot, or None if what is in use leaves no room.
        """
        place = self.allocator.place(key, shard.rows)
        if place is None:
            return None
        for slot in {*place.evicted} - {place.slot}:
            self._clear(slot)
        self._note_empty(place.slot)
        for name, part in shard.layers.items():
            self.layers[name].write(place.slot, place.first_row, part, exchanged=shard.exchanged)
        self._tables.upload(place.slot)
        if shard.exchanged:
            self._exchanged.add(place.slot)
        return place.slot

    def acquire(self, key: Hashable) -> int:
        """Count one more use of an adapter in a slot; the slot is not touched until ``release``."""
        return self.allocator.acquire(key)

    def release(self, key: Hashable) -> None:
        """Count one use less."""
        self.allocator.release(key)

    def evict(self, key: Hashable) -> None:
        """Empty the slot of an adapter that is neither in use nor pinned."""
        self._clear(self.allocator.evict(key))

    def _clear(self, slot: int) -> None:
        self._note_empty(slot)
        self._tables.upload(slot)

    def _note_empty(self, slot: int) -> None:
        for layer in self.layers.values():
            layer.clear(slot)
        self._exchanged.discard(slot)

    # --- running -----------------------------------------------------------------------------

    def batch(self, token_slot: Tensor) -> GroupedBatch:
        """Describe a step.

        Args:
            token_slot: The slot of each token, integers ``[T]`` on the model's device, in the order
                of the flattened ``[S, b]``; -1 runs the base model.

        Returns:
            The batch, for ``serving`` or ``set_batch``.
        """
        return GroupedBatch(token_slot, num_slots=self.num_slots)

    def set_batch(
        self,
        batch: GroupedBatch | None,
        used: Collection[int] | None = None,
        cores: GroupedBatch | None = None,
    ) -> None:
        """Say what the coming steps run, until it is said again; None runs the base model alone.

        Args:
            batch: The batch; the same on every rank.
            used: The slots that the batch uses, or more, the same on every rank. Where none of them
                is in the S-LoRA layout, its products and collectives are left out; where all are,
                those of the other layouts. None: any slot.
            cores: Of ``CoreSlots.batch``, where tokens use a basis.
        """
        self.step.batch, self.step.cores = batch, cores
        used = range(self.num_slots) if used is None else used
        self.step.exchange = not self._exchanged.isdisjoint(used)
        self.step.own = self.capacity.own and not self._exchanged.issuperset(used)

    def set_captured_batch(self, token_slot: Tensor) -> None:
        """Say what the coming step runs, which is captured in a CUDA graph or replays one.

        A graph does again what was done when it was captured, on the same memory. So there is one
        batch for each number of tokens, described anew in place, and the pools of the S-LoRA layout
        are run in every such step, if there are any.

        Args:
            token_slot: As for ``batch``.
        """
        known = self._captured.get(len(token_slot))
        if known is None:
            known = self._captured[len(token_slot)] = self.batch(token_slot)
        else:
            known.refill(token_slot)
        # Cores have no part in captured steps yet.
        self.step.batch, self.step.cores = known, None
        self.step.own = self.capacity.own
        self.step.exchange = self.capacity.exchanged

    @contextmanager
    def serving(
        self,
        batch: GroupedBatch,
        used: Collection[int] | None = None,
        cores: GroupedBatch | None = None,
    ) -> Iterator[None]:
        """Run the batch's adapters inside the ``with`` block.

        Args:
            batch: Which slot each token uses.
            used: As for ``set_batch``.
            cores: Likewise.

        Yields:
            Nothing.
        """
        self.set_batch(batch, used, cores)
        try:
            yield
        finally:
            self.set_batch(None)


def _lora_layer(module: nn.Module) -> LoRALinear:
    return module if isinstance(module, LoRALinear) else lora_layer(module)
