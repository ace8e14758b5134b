"""A basis in which the cores are diagonal.

The sum of || diag(U^T M_i V) ||^2 is convex in U and in V, so that moving to the polar factor of
its gradient never lowers it. Letters as in `bdlora_megatron.compress.stack`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bdlora_megatron.compress.stack import Stack, is_settled

__all__ = ["fit_diagonal"]

_STEPS = 200


def fit_diagonal(stack: Stack, U: Tensor, V: Tensor) -> tuple[Tensor, Tensor, list[float]]:
    """Turn a basis for full cores into one for diagonal cores.

    Args:
        stack: The updates.
        U: `[O, k]`, orthonormal, along its principal axes. Where cores are diagonal in some frame,
            these are that frame, but for axes of equal amplitude.
        V: `[I, k]`, alike.

    Returns:
        U and V, orthonormal, and the sum of || diag(U^T M_i V) ||^2 after each step.
    """
    whole = stack.energy()
    energies = [float(_diagonals(stack, U, V).square().sum())]
    for _ in range(_STEPS):
        U = _turned(stack, stack.left, stack.right, U, V)
        V = _turned(stack, stack.right, stack.left, V, U)
        energies.append(float(_diagonals(stack, U, V).square().sum()))
        if is_settled(energies[-2], energies[-1], whole):
            break
    return U, V, energies


def _diagonals(stack: Stack, U: Tensor, V: Tensor) -> Tensor:
    """The diagonals of the cores, `[n, k]`."""
    rows = (stack.left.t() @ U) * (stack.right.t() @ V)
    return torch.cat([part.sum(1) for part in stack.parts(rows)])


def _turned(stack: Stack, side: Tensor, other: Tensor, own: Tensor, opposite: Tensor) -> Tensor:
    """The polar factor of the gradient: the sum of L_i (R_i^T V) diag_i."""
    seen = other.t() @ opposite
    products = zip(stack.parts(seen), stack.parts((side.t() @ own) * seen), strict=True)
    inner = torch.cat([(part * rows.sum(1, keepdim=True)).flatten(0, 1) for part, rows in products])
    left, _, right = torch.linalg.svd(side @ inner, full_matrices=False)
    polar: Tensor = left @ right
    return polar
