"""The memory behind a layer's slots: pools of factor rows, and what each slot holds in them.

Shapes: J projections of the layer, I and O one rank's input and output features, M pool rows, Z
rank room.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bdlora_megatron.layers.geometry import LayerGeometry
from bdlora_megatron.ops import Columns, SlotFactors, SlotTable

__all__ = [
    "LayerCapacity",
    "LayerShard",
    "Pools",
    "exchanged_columns",
    "exchanged_parts",
    "pool_bytes",
    "slot_columns",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerCapacity:
    """How much a layer holds.

    Attributes:
        num_slots: Slots N.
        rows: Rows M of each projection's pool of B; the pool of A has J times as many, or J / P
            times where each rank holds its shard of an adapter's ranks.
        max_rank: The most rows that one adapter takes in a projection, Z.
        dtype: The pools' type.
        own: Hold adapters that each rank multiplies alone.
        exchanged: Hold adapters in the S-LoRA layout.
    """

    num_slots: int
    rows: int
    max_rank: int
    dtype: torch.dtype
    own: bool = True
    exchanged: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerShard:
    """One rank's shard of one adapter in one layer, on the host, as the pools hold it.

    Attributes:
        A: The projections' rows one below the other, ``[sum of a_ranks, I_local]``.
        B: Per projection the transpose of local B, ``[b_rank, O_local]``.
        a_ranks: Rows of each projection in ``A``; 0 where the adapter leaves it out.
        b_ranks: Rows of each projection in ``B``.
        scales: s of each projection.
    """

    A: Tensor
    B: tuple[Tensor, ...]
    a_ranks: tuple[int, ...]
    b_ranks: tuple[int, ...]
    scales: tuple[float, ...]

    @property
    def rows(self) -> int:
        """The most rows that a projection takes."""
        return max(*self.a_ranks, *self.b_ranks)

    @property
    def num_bytes(self) -> int:
        """Bytes of the factors."""
        return sum(part.numel() * part.element_size() for part in (self.A, *self.B))

    def pin_memory(self) -> LayerShard:
        """The same in pinned memory, from which copies to a GPU do not wait."""
        return replace(self, A=self.A.pin_memory(), B=tuple(part.pin_memory() for part in self.B))


class Pools:
    """Pools of one kind, and what each slot holds in them.

    What slots hold is noted on the host; ``SlotTables.upload`` brings it to the device.

    With ``parts`` P, each of P ranks has a shard of an adapter's ranks, and all of B's rows are
    read against what the ranks gathered; ``in_order`` brings that into the order of the rows.
    """

    def __init__(
        self, layer: Any, columns: tuple[Columns, ...], capacity: LayerCapacity, *, parts: int = 1
    ) -> None:
        self.columns = columns
        self.in_features = in_features_of(layer)
        where = {"dtype": capacity.dtype, "device": layer.weight.device}
        a_rows = _a_rows(capacity.rows, len(columns), parts)
        A = torch.zeros(a_rows, self.in_features, **where)
        B = tuple(torch.zeros(capacity.rows, part.features, **where) for part in columns)
        table = SlotTable.empty(
            capacity.num_slots, len(columns), max_rank=capacity.max_rank, device=layer.weight.device
        )
        self.factors = SlotFactors(A=A, B=B, columns=columns, table=table)
        #: Rank room of one part.
        self.part_rank = -(-capacity.max_rank // parts)
        self._parts = parts
        # Where each rank of a slot stands in the gathered ones, ``[N, J, Z]``.
        shape = (capacity.num_slots, len(columns), capacity.max_rank) if parts > 1 else (0, 0, 0)
        self._order = torch.zeros(shape, dtype=torch.int64, device=layer.weight.device)

    def write(self, slot: int, first_row: int, shard: LayerShard) -> None:
        """Copy a shard in and note that a slot, which no batch in flight may use, holds it."""
        held = self.factors
        first_a = _a_rows(first_row, len(self.columns), self._parts)
        held.A[first_a : first_a + len(shard.A)].copy_(shard.A, non_blocking=True)
        for pool, rows in zip(held.B, shard.B, strict=True):
            pool[first_row : first_row + len(rows)].copy_(rows, non_blocking=True)
        a_rows = []
        for rank in shard.a_ranks:
            a_rows.append((first_a, rank))
            first_a += rank
        b_rows = [(first_row, rank) for rank in shard.b_ranks]
        held.table.note(slot, a_rows=a_rows, b_rows=b_rows, scale=shard.scales)
        if self._parts > 1:
            self._order[slot].copy_(self._places(shard.b_ranks))

    def _places(self, ranks: Sequence[int]) -> Tensor:
        places = torch.zeros(self._order.shape[1:], dtype=self._order.dtype)
        for j, rank in enumerate(ranks):
            own = torch.arange(rank)
            local = max(rank // self._parts, 1)
            places[j, :rank] = own // local * self.part_rank + own % local
        return places

    def in_order(self, parts: Sequence[Tensor], token_slot: Tensor) -> Tensor:
        """All ranks' shards of ``z``, each ``[T, J, Z / P]``, as ``[T, J, Z]`` in B's order."""
        gathered = torch.stack(tuple(parts), dim=2).flatten(2)
        return gathered.gather(2, self._order[token_slot.clamp(min=0)])

    def clear(self, slot: int) -> None:
        """Note that a slot holds nothing."""
        self.factors.table.note_empty(slot)


def _a_rows(rows: int, projections: int, parts: int) -> int:
    """Rows of A that belong to so many of B; adapters' ranks are multiples of ``parts``."""
    return rows // parts * projections


def pool_bytes(layer: Any, geometry: LayerGeometry, capacity: LayerCapacity) -> int:
    """Bytes of all of a layer's pools, on one rank.

    Args:
        layer: The ``LoRALinear``.
        geometry: Its projections.
        capacity: How much they hold.
    """
    kinds = [(slot_columns(layer, geometry), 1)] if capacity.own else []
    if capacity.exchanged:
        kinds.append((exchanged_columns(layer, geometry), exchanged_parts(layer)))
    elements = sum(
        _a_rows(capacity.rows, len(columns), parts) * in_features_of(layer)
        + capacity.rows * sum(part.features for part in columns)
        for columns, parts in kinds
    )
    return elements * capacity.dtype.itemsize


def exchanged_parts(layer: Any) -> int:
    """How many ranks hold a shard each of an adapter's ranks, in the S-LoRA layout."""
    return 1 if layer.splits_input else int(layer.tp_group.size())


def in_features_of(layer: Any) -> int:
    """Input features that one rank's product reads."""
    if not layer.splits_input:
        return int(layer.input_size)
    return int(layer.input_size) // int(layer.tp_group.size())


def slot_columns(layer: Any, geometry: LayerGeometry) -> tuple[Columns, ...]:
    """Where each projection's rows stand in one rank's output."""
    if layer.splits_input:
        return (Columns(width=layer.output_size),)
    size = layer.tp_group.size()
    groups = geometry.local_groups(size)
    widths = [p.out_features // size // groups for p in geometry.projections]
    return tuple(
        Columns(width=width, offset=sum(widths[:j]), groups=groups, stride=sum(widths))
        for j, width in enumerate(widths)
    )


def exchanged_columns(layer: Any, geometry: LayerGeometry) -> tuple[Columns, ...]:
    """The same in the S-LoRA layout, where a rank of a row layer adds its slice of the output."""
    if not layer.splits_input:
        return slot_columns(layer, geometry)
    width = layer.output_size // layer.tp_group.size()
    return (Columns(width=width, offset=layer.tp_group.rank() * width),)
