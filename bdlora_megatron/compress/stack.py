"""The updates of one module, side by side, as the fit reads them.

Letters in shapes: I in features, O out features, r one adapter's rank, R the sum of all ranks,
n adapters, N blocks, w columns of a basis, q columns of any other matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from bdlora_megatron.blocks import BlockFactors, reshard
from bdlora_megatron.blocks.factors import block_views

__all__ = ["Pair", "Stack", "gram_norm2", "is_settled", "slices_of", "stack_pairs"]

_GAIN, _ROUNDING = 1e-5, 1e-14

#: B `[O, r]` and A `[r, I]` of an update B A.
Pair: TypeAlias = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Stack:
    """Several updates B_i A_i in fp64, those of one rank next to each other.

    Attributes:
        left: All B_i, `[O, R]`.
        right: All A_i, transposed, `[I, R]`.
        groups: How many adapters follow each other with which rank.
    """

    left: Tensor
    right: Tensor
    groups: tuple[tuple[int, int], ...]

    def parts(self, rows: Tensor) -> list[Tensor]:
        """Cut `[R, q]` by group.

        Returns:
            One `[n, r, q]` a group.
        """
        sizes = [count * rank for count, rank in self.groups]
        return [
            part.unflatten(0, group)
            for part, group in zip(rows.split(sizes), self.groups, strict=True)
        ]

    def energy(self) -> float:
        """The sum of || B_i A_i ||^2."""
        grams = [
            [part @ part.mT for part in self.parts(side.t())] for side in (self.left, self.right)
        ]
        return sum(float((left * right).sum()) for left, right in zip(*grams, strict=True))


def is_settled(before: float, after: float, whole: float) -> bool:
    """Whether a step of a fit gained nothing that matters.

    Args:
        before: The energy that was held.
        after: The energy that is held.
        whole: All there is.

    Returns:
        True if the loss fell by less than a hundred-thousandth of itself, or by rounding alone.
    """
    return after - before <= _GAIN * max(whole - after, 0.0) + _ROUNDING * whole


def slices_of(factors: BlockFactors, num_blocks: int) -> list[Pair]:
    """The update cut as tensor parallelism cuts it, without its scale.

    Args:
        factors: The update, of any structure.
        num_blocks: N; 1 gives the whole update.

    Returns:
        For each block B `[O / N, r]` and A `[r, I]` in a column layer, B `[O, r]` and A
        `[r, I / N]` in a row layer; r grows where the adapter's own blocks need it.
    """
    if factors.num_blocks == 1 and not factors.parts:
        # Views: a whole factor serves all slices.
        if factors.blocked == "B":
            return [(rows, factors.A) for rows in factors.B.chunk(num_blocks)]
        return [(factors.B, columns) for columns in factors.A.chunk(num_blocks, dim=1)]
    pairs = zip(*block_views(reshard(factors, num_blocks)), strict=True)
    if factors.blocked == "B":
        return list(pairs)
    return [(dense.t(), packed.t()) for packed, dense in pairs]


def gram_norm2(pair: Pair) -> float:
    """The squared Frobenius norm of B A, from `[r, r]` products in fp64."""
    B, A = (factor.double() for factor in pair)
    norm2: float = ((B.t() @ B) * (A @ A.t())).sum().item()
    # Rounding may leave a little less than nothing.
    return max(norm2, 0.0)


def stack_pairs(pairs: Sequence[Pair], weights: Sequence[float]) -> Stack:
    """Put updates side by side.

    Args:
        pairs: The updates, one at least, in an order that their contents decide.
        weights: What to multiply each by.
    """
    ranks = [A.shape[0] for _, A in pairs]
    order = sorted(range(len(pairs)), key=lambda i: ranks[i])
    total = sum(ranks)
    left = torch.empty(pairs[0][0].shape[0], total, dtype=torch.float64)
    right = torch.empty(pairs[0][1].shape[1], total, dtype=torch.float64)
    start = 0
    for i in order:
        B, A = pairs[i]
        own = slice(start, start + ranks[i])
        left[:, own] = B
        left[:, own] *= weights[i]
        right[:, own] = A.t()
        start = own.stop
    distinct = sorted(set(ranks))
    return Stack(left=left, right=right, groups=tuple((ranks.count(r), r) for r in distinct))
