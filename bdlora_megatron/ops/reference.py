"""The grouped product written out: one adapter after another, in fp64, with autograd of its own.

What every other path is tested against, and what runs where there is no other path.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bdlora_megatron.ops.batch import GroupedBatch
from bdlora_megatron.ops.table import SlotFactors

__all__ = ["expand", "shrink"]


def shrink(x: Tensor, slots: SlotFactors, batch: GroupedBatch) -> Tensor:
    """Map tokens to their adapters' ranks.

    Args:
        x: Inputs ``[T, I]``.
        slots: The layer's factors.
        batch: Which slot each token uses.

    Returns:
        ``[T, J, Z]`` in fp64, zero beyond a token's rank.
    """
    table = slots.table
    z = x.new_zeros(len(x), table.num_slices, table.max_rank, dtype=torch.float64)
    for segment in batch.segments:
        for j in range(table.num_slices):
            A = slots.a(segment.slot, j).double()
            z[segment.tokens, j, : len(A)] = segment.take(x).double() @ A.t()
    return z


def expand(out: Tensor, z: Tensor, slots: SlotFactors, batch: GroupedBatch) -> None:
    """Map ranks to outputs and add them in place; each sum is rounded once.

    Args:
        out: Outputs ``[T, O]``.
        z: What ``shrink`` gave.
        slots: The layer's factors.
        batch: Which slot each token uses.
    """
    for segment in batch.segments:
        for j, columns in enumerate(slots.columns):
            B = slots.b(segment.slot, j).double()
            if not len(B):
                continue
            ranks = segment.take(z)[:, j, : len(B)].double()
            delta = (ranks @ B) * slots.table.scale[segment.slot, j].double()
            part = columns.view(out)
            total = segment.take(part).double() + delta.unflatten(1, (columns.groups, -1))
            part[segment.tokens] = total.to(out.dtype)
