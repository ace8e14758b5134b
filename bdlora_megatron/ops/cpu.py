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
from bdlora_megatron.ops.table import Held, SlotFactors, SlotTable

__all__ = ["expand", "shrink"]

#: An adapter's tokens are taken one by one as long as that reads no more rows than these again: a
#: matrix product of its own would be mostly overhead. Measured, and flat around here.
ROWS_READ_AGAIN = 64

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
    """Rows of one pool to read as a matrix, for the tokens of one adapter.

    Attributes:
        rows: The tokens' rows, where the products' tokens are gathered first, else the tokens.
        start: First pool row.
        parts: Per slice (slice, rank): the rows of several slices where they lie together.
        scale: s.
    """

    rows: slice
    start: int
    parts: tuple[tuple[int, int], ...]
    scale: float = 1.0

    @property
    def stop(self) -> int:
        """One past the last pool row."""
        return self.start + sum(rank for _, rank in self.parts)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What a batch reads through one slot table.

    Attributes:
        shrink_bags: The entries of ``shrink``; None where there are none.
        expand_bags: Those of ``expand``, per slice.
        order: The products' tokens, adapter after adapter, where they do not stand so already.
        shrink_products: The products of ``shrink``.
        expand_products: Those of ``expand``, per slice.
    """

    shrink_bags: _Bags | None
    expand_bags: tuple[_Bags | None, ...]
    order: Tensor | None
    shrink_products: tuple[_Product, ...]
    expand_products: tuple[tuple[_Product, ...], ...]


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
    if plan.shrink_bags is not None:
        bags = plan.shrink_bags
        dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            x, slots.A, bags.rows, bags.offsets, bags.entry_token, _SUM
        )
        z.view(-1)[bags.z_index] = dots.to(z.dtype)
    if not plan.shrink_products:
        return
    # One gather and one scatter for all products, not one for each.
    source = x if plan.order is None else x.index_select(0, plan.order)
    target = z if plan.order is None else z.index_select(0, plan.order)
    for product in plan.shrink_products:
        _shrink_product(source, slots.A, product, target)
    if plan.order is not None:
        z.index_copy_(0, plan.order, target)


def _shrink_product(x: Tensor, pool: Tensor, product: _Product, z: Tensor) -> None:
    A = pool[product.start : product.stop]
    if len(product.parts) == 1 and z.dtype == A.dtype:
        ((j, rank),) = product.parts
        torch.mm(x[product.rows], A.t(), out=z[product.rows, j, :rank])
        return
    ranks, first = torch.mm(x[product.rows], A.t()), 0
    for j, rank in product.parts:
        z[product.rows, j, :rank] = ranks[:, first : first + rank]
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
    ranks = z if plan.order is None else z.index_select(0, plan.order)
    for j, products in enumerate(plan.expand_products):
        if not products:
            continue
        if plan.order is None:
            for product in products:
                _add_product(views[j], ranks[:, j], slots.B[j], product)
            continue
        delta = slots.B[j].new_empty(len(plan.order), slots.B[j].shape[1])
        if sum(p.rows.stop - p.rows.start for p in products) < len(plan.order):
            # Where an adapter leaves the slice out, its tokens add nothing.
            delta.zero_()
        for product in products:
            _product(ranks[:, j], slots.B[j], product, delta[product.rows], beta=0)
        shaped = delta.unflatten(1, (views[j].shape[1], -1)).to(out.dtype)
        views[j].index_add_(0, plan.order, shaped)


def _product(z: Tensor, pool: Tensor, product: _Product, out: Tensor, *, beta: int) -> None:
    """``out = beta * out + scale * z B``."""
    B = pool[product.start : product.stop]
    out.addmm_(z[product.rows, : len(B)].to(B.dtype), B, beta=beta, alpha=product.scale)


def _add_product(view: Tensor, z: Tensor, pool: Tensor, product: _Product) -> None:
    """Add a product to tokens that stand together, inside it where their columns do too."""
    part = view[product.rows]
    if part.shape[1] == 1 and part.dtype == pool.dtype:
        _product(z, pool, product, part[:, 0], beta=1)
        return
    delta = pool.new_empty(len(part), pool.shape[1])
    _product(z, pool, product, delta, beta=0)
    part.add_(delta.view(part.shape))


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


def _plan(table: SlotTable, batch: GroupedBatch) -> _Plan:
    held = (table.held[segment.slot] for segment in batch.segments)
    return batch.plan((table.num_slices, table.max_rank, *held), lambda: _make_plan(table, batch))


def _make_plan(table: SlotTable, batch: GroupedBatch) -> _Plan:
    few: list[int] = []
    many: list[Segment] = []
    for segment in batch.segments:
        reads_again = (segment.count - 1) * max(table.held[segment.slot].a_rank)
        if reads_again <= ROWS_READ_AGAIN:
            few.append(segment.slot)
        else:
            many.append(segment)
    tokens = torch.isin(batch.token_slot, torch.tensor(few, dtype=torch.int32)).nonzero()[:, 0]
    every = range(table.num_slices)
    order, rows = _gathered(many)
    return _Plan(
        shrink_bags=_bags(
            table, batch, tokens, slices=list(every), start=table.a_start, rank=table.a_rank
        ),
        expand_bags=tuple(
            _bags(table, batch, tokens, slices=[j], start=table.b_start, rank=table.b_rank)
            for j in every
        ),
        order=order,
        shrink_products=tuple(
            product
            for segment, where in zip(many, rows, strict=True)
            for product in _shrink_products(table.held[segment.slot], where)
        ),
        expand_products=tuple(
            tuple(
                _Product(where, held.b_start[j], ((j, held.b_rank[j]),), held.scale[j])
                for segment, where in zip(many, rows, strict=True)
                if (held := table.held[segment.slot]).b_rank[j]
            )
            for j in every
        ),
    )


def _gathered(segments: list[Segment]) -> tuple[Tensor | None, list[slice]]:
    """In which order to gather tokens so that each segment is a slice, and the slices."""
    slices = [segment.tokens for segment in segments if isinstance(segment.tokens, slice)]
    if len(slices) == len(segments):
        return None, slices
    pieces, rows, first = [], [], 0
    for segment in segments:
        where = segment.tokens
        pieces.append(torch.arange(where.start, where.stop) if isinstance(where, slice) else where)
        rows.append(slice(first, first + segment.count))
        first += segment.count
    return torch.cat(pieces), rows


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
    if not len(tokens):
        return None
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


def _shrink_products(held: Held, rows: slice) -> list[_Product]:
    """One product per run of slices whose rows lie one after another."""
    products: list[_Product] = []
    for j, (start, rank) in enumerate(zip(held.a_start, held.a_rank, strict=True)):
        if not rank:
            continue
        if products and products[-1].stop == start:
            last = products.pop()
            products.append(_Product(rows, last.start, (*last.parts, (j, rank))))
        else:
            products.append(_Product(rows, start, ((j, rank),)))
    return products
