"""Adapter tensors by the names of Megatron-Core's modules, and the rows of its fused layers.

    decoder.layers.[<layer>.]self_attention.linear_qkv.adapter.[adapter_q.]linear_in.weight

The stretches of rows of Mamba's and the delta net's `in_proj` are tensors of their own, whose names
end in the stretch's (`linear_out.weight.z`). Without a number in the name the tensor is a stack of
all layers on a dimension of its own. Without `adapter_<projection>` the pair serves the whole fused
layer, whose rows stand in Megatron's order: for each query group its queries, its key, its value;
all of gate, then all of up.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from bdlora_megatron.blocks import BlockFactors
from bdlora_megatron.convert.adapter.neutral import BaseShape, ModuleKey
from bdlora_megatron.decoder import (
    ALL_LINEARS,
    PARTS,
    ModuleName,
    Numbering,
    facts_of,
    parts_of,
)
from bdlora_megatron.errors import AdapterFormatError

__all__ = ["FactorName", "fuse", "linear_of", "parse_factor", "split_fused", "stem"]

_PATHS = "|".join(re.escape(path) for path in dict.fromkeys(linear.path for linear in ALL_LINEARS))
_FACTOR = re.compile(
    r"(?P<prefix>(?:[^.]+\.)*?)decoder\.layers\.(?:(?P<layer>0|[1-9][0-9]{0,4})\.)?"
    rf"(?P<linear>{_PATHS})\.adapter\."
    r"(?:adapter_(?P<part>[a-z]+)\.)?linear_(?:(?P<A>in)\.weight|out\.weight"
    r"(?:\.(?P<stretch>[A-Za-z]+))?)"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class FactorName:
    """What a tensor's name says.

    Attributes:
        prefix: What stands before `decoder.layers.`.
        layer: The layer, None for a stack of all layers.
        linear: The Megatron-Core layer.
        part: The projection in it; empty for the only one, or for all of a fused layer.
        factor: A or B.
        stretch: Which rows of B the tensor is; empty where it is all of them.
    """

    prefix: str
    layer: int | None
    linear: str
    part: str
    factor: str
    stretch: str = ""


def parse_factor(name: str, numbering: Numbering = "pairs") -> FactorName | None:
    """Take a tensor's name apart.

    Returns:
        What it says; None if it is no factor of a projection that has a name.
    """
    found = _FACTOR.fullmatch(name)
    if found is None:
        return None
    part = found["part"] or ""
    linear = found["linear"]
    known = parts_of(linear, numbering)
    if known is None or (part and part not in known):
        return None
    return FactorName(
        prefix=found["prefix"],
        layer=None if found["layer"] is None else int(found["layer"]),
        linear=linear,
        part=part,
        factor="A" if found["A"] else "B",
        stretch=found["stretch"] or "",
    )


def linear_of(name: ModuleName) -> tuple[str, str]:
    """The Megatron-Core layer that holds a projection, and the projection's name in it."""
    linear, projection = facts_of(name)
    return linear.path, projection.part


def stem(linear: str, part: str, layer: int | None, *, prefix: str = "") -> str:
    """The name of a pair of factors, up to `linear_in` and `linear_out`."""
    number = "" if layer is None else f"{layer}."
    inner = f"adapter_{part}." if part else ""
    return f"{prefix}decoder.layers.{number}{linear}.adapter.{inner}"


def split_fused(
    linear: str, keys: Sequence[ModuleKey], fused: BlockFactors, base: BaseShape
) -> Iterator[tuple[ModuleKey, BlockFactors]]:
    """The update of a whole fused layer as one update per projection, with the same A.

    Args:
        linear: The fused layer.
        keys: Its projections.
        fused: Its update; B's rows in Megatron's order.
        base: Must tell heads, key-value heads and their width for `linear_qkv`.

    Yields:
        Every projection and its update, B's rows in Hugging Face's order.

    Raises:
        AdapterFormatError: If B's rows are not those of this base model, or a block ends inside a
            query group.
    """
    groups, rows = _groups(linear, fused.out_features, base)
    if groups % fused.num_blocks and linear == "self_attention.linear_qkv":
        raise AdapterFormatError(
            f"{fused.num_blocks} blocks over {groups} query groups: a block ends inside a group, "
            "and its rows are no block of q, k or v; reshard it in Megatron first"
        )
    grouped = fused.B.unflatten(0, (groups, -1))
    for key, part in zip(keys, grouped.split(rows, dim=1), strict=True):
        yield key, replace(fused, B=part.flatten(0, 1).contiguous())


def fuse(linear: str, parts: Mapping[str, BlockFactors], base: BaseShape) -> BlockFactors:
    """One update for a whole fused layer; the inverse of `split_fused`.

    Raises:
        AdapterFormatError: If the rows are not those of this base model.
    """
    factors = [parts[part] for part in PARTS[linear]]
    groups, rows = _groups(linear, sum(f.out_features for f in factors), base)
    wanted = [groups * count for count in rows]
    if [f.out_features for f in factors] != wanted:
        raise AdapterFormatError(
            f"{linear} has rows {[f.out_features for f in factors]}, wanted {wanted} by the base "
            "model's heads"
        )
    grouped = [f.B.unflatten(0, (groups, -1)) for f in factors]
    return replace(factors[0], B=torch.cat(grouped, dim=1).flatten(0, 1))


def _groups(linear: str, out_features: int, base: BaseShape) -> tuple[int, list[int]]:
    """How many groups the rows of a fused layer form, and each projection's rows in a group.

    Raises:
        AdapterFormatError: If the heads are not known or make other rows.
    """
    if linear != "self_attention.linear_qkv":
        return 1, [out_features // 2, out_features // 2]
    heads, groups, width = base.num_heads, base.num_kv_heads, base.head_dim
    if heads is None or groups is None or width is None:
        raise AdapterFormatError(
            "linear_qkv has one pair of factors for q, k and v, and telling its rows apart needs "
            "the base model's heads; pass --base HF_DIR, or base=BaseShape(num_heads=..., "
            "num_kv_heads=..., head_dim=...)"
        )
    if heads % groups or width * (heads + 2 * groups) != out_features:
        raise AdapterFormatError(
            f"linear_qkv has {out_features} rows, but {heads} heads and {groups} key-value heads "
            f"of width {width} make {width * (heads + 2 * groups)}; it is an adapter for another "
            "base model, or the base shape is wrong"
        )
    return groups, [heads // groups * width, width, width]
