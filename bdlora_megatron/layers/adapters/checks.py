"""Whether plans divide as a layout needs."""

from __future__ import annotations

from collections.abc import Sequence

from bdlora_megatron.config import Layout
from bdlora_megatron.errors import ConfigError
from bdlora_megatron.layers.adapters.base import ProjectionPlan

__all__ = ["check_blocks", "check_divides", "check_layout"]


def check_layout(layout: Layout, plans: Sequence[ProjectionPlan]) -> None:
    """Refuse blocks in a vanilla layout.

    Raises:
        ConfigError: A plan has blocks, and ``layout`` holds none.
    """
    if layout is not Layout.BDLORA and any(plan.num_blocks != 1 for plan in plans):
        blocks = sorted({plan.num_blocks for plan in plans})
        raise ConfigError(
            f"num_blocks={blocks} in layout {layout.value!r}; only 'bdlora' holds blocks: reshard "
            "the factors to num_blocks=1 first, or use layout 'bdlora'"
        )


def check_blocks(plan: ProjectionPlan, tp_size: int, features: int, what: str) -> None:
    """Refuse a block count that does not divide over ranks, rank or features.

    Raises:
        ConfigError: Something does not divide; the message says what would.
    """
    label = f"projection {plan.projection.name!r}: " if plan.projection.name else ""
    if plan.num_blocks % tp_size:
        raise ConfigError(
            f"{label}num_blocks={plan.num_blocks} is not a multiple of the tensor-parallel size "
            f"{tp_size}; train with a multiple of it, or reshard a loaded adapter to one"
        )
    if plan.rank % plan.num_blocks:
        raise ConfigError(
            f"{label}rank={plan.rank} is not a multiple of num_blocks={plan.num_blocks}; pad the "
            "rank or choose another"
        )
    shares = [(what, features)] if what == "in_features" else []
    shares = shares or [(f"{part.name} rows", part.size) for part in plan.projection.parts]
    for kind, share in shares or [(what, features)]:
        if share % plan.num_blocks:
            raise ConfigError(
                f"{label}{kind}={share} is not a multiple of num_blocks={plan.num_blocks}; choose "
                "a block count that divides it"
            )


def check_divides(value: int, tp_size: int, what: str) -> None:
    """Refuse a size that ranks cannot share evenly.

    Raises:
        ConfigError: ``value`` is not a multiple of ``tp_size``.
    """
    if value % tp_size:
        raise ConfigError(
            f"{what}={value} is not a multiple of the tensor-parallel size {tp_size}; pad it, or "
            "use layout 'bdlora'"
        )
