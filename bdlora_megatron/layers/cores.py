"""Small matrices between the halves of a shared pair of factors: one adapter each.

A collection of adapters that were compressed together shares a pair of factors, its basis, which
lies in a layer's pools like an adapter. What is an adapter's own is a core: a matrix of the basis's
rank for each projection. The product is ``B S A x``; it needs no collective where that of the pair
needs none, because the core acts on what a rank has of the shrunk input.

Shapes: T tokens, J projections of the layer, Z rank room of the pools, K rank room of cores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bdlora_megatron.layers.geometry import LayerGeometry
from bdlora_megatron.ops import Columns, GroupedBatch, SlotFactors, SlotTable, shrink
from bdlora_megatron.ops.grouped import Implementation

__all__ = ["LayerCores"]


class LayerCores:
    """The cores of one tensor-parallel linear layer, each in a slot.

    | tensor | local shape |
    |---|---|
    | pool of a projection | ``[slots K, K]``, float32 or wider |

    Collectives: none.
    """

    def __init__(
        self, layer: Any, geometry: LayerGeometry, *, num_slots: int, max_rank: int
    ) -> None:
        """Make empty pools on the layer's device.

        Args:
            layer: The ``LoRALinear`` that they belong to.
            geometry: Its projections.
            num_slots: Cores of the layer.
            max_rank: The largest rank of a basis on one rank, K; at most Z.
        """
        # What stands between the halves is float32, too.
        dtype = torch.promote_types(layer.weight.dtype, torch.float32)
        where: dict[str, Any] = {"dtype": dtype, "device": layer.weight.device}
        self.max_rank = max_rank
        self.projections = tuple(projection.name for projection in geometry.projections)
        self._pools = [
            SlotFactors(
                A=torch.zeros(num_slots * max_rank, max_rank, **where),
                # Only the first half of the grouped product is used.
                B=(torch.zeros(0, 1, **where),),
                columns=(Columns(width=1),),
                table=SlotTable.empty(num_slots, 1, max_rank=max_rank, device=layer.weight.device),
            )
            for _ in self.projections
        ]

    @property
    def tables(self) -> list[SlotTable]:
        """What slots hold, for ``SlotTables`` to bring to the device."""
        return [pool.table for pool in self._pools]

    @property
    def num_bytes(self) -> int:
        """Bytes of the pools."""
        return sum(pool.A.numel() * pool.A.element_size() for pool in self._pools)

    def write(self, slot: int, cores: Sequence[Tensor | None]) -> None:
        """Copy an adapter's cores in and note that a slot holds them.

        Args:
            slot: The slot, which no batch in flight may use. ``tables`` must be uploaded before one
                does.
            cores: For each projection ``[k, k]``, or None where the adapter has none.
        """
        first = slot * self.max_rank
        for pool, core in zip(self._pools, cores, strict=True):
            rank = 0 if core is None else len(core)
            if core is not None:
                # Columns that a larger one left meet zeros: a token has nothing beyond its rank.
                pool.A[first : first + rank, :rank].copy_(core, non_blocking=True)
            pool.table.note(slot, a_rows=[(first, rank)], b_rows=[(0, 0)], scale=[1.0])

    def clear(self, slot: int) -> None:
        """Note that a slot holds nothing."""
        for pool in self._pools:
            pool.table.note_empty(slot)

    def apply(
        self, z: Tensor, batch: GroupedBatch, implementation: Implementation | None
    ) -> Tensor:
        """Multiply each token's shrunk input with its core.

        Args:
            z: What ``ops.shrink`` gave, ``[T, J, Z]``, zero beyond a token's rank.
            batch: Which core each token uses; one of slot -1 keeps its ``z``, bit by bit.
            implementation: Of the grouped product, instead of the device's own.

        Returns:
            ``[T, J, Z]``; where a token's adapter has no core for a projection, zero.
        """
        has = batch.token_slot >= 0
        out = z.masked_fill(has[:, None, None], 0.0)
        for j, pool in enumerate(self._pools):
            x = z[:, j, : self.max_rank]
            made = shrink(x.contiguous(), pool, batch, implementation=implementation)[:, 0]
            out[:, j, : self.max_rank] = torch.where(has[:, None], made, x)
        return out
