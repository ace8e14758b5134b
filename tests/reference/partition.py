"""One tensor-parallel rank's part of an update, and the whole from the parts.

Letters in shapes: I in features, O out features, R total rank, N blocks, P tensor-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bdlora_megatron.blocks.factors import Blocked, BlockFactors
from bdlora_megatron.errors import ConfigError, ShapeError

__all__ = ["shard", "unshard"]


def shard(factors: BlockFactors, *, tp_rank: int, tp_size: int) -> tuple[Tensor, Tensor]:
    """The factors that one rank holds: its N / P whole blocks.

    | blocked | A_local | B_local |
    |---|---|---|
    | `"B"` (column-parallel) | `[R / P, I]` | `[O / P, R / N]` |
    | `"A"` (row-parallel) | `[R / P, I / N]` | `[O, R / P]` |

    Args:
        factors: The whole update.
        tp_rank: Which rank.
        tp_size: P.

    Returns:
        `(A_local, B_local)`, views of the whole factors.

    Raises:
        ConfigError: If there is no such rank.
        ShapeError: If P does not divide N.
    """
    if not 0 <= tp_rank < tp_size:
        raise ConfigError(f"tp_rank={tp_rank} is not one of tp_size={tp_size} ranks")
    blocks = factors.num_blocks
    if blocks % tp_size:
        raise ShapeError(
            f"num_blocks={blocks} is not a multiple of tp_size={tp_size}; "
            f"reshard to a multiple of {tp_size} first"
        )
    ranks = factors.rank // tp_size
    A_local = factors.A.narrow(0, tp_rank * ranks, ranks)
    if factors.blocked == "A":
        return A_local, factors.B.narrow(1, tp_rank * ranks, ranks)
    rows = factors.out_features // tp_size
    return A_local, factors.B.narrow(0, tp_rank * rows, rows)


def unshard(
    shards: Sequence[tuple[Tensor, Tensor]], *, num_blocks: int, blocked: Blocked, scale: float
) -> BlockFactors:
    """The whole update from every rank's part; the inverse of `shard`.

    Args:
        shards: `(A_local, B_local)` of ranks 0 to P - 1, in order.
        num_blocks: N.
        blocked: Which factor is block-diagonal.
        scale: s.

    Returns:
        The whole update.

    Raises:
        ShapeError: If there is no shard, P does not divide N, or the shards differ in shape.
    """
    if not shards or num_blocks % len(shards):
        raise ShapeError(
            f"got {len(shards)} shards of an update with num_blocks={num_blocks}; "
            "wanted every rank's, a number that divides num_blocks"
        )
    shapes = {(tuple(A.shape), tuple(B.shape)) for A, B in shards}
    if len(shapes) > 1:
        raise ShapeError(
            f"shards have different shapes, (A, B) = {sorted(shapes)}; "
            "wanted the shards of one module at one tensor-parallel size"
        )
    return BlockFactors(
        A=torch.cat([A for A, _ in shards], dim=0),
        B=torch.cat([B for _, B in shards], dim=0 if blocked == "B" else 1),
        num_blocks=num_blocks,
        blocked=blocked,
        scale=scale,
    )
