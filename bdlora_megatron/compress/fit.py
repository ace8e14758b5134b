"""Fitting the basis that several updates share, from their factors alone.

For updates M_i = B_i A_i, find U `[O, k]` and V `[I, k]`, both orthonormal, that hold most of them:
the sum of || U^T M_i V ||^2 is as large as can be, and with it the sum of || M_i - U S_i V^T ||^2
for S_i = U^T M_i V as small. Given V, the best U are the leading eigenvectors of the sum of
(M_i V)(M_i V)^T, and V likewise given U. Each half step is one subspace iteration with some spare
columns and cannot lose anything: the new columns hold what the old ones did, and more. Neither an
update nor an `[O, O]` matrix is ever formed. Letters as in `bdlora_megatron.compress.stack`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from bdlora_megatron.compress.diagonal import fit_diagonal
from bdlora_megatron.compress.stack import Stack, is_settled

__all__ = ["CORES", "Basis", "CoreKind", "fit_basis"]

CoreKind: TypeAlias = Literal["full", "diagonal"]
CORES: tuple[CoreKind, ...] = get_args(CoreKind)
#: Columns beyond k: the iteration converges by the ratio of energies k and k + this one apart.
_SPARE = 8
_START_STEPS, _STEPS = 20, 40
#: A start is only that.
_START_GAIN = 1e-6
#: Directions with less amplitude than this, of the whole stack's, are rounding.
_NOTHING = 1e-13


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Basis:
    """An orthonormal basis for the outputs and one for the inputs of several updates.

    Attributes:
        U: `[O, k]`.
        V: `[I, k]`.
        energies: The sum of || U^T M_i V ||^2 after each step; never falls.
    """

    U: Tensor
    V: Tensor
    energies: Sequence[float] = field(default_factory=list)


def fit_basis(stack: Stack, rank: int, *, core: CoreKind = "full") -> Basis:
    """Fit a basis to several updates.

    Args:
        stack: The updates, scaled to weigh alike.
        rank: k, the most columns.
        core: Whether the S_i will be full or diagonal.

    Returns:
        The basis in fp64. It has fewer than k columns where they hold all updates already, and
        one at least.
    """
    left_frame, left = _reduced(stack.left)
    right_frame, right = _reduced(stack.right)
    small = Stack(left=left, right=right, groups=stack.groups)
    width = min(rank, left.shape[0], right.shape[0])
    U, V, energies = _alternated(small, width)
    if core == "diagonal":
        U, V, more = fit_diagonal(small, U, V)
        energies = more
    return Basis(U=_framed(left_frame, U), V=_framed(right_frame, V), energies=energies)


def _reduced(side: Tensor) -> tuple[Tensor | None, Tensor]:
    """A frame for the columns and what they are in it; fewer ranks than features cost less so."""
    if side.shape[1] >= side.shape[0]:
        return None, side
    frame, inside = torch.linalg.qr(side)
    return frame, inside


def _framed(frame: Tensor | None, basis: Tensor) -> Tensor:
    return (basis if frame is None else frame @ basis).contiguous()


def _alternated(stack: Stack, width: int) -> tuple[Tensor, Tensor, list[float]]:
    """U and V of `width` columns, less those that hold nothing, and the energy after each step."""
    left, right = stack.left, stack.right
    whole = stack.energy()
    if whole == 0.0:
        U, V = (torch.eye(side.shape[0], 1, dtype=side.dtype) for side in (left, right))
        return U, V, [0.0]
    U = _started(stack, left, right, width)
    V = _started(stack, right, left, width)
    V_seen = right.t() @ V
    energies: list[float] = []
    while len(energies) < 2 * _STEPS:
        U, U_seen, U_energy = _step(stack, left, stack.parts(V_seen[:, :width]), U)
        V, V_seen, V_energy = _step(stack, right, stack.parts(U_seen[:, :width]), V)
        energies += [float(energy[:width].square().sum()) for energy in (U_energy, V_energy)]
        if len(energies) > 2 and is_settled(energies[-3], energies[-1], whole):
            break
    # U's axes once more, by what V holds at the end.
    turn, U_energy = _axes(stack, U_seen[:, :width], stack.parts(V_seen[:, :width]))
    kept = [int((e[:width] > _NOTHING * whole**0.5).sum()) for e in (U_energy, V_energy)]
    keep = max(1, *kept)
    return U[:, :width] @ turn[:, :keep], V[:, :keep], energies


def _started(stack: Stack, side: Tensor, other: Tensor, width: int) -> Tensor:
    """The leading directions of one side by itself: those of a truncated HOSVD."""
    columns = min(width + _SPARE, side.shape[0])
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(side.shape[0], columns, generator=generator, dtype=side.dtype)
    # M_i M_i^T = B_i (A_i A_i^T) B_i^T, and this is a square root of what is in the middle.
    middles = [_triangles(part.mT).mT for part in stack.parts(other.t())]
    last = -1.0
    for _ in range(_START_STEPS):
        basis, _, energy = _step(stack, side, middles, basis)
        held, whole = float(energy[:width].square().sum()), float(energy.square().sum())
        if held - last <= _START_GAIN * whole:
            break
        last = held
    return basis


def _triangles(tall: Tensor) -> Tensor:
    triangles: Tensor = torch.linalg.qr(tall, mode="r").R
    return triangles


def _step(
    stack: Stack, side: Tensor, middles: Sequence[Tensor], basis: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One subspace iteration of the sum of (L_i m_i)(L_i m_i)^T, L_i a factor and m_i its middle.

    Returns:
        The new basis `[O, w]`, its strongest direction first, what it sees of the factors
        `[R, w]`, and the amplitude of each direction `[w]`.
    """
    inner = [
        (middle @ (middle.mT @ part)).flatten(0, 1)
        for middle, part in zip(middles, stack.parts(side.t() @ basis), strict=True)
    ]
    basis = torch.linalg.qr(side @ torch.cat(inner)).Q
    seen = side.t() @ basis
    turn, amplitudes = _axes(stack, seen, middles)
    return basis @ turn, seen @ turn, amplitudes


def _axes(stack: Stack, seen: Tensor, middles: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The principal axes of all L_i m_i within a basis, `[w, w]`, and their amplitudes."""
    within = torch.cat(
        [
            (part.mT @ middle).transpose(0, 1).flatten(1)
            for part, middle in zip(stack.parts(seen), middles, strict=True)
        ],
        dim=1,
    )
    # Amplitudes, not their squares: a direction of 1e-10 is one, and its square would be rounding.
    turn, amplitudes, _ = torch.linalg.svd(_triangles(within.t()).t(), full_matrices=True)
    missing = turn.shape[0] - amplitudes.shape[0]
    return turn, torch.nn.functional.pad(amplitudes, (0, missing))
