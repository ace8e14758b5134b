"""Adding low-rank products to a base product, block by block and in its memory.

A block-diagonal B laid out with zeros costs as many operations as a dense one. Where a block's rows
stand together, its product is taken by itself. Letters in shapes: S sequence, b batch, T = S b, O
output, K rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["Block", "add_blocks"]


class Block(NamedTuple):
    """A part of B that is not zero.

    Attributes:
        top: Its first row of O.
        left: Its first column of K.
        scale: s in ``s * z B^T``.
        weight: ``[rows, columns]``.
    """

    top: int
    left: int
    scale: float
    weight: Tensor


def add_blocks(base: Tensor, z: Tensor, blocks: Sequence[Block]) -> Tensor:
    """``base + s * z B^T``, where B is zero but for some blocks.

    Args:
        base: ``[S, b, O]``; overwritten where autograd allows it.
        z: ``[T, K]``.
        blocks: The parts of B; no two of them share a row.

    Returns:
        ``[S, b, O]``, in the type of ``base``.
    """
    places = [block[:3] for block in blocks]
    # Autocast has chosen the type of z; products in place are not on its list.
    weights = [block.weight.to(z.dtype) for block in blocks]
    added: Tensor = _AddBlocks.apply(_writable(base), z, places, *weights)  # type: ignore[no-untyped-call]
    return added


def _writable(base: Tensor) -> Tensor:
    """The tensor itself, or a copy where it cannot be written to row by row."""
    # Transformer Engine's functions return views, which autograd lets nobody write to.
    refused = base.requires_grad and (base.is_leaf or base._is_view())
    return base.clone() if refused else base.contiguous()


class _AddBlocks(torch.autograd.Function):
    """See ``add_blocks``. Autograd itself would copy a tensor whose slices are written in turn."""

    @staticmethod
    def forward(
        ctx: Any,
        base: Tensor,
        z: Tensor,
        places: Sequence[tuple[int, int, float]],
        *weights: Tensor,
    ) -> Tensor:
        ctx.mark_dirty(base)
        ctx.save_for_backward(z, *weights)
        ctx.places = places
        whole = base.view(-1, base.size(-1))
        for (top, left, scale), weight in zip(places, weights, strict=True):
            rows, columns = whole.narrow(1, top, len(weight)), z.narrow(1, left, weight.size(1))
            if base.dtype == z.dtype:
                rows.addmm_(columns, weight.t(), alpha=scale)
            else:
                rows.add_((torch.mm(columns, weight.t()) * scale).to(base.dtype))
        return base

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, *weights = ctx.saved_tensors
        whole = grad.flatten(0, -2).to(z.dtype)
        # Parts of a projection may read the same columns.
        dz = torch.zeros_like(z) if ctx.needs_input_grad[1] else None
        d_weights: list[Tensor | None] = []
        for (top, left, scale), weight, wanted in zip(
            ctx.places, weights, ctx.needs_input_grad[3:], strict=True
        ):
            rows, columns = whole.narrow(1, top, len(weight)), (1, left, weight.size(1))
            if dz is not None:
                dz.narrow(*columns).addmm_(rows, weight, alpha=scale)
            d_weight = torch.mm(rows.t(), z.narrow(*columns)) if wanted else None
            d_weights.append(d_weight if scale == 1.0 or d_weight is None else d_weight.mul_(scale))
        return grad, dz, None, *d_weights
