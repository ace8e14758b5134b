"""Where adapters lie: flat pools of factor rows, and the table that says which rows a slot holds.

A slot holds one adapter of a layer, or none. The factors of all slots lie in pools without padding:
one row of a pool is one rank component, so that an adapter of rank 8 takes 8 rows and one of rank
256 takes 256. The pools and the table never move, so a captured CUDA graph keeps reading them.

Shapes: T tokens, N slots, J slices of a layer (q, k, v; gate, up; or one), I input features,
O_j output features of slice j, Z rank room per slice. All of them are one rank's local sizes:
nothing here knows of process groups.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from bdlora_megatron.errors import ShapeError

__all__ = ["Columns", "Held", "SlotFactors", "SlotTable", "SlotTables"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """Where a slice's output features stand among the columns of a fused layer's output.

    Feature ``g * width + w`` stands in column ``offset + g * stride + w``: query groups interleave
    q, k and v that way; gate and up are one group each.

    Attributes:
        width: Features of one group.
        offset: Column of the first feature.
        groups: Number of groups.
        stride: Columns from one group to the next; unused with one group.
    """

    width: int
    offset: int = 0
    groups: int = 1
    stride: int = 0

    def __post_init__(self) -> None:
        if min(self.width, self.groups) < 1 or self.offset < 0:
            raise ShapeError(f"{self}: width and groups must be positive, offset not negative")
        if self.groups > 1 and self.stride < self.width:
            raise ShapeError(f"{self}: groups overlap; stride must be at least {self.width}")

    @property
    def features(self) -> int:
        """Output features O_j of the slice."""
        return self.groups * self.width

    @property
    def end(self) -> int:
        """One past the last column."""
        return self.offset + (self.groups - 1) * self.stride + self.width

    def view(self, out: Tensor) -> Tensor:
        """The slice's columns of ``out`` ``[T, O]``, as a view ``[T, groups, width]``."""
        columns = out.narrow(1, self.offset, self.end - self.offset)
        return columns.unfold(1, self.width, self.stride if self.groups > 1 else self.width)


@dataclass(frozen=True, eq=False, slots=True)
class Held:
    """What one slot holds, on the host: an entry per slice in each tuple.

    Equal contents are one object (see ``_held``), so that comparing and hashing are by identity.
    """

    a_start: tuple[int, ...]
    b_start: tuple[int, ...]
    a_rank: tuple[int, ...]
    b_rank: tuple[int, ...]
    scale: tuple[float, ...]


@lru_cache(maxsize=1 << 16)  # an entry that falls out costs a plan, not a wrong answer
def _held(*columns: tuple[Any, ...]) -> Held:
    return Held(*columns)


_INTEGERS = ("a_start", "b_start", "a_rank", "b_rank")
_TENSORS = (*_INTEGERS, "scale")


@dataclass(frozen=True, kw_only=True, slots=True)
class SlotTable:
    """Which pool rows hold each slot's factors, and each slot's scale; all ``[N, J]``.

    The tensors are what kernels read; the host reads ``held`` and never waits for them. Layers
    whose slots hold the same rows share what a batch derives from them. ``SlotTables`` keeps the
    tensors of many layers in one piece of memory.

    A and B have rows of their own because the pools do, and ranks of their own because the S-LoRA
    layout holds a share of A's rows and all of B's; BD-LoRA holds equally many of both.

    An adapter whose slices lie one after another in the pool of A is shrunk in one product.

    Attributes:
        a_start: First row in the pool of A, int32.
        b_start: First row in the slice's pool of B, int32.
        a_rank: Rows in the pool of A, int32; 0 where the slot has nothing for the slice.
        b_rank: Rows in the slice's pool of B, int32.
        scale: s in ``s * B A``, float32.
        max_rank: Rank room Z of one slice; static, so that ``z`` has a static shape.
        held: What each slot holds, on the host.
    """

    a_start: Tensor
    b_start: Tensor
    a_rank: Tensor
    b_rank: Tensor
    scale: Tensor
    max_rank: int
    held: list[Held] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        columns = [getattr(self, name) for name in _TENSORS]
        if len({(column.shape, column.stride()) for column in columns}) != 1:
            raise ShapeError("the tensors of a table differ in their shapes or strides")
        rows = zip(*(column.tolist() for column in columns), strict=True)
        object.__setattr__(self, "held", [_held(*map(tuple, row)) for row in rows])

    @classmethod
    def empty(
        cls, num_slots: int, num_slices: int, *, max_rank: int, device: torch.device | str = "cpu"
    ) -> SlotTable:
        """A table of slots that hold nothing.

        Args:
            num_slots: Slots N.
            num_slices: Slices J of the layer.
            max_rank: The largest rank that ``note`` will take.
            device: Where the pools are.

        Returns:
            The table.
        """
        starts, ranks = (
            [torch.zeros(num_slots, num_slices, dtype=torch.int32, device=device) for _ in "ab"]
            for _ in ("start", "rank")
        )
        scale = torch.zeros(num_slots, num_slices, device=device)
        return cls(
            a_start=starts[0],
            b_start=starts[1],
            a_rank=ranks[0],
            b_rank=ranks[1],
            scale=scale,
            max_rank=max_rank,
        )

    @property
    def num_slots(self) -> int:
        """Slots N."""
        return self.scale.shape[0]

    @property
    def num_slices(self) -> int:
        """Slices J."""
        return self.scale.shape[1]

    @property
    def row(self) -> int:
        """Entries from one slot to the next, in each of the tensors."""
        return self.scale.stride(0)

    def note(
        self,
        slot: int,
        *,
        a_rows: Sequence[tuple[int, int]],
        b_rows: Sequence[tuple[int, int]],
        scale: Sequence[float],
    ) -> None:
        """Say what one slot holds, on the host; kernels read it after an ``upload``.

        Args:
            slot: The slot; no batch in flight may use it.
            a_rows: Per slice (start, rank) in the pool of A.
            b_rows: Per slice (start, rank) in the slice's pool of B.
            scale: Per slice.

        Raises:
            ShapeError: A slice is missing, or a rank is larger than ``max_rank``.
        """
        counts = {len(a_rows), len(b_rows), len(scale)}
        if counts != {self.num_slices}:
            raise ShapeError(f"got {sorted(counts)} slices, wanted {self.num_slices} of each")
        largest = max(rank for _, rank in (*a_rows, *b_rows))
        if largest > self.max_rank:
            raise ShapeError(
                f"rank {largest} in a table with max_rank={self.max_rank}; make the table with "
                f"max_rank={largest} or more"
            )
        a_start, a_rank = zip(*a_rows, strict=True)
        b_start, b_rank = zip(*b_rows, strict=True)
        # As the kernels will read it, in float32.
        rounded = tuple(array("f", scale))
        self.held[slot] = _held(a_start, b_start, a_rank, b_rank, rounded)

    def note_empty(self, slot: int) -> None:
        """Say that a slot holds nothing, on the host; kernels read it after an ``upload``."""
        nothing = (0,) * self.num_slices
        self.held[slot] = _held(*[nothing] * len(_INTEGERS), (0.0,) * self.num_slices)

    def upload(self, slot: int) -> None:
        """Copy to the device what was noted of a slot; ``SlotTables`` does it for many tables.

        Args:
            slot: The slot; no batch in flight may use it.
        """
        for name in _TENSORS:
            column: Tensor = getattr(self, name)
            row = getattr(self.held[slot], name)
            column[slot].copy_(torch.tensor(row, dtype=column.dtype))


class SlotTables:
    """The tables of a model's layers in one piece of memory: one copy writes a slot of all.

    A model of 32 layers has 128 tables of five tensors each, and an adapter that moves in changes a
    row of every one of them. Copied one by one, that takes longer than the adapter's factors.

    Memory: int32 ``[N, 5 S]`` with S slices of all tables together; the last S are the bits of
    ``scale``.
    """

    def __init__(self, tables: Sequence[SlotTable]) -> None:
        """Move tables together; their tensors become views of the one memory.

        Args:
            tables: Of equally many slots on one device; no graph has captured them.
        """
        self._tables = tuple(tables)
        self._memory = torch.cat(
            [getattr(table, name).view(torch.int32) for name in _TENSORS for table in self._tables],
            dim=1,
        )
        first = 0
        for name in _TENSORS:
            for table in self._tables:
                view = self._memory[:, first : first + table.num_slices]
                first += table.num_slices
                # Frozen against everyone else.
                object.__setattr__(table, name, view.view(getattr(table, name).dtype))

    def upload(self, slot: int) -> None:
        """Copy to the device what the tables have noted of a slot.

        Args:
            slot: The slot; no batch in flight may use it.
        """
        held = [table.held[slot] for table in self._tables]
        integers = [n for name in _INTEGERS for one in held for n in getattr(one, name)]
        scales = [scale for one in held for scale in one.scale]
        row = [
            torch.tensor(integers, dtype=torch.int32),
            torch.tensor(scales, dtype=torch.float32).view(torch.int32),
        ]
        self._memory[slot].copy_(torch.cat(row))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SlotFactors:
    """The factors of all slots of one layer.

    Attributes:
        A: Pool ``[rows, I]``, shared by the slices.
        B: Per slice a pool ``[rows_j, O_j]``: the transpose of a LoRA B, so that a rank's row is
            contiguous.
        columns: Per slice, where its features stand in the layer's output.
        table: Which rows each slot holds.
    """

    A: Tensor
    B: tuple[Tensor, ...]
    columns: tuple[Columns, ...]
    table: SlotTable

    def __post_init__(self) -> None:
        counts = {len(self.B), len(self.columns), self.table.num_slices}
        if len(counts) != 1:
            raise ShapeError(f"B, columns and table disagree on the slices: {sorted(counts)}")
        for j, (pool, columns) in enumerate(zip(self.B, self.columns, strict=True)):
            if pool.ndim != 2 or pool.shape[1] != columns.features:
                raise ShapeError(
                    f"B pool {j} has shape {list(pool.shape)}, wanted [rows, {columns.features}]"
                )
        pools = (self.A, *self.B)
        if len({(pool.dtype, pool.device) for pool in pools}) != 1:
            raise ShapeError("the pools of A and B must have one dtype and be on one device")
        if not all(pool.is_contiguous() for pool in pools):
            raise ShapeError("the pools of A and B must be contiguous")

    @property
    def in_features(self) -> int:
        """Input features I."""
        return self.A.shape[1]

    def a(self, slot: int, slice_index: int) -> Tensor:
        """A of one slot and slice, a view ``[rank, I]``."""
        held = self.table.held[slot]
        return self.A.narrow(0, held.a_start[slice_index], held.a_rank[slice_index])

    def b(self, slot: int, slice_index: int) -> Tensor:
        """B of one slot and slice, a view ``[rank, O_j]``."""
        held = self.table.held[slot]
        pool = self.B[slice_index]
        return pool.narrow(0, held.b_start[slice_index], held.b_rank[slice_index])
