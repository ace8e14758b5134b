"""Adding a low-rank product to a base product, block by block and in place.

A block-diagonal B laid out with zeros costs as many operations as a dense one. Where each block's
rows stand together, its product is taken by itself. Letters in shapes: T tokens, O output, K rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["Block", "add_blocks", "add_dense"]


class Block(NamedTuple):
    """A block of B: the output's rows that it makes and the columns of the rank that it reads.

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


def add_dense(base: Tensor, z: Tensor, weight: Tensor, scale: float) -> Tensor:
    """``base + scale * z weight^T``, in one product where the types agree.

    Args:
        base: ``[T, O]``, written to where autograd allows it.
        z: ``[T, K]``.
        weight: ``[O, K]``.
        scale: s.

    Returns:
        ``[T, O]``, in the type of ``base``.
    """
    if base.dtype == z.dtype:
        return _writable(base).addmm_(z, weight.to(z.dtype).t(), alpha=scale)
    return base + (torch.mm(z, weight.t()) * scale).to(base.dtype)


def add_blocks(base: Tensor, z: Tensor, blocks: Sequence[Block]) -> Tensor:
    """The same where the weight is zero but for some blocks.

    Args:
        base: ``[T, O]``, written to where autograd allows it.
        z: ``[T, K]``.
        blocks: No two of them share a row.

    Returns:
        ``[T, O]``, in the type of ``base``.
    """
    places = [block[:3] for block in blocks]
    # Autocast has chosen the type of z; in-place products are not on its list.
    weights = [block.weight.to(z.dtype) for block in blocks]
    added: Tensor = _AddBlocks.apply(_writable(base), z, places, *weights)  # type: ignore[no-untyped-call]
    return added


def _writable(base: Tensor) -> Tensor:
    """The tensor itself, or a copy where writing to it would be an error of autograd's."""
    # Transformer Engine returns views from its autograd functions.
    return base.clone() if base.requires_grad and (base.is_leaf or base._is_view()) else base


class _AddBlocks(torch.autograd.Function):
    """See ``add_blocks``. Slices of one tensor written in turn would be copied by autograd."""

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
        for (top, left, scale), weight in zip(places, weights, strict=True):
            rows, columns = base.narrow(1, top, len(weight)), z.narrow(1, left, weight.size(1))
            if base.dtype == z.dtype:
                rows.addmm_(columns, weight.t(), alpha=scale)
            else:
                rows.add_((torch.mm(columns, weight.t()) * scale).to(base.dtype))
        return base

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, *weights = ctx.saved_tensors
        wide = grad.to(z.dtype)
        # Not every column need be read by a block.
        dz = torch.zeros_like(z) if ctx.needs_input_grad[1] else None
        d_weights: list[Tensor | None] = []
        for number, ((top, left, scale), weight) in enumerate(
            zip(ctx.places, weights, strict=True)
        ):
            rows = wide.narrow(1, top, len(weight))
            if dz is not None:
                dz.narrow(1, left, weight.size(1)).addmm_(rows, weight, alpha=scale)
            wanted = ctx.needs_input_grad[3 + number]
            columns = z.narrow(1, left, weight.size(1))
            d_weights.append(torch.mm(rows.t(), columns).mul_(scale) if wanted else None)
        return grad, dz, None, *d_weights
