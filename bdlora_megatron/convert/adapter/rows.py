"""Rows of a blocked B between Hugging Face's order and that of Megatron-Core's layers.

Both have the same rows. Mamba's ``in_proj`` has its stretches (z, x, B, C, dt) one after the other
in both; ranks, and so blocks, take a piece of each. The gated delta net's two modules interleave
theirs by key head in Hugging Face's models, where a block of whole heads is one stretch of rows,
and have them one after the other in Megatron-Core's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from bdlora_megatron.blocks import BlockFactors, in_blocks, in_rows, reshard

__all__ = ["in_file_order", "in_layer_order"]


def in_file_order(factors: BlockFactors, groups: int) -> BlockFactors:
    """An update with its rows in Hugging Face's order. Exact.

    Args:
        factors: In the layer's order, with the stretches of its rows.
        groups: Groups by which Hugging Face interleaves them; 1 where it does not.

    Returns:
        The same update; with one block where a block would end inside a group.
    """
    if not factors.parts:
        return factors
    if groups == 1:
        return replace(factors, parts=()) if factors.num_blocks == 1 else factors
    parts = factors.parts
    if groups % factors.num_blocks:
        factors = reshard(factors, 1)
    B = in_blocks(factors.B, groups, parts).flatten(0, 1)
    return replace(factors, B=B, parts=())


def in_layer_order(factors: BlockFactors, parts: Sequence[int], groups: int) -> BlockFactors:
    """An update with its rows, and the stretches that blocks cut, as a layer has them. Exact.

    Args:
        factors: In Hugging Face's order.
        parts: Rows of the layer's stretches; empty where they are one.
        groups: As of ``in_file_order``.

    Returns:
        The same update; with one block where its blocks are no pieces of those stretches.

    Raises:
        ShapeError: The update has other rows than the stretches.
    """
    if not parts:
        return factors
    sizes = tuple(parts)
    if groups == 1:
        if factors.num_blocks > 1 and factors.parts != sizes:
            factors = reshard(factors, 1)
        return replace(factors, parts=sizes)
    if factors.parts or groups % factors.num_blocks:
        factors = reshard(factors, 1)
    B = in_rows(factors.B.unflatten(0, (groups, -1)), sizes)
    return replace(factors, B=B, parts=sizes)
