"""What each way to serve an adapter on P tensor-parallel ranks would cost.

Letters in shapes: I in features, O out features, R total rank, N blocks, P tensor-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from bdlora_megatron.blocks import (
    BlockFactors,
    ModuleShape,
    compact,
    num_parameters,
    rank_within,
    reshard,
    resharded_rank,
    singular_values,
)
from bdlora_megatron.config import Layout
from bdlora_megatron.convert.adapter import Adapter
from bdlora_megatron.convert.adapter.lazy import module_facts
from bdlora_megatron.convert.adapter.tables import format_bytes, format_table
from bdlora_megatron.convert.structure.restructure import (
    StructureMode,
    check_fits,
    module_shapes,
)
from bdlora_megatron.decoder import facts_of
from bdlora_megatron.errors import ConfigError

__all__ = ["Choices", "ServingOption", "choices_for_tp"]

_NONE = "none"
_SLORA = "2 all-gather(r) + 2 all-reduce(r)"


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingOption:
    """One way to serve the adapter.

    Attributes:
        name: What to call it.
        mode: The structure to convert to.
        layout: How the layers split the factors over ranks.
        rank: The largest total rank of a module.
        bytes_per_rank: What one tensor-parallel rank holds of all modules.
        error: Relative error of the whole adapter, in the Frobenius norm; 0 where it is exact.
        collectives: What the adapter adds in the forward pass of a decoder layer.
        options: The options of `bdlora convert` that make it.
    """

    name: str
    mode: StructureMode
    layout: Layout
    rank: int
    bytes_per_rank: int
    error: float
    collectives: str
    options: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Choices:
    """All ways, and which one to take.

    Attributes:
        adapter: The adapter's name.
        tp: P.
        choices: Every way that is open to this adapter.
        recommended: The name of one of them.
        reason: Why that one.
        curve: Total rank and relative error of truncations, up to the rank without loss.
        heads_known: Whether P was held against the base model's key-value heads, which an adapter
            of most formats does not tell.
    """

    adapter: str
    tp: int
    choices: tuple[ServingOption, ...]
    recommended: str
    reason: str
    curve: tuple[tuple[int, float], ...]
    heads_known: bool = True

    @property
    def caution(self) -> str:
        """What the recommendation takes for granted, as lines to append; empty if nothing."""
        if self.heads_known or self.tp == 1:
            return ""
        return (
            f"\nwhether {self.tp} ranks divide the base model's key-value heads is not known; pass "
            "--base HF_DIR"
        )

    @property
    def choice(self) -> ServingOption:
        """The recommended way."""
        return next(choice for choice in self.choices if choice.name == self.recommended)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON takes it."""
        choices = [{**asdict(choice), "layout": choice.layout.value} for choice in self.choices]
        return {**asdict(self), "choices": choices}

    def table(self) -> str:
        """The report for people."""
        rows = [
            (
                f"{choice.name}{' *' if choice.name == self.recommended else ''}",
                choice.layout.value,
                str(choice.rank),
                format_bytes(choice.bytes_per_rank),
                f"{choice.error:.3g}",
                choice.collectives,
            )
            for choice in self.choices
        ]
        header = ("choice", "layout", "rank", "size per rank", "relative error", "collectives")
        return (
            f"{self.adapter} on {self.tp} tensor-parallel ranks\n\n{format_table(header, rows)}\n\n"
            f"* recommended ({self.choice.options}): {self.reason}{self.caution}"
        )


def choices_for_tp(adapter: Adapter, tp: int, *, tolerance: float = 0.01) -> Choices:
    """Look at every module once, and say what each way to serve the adapter would cost.

    Args:
        adapter: Lazy or in memory.
        tp: P.
        tolerance: A truncation with at most this relative error is recommended over an exact
            structure of higher rank.

    Returns:
        Ranks, bytes, errors, collectives and a recommendation.

    Raises:
        ConfigError: If `tp` is not positive or the adapter has no modules.
        AdapterFormatError: If P does not divide the blocked side of some module, or the base
            model's key-value heads where they are known.
    """
    facts = list(module_facts(adapter).values())
    if tp < 1 or not facts:
        raise ConfigError(f"tp={tp} and {len(facts)} modules; wanted at least one of each")
    check_fits(adapter, tp, f"adapter {adapter.name!r} cannot be served on {tp} ranks")
    compact_ranks, spectra = [], []
    for key in adapter.modules:
        factors = adapter.modules[key]
        blocked = factors if factors.num_blocks % tp == 0 else reshard(factors, tp)
        compact_ranks.append(compact(blocked).rank)
        spectra.append(singular_values(factors, num_blocks=tp))
    replicas = _replicas(adapter, tp)
    choices = _exact_choices(facts, replicas, compact_ranks, tp)
    choices += _truncations(facts, replicas, compact_ranks, spectra, tp)
    recommended, reason = _recommend(choices, tolerance)
    return Choices(
        adapter=adapter.name,
        tp=tp,
        choices=tuple(choices),
        recommended=recommended,
        reason=reason,
        curve=_curve(spectra, tp),
        heads_known=adapter.base.num_kv_heads is not None,
    )


def _replicas(adapter: Adapter, tp: int) -> list[int]:
    """How many ranks hold each of a module's heads."""
    heads = adapter.base.num_kv_heads or tp
    shared = max(tp // heads, 1)
    sizes = [facts_of(key.name)[1].out_size for key in adapter.modules]
    return [shared if size == "kv_size" else 1 for size in sizes]


def _exact_choices(
    facts: Sequence[BlockFactors],
    replicas: Sequence[int],
    compact_ranks: Sequence[int],
    tp: int,
) -> list[ServingOption]:
    shapes = module_shapes(facts)
    if all(fact.num_blocks % tp == 0 for fact in facts):
        return [
            ServingOption(
                name="keep",
                mode="keep",
                layout=Layout.BDLORA,
                rank=max(fact.rank for fact in facts),
                bytes_per_rank=sum(
                    _nbytes(fact, copies * fact.num_parameters)
                    for fact, copies in zip(facts, replicas, strict=True)
                )
                // tp,
                error=0.0,
                collectives=_NONE,
                options="--structure keep",
            )
        ]
    dense = [
        resharded_rank(fact.rank, num_blocks=fact.num_blocks, new_num_blocks=1) for fact in facts
    ]
    bdlora = sum(
        # What already fits keeps its blocks, which may be a multiple of P.
        copies * _nbytes(fact, _blocked_parameters(shape, rank, max(fact.num_blocks, tp))) // tp
        if fact.num_blocks % tp == 0
        else copies * _nbytes(fact, _blocked_parameters(shape, rank, tp)) // tp
        for fact, copies, shape, rank in zip(facts, replicas, shapes, compact_ranks, strict=True)
    )
    return [
        _vanilla("keep, S-LoRA layout", Layout.SLORA, facts, replicas, dense, tp),
        _vanilla("keep, half sharded", Layout.HALF_SHARDED, facts, replicas, dense, tp),
        ServingOption(
            name="exact",
            mode="exact",
            layout=Layout.BDLORA,
            rank=max(compact_ranks),
            bytes_per_rank=bdlora,
            error=0.0,
            collectives=_NONE,
            options=f"--structure exact --tp {tp}",
        ),
    ]


def _vanilla(
    name: str,
    layout: Layout,
    facts: Sequence[BlockFactors],
    replicas: Sequence[int],
    ranks: Sequence[int],
    tp: int,
) -> ServingOption:
    """An adapter held as vanilla LoRA, both factors split or one of them replicated."""
    size = 0
    for fact, copies, rank in zip(facts, replicas, ranks, strict=True):
        blocked = copies * fact.out_features if fact.blocked == "B" else fact.in_features
        dense = fact.in_features if fact.blocked == "B" else fact.out_features
        if layout is Layout.SLORA:
            padded = -(-rank // tp) * tp
            numbers = padded * (dense + blocked) // tp
        else:
            numbers = rank * (dense + blocked // tp)
        size += _nbytes(fact, numbers)
    return ServingOption(
        name=name,
        mode="keep",
        layout=layout,
        rank=max(ranks),
        bytes_per_rank=size,
        error=0.0,
        collectives=_SLORA if layout is Layout.SLORA and tp > 1 else _NONE,
        options="--structure keep",
    )


def _truncations(
    facts: Sequence[BlockFactors],
    replicas: Sequence[int],
    compact_ranks: Sequence[int],
    spectra: Sequence[Tensor],
    tp: int,
) -> list[ServingOption]:
    shapes = module_shapes(facts)
    lora_rank = max(
        resharded_rank(fact.rank, num_blocks=fact.num_blocks, new_num_blocks=1) for fact in facts
    )
    budget = rank_within(
        shapes, num_parameters=sum(fact.num_parameters for fact in facts), num_blocks=tp
    )
    wanted = {"truncate, equal parameters": budget, "truncate, equal rank": lora_rank // tp * tp}
    return [
        ServingOption(
            name=name,
            mode="truncate",
            layout=Layout.BDLORA,
            rank=rank,
            bytes_per_rank=sum(
                copies * _nbytes(fact, _blocked_parameters(shape, rank, tp)) // tp
                for fact, copies, shape in zip(facts, replicas, shapes, strict=True)
            ),
            error=_error(spectra, rank // tp),
            collectives=_NONE,
            options=f"--structure truncate --tp {tp} --rank {rank}",
        )
        for name, rank in wanted.items()
        # Where the exact structure is no larger, there is nothing to truncate.
        if 0 < rank < max(compact_ranks)
    ]


def _recommend(choices: Sequence[ServingOption], tolerance: float) -> tuple[str, str]:
    first = choices[0]
    if first.layout is Layout.BDLORA:
        return first.name, "its blocks line up with the ranks already; nothing is sent or lost"
    good = [choice for choice in choices if choice.mode == "truncate" and choice.error <= tolerance]
    if good:
        best = min(good, key=lambda choice: choice.bytes_per_rank)
        return best.name, (
            f"it loses {best.error:.2g} of the update, within the tolerance of {tolerance:g}, and "
            "nothing is sent"
        )
    exact = next(choice for choice in choices if choice.mode == "exact")
    return exact.name, (
        f"nothing is sent or lost; no truncation stays within the tolerance of {tolerance:g}"
    )


def _curve(spectra: Sequence[Tensor], tp: int) -> tuple[tuple[int, float], ...]:
    largest = max(values.shape[1] for values in spectra)
    return tuple((keep * tp, _error(spectra, keep)) for keep in range(1, largest + 1))


def _error(spectra: Sequence[Tensor], keep: int) -> float:
    whole = torch.stack([values.square().sum() for values in spectra]).sum()
    lost = torch.stack([values[:, keep:].square().sum() for values in spectra]).sum()
    return float((lost / whole).sqrt()) if whole > 0 else 0.0


def _blocked_parameters(shape: ModuleShape, rank: int, num_blocks: int) -> int:
    return num_parameters(
        shape.in_features,
        shape.out_features,
        rank=rank,
        num_blocks=num_blocks,
        blocked=shape.blocked,
    )


def _nbytes(fact: BlockFactors, numbers: int) -> int:
    return numbers * fact.dtype.itemsize
