"""Scales in formats: PEFT's alpha that gives one exactly, and one scale for all modules."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace

from bdlora_megatron.blocks import BlockFactors
from bdlora_megatron.convert.adapter.lazy import map_modules, module_facts
from bdlora_megatron.convert.adapter.neutral import Adapter, ModuleKey

__all__ = [
    "choose_alphas",
    "fold_scale",
    "nearest_alpha",
    "peft_scale",
    "warn_inexact",
    "with_one_scale",
]

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
    """Tell that some scales were written to the nearest one."""
    if missed:
        logger.warning(
            "the scale of %d modules of adapter %r, such as %s, is no quotient of an alpha and the "
            "rank; it is written to the nearest one, a float64's last place away",
            len(missed),
            name,
            missed[0],
        )


def fold_scale(factors: BlockFactors, scale: float) -> BlockFactors:
    """The same update at another scale, whose B holds the difference, rounded once."""
    if factors.scale == scale:
        return factors
    B = (factors.B.double() * (factors.scale / scale)).to(factors.B.dtype)
    return replace(factors, B=B, scale=scale)


def with_one_scale(adapter: Adapter) -> Adapter:
    """The same function with one scale for all modules, for formats that hold one.

    Returns:
        The adapter itself where its modules agree; else one whose B holds the difference, which a
        warning says.
    """
    facts = module_facts(adapter)
    counts = Counter(factors.scale for factors in facts.values())
    if len(counts) == 1:
        return adapter
    scale = max((s for s in counts if s), key=lambda s: counts[s])

    def change(_: ModuleKey, factors: BlockFactors) -> BlockFactors:
        return fold_scale(factors, scale)

    others = [key for key, factors in facts.items() if factors.scale != scale]
    logger.warning(
        "adapter %r has %d scales and the format one: those of %d modules, such as %s, are folded "
        "into their B, which rounds it once",
        adapter.name,
        len(counts),
        len(others),
        others[0],
    )
    return map_modules(adapter, change, subject=f"cannot fold the scales of {adapter.name!r}")
