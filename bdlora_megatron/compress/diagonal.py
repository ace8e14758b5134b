"""A basis in which the cores are diagonal.

The sum of || diag(U^T M_i V) ||^2 is convex in U and in V, so that moving to the polar factor of
its gradient never lowers it. Letters as in `bdlora_megatron.compress.stack`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bdlora_megatron.compress.stack import Stack

__all__ = ["fit_diagonal"]

_STEPS, _GAIN = 400, 1e-8
#: Mixtures of the cores to start from.
_MIXTURES = 8


def fit_diagonal(stack: Stack, U: Tensor, V: Tensor) -> tuple[Tensor, Tensor, list[float]]:
    """Turn a basis for full cores into one for diagonal cores.

    Args:
        stack: The updates.
        U: `[O, k]`, orthonormal.
        V: `[I, k]`, orthonormal.

    Returns:
        U and V, orthonormal, and the sum of || diag(U^T M_i V) ||^2 after each step.
    """
    left_turn, right_turn = _jointly_diagonal(_cores(stack, U, V))
    U, V = U @ left_turn, V @ right_turn
    energies = [float(_diagonals(stack, U, V).square().sum())]
    for _ in range(_STEPS):
        U = _turned(stack, stack.left, stack.right, U, V)
        V = _turned(stack, stack.right, stack.left, V, U)
        energies.append(float(_diagonals(stack, U, V).square().sum()))
        if energies[-1] - energies[-2] <= _GAIN * energies[-1]:
            break
    return U, V, energies


def _cores(stack: Stack, U: Tensor, V: Tensor) -> Tensor:
    """U^T M_i V of every update, `[n, k, k]`."""
    seen = zip(stack.parts(stack.left.t() @ U), stack.parts(stack.right.t() @ V), strict=True)
    return torch.cat([left.mT @ right for left, right in seen])


def _diagonals(stack: Stack, U: Tensor, V: Tensor) -> Tensor:
    """The diagonals of the cores, `[n, k]`."""
    rows = (stack.left.t() @ U) * (stack.right.t() @ V)
    return torch.cat([part.sum(1) for part in stack.parts(rows)])


def _jointly_diagonal(cores: Tensor) -> tuple[Tensor, Tensor]:
    """Two rotations that leave the most on the diagonals, of those that mixtures of cores suggest.

    Where all cores are diagonal in one pair of frames, so is every mixture of them, and its
    singular vectors are those frames.
    """
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(_MIXTURES, len(cores), generator=generator, dtype=cores.dtype)
    left, _, right = torch.linalg.svd(torch.tensordot(weights, cores, dims=1))
    held = [
        float((l.mT @ cores @ r.mT).diagonal(dim1=1, dim2=2).square().sum())
        for l, r in zip(left, right, strict=True)
    ]
    best = held.index(max(held))
    return left[best], right[best].mT


def _turned(stack: Stack, side: Tensor, other: Tensor, own: Tensor, opposite: Tensor) -> Tensor:
    """The polar factor of the gradient: the sum of L_i (R_i^T V) diag_i."""
    seen = other.t() @ opposite
    products = zip(stack.parts(seen), stack.parts((side.t() @ own) * seen), strict=True)
    inner = torch.cat([(part * rows.sum(1, keepdim=True)).flatten(0, 1) for part, rows in products])
    left, _, right = torch.linalg.svd(side @ inner, full_matrices=False)
    polar: Tensor = left @ right
    return polar
