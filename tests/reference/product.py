"""The product itself: the reference forward, and the update as one dense matrix.

Letters in shapes: I in features, O out features, R total rank, N blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bdlora_megatron.blocks.factors import BlockFactors, block_views
from bdlora_megatron.errors import ShapeError

__all__ = ["dense_update", "forward"]


def dense_update(factors: BlockFactors, *, dtype: torch.dtype | None = None) -> Tensor:
    """The whole update `s * B A`, as merging into a weight needs it.

    Args:
        factors: The update.
        dtype: The dtype to compute in and to return; the factors' own when None.

    Returns:
        `[O, I]`.
    """
    packed, dense = (part.to(dtype or factors.dtype) for part in block_views(factors))
    update = (packed @ dense).flatten(0, 1) * factors.scale
    return update if factors.blocked == "B" else update.t().contiguous()


def forward(factors: BlockFactors, x: Tensor) -> Tensor:
    """The reference forward `s * (x A^T) B^T`, block by block, forming no zeros.

    Args:
        factors: The update.
        x: `[..., I]`, in the factors' dtype.

    Returns:
        `[..., O]`.

    Raises:
        ShapeError: If the last dimension of `x` is not I.
    """
    if x.shape[-1] != factors.in_features:
        raise ShapeError(
            f"x has shape {list(x.shape)}, wanted [..., {factors.in_features}]; "
            "pass the module's own input, not a shard of it"
        )
    A, B, blocks = factors.A, factors.B, factors.num_blocks
    if factors.blocked == "B":
        hidden = (x @ A.t()).unflatten(-1, (blocks, -1))
        y = torch.einsum("...nr,nor->...no", hidden, B.unflatten(0, (blocks, -1))).flatten(-2)
    else:
        pieces = x.unflatten(-1, (blocks, -1))
        hidden = torch.einsum("...ni,nri->...nr", pieces, A.unflatten(0, (blocks, -1))).flatten(-2)
        y = hidden @ B.t()
    return y * factors.scale
