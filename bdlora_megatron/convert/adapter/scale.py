"""PEFT's alpha for a given scale, such that PEFT computes the very same number from it."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Sequence

__all__ = ["choose_alphas", "nearest_alpha", "peft_scale", "warn_inexact"]

logger = logging.getLogger(__name__)


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
        alphas = {pair: nearest_alpha(*pair, use_rslora=use_rslora) for pair in pairs}
        missed = sum(
            peft_scale(alpha, pair[0], use_rslora=use_rslora) != pair[1]
            for pair, alpha in alphas.items()
        )
        if missed < fewest:
            best, fewest = (use_rslora, alphas), missed
    return best


def nearest_alpha(rank: int, scale: float, *, use_rslora: bool) -> float:
    """The whole number that gives the scale, or else the float that gives it or comes nearest."""
    middle = scale * (math.sqrt(rank) if use_rslora else rank)
    below, above = math.nextafter(middle, -math.inf), math.nextafter(middle, math.inf)
    candidates = (round(middle), middle, below, above)

    def error(alpha: float) -> float:
        return abs(peft_scale(alpha, rank, use_rslora=use_rslora) - scale)

    return min(candidates, key=error)


def warn_inexact(name: str, missed: Sequence[object]) -> None:
    """Tell that some scales were written to the nearest one.

    Args:
        name: The adapter's name.
        missed: The modules whose scale no alpha gives.
    """
    if missed:
        logger.warning(
            "the scale of %d modules of adapter %r, such as %s, is no quotient of an alpha and the "
            "rank; it is written to the nearest one, a float64's last place away",
            len(missed),
            name,
            missed[0],
        )
