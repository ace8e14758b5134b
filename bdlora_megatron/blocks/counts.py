"""How many parameters an update has, and which block-diagonal rank costs what a LoRA costs.

Letters in shapes: I in features, O out features, R total rank, N blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bdlora_megatron.blocks.factors import Blocked
from bdlora_megatron.errors import ConfigError, ShapeError

__all__ = ["ModuleShape", "matching_rank", "num_parameters", "rank_within"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleShape:
    """What of a linear module decides its parameter count."""

    in_features: int
    """I, over all tensor-parallel ranks."""
    out_features: int
    """O, over all tensor-parallel ranks."""
    blocked: Blocked
    """`"B"` for a column-parallel module, `"A"` for a row-parallel one."""


def num_parameters(
    in_features: int, out_features: int, *, rank: int, num_blocks: int, blocked: Blocked
) -> int:
    """The numbers stored in both factors: R (I + O / N) or R (I / N + O).

    Args:
        in_features: I.
        out_features: O.
        rank: R, the total rank.
        num_blocks: N; 1 gives vanilla LoRA's R (I + O).
        blocked: Which factor is block-diagonal.

    Returns:
        The count over all tensor-parallel ranks.

    Raises:
        ShapeError: If N does not divide the rank and the width of the blocked side.
    """
    width = out_features if blocked == "B" else in_features
    if num_blocks < 1 or rank % num_blocks or width % num_blocks:
        raise ShapeError(
            f"rank={rank} and {'out' if blocked == 'B' else 'in'}_features={width} are not both "
            f"multiples of num_blocks={num_blocks}; use a number of blocks that divides both"
        )
    dense = in_features if blocked == "B" else out_features
    return rank * (dense + width // num_blocks)


def matching_rank(shapes: Sequence[ModuleShape], *, lora_rank: int, num_blocks: int) -> int:
    """The largest block-diagonal rank with no more parameters than a LoRA.

    The rule of the BD-LoRA experiments: raise the rank in steps of N until the parameters over all
    target modules exceed LoRA's, then take one step back.

    Args:
        shapes: The shapes of all target modules.
        lora_rank: The rank of the LoRA to match.
        num_blocks: The number of blocks, N.

    Returns:
        The rank, a positive multiple of N.

    Raises:
        ConfigError: If there is no module, the LoRA rank is not positive, or even rank N costs
            more than the LoRA (a silent larger budget would make the comparison unfair).
    """
    if not shapes or lora_rank < 1:
        raise ConfigError(
            f"got {len(shapes)} modules and lora_rank={lora_rank}; wanted at least one module "
            "and a positive rank"
        )

    budget = _parameters(shapes, lora_rank, 1)
    step = _parameters(shapes, num_blocks, num_blocks)
    if step > budget:
        raise ConfigError(
            f"rank {num_blocks}, the smallest with num_blocks={num_blocks}, has {step} parameters, "
            f"more than the {budget} of a LoRA of rank {lora_rank}; use a lora_rank of at least "
            f"{-(-step * lora_rank // budget)} or fewer blocks"
        )
    return num_blocks * (budget // step)


def rank_within(shapes: Sequence[ModuleShape], *, num_parameters: int, num_blocks: int) -> int:
    """The largest block-diagonal rank that all modules can have within a budget.

    Args:
        shapes: Every target module.
        num_parameters: The most numbers to store, over all modules and tensor-parallel ranks.
        num_blocks: N.

    Returns:
        A multiple of N; 0 if even rank N does not fit.

    Raises:
        ConfigError: If there is no module.
    """
    if not shapes:
        raise ConfigError("got no modules; wanted at least one")
    return num_blocks * (num_parameters // _parameters(shapes, num_blocks, num_blocks))


def _parameters(shapes: Sequence[ModuleShape], rank: int, num_blocks: int) -> int:
    return sum(
        num_parameters(
            shape.in_features,
            shape.out_features,
            rank=rank,
            num_blocks=num_blocks,
            blocked=shape.blocked,
        )
        for shape in shapes
    )
