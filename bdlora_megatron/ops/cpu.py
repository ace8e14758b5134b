"""The grouped product on a CPU.

Tokens that share an adapter with more than a few others go through one matrix product per adapter.
The rest, which is all of a decode step with many adapters, would spend its time calling small
products: all their tokens go through one call instead, each reading its rows in the pools once,
where they lie, without a gathered copy. For ``expand`` that call is ``embedding_bag``: a weighted
sum of pool rows. For ``shrink`` it is the derivative of ``embedding_bag`` with respect to those
weights: dot products of chosen pool rows with a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bdlora_megatron.ops.batch import GroupedBatch, Segment
from bdlora_megatron.ops.slots import SlotFactors, SlotTable

__all__ = ["expand", "shrink"]

#: An adapter's tokens are taken one by one as long as that reads no more rows than these again: a
#: matrix product of its own would be mostly overhead. Measured, and flat around here.
ROWS_READ_AGAIN = 256

_SUM = 0  # embedding_bag's mode


@dataclass(frozen=True, slots=True)
class _Bags:
    """Pool rows to read one by one: entry i pairs row ``rows[i]`` with rank ``z_index[i]``.

    Attributes:
        tokens: The tokens that read anything, in order; None stands for all tokens.
        entry_token: The token of each entry.
        rows: Pool row of each entry.
        z_index: Place of each entry in the flattened ``[T, J, Z]``.
        offsets: First entry of each of ``tokens``, and the number of entries.
        scale: s of each entry.
    """

    tokens: Tensor | None
    entry_token: Tensor
    rows: Tensor
    z_index: Tensor
    offsets: Tensor
    scale: Tensor


@dataclass(frozen=True, slots=True)
class _Product:
    """Rows of one pool to read as a matrix, for one segment.

    Attributes:
        segment: The tokens.
        start: First pool row.
        parts: Per slice (slice, rank): the rows of several slices where they lie together.
        scale: s.
    """

    segment: Segment
    start: int
    parts: tuple[tuple[int, int], ...]
    scale: float = 1.0

    @property
    def stop(self) -> int:
        """One past the last pool row."""
        return self.start + sum(rank for _, rank in self.parts)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What a batch reads through one slot table."""

    shrink_bags: tuple[_Bags, ...]
    shrink_products: tuple[_Product, ...]
    expand_bags: tuple[_Bags | None, ...]
    expand_products: tuple[_Product, ...]


def shrink(x: Tensor, slots: SlotFactors, batch: GroupedBatch, z: Tensor) -> None:
    """Map tokens to their adapters' ranks.

    Args:
        x: Inputs ``[T, I]``.
        slots: The layer's factors.
        batch: Which slot each token uses.
        z: Written to, ``[T, J, Z]``; what lies beyond a token's rank is left as it is.
    """
    plan = _plan(slots.table, batch)
    x = x.to(slots.A.dtype)
    for bags in plan.shrink_bags:
        dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            x, slots.A, bags.rows, bags.offsets, bags.entry_token, _SUM
        )
        z.view(-1)[bags.z_index] = dots.to(z.dtype)
    for product in plan.shrink_products:
        A = slots.A[product.start : product.stop]
        ranks = torch.mm(product.segment.take(x), A.t())
        first = 0
        for j, rank in product.parts:
            z[product.segment.tokens, j, :rank] = ranks[:, first : first + rank].to(z.dtype)
            first += rank


def expand(out: Tensor, z: Tensor, slots: SlotFactors, batch: GroupedBatch) -> None:
    """Map ranks to outputs and add them in place.

    Args:
        out: Outputs ``[T, O]``.
        z: What ``shrink`` gave.
        slots: The layer's factors.
        batch: Which slot each token uses.
    """
    plan = _plan(slots.table, batch)
    views = [columns.view(out) for columns in slots.columns]
    for view, pool, bags in zip(views, slots.B, plan.expand_bags, strict=True):
        if bags is not None:
            _expand_bags(view, z, pool, bags)
    for product in plan.expand_products:
        ((j, rank),) = product.parts
        B = slots.B[j][product.start : product.stop]
        ranks = product.segment.take(z)[:, j, :rank].mul(product.scale).to(B.dtype)
        _add_product(views[j], product.segment, ranks, B)


def _expand_bags(view: Tensor, z: Tensor, pool: Tensor, bags: _Bags) -> None:
    weights = z.view(-1)[bags.z_index].mul_(bags.scale).to(pool.dtype)
    delta = F.embedding_bag(
        bags.rows,
        pool,
        bags.offsets,
        mode="sum",
        per_sample_weights=weights,
        include_last_offset=True,
    ).view(-1, *view.shape[1:])
    if bags.tokens is None:
        view.add_(delta)
    else:
        view[bags.tokens] = (view[bags.tokens] + delta).to(view.dtype)


def _add_product(view: Tensor, segment: Segment, ranks: Tensor, B: Tensor) -> None:
    """``view[tokens] += ranks B``, inside the product where the columns lie together."""
    groups = view.shape[1]
    in_place = isinstance(segment.tokens, slice) and groups == 1 and view.dtype == B.dtype
    if in_place:
        view[segment.tokens, 0].addmm_(ranks, B)
    else:
        delta = torch.mm(ranks, B).unflatten(1, (groups, -1))
        segment.add(view, delta.to(view.dtype))


def _plan(table: SlotTable, batch: GroupedBatch) -> _Plan:
    held = (table.held[segment.slot] for segment in batch.segments)
    return batch.plan((table.num_slices, table.max_rank, *held), lambda: _make_plan(table, batch))


def _make_plan(table: SlotTable, batch: GroupedBatch) -> _Plan:
    few: list[Segment] = []
    many: list[Segment] = []
    for segment in batch.segments:
        reads_again = (segment.count - 1) * max(table.held[segment.slot].a_rank)
        (few if reads_again <= ROWS_READ_AGAIN else many).append(segment)
    tokens = _tokens_of(few, batch)
    bags = [
        _bags(table, batch, tokens, slices=[j], start=table.b_start, rank=table.b_rank)
        for j in range(table.num_slices)
    ]
    every = list(range(table.num_slices))
    shrink_bags = _bags(table, batch, tokens, slices=every, start=table.a_start, rank=table.a_rank)
    return _Plan(
        shrink_bags=() if shrink_bags is None else (shrink_bags,),
        shrink_products=tuple(
            product for segment in many for product in _shrink_products(table, segment)
        ),
        expand_bags=tuple(bags),
        expand_products=tuple(
            product for segment in many for product in _expand_products(table, segment)
        ),
    )


def _tokens_of(segments: list[Segment], batch: GroupedBatch) -> Tensor:
    """The segments' tokens, ascending."""
    every = torch.arange(batch.num_tokens)
    pieces = [segment.take(every) for segment in segments]
    return torch.cat(pieces).sort().values if pieces else every[:0]


def _bags(
    table: SlotTable,
    batch: GroupedBatch,
    tokens: Tensor,
    *,
    slices: list[int],
    start: Tensor,
    rank: Tensor,
) -> _Bags | None:
    """The rows that ``tokens`` read for some slices; None where they read none."""
    slot = batch.token_slot[tokens].long()
    counts = rank[slot][:, slices]
    reads = counts.sum(1) > 0
    tokens, slot, counts = tokens[reads], slot[reads], counts[reads].flatten().long()
    if not len(tokens):
        return None
    pair = torch.arange(len(counts)).repeat_interleave(counts)
    ends = counts.cumsum(0)
    within = torch.arange(len(pair)) - (ends - counts)[pair]
    token_of_pair = tokens.repeat_interleave(len(slices))
    slice_of_pair = torch.tensor(slices).repeat(len(tokens))
    z_start = (token_of_pair * table.num_slices + slice_of_pair) * table.max_rank
    ends_of_token = ends.view(-1, len(slices))[:, -1]
    return _Bags(
        tokens=None if len(tokens) == batch.num_tokens else tokens,
        entry_token=token_of_pair[pair],
        rows=start[slot][:, slices].flatten().long()[pair] + within,
        z_index=z_start[pair] + within,
        offsets=torch.cat([ends_of_token.new_zeros(1), ends_of_token]),
        scale=table.scale[slot][:, slices].flatten()[pair],
    )


def _shrink_products(table: SlotTable, segment: Segment) -> list[_Product]:
    """One product per run of slices whose rows lie one after another."""
    products: list[_Product] = []
    held = table.held[segment.slot]
    for j, (start, rank) in enumerate(zip(held.a_start, held.a_rank, strict=True)):
        if not rank:
            continue
        if products and products[-1].stop == start:
            last = products.pop()
            products.append(_Product(segment, last.start, (*last.parts, (j, rank))))
        else:
            products.append(_Product(segment, start, ((j, rank),)))
    return products


def _expand_products(table: SlotTable, segment: Segment) -> list[_Product]:
    held = table.held[segment.slot]
    parts = zip(held.b_start, held.b_rank, held.scale, strict=True)
    return [
        _Product(segment, start, ((j, rank),), scale)
        for j, (start, rank, scale) in enumerate(parts)
        if rank
    ]
