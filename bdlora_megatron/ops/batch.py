"""What a batch tells every layer: which slot each token uses, and which tokens share a slot.

It is built once per step. What a layer's slot table adds to it (which pool rows the tokens read) is
derived on first use and kept, for all layers whose slots hold the same rows.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from bdlora_megatron.errors import ShapeError

__all__ = ["GroupedBatch", "Segment", "Tiles"]

Plan = TypeVar("Plan")

#: Up to so many tokens, a batch is taken token by token unless told otherwise: a decode step.
DECODE_TOKENS = 256
#: Tokens of one tile: the least a tensor core takes, and more where segments are long.
SMALL_TILE, LARGE_TILE = 16, 64
LARGE_TILE_FROM = 2048


@dataclass(frozen=True, slots=True)
class Segment:
    """The tokens of one slot, on the host.

    Attributes:
        slot: The slot.
        tokens: A slice where the tokens stand together, else their indices.
        count: How many tokens.
    """

    slot: int
    tokens: slice | Tensor
    count: int

    def take(self, rows: Tensor) -> Tensor:
        """The segment's rows of a ``[T, ...]`` tensor; a view where they stand together."""
        return rows[self.tokens]

    def add(self, rows: Tensor, values: Tensor) -> None:
        """Add to the segment's rows of a ``[T, ...]`` tensor, in place."""
        if isinstance(self.tokens, slice):
            rows[self.tokens].add_(values)
        else:
            rows[self.tokens] = rows[self.tokens] + values


@dataclass(frozen=True, slots=True)
class Tiles:
    """The tokens sorted by slot and cut into tiles of one slot each; static shapes, on the device.

    Attributes:
        order: Tokens sorted by slot, int32 ``[T]``.
        spans: Per tile (slot, first, end) into ``order``, int32 ``[tiles, 3]``; slot -1 where a
            tile is unused. There are as many as any batch of T tokens could need.
        size: Tokens of a tile at most.
    """

    order: Tensor
    spans: Tensor
    size: int


class GroupedBatch:
    """Which slot each token of a step uses.

    Attributes:
        token_slot: Slot of each token, int32 ``[T]``; -1 uses none.
        num_slots: Slots N of the tables that the batch is used with.
        by: ``token`` reads a token's factors for that token alone, ``segment`` once per tile of
            tokens that share them. The CPU path decides for each adapter by itself.
    """

    def __init__(
        self,
        token_slot: Tensor,
        *,
        num_slots: int,
        by: Literal["token", "segment"] | None = None,
    ) -> None:
        """Describe a batch.

        Args:
            token_slot: Integers ``[T]`` on the device of the layers. Checked on a CPU; on another
                device a slot out of range is the caller's bug, as checking would wait for it.
            num_slots: Slots N.
            by: How the Triton path walks the tokens; by T when None.

        Raises:
            ShapeError: ``token_slot`` is not a vector of integers from -1 to N - 1.
        """
        self.token_slot = _checked(token_slot, num_slots)
        self.num_slots = num_slots
        self.by = by or ("token" if len(token_slot) <= DECODE_TOKENS else "segment")
        self._segments: tuple[Segment, ...] | None = None
        self._plans: dict[Hashable, Any] = {}
        self._tiles: Tiles | None = None
        if self.by == "segment" and token_slot.device.type != "cpu":
            self._tiles = self._make_tiles()

    @property
    def num_tokens(self) -> int:
        """Tokens T."""
        return len(self.token_slot)

    @property
    def tiles(self) -> Tiles:
        """The sorted tokens in tiles; made at once on an accelerator, on first use on a CPU."""
        if self._tiles is None:
            self._tiles = self._make_tiles()
        return self._tiles

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The tokens of each slot that is used, by slot; waits for the device on first use."""
        if self._segments is None:
            self._segments = _segments(self.token_slot)
        return self._segments

    def refill(self, token_slot: Tensor) -> None:
        """Describe the next step in the same memory, for a captured CUDA graph to read.

        Args:
            token_slot: As many tokens as before.

        Raises:
            ShapeError: Another number of tokens, or a slot out of range.
        """
        if token_slot.shape != self.token_slot.shape:
            raise ShapeError(
                f"refill with {list(token_slot.shape)} tokens, wanted "
                f"{list(self.token_slot.shape)}; pad with slot -1, or make another batch"
            )
        self.token_slot.copy_(_checked(token_slot, self.num_slots))
        self._segments = None
        self._plans.clear()
        if self._tiles is not None:
            new = self._make_tiles()
            self._tiles.order.copy_(new.order)
            self._tiles.spans.copy_(new.spans)

    def plan(self, key: Hashable, make: Callable[[], Plan]) -> Plan:
        """What ``make`` gave the first time this batch was asked for ``key``.

        Args:
            key: All that the plan follows from, beside the batch.
            make: Makes the plan.

        Returns:
            The plan.
        """
        known: Plan | None = self._plans.get(key)
        if known is None:
            known = self._plans[key] = make()
        return known

    def _make_tiles(self) -> Tiles:
        """Sort and cut with device operations of static shape alone, so that no one waits."""
        T, N, device = self.num_tokens, self.num_slots, self.token_slot.device
        size = LARGE_TILE if T >= LARGE_TILE_FROM else SMALL_TILE
        in_order, order = torch.sort(self.token_slot, stable=True)
        slots = torch.arange(N + 1, dtype=torch.int32, device=device)
        bounds = torch.searchsorted(in_order, slots)
        tiles_of_slot = (bounds.diff() + size - 1) // size
        tile_ends = tiles_of_slot.cumsum(0)
        tile = torch.arange(T // size + min(T, N), device=device)
        slot = torch.searchsorted(tile_ends, tile, right=True).clamp(max=N - 1)
        first = bounds[slot] + (tile - (tile_ends - tiles_of_slot)[slot]) * size
        end = torch.minimum(first + size, bounds[slot + 1])
        used = tile < tile_ends[-1]
        spans = torch.stack([torch.where(used, slot, -1), first, end], dim=1)
        return Tiles(order.to(torch.int32), spans.to(torch.int32), size)


def _checked(token_slot: Tensor, num_slots: int) -> Tensor:
    """``token_slot`` as int32, with its range checked where that costs no wait.

    Raises:
        ShapeError: It is not a vector of integers from -1 to N - 1.
    """
    if token_slot.ndim != 1 or token_slot.is_floating_point() or token_slot.dtype == torch.bool:
        raise ShapeError(
            f"token_slot is {token_slot.dtype} {list(token_slot.shape)}, wanted integers [T]"
        )
    if num_slots < 1:
        raise ShapeError(f"num_slots={num_slots}; a table has at least one slot")
    if token_slot.device.type == "cpu" and len(token_slot):
        low, high = (int(bound) for bound in token_slot.aminmax())
        if low < -1 or high >= num_slots:
            raise ShapeError(
                f"token_slot holds {low} to {high}, wanted -1 (no adapter) to {num_slots - 1}"
            )
    return token_slot.to(torch.int32, copy=True)


def _segments(token_slot: Tensor) -> tuple[Segment, ...]:
    in_order, order = torch.sort(token_slot, stable=True)
    slots, counts = torch.unique_consecutive(in_order, return_counts=True)
    tokens, segments, start = order.tolist(), [], 0
    for slot, count in zip(slots.tolist(), counts.tolist(), strict=True):
        first, last = tokens[start], tokens[start + count - 1]
        # The sort is stable, so a slot's tokens ascend.
        together = last - first + 1 == count
        where = slice(first, last + 1) if together else order[start : start + count]
        if slot >= 0:
            segments.append(Segment(slot, where, count))
        start += count
    return tuple(segments)
