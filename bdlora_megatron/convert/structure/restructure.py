"""Giving every module of an adapter another rank or number of blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias, get_args

import torch

from bdlora_megatron.blocks import (
    BlockFactors,
    ModuleShape,
    compact,
    in_blocks,
    matching_rank,
    reshard,
    resharded_rank,
    truncate,
)
from bdlora_megatron.convert.adapter import Adapter, ModuleKey
from bdlora_megatron.convert.adapter.lazy import LazyModules, module_facts
from bdlora_megatron.convert.adapter.problems import Problems
from bdlora_megatron.convert.structure.changes import ModuleChange, StructureReport, measure
from bdlora_megatron.decoder import facts_of, heads_fit
from bdlora_megatron.errors import ConfigError, ShapeError

__all__ = [
    "Restructured",
    "Structure",
    "StructureMode",
    "check_fits",
    "module_shapes",
    "restructure",
]

StructureMode: TypeAlias = Literal["keep", "exact", "truncate", "reshard"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Structure:
    """The structure that every module of an adapter is to have.

    | mode | blocks | rank | loss |
    |---|---|---|---|
    | `keep` | as they are | as it is | none |
    | `reshard` | exactly `num_blocks` | what `blocks.resharded_rank` says | none |
    | `exact` | a multiple of `num_blocks` | the least found by `blocks.compact` | none |
    | `truncate` | a multiple of `num_blocks` | at most the rank or budget | reported |

    `exact` leaves a module alone whose blocks already fit, and so does `truncate` if its rank does
    too. A vanilla module needs `num_blocks` times its rank to be exact.

    Raises:
        ConfigError: If a value is out of range, or two disagree.
    """

    mode: StructureMode = "keep"
    """What may change."""

    num_blocks: int = 1
    """The tensor-parallel size to serve at. Not used by `keep`."""

    rank: int | None = None
    """For `truncate`: the largest total rank, a multiple of `num_blocks`."""

    budget_of_rank: int | None = None
    """For `truncate`: have no more parameters than a vanilla LoRA of this rank would."""

    def __post_init__(self) -> None:
        if self.mode not in get_args(StructureMode):
            raise ConfigError(f"mode={self.mode!r}; wanted one of {list(get_args(StructureMode))}")
        if self.num_blocks < 1:
            raise ConfigError(f"num_blocks={self.num_blocks}; wanted 1 or more")
        if self.mode != "truncate":
            if self.rank is not None or self.budget_of_rank is not None:
                raise ConfigError(
                    f"a rank or a budget is given with the structure {self.mode!r}, which loses "
                    "nothing; wanted them with 'truncate' only: leave them out or choose it"
                )
            return
        if (self.rank is None) == (self.budget_of_rank is None):
            raise ConfigError(
                "the structure 'truncate' needs either a rank or the rank of a LoRA whose "
                f"parameters are the budget; got rank={self.rank}, "
                f"budget_of_rank={self.budget_of_rank}"
            )
        if self.rank is not None and (self.rank < 1 or self.rank % self.num_blocks):
            raise ConfigError(
                f"rank={self.rank} is not a positive multiple of num_blocks={self.num_blocks}; "
                "every block gets rank / num_blocks"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Restructured:
    """An adapter of another structure, and what that cost.

    Attributes:
        adapter: Lazy: each look-up of a module computes it. Usable as long as its source is.
        structure: What was asked for.
    """

    adapter: Adapter
    structure: Structure
    _changes: dict[ModuleKey, ModuleChange] = field(default_factory=dict)

    def report(self) -> StructureReport:
        """Every module before and after. Modules that were not looked up yet are computed.

        Returns:
            The report.
        """
        for key in self.adapter.modules:
            if key not in self._changes:
                self.adapter.modules[key]
        return StructureReport(
            adapter=self.adapter.name,
            mode=self.structure.mode,
            modules=tuple(self._changes[key] for key in self.adapter.modules),
            invocation_tokens=self.adapter.invocation_tokens,
        )


def restructure(
    adapter: Adapter, structure: Structure, *, dtype: torch.dtype | None = None
) -> Restructured:
    """Give every module another rank or number of blocks.

    Args:
        adapter: Lazy or in memory.
        structure: What the modules are to be like.
        dtype: The type that the result will be written in, where it is another one; it is counted
            in the report and not applied.

    Returns:
        The adapter, computed module by module as it is looked up. `exact` looks at every module
        once to find the ranks, before this returns.

    Raises:
        AdapterFormatError: If some modules cannot have that structure. All of them are listed.
        ConfigError: If even the smallest rank exceeds the budget.
    """
    facts = module_facts(adapter)
    subject = f"adapter {adapter.name!r} cannot have the structure {structure.mode!r}"
    if structure.mode != "keep":
        check_fits(adapter, structure.num_blocks, subject)
    change = _change(structure, facts.values())
    new_facts, problems = {}, Problems()
    compacted = set()
    for key, fact in facts.items():
        try:
            new_facts[key] = change(fact)
        except ShapeError as error:
            problems.add_error(error, str(key))
            continue
        if structure.mode == "exact":
            # What compacting wins is in the numbers alone.
            smaller = _compacted(adapter.modules[key], structure.num_blocks)
            if smaller is not None:
                new_facts[key] = replace(smaller, A=smaller.A.to("meta"), B=smaller.B.to("meta"))
                compacted.add(key)
    problems.raise_if_any(subject)
    changes: dict[ModuleKey, ModuleChange] = {}
    lossy = structure.mode == "truncate" or _narrows(facts.values(), dtype)

    def load(key: ModuleKey) -> BlockFactors:
        before = adapter.modules[key]
        after = change(before)
        after = compact(after) if key in compacted else after
        rounded = None if dtype is None else _cast(after, dtype)
        changes[key] = measure(key, before, after, lossy=lossy, rounded=rounded)
        return after

    # Copied numbers stay finite; computed ones may not.
    trusted = structure.mode != "truncate" and isinstance(adapter.modules, LazyModules)
    modules = LazyModules(new_facts, load, subject=subject, trusted=trusted)
    return Restructured(
        adapter=replace(adapter, modules=modules), structure=structure, _changes=changes
    )


def check_fits(adapter: Adapter, tp: int, subject: str) -> None:
    """Refuse a tensor-parallel size at which the layers could not hold the adapter.

    Args:
        adapter: Lazy or in memory; no module is loaded.
        tp: The size. Without the base model's heads, widths alone are looked at.
        subject: What fails; the start of the message.

    Raises:
        AdapterFormatError: If a rank would hold part of a row, a column or a key-value head. The
            modules and the sizes that fit are listed. Ranks may share a key-value head, of which
            each then serves a copy.
    """
    facts = module_facts(adapter)
    widths = {
        key: fact.out_features if fact.blocked == "B" else fact.in_features
        for key, fact in facts.items()
    }
    qkv = [str(key) for key in facts if facts_of(key.name)[0].name == "linear_qkv"]
    base = adapter.base
    heads = (base.num_heads, base.num_kv_heads)
    whole = math.gcd(*widths.values(), base.ffn_size or 0)
    fitting = [
        size
        for size in range(1, min(whole, 1024) + 1)
        if whole % size == 0 and _heads_fit(size, *heads)
    ]
    advice = f"use a tensor-parallel size of {', '.join(map(str, fitting))}"
    problems = Problems()
    for key, width in widths.items():
        if width % tp:
            side = "out_features" if facts[key].blocked == "B" else "in_features"
            problems.add(f"{side}={width} is not a multiple of num_blocks={tp}; {advice}", str(key))
    stretched = [
        str(key)
        for key, fact in facts.items()
        if facts_of(key.name)[0].parent == "mixer"
        and facts_of(key.name)[1].stretches
        and not fact.parts
    ]
    if stretched and tp > 1:
        problems.add(
            "blocks would have to cut z, x, B, C and dt each by itself, and only the model knows "
            "how long they are; load the adapter as it is, which makes such blocks",
            *stretched,
        )
    if base.ffn_size and base.ffn_size % tp and base.ffn_size not in widths.values():
        problems.add(
            f"the base model's MLP of {base.ffn_size} is not a multiple of {tp} ranks; {advice}"
        )
    if not _heads_fit(tp, *heads):
        problems.add(
            f"the base model has {heads[0] or 'an unknown number of'} query heads and {heads[1]} "
            f"key-value heads, of which each of {tp} ranks would hold part of one; {advice}",
            *qkv,
        )
    problems.raise_if_any(subject)


def _heads_fit(tp: int, num_heads: int | None, num_kv_heads: int | None) -> bool:
    """Whether ranks can hold whole heads, as far as the heads are known."""
    if num_kv_heads is None:
        return True
    # Without query heads, as many as fit.
    return heads_fit(tp, num_heads or math.lcm(num_kv_heads, tp), num_kv_heads)


def module_shapes(facts: Iterable[BlockFactors]) -> list[ModuleShape]:
    """What of the modules decides their parameter counts.

    Args:
        facts: The modules; their numbers are not looked at.
    """
    return [
        ModuleShape(
            in_features=fact.in_features, out_features=fact.out_features, blocked=fact.blocked
        )
        for fact in facts
    ]


def _change(
    structure: Structure, facts: Iterable[BlockFactors]
) -> Callable[[BlockFactors], BlockFactors]:
    blocks = structure.num_blocks
    if structure.mode == "keep":
        return lambda factors: factors
    if structure.mode == "reshard":
        return lambda factors: reshard(factors, blocks)
    if structure.mode == "exact":
        return lambda factors: _fitted(factors, blocks)
    rank = structure.rank
    if rank is None:
        assert structure.budget_of_rank is not None, "checked where the structure is made"
        rank = matching_rank(
            module_shapes(facts), lora_rank=structure.budget_of_rank, num_blocks=blocks
        )
    return lambda factors: _at_most(factors, blocks, rank)


def _fitted(factors: BlockFactors, num_blocks: int) -> BlockFactors:
    return reshard(factors, num_blocks) if factors.num_blocks % num_blocks else factors


def _compacted(factors: BlockFactors, num_blocks: int) -> BlockFactors | None:
    """The module in fitting blocks of less rank than `_fitted` gives, if there is one."""
    blocks = num_blocks if factors.num_blocks % num_blocks else factors.num_blocks
    if blocks % factors.num_blocks == 0:
        # All blocks share a rank, so nothing is won where the first alone needs all of it.
        ranks = factors.rank // factors.num_blocks
        A, B = factors.A[:ranks], factors.B
        if factors.blocked == "B":
            B = in_blocks(B, blocks, factors.parts)[0]
        else:
            A, B = A[:, : factors.in_features // blocks], B[:, :ranks]
        first = replace(factors, A=A, B=B, num_blocks=1, parts=())
        if compact(first) is first:
            return None
    fitted = _fitted(factors, num_blocks)
    smaller = compact(fitted)
    return None if smaller is fitted else smaller


def _at_most(factors: BlockFactors, num_blocks: int, rank: int) -> BlockFactors:
    """No larger rank, and no loss where it is not needed."""
    blocks = num_blocks if factors.num_blocks % num_blocks else factors.num_blocks
    exact = resharded_rank(factors.rank, num_blocks=factors.num_blocks, new_num_blocks=blocks)
    if exact <= rank:
        return _fitted(factors, num_blocks)
    if not factors.A.is_meta:
        return truncate(factors, num_blocks=num_blocks, rank=rank)[0]
    # The shapes alone: any factors of that rank have them.
    shape = reshard(factors, num_blocks)
    columns = rank // num_blocks if shape.blocked == "B" else rank
    return replace(
        shape,
        A=shape.A.new_empty(rank, shape.A.shape[1]),
        B=shape.B.new_empty(shape.B.shape[0], columns),
    )


def _cast(factors: BlockFactors, dtype: torch.dtype) -> BlockFactors:
    return replace(factors, A=factors.A.to(dtype), B=factors.B.to(dtype))


def _narrows(facts: Iterable[BlockFactors], dtype: torch.dtype | None) -> bool:
    return dtype is not None and any(
        torch.promote_types(fact.dtype, dtype) != dtype for fact in facts
    )
