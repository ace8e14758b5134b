"""The gradients of shrink and expand, for training several adapters at once.

One matrix product per adapter, slice and gradient, on any device: a training batch holds few
adapters with many tokens each. Which tokens share an adapter is read on the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from bdlora_megatron.ops.batch import GroupedBatch, Segment
from bdlora_megatron.ops.slots import SlotFactors

__all__ = ["expand_backward", "shrink_backward"]


def _held(
    slots: SlotFactors, batch: GroupedBatch, which: Literal["a", "b"]
) -> Iterator[tuple[Segment, int, slice]]:
    """Each (segment, slice of the layer, its rows in the pool of A or B) that holds anything."""
    for segment in batch.segments:
        held = slots.table.held[segment.slot]
        rows = (held.a_start, held.a_rank) if which == "a" else (held.b_start, held.b_rank)
        for j, (first, count) in enumerate(zip(*rows, strict=True)):
            if count:
                yield segment, j, slice(first, first + count)


def shrink_backward(
    dz: Tensor, x: Tensor, slots: SlotFactors, batch: GroupedBatch
) -> tuple[Tensor, Tensor]:
    """The gradients of ``shrink``.

    Args:
        dz: Gradient of its result, ``[T, J, Z]``.
        x: Its input ``[T, I]``.
        slots: The layer's factors.
        batch: Which slot each token uses.

    Returns:
        Gradients of ``x`` and of the pool of A.
    """
    A = slots.A
    dx = torch.zeros_like(x, dtype=dz.dtype)
    dA = torch.zeros_like(A)
    for segment, j, rows in _held(slots, batch, "a"):
        ranks = segment.take(dz)[:, j, : rows.stop - rows.start].to(A.dtype)
        segment.add(dx, torch.mm(ranks, A[rows]).to(dx.dtype))
        dA[rows] += torch.mm(ranks.t(), segment.take(x).to(A.dtype))
    return dx.to(x.dtype), dA


def expand_backward(
    dout: Tensor, z: Tensor, slots: SlotFactors, batch: GroupedBatch
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The gradients of ``expand``, beside that of ``out``, which is ``dout`` itself.

    Args:
        dout: Gradient of its result, ``[T, O]``.
        z: Its input ``[T, J, Z]``.
        slots: The layer's factors.
        batch: Which slot each token uses.

    Returns:
        Gradients of ``z`` and of the pools of B.
    """
    views = [columns.view(dout) for columns in slots.columns]
    dz, dB = torch.zeros_like(z), tuple(torch.zeros_like(pool) for pool in slots.B)
    for segment, j, rows in _held(slots, batch, "b"):
        pool, scale, rank = (
            slots.B[j],
            slots.table.held[segment.slot].scale[j],
            rows.stop - rows.start,
        )
        grad = segment.take(views[j]).flatten(1).to(pool.dtype)
        dz[segment.tokens, j, :rank] = torch.mm(grad, pool[rows].t()).to(z.dtype) * scale
        ranks = segment.take(z)[:, j, :rank].mul(scale).to(pool.dtype)
        dB[j][rows] += torch.mm(ranks.t(), grad)
    return dz, dB
