"""The cores of a whole model: adapters that share a basis, and take little more than their cores.

A basis is loaded into the model's slots like an adapter, by ``ModelSlots``. Its adapters are loaded
here, each into a slot of its own kind, and loading one moves its cores alone.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from bdlora_megatron.blocks import BlockFactors
from bdlora_megatron.convert.adapter import Adapter, ModuleKey
from bdlora_megatron.convert.adapter.lazy import LazyModules
from bdlora_megatron.convert.collection.reader import Collection, expanded
from bdlora_megatron.convert.collection.tensors import ModuleBasis
from bdlora_megatron.errors import CapacityError, ConfigError, ShapeError, TargetError
from bdlora_megatron.layers.cores import LayerCores
from bdlora_megatron.ops import GroupedBatch, SlotTables
from bdlora_megatron.serve.allocator import SlotAllocator
from bdlora_megatron.serve.slots import ModelSlots

__all__ = ["CoreShard", "CoreSlots", "open_basis"]


@contextmanager
def open_basis(collection: Collection, cluster: int) -> Iterator[Adapter]:
    """Open a cluster's basis as an adapter of scale 1: B is U and A is V^T.

    Args:
        collection: What ``read_collection`` gave.
        cluster: The cluster's number.

    Yields:
        The adapter, for ``ModelSlots.shard``; its modules are read when they are looked up.

    Raises:
        AdapterFormatError: The file is missing or broken.
    """

    def alone(key: ModuleKey, basis: ModuleBasis) -> BlockFactors:
        return expanded(key, basis, basis.U.new_ones(basis.U.shape[0], basis.U.shape[2]))

    with collection.basis(cluster) as basis:
        yield Adapter(
            name=f"cluster {cluster}",
            modules=LazyModules(
                {key: alone(key, facts) for key, facts in basis.facts.items()},
                lambda key: alone(key, basis[key]),
                subject=f"cannot read cluster {cluster} of {collection.folder}",
            ),
            base=collection.manifest.base,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class CoreShard:
    """One rank's share of an adapter's cores, on the host.

    Attributes:
        layers: For each layer by its full name, a core ``[k, k]`` or None for each projection.
        num_bytes: Bytes of all of them.
    """

    layers: Mapping[str, tuple[Tensor | None, ...]]
    num_bytes: int


class CoreSlots:
    """Slots for the cores of a model's layers.

    Every rank must make the same calls in the same order. No call communicates.
    """

    def __init__(self, slots: ModelSlots, *, max_cores: int, max_rank: int) -> None:
        """Make room in all layers that have slots.

        Args:
            slots: The model's; it holds the bases.
            max_cores: Adapters at once.
            max_rank: The largest rank that one rank holds of a basis: k, or k / P where its blocks
                divide over the P ranks.

        Raises:
            ConfigError: There is room for nothing, the model has such slots already, or a basis of
                that rank has no room.
        """
        if min(max_cores, max_rank) < 1:
            raise ConfigError(f"max_cores={max_cores}, max_rank={max_rank}; both are at least 1")
        if max_rank > slots.capacity.max_lora_rank:
            raise ConfigError(
                f"cores of rank {max_rank} for bases of at most "
                f"max_lora_rank={slots.capacity.max_lora_rank}; raise that, or lower max_rank"
            )
        self._slots = slots
        self._layers: dict[str, LayerCores] = {}
        for name, layer in slots.layers.items():
            if layer.cores is not None:
                raise ConfigError("the model's slots have cores already; use those")
            self._layers[name] = layer.add_cores(num_slots=max_cores, max_rank=max_rank)
        self.allocator = SlotAllocator(max_cores, rows=max_cores, max_rows=1)
        self._max_rank = max_rank
        self._tables = SlotTables([t for layer in self._layers.values() for t in layer.tables])

    @property
    def memory_bytes(self) -> int:
        """Bytes of all pools on this rank."""
        return sum(layer.num_bytes for layer in self._layers.values())

    def shard(self, cores: Mapping[ModuleKey, Tensor]) -> CoreShard:
        """Cut this rank's share of an adapter's cores.

        Args:
            cores: For each module ``[N, k / N, k / N]``, or ``[N, k / N]`` if they are diagonal:
                the core of each block of the basis, one where the basis has no blocks. The
                adapter's scale is in them. ``Collection.cores`` opens such a mapping.

        Returns:
            The share, in pinned memory where the device is CUDA.

        Raises:
            CapacityError: One is larger than there is room for.
            ShapeError: One is no stack of square matrices, or its blocks don't divide over ranks.
            TargetError: A module has no slots.
        """
        layers: dict[str, tuple[Tensor | None, ...]] = {}
        left = dict(cores)
        for name, keys in self._slots.keys_of_layers():
            found = [
                self._share(left.pop(key), key, projection.replicas)
                if (key := keys.get(projection.name)) in left
                else None
                for projection in self._slots.layers[name].geometry.projections
            ]
            if any(core is not None for core in found):
                layers[name] = tuple(found)
        if left:
            raise TargetError(
                f"cores for {len(left)} modules without slots, {min(left)} for one; is it a "
                "collection for another base model?"
            )
        every = [core for found in layers.values() for core in found if core is not None]
        return CoreShard(
            layers=layers, num_bytes=sum(core.numel() * core.element_size() for core in every)
        )

    def _share(self, core: Tensor, key: ModuleKey, replicas: int) -> Tensor:
        if core.ndim == 2:
            core = torch.diag_embed(core)
        if core.ndim != 3 or core.shape[1] != core.shape[2]:
            raise ShapeError(f"{key}: a core of shape {list(core.shape)}; wanted [N, k / N, k / N]")
        blocks, ranks = len(core), self._slots.tp_group.size()
        if blocks == 1:
            own = core[0]
        elif replicas > 1:
            raise ShapeError(
                f"{key}: {blocks} blocks over key-value heads that {replicas} ranks each hold a "
                "copy of; compress in the shared form, or serve on fewer ranks"
            )
        elif blocks % ranks:
            raise ShapeError(
                f"{key}: {blocks} blocks over {ranks} tensor-parallel ranks; compress for a "
                f"multiple of {ranks}, or in the shared form"
            )
        else:
            own = torch.block_diag(*core.chunk(ranks)[self._slots.tp_group.rank()])
        if len(own) > self._max_rank:
            raise CapacityError(
                f"{key}: a core of rank {len(own)} on each rank, and there is room for "
                f"{self._max_rank}; set max_rank={len(own)} or more"
            )
        own = own.to(torch.promote_types(own.dtype, torch.float32)).contiguous()
        return own.pin_memory() if self._slots.device.type == "cuda" else own

    def load(self, key: Hashable, shard: CoreShard) -> int | None:
        """Put an adapter's cores into a slot, emptying idle ones if there is no other way.

        Args:
            key: What to call the adapter.
            shard: What ``shard`` gave on this rank.

        Returns:
            Its slot, or None if all are in use.
        """
        place = self.allocator.place(key, 1)
        if place is None:
            return None
        for name, layer in self._layers.items():
            nothing = (None,) * len(layer.projections)
            layer.write(place.slot, shard.layers.get(name, nothing))
        self._tables.upload(place.slot)
        return place.slot

    def batch(self, token_core: Tensor) -> GroupedBatch:
        """Describe a step.

        Args:
            token_core: The slot of each token's cores, integers ``[T]`` on the model's device, in
                the order of the flattened ``[S, b]``; -1 where the token's adapter, in
                ``ModelSlots.batch``, is no basis.

        Returns:
            The batch, for ``ModelSlots.serving`` or ``set_batch``.
        """
        return GroupedBatch(token_core, num_slots=self.allocator.num_slots)
