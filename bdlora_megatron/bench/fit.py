"""A robust fit: Levenberg and Marquardt's search for the parameters whose errors are least."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["least_errors"]

_STEPS = 200
#: The damping is divided by this after a step that helped, and multiplied by its square after one
#: that did not.
_EASE = 3.0
_NUDGE = 1e-4
#: Curvature of a parameter of which the errors tell nothing.
_FLAT = 1e-9
_DONE = 1e-7


def least_errors(
    errors_at: Callable[[Tensor], Tensor], start: Tensor, *, reach: float, near: float
) -> Tensor:
    """Parameters that make errors small.

    What is made small is the sum of ``hypot(error, near)``. It grows with the square of an error up
    to about ``near`` and linearly beyond: a measurement that was disturbed then pulls little harder
    than any other.

    Args:
        errors_at: The errors ``[n]`` of parameters ``[k]``, float64.
        start: Where to begin, ``[k]``.
        reach: How far a parameter may go from there.
        near: Which errors are small.

    Returns:
        The parameters, ``[k]``.
    """
    point, errors, damping = start, errors_at(start), 1.0
    for _ in range(_STEPS):
        slopes = _slopes(errors_at, point, errors)
        weighted = slopes / _sizes(errors, near)[:, None]
        curvature, downhill = slopes.T @ weighted, -(weighted.T @ errors)
        damped = curvature + torch.diag(damping * curvature.diagonal() + _FLAT)
        moved = point + torch.linalg.solve(damped, downhill)
        moved = moved.clamp(start - reach, start + reach)
        found = errors_at(moved)
        gain = float((_sizes(errors, near) - _sizes(found, near)).sum())
        if gain > 0.0:
            point, errors, damping = moved, found, damping / _EASE
        else:
            damping *= _EASE**2
        if abs(gain) < _DONE:
            break
    return point


def _sizes(errors: Tensor, near: float) -> Tensor:
    return torch.hypot(errors, torch.full_like(errors, near))


def _slopes(errors_at: Callable[[Tensor], Tensor], point: Tensor, errors: Tensor) -> Tensor:
    """How each error changes with each parameter, ``[n, k]``."""
    moves = _NUDGE * torch.eye(len(point), dtype=point.dtype)
    return torch.stack([errors_at(point + move) - errors for move in moves], dim=1) / _NUDGE
