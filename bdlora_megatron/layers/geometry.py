"""Which projections a Megatron-Core linear layer holds, and in what order its rows stand.

Megatron-Core fuses q, k, v into ``linear_qkv`` and gate, up into ``linear_fc1``. An adapter keeps
one pair of factors per projection, because that is what PEFT trains and what files hold; this
module says where each projection's rows go in the fused layer.

`linear_qkv` interleaves by query group: ``[q q k v | q q k v | ...]``, so that a rank's share is a
whole number of groups. `linear_fc1` of a gated MLP stores, on each rank, its gate rows and then its
up rows. So do, by themselves on each rank, the stretches of Mamba's ``in_proj`` (z, x, B, C, dt)
and of the gated delta net's (query, key, value, z, beta, alpha).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from bdlora_megatron.decoder import facts_of
from bdlora_megatron.errors import ShapeError, UnsupportedError

__all__ = ["LayerGeometry", "Projection", "Stretch", "check_own_heads", "layer_geometry"]


class Stretch(NamedTuple):
    """Rows of a projection that ranks split by themselves."""

    name: str
    size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Projection:
    """One projection inside a linear layer.

    Attributes:
        name: ``q``, ``k``, ``v``, ``gate``, ``up``, or empty where the layer is one projection.
        out_features: Its rows over all ranks.
        parts: Where its rows are several stretches that are each split over ranks by themselves,
            such as ``gate`` and ``up`` of a gated ``linear_fc1`` taken as one projection, whose
            rank holds ``[gate_i; up_i]``. Empty where they are one.
        groups: Hugging Face interleaves these stretches by so many groups.
        replicas: How many ranks hold each of its heads; ``out_features`` counts every one.
    """

    name: str
    out_features: int
    parts: tuple[Stretch, ...] = ()
    groups: int = 1
    replicas: int = 1

    @property
    def own_features(self) -> int:
        """Its rows without replicas, as adapters have them."""
        return self.out_features // self.replicas

    @property
    def part_sizes(self) -> tuple[int, ...]:
        """Rows of each stretch; empty where there is one."""
        return tuple(part.size for part in self.parts)


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
        name: The layer's attribute name, such as ``linear_qkv``, or the end of its path; an
            ``in_proj`` takes its parent's, since Mamba and the delta net both have one.
        config: The model's ``TransformerConfig``.
        out_features: The layer's output size over all ranks.
        fused: Treat the whole layer as one projection with one pair of factors.
        tp_size: Ranks that share the layer.

    Raises:
        ShapeError: The layer's size is not what ``config`` says.
        UnsupportedError: A rank would hold part of a key-value head, the layer holds more than
            q, k and v, or ``fused`` asks for one pair in a delta net.
    """
    if name.endswith("mixer.in_proj"):
        return _mamba(config, out_features)
    if name.endswith("self_attention.in_proj"):
        return _delta_net(config, out_features, fused=fused)
    name = name.rpartition(".")[2]
    if name == "linear_qkv":
        _check_qkv(config, out_features, tp_size)
        return _qkv(config, out_features, fused=fused)
    if name == "linear_fc1" and config.gated_linear_unit:
        return _gated(out_features, fused=fused)
    return LayerGeometry(projections=(Projection(name="", out_features=out_features),))


def _kv_head_replicas(config: Any) -> int:
    """How many ranks hold each key-value head, all of which ``num_query_groups`` counts."""
    return int(getattr(config, "kv_head_replicas", 1))


def check_own_heads(name: str, config: Any) -> None:
    """Refuse to train or save an adapter on heads that several ranks hold a copy of.

    Args:
        name: The layer's name or path.
        config: The model's ``TransformerConfig``.

    Raises:
        UnsupportedError: The layer was built for serving (``ModelShape.for_serving``) and repeats
            key-value heads.
    """
    replicas = _kv_head_replicas(config)
    if replicas == 1 or name.rpartition(".")[2] != "linear_qkv":
        return
    heads = config.num_query_groups // replicas
    fit = [str(size) for size in range(1, heads + 1) if heads % size == 0]
    raise UnsupportedError(
        f"{name} was loaded to serve, with each of {heads} key-value heads on {replicas} ranks; "
        "nothing sums the copies' gradients. To train or save an "
        f"adapter, use a tensor-parallel size of {', '.join(fit)}, without for_serving, or leave "
        "linear_qkv out of target_modules"
    )


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
            "linear_qkv out of target_modules; to serve, load the model with for_serving=True, "
            "which repeats the heads"
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
    replicas = _kv_head_replicas(config)
    heads = {"q": (config.num_attention_heads, 1), "k": (groups, replicas), "v": (groups, replicas)}
    return LayerGeometry(
        projections=tuple(
            Projection(name=name, out_features=config.kv_channels * count, replicas=copies)
            for name, (count, copies) in heads.items()
        ),
        groups=groups,
    )


def _gated(out_features: int, *, fused: bool) -> LayerGeometry:
    if fused:
        parts = tuple(Stretch(half, out_features // 2) for half in ("gate", "up"))
        projection = Projection(name="", out_features=out_features, parts=parts)
        return LayerGeometry(projections=(projection,))
    halves = (Projection(name=name, out_features=out_features // 2) for name in ("gate", "up"))
    return LayerGeometry(projections=tuple(halves))


def _mamba(config: Any, out_features: int) -> LayerGeometry:
    """Mamba's z, x, B, C and dt, which have one pair of factors, as they have one module.

    Raises:
        ShapeError: The layer's size is not what ``config`` says.
    """
    state, width = config.mamba_num_groups * config.mamba_state_dim, config.mamba_head_dim
    heads, rest = divmod(out_features - 2 * state, 2 * width + 1)
    if rest or heads < 1 or config.mamba_num_heads not in (None, heads):
        raise ShapeError(
            f"in_proj has {out_features} output features, which are not 2 * heads * head_dim + 2 * "
            f"groups * state + heads of mamba_num_heads={config.mamba_num_heads}, mamba_head_dim="
            f"{width}, mamba_num_groups={config.mamba_num_groups}, mamba_state_dim="
            f"{config.mamba_state_dim}; pass the config that the layer was built with"
        )
    sizes = (heads * width, heads * width, state, state, heads)
    (_, facts) = facts_of("mixer.in_proj")
    parts = tuple(map(Stretch, facts.stretches, sizes))
    return LayerGeometry(projections=(Projection(name="", out_features=out_features, parts=parts),))


def _delta_net(config: Any, out_features: int, *, fused: bool) -> LayerGeometry:
    """A gated delta net's two modules, whose rows Hugging Face groups by key head.

    Raises:
        ShapeError: The layer's size is not what ``config`` says.
        UnsupportedError: ``fused`` asks for one pair.
    """
    if fused:
        raise UnsupportedError(
            "fused=True and the gated delta net's in_proj: its rows are two modules' in Hugging "
            "Face's models, and no adapter format has one pair for both; use fused=False"
        )
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values = config.linear_num_value_heads * config.linear_value_head_dim
    heads = config.linear_num_value_heads
    wanted = 2 * (keys + values + heads)
    if wanted != out_features:
        raise ShapeError(
            f"in_proj has {out_features} output features, but the config's linear_* sizes make "
            f"{wanted}; pass the config that the layer was built with"
        )
    sizes = {
        "linear_attn.in_proj_qkvz": (keys, keys, values, values),
        "linear_attn.in_proj_ba": (heads, heads),
    }
    projections = []
    for name, rows in sizes.items():
        (_, facts) = facts_of(name)  # type: ignore[arg-type]
        projections.append(
            Projection(
                name=facts.part,
                out_features=sum(rows),
                parts=tuple(map(Stretch, facts.stretches, rows)),
                groups=config.linear_num_key_heads,
            )
        )
    return LayerGeometry(projections=tuple(projections))
