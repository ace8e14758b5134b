"""Other block counts and ranks for the same update, exactly.

Letters in shapes: N old blocks, M new blocks, R total rank, W width of the blocked side,
D width of the dense side (see `bdlora_megatron.blocks.factors`).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bdlora_megatron.blocks.factors import BlockFactors, block_views, from_block_views
from bdlora_megatron.errors import ConfigError, ShapeError

__all__ = ["compact", "pad_rank", "replicate", "reshard", "resharded_rank"]


def reshard(factors: BlockFactors, num_blocks: int) -> BlockFactors:
    """The same update with another number of blocks. Exact: numbers are copied, never computed.

    New block m covers the slice `[m W / M, (m + 1) W / M)` of the blocked side. It takes the
    packed rows of every old block that it overlaps, side by side with zeros between, and a copy of
    those blocks' dense rows:

    - refine (N divides M): one old block each, so the packed numbers stay and the dense rows are
      repeated. The rank grows to R M / N. Vanilla to BD is the case N = 1.
    - coarsen (M divides N): N / M old blocks each. The rank stays R; the packed factor gets zeros.
    - otherwise: as many as a new block overlaps at most (`resharded_rank`), never more rank than
      refining to the least common multiple and coarsening would need.

    Coarsening what was refined keeps the larger rank; `compact` gives the original back.

    Args:
        factors: The update, N blocks.
        num_blocks: M.

    Returns:
        An update with M blocks and the same scale; the same object when M is N. It shares the
        memory of a factor that stays as it is. A single block has no stretches (`parts`).

    Raises:
        ConfigError: If M is not positive.
        ShapeError: If M does not divide the width of the blocked side.
    """
    old = factors.num_blocks
    if num_blocks == old:
        return factors
    check_num_blocks(factors, num_blocks)
    if factors.parts:
        return _by_stretch(factors, num_blocks)
    if num_blocks % old == 0:
        return _refine(factors, num_blocks // old)
    packed, dense = block_views(factors)
    old_width, block_rank = packed.shape[1:]
    width = packed.shape[0] * old_width
    new_width = width // num_blocks
    overlaps = _max_overlap(old, num_blocks)
    new_packed = packed.new_zeros(num_blocks, new_width, overlaps * block_rank)
    new_dense = dense.new_zeros(num_blocks, overlaps * block_rank, dense.shape[2])
    for m in range(num_blocks):
        begin, end = m * new_width, (m + 1) * new_width
        for slot, n in enumerate(_overlapped(m, old, num_blocks)):
            low, high = max(begin, n * old_width), min(end, (n + 1) * old_width)
            ranks = slice(slot * block_rank, (slot + 1) * block_rank)
            rows = packed[n, low - n * old_width : high - n * old_width]
            new_packed[m, low - begin : high - begin, ranks] = rows
            new_dense[m, ranks] = dense[n]
    return from_block_views(new_packed, new_dense, blocked=factors.blocked, scale=factors.scale)


def replicate(factors: BlockFactors, heads: int, replicas: int) -> BlockFactors:
    """The update of a module whose heads are each repeated, one copy after the other. Exact.

    Where B has blocks, a copy takes those of its head along, and A's rows for them.

    Args:
        factors: The update of the heads, R and N, with B blocked.
        heads: How many they are; B's rows are so many stretches of one length.
        replicas: Copies of each.

    Returns:
        The update of all copies. A vanilla one keeps A and its rank. With blocks, rank and blocks
        grow by `replicas`, after a reshard to `heads` blocks if one crosses two heads' border.
    """
    if factors.num_blocks == 1:
        return replace(factors, B=_repeat(factors.B, heads, replicas))
    if factors.num_blocks % heads:
        factors = reshard(factors, heads)
    return replace(
        factors,
        A=_repeat(factors.A, heads, replicas),
        B=_repeat(factors.B, heads, replicas),
        num_blocks=factors.num_blocks * replicas,
    )


def _repeat(rows: Tensor, groups: int, times: int) -> Tensor:
    """Rows whose every group stands there several times."""
    grouped: Tensor = rows.unflatten(0, (groups, -1))
    return grouped.repeat_interleave(times, dim=0).flatten(0, 1)


def _by_stretch(factors: BlockFactors, num_blocks: int) -> BlockFactors:
    """Reshard each stretch of B's rows by itself; A comes out the same from every one."""
    stretches = [
        reshard(replace(factors, B=rows, parts=()), num_blocks)
        for rows in factors.B.split(list(factors.parts))
    ]
    return replace(
        stretches[0],
        B=torch.cat([stretch.B for stretch in stretches]),
        parts=factors.parts if num_blocks > 1 else (),
    )


def resharded_rank(rank: int, *, num_blocks: int, new_num_blocks: int) -> int:
    """The total rank that `reshard` gives, without resharding.

    Args:
        rank: R, before.
        num_blocks: N, before.
        new_num_blocks: M, after.

    Returns:
        M times R / N times the most old blocks that one new block overlaps.

    Raises:
        ConfigError: If a block count is not positive, or N does not divide R.
    """
    if min(num_blocks, new_num_blocks) < 1 or rank % num_blocks:
        raise ConfigError(
            f"rank={rank}, num_blocks={num_blocks}, new_num_blocks={new_num_blocks}: wanted "
            "positive block counts and a rank that is a multiple of num_blocks"
        )
    return new_num_blocks * (rank // num_blocks) * _max_overlap(num_blocks, new_num_blocks)


def compact(factors: BlockFactors) -> BlockFactors:
    """The same update with the rank that a reshard added taken out again. Exact.

    In every block, rank directions that contribute nothing are dropped, and directions with
    bit-equal dense rows are merged when their packed columns are nowhere both non-zero (so adding
    them rounds nothing). The blocks are padded with zeros to the largest rank left.
    Where the directions of every block of `f` are distinct and none is zero,
    `compact(reshard(reshard(f, M), f.num_blocks))` has the rank of `f` again.

    Args:
        factors: The update.

    Returns:
        An update with the same blocks and a rank not larger; the same object when nothing is won.
    """
    packed, dense = block_views(factors)
    kept: list[tuple[Tensor, Tensor]] = []
    for block in zip(packed, dense, strict=True):
        kept.append(_compact_block(*block))
        # Blocks share one rank, so a single full one decides, mostly the first.
        if kept[-1][1].shape[0] == packed.shape[2]:
            return factors
    block_rank = max(1, *(rows.shape[0] for _, rows in kept))
    new_packed = packed.new_zeros(*packed.shape[:2], block_rank)
    new_dense = dense.new_zeros(dense.shape[0], block_rank, dense.shape[2])
    for n, (columns, rows) in enumerate(kept):
        new_packed[n, :, : columns.shape[1]] = columns
        new_dense[n, : rows.shape[0]] = rows
    return from_block_views(
        new_packed,
        new_dense,
        blocked=factors.blocked,
        scale=factors.scale,
        parts=factors.parts,
    )


def pad_rank(factors: BlockFactors, rank: int) -> BlockFactors:
    """The same update with a larger rank: every block is padded with zeros. Exact.

    Args:
        factors: The update.
        rank: The total rank wanted.

    Returns:
        An update of that rank; the same object when it has it already.

    Raises:
        ShapeError: If `rank` is smaller than R or not a multiple of N.
    """
    if rank == factors.rank:
        return factors
    if rank < factors.rank or rank % factors.num_blocks:
        raise ShapeError(
            f"cannot pad rank {factors.rank} to {rank} with num_blocks={factors.num_blocks}; "
            "wanted a larger multiple of num_blocks; use truncate to make a rank smaller"
        )
    packed, dense = block_views(factors)
    more = rank // factors.num_blocks - packed.shape[2]
    return from_block_views(
        torch.nn.functional.pad(packed, (0, more)),
        torch.nn.functional.pad(dense, (0, 0, 0, more)),
        blocked=factors.blocked,
        scale=factors.scale,
        parts=factors.parts,
    )


def check_num_blocks(factors: BlockFactors, num_blocks: int) -> None:
    """See that an update can be cut into a number of blocks.

    Raises:
        ConfigError: If `num_blocks` is not positive.
        ShapeError: If it does not divide the width of the blocked side.
    """
    if num_blocks < 1:
        raise ConfigError(f"num_blocks={num_blocks} is not a number of blocks; use 1 or more")
    side, width = ("out_features", factors.out_features)
    if factors.blocked == "A":
        side, width = ("in_features", factors.in_features)
    for size in factors.parts or (width,):
        if size % num_blocks:
            raise ShapeError(
                f"{side}={size} is not a multiple of num_blocks={num_blocks}; "
                "use a number of blocks that divides it"
            )


def _refine(factors: BlockFactors, pieces: int) -> BlockFactors:
    """Cut every block into `pieces`, writing each number once."""
    A, B, blocks = factors.A, factors.B, factors.num_blocks
    if factors.blocked == "B":
        # B's packed rows stay; A's rows are repeated block by block.
        A = A.unflatten(0, (blocks, 1, -1)).expand(-1, pieces, -1, -1).flatten(0, 2)
    else:
        # A's packed rows are cut across; B's columns are repeated block by block.
        A = A.reshape(blocks, -1, pieces, A.shape[1] // pieces).transpose(1, 2).flatten(0, 2)
        B = B.unflatten(1, (blocks, 1, -1)).expand(-1, -1, pieces, -1).flatten(1, 3)
    return replace(
        factors, A=A.contiguous(), B=B.contiguous(), num_blocks=factors.num_blocks * pieces
    )


def _overlapped(m: int, old: int, new: int) -> range:
    """The old blocks that new block m overlaps: floor(m N / M) to ceil((m + 1) N / M)."""
    return range(m * old // new, -(-(m + 1) * old // new))


def _max_overlap(old: int, new: int) -> int:
    return max(len(_overlapped(m, old, new)) for m in range(new))


def _compact_block(packed: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
    """Drop empty directions of `packed [w, r]` and `dense [r, D]`, and merge repeated ones."""
    columns: list[Tensor] = []
    rows: list[int] = []
    slot_of: dict[bytes, int] = {}
    for i, (column, row) in enumerate(zip(packed.unbind(1), dense, strict=True)):
        if not (column.any() and row.any()):
            continue
        # A fresh tensor: contiguous() leaves a row of one number with its old stride.
        fresh = torch.empty(row.shape, dtype=row.dtype).copy_(row.detach())
        key = fresh.view(torch.uint8).numpy().tobytes()
        slot = slot_of.get(key)
        if slot is not None and not ((columns[slot] != 0) & (column != 0)).any():
            columns[slot] = columns[slot] + column
            continue
        slot_of[key] = len(columns)
        columns.append(column)
        rows.append(i)
    merged = torch.stack(columns, dim=1) if columns else packed[:, :0]
    return merged, dense[rows]
