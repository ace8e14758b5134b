"""Which projections a Megatron-Core linear layer holds, and in what order its rows stand.

Megatron-Core fuses q, k, v into ``linear_qkv`` and gate, up into ``linear_fc1``. An adapter keeps
one pair of factors per projection, because that is what PEFT trains and what files hold; this
module says where each projection's rows go in the fused layer.

`linear_qkv` interleaves by query group: ``[q q k v | q q k v | ...]``, so that a rank's share is a
whole number of groups. `linear_fc1` of a gated MLP stores, on each rank, its gate rows and then its
up rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bdlora_megatron.errors import ShapeError, UnsupportedError

__all__ = ["LayerGeometry", "Projection", "layer_geometry"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Projection:
    """One projection inside a linear layer.

    Attributes:
        name: ``q``, ``k``, ``v``, ``gate``, ``up``, or empty where the layer is one projection.
        out_features: Its rows over all ranks.
        parts: How many stretches of its rows are each split over ranks by themselves: 2 for a
            gated ``linear_fc1`` taken as one projection, whose rank holds ``[gate_i; up_i]``.
    """

    name: str
    out_features: int
    parts: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerGeometry:
    """The projections of one layer and how their rows interleave.

    Attributes:
        projections: In the order in which they stand within a group.
        groups: Query groups over all ranks; 1 where rows do not interleave.
    """

    projections: tuple[Projection, ...]
    groups: int = 1

    def local_groups(self, tp_size: int) -> int:
        """Groups on one of ``tp_size`` ranks."""
        return self.groups // tp_size if self.groups > 1 else 1


def layer_geometry(
    name: str, config: Any, out_features: int, *, fused: bool, tp_size: int
) -> LayerGeometry:
    """Say which projections the layer called ``name`` holds.

    Args:
        name: The layer's attribute name, such as ``linear_qkv``.
        config: The model's ``TransformerConfig``.
        out_features: The layer's output size over all ranks.
        fused: Treat the whole layer as one projection with one pair of factors.
        tp_size: Ranks that share the layer.

    Returns:
        The projections in row order.

    Raises:
        ShapeError: The layer's size is not what ``config`` says.
        UnsupportedError: A rank would hold part of a key-value head, or the layer holds more than
            q, k and v.
    """
    if name == "linear_qkv":
        _check_qkv(config, out_features, tp_size)
        return _qkv(config, out_features, fused=fused)
    if name == "linear_fc1" and config.gated_linear_unit:
        return _gated(out_features, fused=fused)
    return LayerGeometry(projections=(Projection(name="", out_features=out_features),))


def _check_qkv(config: Any, out_features: int, tp_size: int) -> None:
    if getattr(config, "attention_output_gate", False):
        raise UnsupportedError(
            "linear_qkv also holds an output gate (attention_output_gate=True), which no adapter "
            "format covers; leave linear_qkv out of target_modules"
        )
    groups = config.num_query_groups or config.num_attention_heads
    if groups % tp_size:
        raise UnsupportedError(
            f"num_query_groups={groups} over {tp_size} tensor-parallel ranks: a rank would hold "
            f"part of a key-value head; use a tensor-parallel size that divides {groups}, or leave "
            "linear_qkv out of target_modules"
        )
    wanted = config.kv_channels * (config.num_attention_heads + 2 * groups)
    if wanted != out_features:
        raise ShapeError(
            f"linear_qkv has {out_features} output features, but the config's heads make {wanted}; "
            "pass the config that the layer was built with"
        )


def _qkv(config: Any, out_features: int, *, fused: bool) -> LayerGeometry:
    if fused:
        return LayerGeometry(projections=(Projection(name="", out_features=out_features),))
    groups = config.num_query_groups or config.num_attention_heads
    heads = {"q": config.num_attention_heads, "k": groups, "v": groups}
    return LayerGeometry(
        projections=tuple(
            Projection(name=name, out_features=config.kv_channels * count)
            for name, count in heads.items()
        ),
        groups=groups,
    )


def _gated(out_features: int, *, fused: bool) -> LayerGeometry:
    if fused:
        projection = Projection(name="", out_features=out_features, parts=2)
        return LayerGeometry(projections=(projection,))
    halves = (Projection(name=name, out_features=out_features // 2) for name in ("gate", "up"))
    return LayerGeometry(projections=tuple(halves))
