"""Random layers, ranks and batches for the grouped product, each drawn from a seed.

Kernels are compiled for a layer, a room for ranks and types, which takes longer than a product. So
a ``Setup`` settles those, and several batches are drawn for each.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch

from bdlora_megatron.ops import Columns

__all__ = ["POPULARITY", "Bounds", "Setup", "batches", "draw_setup"]

POPULARITY = ("distinct", "uniform", "zipf", "identical", "skewed", "some without")

#: Input features, the slices' columns, output columns; as ``tests.unit.ops.cases`` has them.
Geometry: TypeAlias = tuple[int, tuple[Columns, ...], int]

#: Of inputs and outputs, and of factors.
_TYPES = (
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
)


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """How large random cases are, at most.

    Attributes:
        features: Of an input or of a slice's output.
        rank: Of an adapter.
        slots: Adapters.
        tokens: Numbers of tokens to draw from.
    """

    features: int
    rank: int
    slots: int
    tokens: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What kernels are compiled for.

    Attributes:
        seed: All else follows from it and the bounds.
        geometry: The layer.
        ranks: Of each slot's adapter; 0 where the slot holds none.
        data: Type of inputs and outputs.
        factors: Type of the factors.
    """

    seed: int
    geometry: Geometry
    ranks: tuple[int, ...]
    data: torch.dtype
    factors: torch.dtype


def draw_setup(seed: int, bounds: Bounds) -> Setup:
    """Draw a layer, adapters and types.

    Args:
        seed: Equal seeds draw the same.
        bounds: How large.

    Returns:
        The setup.
    """
    rng = random.Random(seed)
    # Sizes that divide by 16, as models have them, and any others.
    step = rng.choice([1, 16, 16])
    most = max(1, bounds.features // step)
    slices = rng.choice([1, 1, 2, 3, 4])
    widths = [step * rng.randint(1, max(1, most // slices)) for _ in range(slices)]
    columns = _interleaved(rng, widths, step) if rng.random() < 0.4 else _beside(rng, widths, step)
    outputs = max(part.end for part in columns) + step * rng.randint(0, 2)
    capacity = rng.randint(1, bounds.rank)
    ranks = [rng.choice([0, 1, capacity, rng.randint(0, capacity)]) for _ in range(bounds.slots)]
    data, factors = rng.choice(_TYPES)
    return Setup(
        seed=seed,
        geometry=(step * rng.randint(1, most), columns, outputs),
        ranks=(capacity, *ranks[1:]),
        data=data,
        factors=factors,
    )


def _beside(rng: random.Random, widths: list[int], step: int) -> tuple[Columns, ...]:
    """Slices one after another, with columns between them that belong to none."""
    columns, offset = [], step * rng.randint(0, 1)
    for width in widths:
        columns.append(Columns(width=width, offset=offset))
        offset += width + step * rng.randint(0, 1)
    return tuple(columns)


def _interleaved(rng: random.Random, widths: list[int], step: int) -> tuple[Columns, ...]:
    """Groups of all slices, as query groups lie."""
    groups = rng.choice([2, 3])
    widths = [step * max(1, width // step // groups) for width in widths]
    stride = sum(widths) + step * rng.randint(0, 1)
    offsets = [sum(widths[:j]) for j in range(len(widths))]
    return tuple(
        Columns(width=width, groups=groups, stride=stride, offset=offset)
        for width, offset in zip(widths, offsets, strict=True)
    )


def batches(setup: Setup, bounds: Bounds, count: int) -> Iterator[tuple[str, list[int]]]:
    """Draw which slot each token uses, batch by batch.

    Args:
        setup: Whose slots.
        bounds: How many tokens.
        count: How many batches.

    Yields:
        How popular the slots are, and each token's slot; -1 for none.
    """
    rng = random.Random(setup.seed + 10**6)
    for number in range(count):
        popularity = POPULARITY[(setup.seed + number) % len(POPULARITY)]
        slots = _draw(rng, popularity, rng.choice(bounds.tokens), len(setup.ranks))
        # A prefill's tokens stand together, a decoding step's do not.
        yield popularity, sorted(slots) if rng.random() < 0.5 else rng.sample(slots, len(slots))


def _draw(rng: random.Random, popularity: str, tokens: int, slots: int) -> list[int]:
    every = list(range(slots))
    if popularity == "distinct":
        return rng.sample(every, min(tokens, slots))
    if popularity == "identical":
        return [rng.choice(every)] * tokens
    weights = {
        "zipf": [1 / (slot + 1) for slot in every],
        "skewed": [9.0 * slots] + [1.0] * (slots - 1),
    }
    drawn = rng.choices(every, weights.get(popularity), k=tokens)
    if popularity == "some without":
        drawn = [-1 if rng.random() < 0.4 else slot for slot in drawn]
    return drawn
