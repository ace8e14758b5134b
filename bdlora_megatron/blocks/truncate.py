"""The best update of a smaller rank, and what every smaller rank would lose.

Letters in shapes: N blocks, R total rank, r rank of one block, W width of the blocked side,
D width of the dense side (see `bdlora_megatron.blocks.factors`).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from bdlora_megatron.blocks.factors import (
    BlockFactors,
    block_views,
    from_block_views,
    in_blocks,
)
from bdlora_megatron.blocks.finite import all_finite
from bdlora_megatron.blocks.reshard import check_num_blocks, reshard
from bdlora_megatron.errors import ShapeError, UnsupportedError

__all__ = ["singular_values", "truncate"]


def truncate(factors: BlockFactors, *, num_blocks: int, rank: int) -> tuple[BlockFactors, float]:
    """The best approximation with `num_blocks` blocks and a total rank of `rank`.

    By Eckart and Young no factors of that layout are nearer in the Frobenius norm: the blocks
    partition the update, and each gets its truncated singular value decomposition. That is taken
    in fp64 from QR decompositions of the factors and the SVD of the small `[r, r]` core between
    them; `[O, I]` is never formed. The singular values are split evenly (square roots) between the
    factors.

    Args:
        factors: The update, with any number of blocks.
        num_blocks: The blocks wanted.
        rank: The total rank wanted. One larger than needed is filled with zeros.

    Returns:
        The approximation in the input's dtype, and its relative error: the Frobenius norm of the
        difference over that of the update, for the whole module, before rounding to that dtype.
        A zero update has error 0.

    Raises:
        ShapeError: If `rank` is not a positive multiple of `num_blocks`.
        UnsupportedError: If a factor holds NaN or infinity.
    """
    if rank < 1 or num_blocks < 1 or rank % num_blocks:
        raise ShapeError(
            f"rank={rank} is not a positive multiple of num_blocks={num_blocks}; "
            "every block gets rank / num_blocks"
        )
    if not all_finite(factors.A, factors.B):
        raise UnsupportedError(
            "cannot truncate factors that hold NaN or infinity; wanted finite numbers; "
            "use an adapter whose training did not diverge"
        )
    packed, dense = _split(factors, num_blocks)
    keep = rank // num_blocks
    new_packed, new_dense, singular = _truncated_blocks(packed, dense, keep)
    result = from_block_views(
        new_packed.to(factors.dtype),
        new_dense.to(factors.dtype),
        blocked=factors.blocked,
        scale=factors.scale,
        parts=factors.parts if num_blocks > 1 else (),
    )
    return result, 0.0 if factors.scale == 0 else _relative_error(singular, keep)


def singular_values(factors: BlockFactors, *, num_blocks: int) -> Tensor:
    """What `truncate` could keep: the singular values of the update's blocks, scale included.

    A truncation to rank R loses, in the Frobenius norm, all but the first R / N values of each
    block, so the error at every rank follows from them.

    Args:
        factors: The update, with any number of blocks.
        num_blocks: N, the blocks wanted.

    Returns:
        `[N, min(r, W / N, D)]` in fp64, each block's in falling order, r being a block's rank.

    Raises:
        ConfigError: If N is not positive.
        ShapeError: If N does not divide the width of the blocked side.
    """
    packed, dense = _split(factors, num_blocks)
    r_packed = torch.linalg.qr(packed, mode="r").R
    r_dense = torch.linalg.qr(dense.transpose(1, 2), mode="r").R
    values: Tensor = torch.linalg.svdvals(_cores(r_packed, r_dense))
    return values * abs(factors.scale)


def _split(factors: BlockFactors, num_blocks: int) -> tuple[Tensor, Tensor]:
    """The parts of `num_blocks` blocks in fp64, dense rows that blocks share given once.

    Returns:
        `packed [M, W / M, r]` and `dense [M / k, r, D]`: k blocks after each other share one.
    """
    blocks = factors.num_blocks
    if num_blocks % blocks:
        factors = reshard(factors, num_blocks)
    elif num_blocks != blocks:
        check_num_blocks(factors, num_blocks)
    packed, dense = block_views(factors)
    # Refining cuts each block's packed rows in pieces, and repeats its dense rows.
    if factors.parts:
        packed = in_blocks(factors.B, num_blocks, factors.parts)
    packed = packed.double().reshape(num_blocks, -1, packed.shape[2])
    return packed, dense.double()


def _cores(r_packed: Tensor, r_dense: Tensor) -> Tensor:
    """What is left between the two orthogonal parts of each block, `[M, r, r]`."""
    shared = r_packed.shape[0] // r_dense.shape[0]
    return r_packed @ r_dense.transpose(1, 2).repeat_interleave(shared, dim=0)


def _truncated_blocks(packed: Tensor, dense: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """Truncate what `_split` gives to `keep` directions per block.

    Returns the two new factors and all singular values, `[M, min(r, W / M, D)]`.
    """
    q_packed, r_packed = torch.linalg.qr(packed)
    q_dense, r_dense = torch.linalg.qr(dense.transpose(1, 2))
    left, singular, right = torch.linalg.svd(_cores(r_packed, r_dense), full_matrices=False)
    root = singular[:, :keep].sqrt()
    new_packed = q_packed @ (left[:, :, :keep] * root[:, None, :])
    rows = (root[:, :, None] * right[:, :keep]).reshape(dense.shape[0], -1, right.shape[2])
    new_dense = (rows @ q_dense.transpose(1, 2)).reshape(*root.shape, -1)
    missing = keep - root.shape[1]
    if missing > 0:
        new_packed, new_dense = pad(new_packed, (0, missing)), pad(new_dense, (0, 0, 0, missing))
    return new_packed, new_dense, singular


def _relative_error(singular: Tensor, keep: int) -> float:
    whole = singular.norm().item()
    return singular[:, keep:].norm().item() / whole if whole > 0 else 0.0
