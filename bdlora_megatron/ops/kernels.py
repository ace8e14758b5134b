"""The Triton kernels of the grouped product, for A100 and newer.

Two ways to walk the tokens. By token: a program holds one token and reads its factors' rows as
vectors, for decode, where a token seldom shares an adapter. By tile: a program holds up to TILE
tokens of one slot and multiplies on the tensor cores, for prefill. Grids depend on sizes alone;
what a batch leaves unused exits at once, so a captured graph serves every batch of its size.

Sums are kept in float32. ``z`` is ``[SPLITS, T, J, Z]``: programs that share the input features of
a token each write their own share, and whoever reads adds them up in order, so that results do not
depend on which program came first.

Where a slot's rows lie is read from the tensors of ``SlotTable``, ``table_row`` entries from one
slot to the next: those of all layers may stand in one piece of memory.

``DOT`` is the type that tensor cores are given: the factors' own, except under Triton's
interpreter.

Letters: T tokens, N slots, J slices, I input features, Z rank room, R ranks of a block, K input
features of a block, O output columns of a block.
"""

# A kernel's arguments are its interface to the launcher beside it, and not every supported Triton
# takes a tuple of pointers. Their types are Triton's own, which mypy knows nothing of.
# ruff: noqa: PLR0913, ANN001, ANN201
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["expand_by_tile", "expand_by_token", "shrink_by_tile", "shrink_by_token"]


@triton.jit
def shrink_by_token(
    x,
    x_stride,
    A,
    token_slot,
    a_start,
    a_rank,
    table_row,
    z,
    T,
    I,
    J: tl.constexpr,
    Z: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``z[:, t, j, block] = A[rows] x[t]`` on the grid (T, J * rank blocks, SPLITS)."""
    t = tl.program_id(0).to(tl.int64)
    rank_blocks: tl.constexpr = (Z + BLOCK_R - 1) // BLOCK_R
    j = tl.program_id(1) // rank_blocks
    r = tl.program_id(1) % rank_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(2)
    slot = tl.load(token_slot + t)
    if slot >= 0:
        rank = tl.load(a_rank + slot * table_row + j)
        if tl.program_id(1) % rank_blocks * BLOCK_R < rank:
            row = (tl.load(a_start + slot * table_row + j) + r).to(tl.int64)
            # Summed over features once, at the end: each such sum makes the warps wait.
            products = tl.zeros([BLOCK_R, BLOCK_K], dtype=tl.float32)
            for first in range(split * BLOCK_K, I, SPLITS * BLOCK_K):
                k = first + tl.arange(0, BLOCK_K)
                a = tl.load(
                    A + row[:, None] * I + k[None, :],
                    mask=(r < rank)[:, None] & (k < I)[None, :],
                    other=0.0,
                )
                values = tl.load(x + t * x_stride + k, mask=k < I, other=0.0).to(a.dtype)
                products += a.to(tl.float32) * values.to(tl.float32)[None, :]
            place = z + ((split * T + t) * J + j) * Z + r
            tl.store(place, tl.sum(products, axis=1), mask=r < rank)


@triton.jit
def shrink_by_tile(
    x,
    x_stride,
    A,
    order,
    spans,
    a_start,
    a_rank,
    table_row,
    z,
    T,
    I,
    J: tl.constexpr,
    Z: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    DOT: tl.constexpr,
):
    """``z[:, tile, j, block] = x[tile] A[rows]^T`` on the grid (tiles, J * rank blocks, SPLITS)."""
    tile = tl.program_id(0)
    rank_blocks: tl.constexpr = (Z + BLOCK_R - 1) // BLOCK_R
    j = tl.program_id(1) // rank_blocks
    r = tl.program_id(1) % rank_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(2).to(tl.int64)
    slot = tl.load(spans + tile * 3)
    if slot >= 0:
        rank = tl.load(a_rank + slot * table_row + j)
        if tl.program_id(1) % rank_blocks * BLOCK_R < rank:
            position = tl.load(spans + tile * 3 + 1) + tl.arange(0, TILE)
            here = position < tl.load(spans + tile * 3 + 2)
            t = tl.load(order + position, mask=here, other=0).to(tl.int64)
            row = (tl.load(a_start + slot * table_row + j) + r).to(tl.int64)
            sums = tl.zeros([TILE, BLOCK_R], dtype=tl.float32)
            for first in range(split * BLOCK_K, I, SPLITS * BLOCK_K):
                k = first + tl.arange(0, BLOCK_K)
                a = tl.load(
                    A + row[None, :] * I + k[:, None],
                    mask=(r < rank)[None, :] & (k < I)[:, None],
                    other=0.0,
                )
                values = tl.load(
                    x + t[:, None] * x_stride + k[None, :],
                    mask=here[:, None] & (k < I)[None, :],
                    other=0.0,
                ).to(a.dtype)
                sums = tl.dot(values.to(DOT), a.to(DOT), sums, input_precision=PRECISION)
            tl.store(
                z + ((split * T + t[:, None]) * J + j) * Z + r[None, :],
                sums,
                mask=here[:, None] & (r < rank)[None, :],
            )


@triton.jit
def expand_by_token(
    out,
    out_stride,
    z,
    B0,
    B1,
    B2,
    B3,
    blocks,
    token_slot,
    b_start,
    b_rank,
    scale,
    table_row,
    T,
    J: tl.constexpr,
    Z: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """``out[t, block] += scale * z[t, j] B_j[rows, block]`` on the grid (T, column blocks)."""
    t = tl.program_id(0).to(tl.int64)
    slot = tl.load(token_slot + t)
    block = blocks + tl.program_id(1) * 5
    j = tl.load(block)
    if slot >= 0:
        rank = tl.load(b_rank + slot * table_row + j)
        if rank > 0:
            B = B0
            if j == 1:
                B = B1
            elif j == 2:
                B = B2
            elif j == 3:
                B = B3
            feature = tl.multiple_of(tl.load(block + 1), ALIGN)
            column = tl.multiple_of(tl.load(block + 2), ALIGN)
            row_size = tl.multiple_of(tl.load(block + 4), ALIGN)
            o = tl.arange(0, BLOCK_O)
            inside = o < tl.multiple_of(tl.load(block + 3), ALIGN)
            start = tl.load(b_start + slot * table_row + j)
            factor = tl.load(scale + slot * table_row + j)
            products = tl.zeros([BLOCK_R, BLOCK_O], dtype=tl.float32)
            for first in range(0, rank, BLOCK_R):
                r = first + tl.arange(0, BLOCK_R)
                ranks = tl.zeros([BLOCK_R], dtype=tl.float32)
                for split in tl.static_range(SPLITS):
                    share = z + ((split * T + t) * J + j) * Z
                    # Read up to the room's end, whose alignment is known: many at once. What lies
                    # beyond the rank was never written.
                    shares = tl.load(share + r, mask=r < Z, other=0.0)
                    ranks += tl.where(r < rank, shares, 0.0)
                row = (start + r).to(tl.int64)
                b = tl.load(
                    B + row[:, None] * row_size + (feature + o)[None, :],
                    mask=(r < rank)[:, None] & inside[None, :],
                    other=0.0,
                )
                weights = (ranks * factor).to(b.dtype).to(tl.float32)
                products += weights[:, None] * b.to(tl.float32)
            place = out + t * out_stride + column + o
            total = tl.load(place, mask=inside).to(tl.float32) + tl.sum(products, axis=0)
            tl.store(place, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def expand_by_tile(
    out,
    out_stride,
    z,
    B0,
    B1,
    B2,
    B3,
    blocks,
    order,
    spans,
    b_start,
    b_rank,
    scale,
    table_row,
    T,
    J: tl.constexpr,
    Z: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    DOT: tl.constexpr,
):
    """``out[tile, block] += scale * z[tile, j] B_j[rows, block]`` on (tiles, column blocks)."""
    tile = tl.program_id(0)
    slot = tl.load(spans + tile * 3)
    block = blocks + tl.program_id(1) * 5
    j = tl.load(block)
    if slot >= 0:
        rank = tl.load(b_rank + slot * table_row + j)
        if rank > 0:
            B = B0
            if j == 1:
                B = B1
            elif j == 2:
                B = B2
            elif j == 3:
                B = B3
            feature = tl.multiple_of(tl.load(block + 1), ALIGN)
            column = tl.multiple_of(tl.load(block + 2), ALIGN)
            row_size = tl.multiple_of(tl.load(block + 4), ALIGN)
            o = tl.arange(0, BLOCK_O)
            inside = o < tl.multiple_of(tl.load(block + 3), ALIGN)
            position = tl.load(spans + tile * 3 + 1) + tl.arange(0, TILE)
            here = position < tl.load(spans + tile * 3 + 2)
            t = tl.load(order + position, mask=here, other=0).to(tl.int64)
            start = tl.load(b_start + slot * table_row + j)
            factor = tl.load(scale + slot * table_row + j)
            sums = tl.zeros([TILE, BLOCK_O], dtype=tl.float32)
            for first in range(0, rank, BLOCK_R):
                r = first + tl.arange(0, BLOCK_R)
                capacity = here[:, None] & (r < Z)[None, :]
                ranks = tl.zeros([TILE, BLOCK_R], dtype=tl.float32)
                for split in tl.static_range(SPLITS):
                    share = z + ((split * T + t[:, None]) * J + j) * Z
                    shares = tl.load(share + r[None, :], mask=capacity, other=0.0)
                    ranks += tl.where((r < rank)[None, :], shares, 0.0)
                row = (start + r).to(tl.int64)
                b = tl.load(
                    B + row[:, None] * row_size + (feature + o)[None, :],
                    mask=(r < rank)[:, None] & inside[None, :],
                    other=0.0,
                )
                weights = (ranks * factor).to(b.dtype)
                sums = tl.dot(weights.to(DOT), b.to(DOT), sums, input_precision=PRECISION)
            place = out + t[:, None] * out_stride + (column + o)[None, :]
            held = here[:, None] & inside[None, :]
            total = tl.load(place, mask=held).to(tl.float32) + sums
            tl.store(place, total.to(out.dtype.element_ty), mask=held)
