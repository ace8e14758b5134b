"""Adapters of models whose projections are fused: Phi's `qkv_proj` and `gate_up_proj`.

Such a module has one pair of factors. Read, its rows of B become several modules that share A;
written, they are put one below the other again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import torch

from bdlora_megatron.blocks import BlockFactors, compact, reshard
from bdlora_megatron.convert.adapter.lazy import LazyModules, module_facts
from bdlora_megatron.convert.adapter.neutral import (
    FUSED,
    PROJECTIONS,
    Adapter,
    BaseShape,
    ModuleKey,
    ModuleName,
)
from bdlora_megatron.convert.adapter.scale import fold_scale
from bdlora_megatron.decoder import FUSED_PARTS, facts_of
from bdlora_megatron.errors import AdapterFormatError

__all__ = ["fuse", "is_fused", "part_rows", "split"]


def is_fused(adapter: Adapter) -> bool:
    """Whether its base model in Hugging Face's format has fused projections."""
    return adapter.metadata.get(PROJECTIONS) == FUSED


def part_rows(name: ModuleName, rows: int, base: BaseShape) -> dict[ModuleName, int]:
    """Rows of each projection in a fused one.

    Args:
        name: The fused module.
        rows: Its rows.
        base: The base model; its heads or `q_size` are needed for `qkv_proj`.

    Raises:
        AdapterFormatError: They are not known, or make other rows.
    """
    parts = FUSED_PARTS[name]
    if name == "gate_up_proj":
        if rows % 2:
            raise AdapterFormatError(f"{name} has {rows} rows, wanted an even number")
        return dict.fromkeys(parts, rows // 2)
    q_size = base.q_size
    if q_size is None and base.num_heads is not None and base.head_dim is not None:
        q_size = base.num_heads * base.head_dim
    if q_size is None:
        raise AdapterFormatError(
            f"{name} has one pair of factors for q, k and v, and telling its rows apart needs the "
            "base model's heads; pass --base HF_DIR, or base=BaseShape(num_heads=..., "
            "num_kv_heads=..., head_dim=...)"
        )
    kv_size, rest = divmod(rows - q_size, 2)
    if kv_size < 1 or rest or base.kv_size not in (None, kv_size):
        raise AdapterFormatError(
            f"{name} has {rows} rows, which are not {q_size} of q and two times "
            f"{base.kv_size or 'as many'} of k and v; it is an adapter for another base model"
        )
    return dict(zip(parts, (q_size, kv_size, kv_size), strict=True))


def split(factors: BlockFactors, first: int, rows: int) -> BlockFactors:
    """One projection's part of a fused module's update; blocks of fused rows are none of it."""
    whole = reshard(factors, 1)
    return replace(whole, B=whole.B[first : first + rows])


def fuse(adapter: Adapter) -> Adapter:
    """The adapter with fused modules in place of their parts. Exact, but for scales that differ.

    Every module is looked at once, to see whether parts share A. No blocks of the parts are blocks
    of the fused rows: those become vanilla LoRA.

    Args:
        adapter: Lazy or in memory.

    Returns:
        A lazy adapter; it is usable as long as `adapter` is.

    Raises:
        AdapterFormatError: A part is missing, and how many rows it has is not known.
    """
    facts = module_facts(adapter)
    groups: dict[ModuleKey, list[ModuleKey]] = {}
    for key in facts:
        groups.setdefault(_fused_key(key), []).append(key)
    rows = {key.name: fact.out_features for key, fact in facts.items()}

    def load(key: ModuleKey) -> BlockFactors:
        members = groups[key]
        if members == [key]:
            return adapter.modules[key]
        return _fused(key.name, {m.name: adapter.modules[m] for m in members}, sizes[key.name])

    sizes = {
        name: _sizes(adapter, name, rows)
        for name in FUSED_PARTS
        if any(key.name == name for key in groups)
    }
    made = {}
    for key in groups:
        factors = load(key)
        made[key] = replace(factors, A=factors.A.to("meta"), B=factors.B.to("meta"))
    subject = f"cannot fuse the projections of adapter {adapter.name!r}"
    modules = LazyModules(made, load, subject=subject)
    return replace(adapter, modules=modules)


def _fused_key(key: ModuleKey) -> ModuleKey:
    for name, parts in FUSED_PARTS.items():
        if key.name in parts:
            return replace(key, name=name)
    return key


def _sizes(adapter: Adapter, name: ModuleName, rows: Mapping[ModuleName, int]) -> dict[str, int]:
    """Rows of every part of a fused module.

    Raises:
        AdapterFormatError: A missing part's are not known.
    """
    sizes: dict[str, int] = {}
    for part in FUSED_PARTS[name]:
        side = facts_of(part)[1].out_size
        size = rows.get(part) or getattr(adapter.base, side)
        if size is None:
            raise AdapterFormatError(
                f"cannot write adapter {adapter.name!r}: {name} also holds {part}, whose rows are "
                "not known; pass the base model's folder with --base"
            )
        sizes[part] = size
    return sizes


def _fused(
    name: ModuleName, parts: Mapping[ModuleName, BlockFactors], sizes: Mapping[str, int]
) -> BlockFactors:
    dense = {part: reshard(parts[part], 1) for part in FUSED_PARTS[name] if part in parts}
    scale = Counter(factors.scale for factors in dense.values()).most_common(1)[0][0]
    dense = {part: fold_scale(factors, scale) for part, factors in dense.items()}
    first = next(iter(dense.values()))
    A = torch.cat([factors.A for factors in dense.values()])
    B = first.B.new_zeros(sum(sizes.values()), len(A))
    top = left = 0
    for part in FUSED_PARTS[name]:
        if part in dense:
            own = dense[part].B
            B[top : top + len(own), left : left + own.shape[1]] = own
            left += own.shape[1]
        top += sizes[part]
    return compact(BlockFactors(A=A, B=B, num_blocks=1, blocked="B", scale=scale))
