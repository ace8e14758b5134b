"""How large an update is and how far apart two are, without forming either.

Letters in shapes: I in features, O out features, R total rank, N blocks, W width of the blocked
side, D width of the dense side (see `bdlora_megatron.blocks.factors`).
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from bdlora_megatron.blocks.factors import BlockFactors, block_views, from_block_views, in_rows
from bdlora_megatron.blocks.reshard import reshard
from bdlora_megatron.errors import ShapeError

__all__ = ["output_distances", "output_norms", "subtract", "update_norm"]


def output_norms(factors: BlockFactors) -> Tensor:
    """The Euclidean norm of every row of the update `s * B A`.

    Row o is what an input of norm 1 can move output o by at most. Computed in fp64: a QR
    decomposition of the factor on the input's side leaves a triangle of the rank's size, and the
    rows of the product with that have the same norms.

    Args:
        factors: The update.

    Returns:
        `[O]`, fp64.
    """
    packed, dense = (part.double() for part in block_views(factors))
    if factors.blocked == "B":
        # Outputs are the packed rows; every block has its own.
        triangle = _triangle(dense.transpose(1, 2))
        rows = torch.linalg.vector_norm(packed @ triangle.transpose(1, 2), dim=2)
        rows = in_rows(rows, factors.parts)
    else:
        # Outputs are the dense columns; each sums over the blocks, whose inputs are disjoint.
        rows = torch.linalg.vector_norm(_triangle(packed) @ dense, dim=(0, 1))
    norms: Tensor = rows * abs(factors.scale)
    return norms


def update_norm(factors: BlockFactors) -> float:
    """The Frobenius norm of the update `s * B A`.

    Args:
        factors: The update.

    Returns:
        The norm, computed in fp64.
    """
    norm: float = output_norms(factors).norm().item()
    return norm


def output_distances(first: BlockFactors, second: BlockFactors) -> Tensor:
    """The most that an input of norm 1 can move each output of two updates apart.

    Args:
        first: An update.
        second: An update of the same module, with any number of blocks, rank, scale and dtype.

    Returns:
        `[O]`, fp64: the norms of the difference's rows. Exactly 0 where one is a resharding of the
        other; otherwise rounding leaves about 1e-16 of the updates' size.

    Raises:
        ShapeError: If the two are not updates of one module.
    """
    first, second = _alike(first, second)
    difference = subtract(first, second)
    if _is_resharded(first, second):
        return torch.zeros(first.out_features, dtype=torch.float64)
    return output_norms(difference)


def subtract(first: BlockFactors, second: BlockFactors) -> BlockFactors:
    """The update `first - second` in factors: their ranks side by side, one of them negated.

    Args:
        first: An update.
        second: An update of the same module, with any number of blocks, rank, scale and dtype.

    Returns:
        The difference in fp64, with scale 1 and the least common multiple of both block counts.

    Raises:
        ShapeError: If the two are not updates of one module.
    """
    widths = [(f.out_features, f.in_features, f.blocked) for f in (first, second)]
    if widths[0] != widths[1]:
        raise ShapeError(
            f"cannot compare an update of [out, in, blocked factor] {list(widths[0])} with one of "
            f"{list(widths[1])}; wanted two of the same module"
        )
    first, second = _alike(first, second)
    blocks = math.lcm(first.num_blocks, second.num_blocks)
    (p1, d1), (p2, d2) = (
        (part.double() for part in block_views(reshard(f, blocks))) for f in (first, second)
    )
    packed = torch.cat([p1 * first.scale, p2 * -second.scale], dim=2)
    return from_block_views(
        packed,
        torch.cat([d1, d2], dim=1),
        blocked=first.blocked,
        scale=1.0,
        parts=first.parts,
    )


def _alike(first: BlockFactors, second: BlockFactors) -> tuple[BlockFactors, BlockFactors]:
    """Two updates whose blocks cut the same stretches of rows, if need be with one block each."""
    if first.parts == second.parts:
        return first, second
    one, other = (replace(reshard(factors, 1), parts=()) for factors in (first, second))
    return one, other


def _is_resharded(first: BlockFactors, second: BlockFactors) -> bool:
    """Whether one gives the other's numbers."""
    if first.scale != second.scale:
        return False
    return any(
        torch.equal(one.A, other.A) and torch.equal(one.B, other.B)
        for one, other in (
            (reshard(first, second.num_blocks), second),
            (first, reshard(second, first.num_blocks)),
        )
    )


def _triangle(tall: Tensor) -> Tensor:
    """R of a QR decomposition, without Q."""
    triangle: Tensor = torch.linalg.qr(tall, mode="r").R
    return triangle
