"""PEFT's alpha for a given scale, such that PEFT computes the very same number from it."""

from __future__ import annotations

import math
from collections.abc import Collection

__all__ = ["choose_alphas", "peft_scale"]


def peft_scale(alpha: float, rank: int, *, use_rslora: bool) -> float:
    """The scale as PEFT computes it."""
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank


def choose_alphas(
    pairs: Collection[tuple[int, float]],
) -> tuple[bool, dict[tuple[int, float], float]]:
    """Find alpha for every rank and scale, and whether to divide by the rank or by its root.

    Division does not reach every floating-point number, so the way that reaches more of the scales
    is taken; scales that PEFT itself computed are always reached.

    Args:
        pairs: `(rank, scale)` of every module.

    Returns:
        `use_rslora` and alpha for each pair. Where no alpha gives the scale, it is the nearest,
        one unit in the last place of a float64 away.
    """
    best: tuple[bool, dict[tuple[int, float], float]] = (False, {})
    fewest = len(pairs) + 1
    for use_rslora in (False, True):
        alphas = {pair: _alpha(*pair, use_rslora=use_rslora) for pair in pairs}
        missed = sum(
            peft_scale(alpha, pair[0], use_rslora=use_rslora) != pair[1]
            for pair, alpha in alphas.items()
        )
        if missed < fewest:
            best, fewest = (use_rslora, alphas), missed
    return best


def _alpha(rank: int, scale: float, *, use_rslora: bool) -> float:
    """The whole number that gives the scale, or the float near `scale * rank` that does."""
    middle = scale * (math.sqrt(rank) if use_rslora else rank)
    below, above = math.nextafter(middle, -math.inf), math.nextafter(middle, math.inf)
    candidates = (round(middle), middle, below, above)

    def error(alpha: float) -> float:
        return abs(peft_scale(alpha, rank, use_rslora=use_rslora) - scale)

    return min(candidates, key=error)
