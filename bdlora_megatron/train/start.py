"""The adapter that a run starts from, brought into the run's rank, blocks and scale.

The first rank reads and restructures it, one module after the other, and every rank cuts its own
share out of each. What the model computes at step 0 is the adapter's function, whatever its format;
only ``peft.init_structure: truncate`` loses anything, and says how much.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from bdlora_megatron.blocks import BlockFactors, pad_rank, reshard
from bdlora_megatron.config import LoRAConfig
from bdlora_megatron.convert.adapter import Adapter, ModuleKey
from bdlora_megatron.convert.adapter.lazy import map_modules, module_facts
from bdlora_megatron.convert.adapter.scale import fold_scale
from bdlora_megatron.convert.pipeline import open_fitting
from bdlora_megatron.convert.structure import Structure, StructureReport, restructure
from bdlora_megatron.convert.structure.restructure import Restructured
from bdlora_megatron.decoder import facts_of
from bdlora_megatron.errors import ConfigError
from bdlora_megatron.export import main_weights
from bdlora_megatron.layers import lora_layers
from bdlora_megatron.layers.anatomy import decoder_keys
from bdlora_megatron.runtime import from_first_rank
from bdlora_megatron.train.peft import chosen_section, resolve_peft, target_modules
from bdlora_megatron.train.schema import TrainConfig

if TYPE_CHECKING:
    from bdlora_megatron.models import HFConfig

__all__ = ["check_start", "load_start", "start_digest"]

_NAMED = 4


def check_start(config: TrainConfig, hf: HFConfig) -> None:
    """Refuse an adapter that the run could not start from, on one process.

    Args:
        config: The run's settings.
        hf: The base model.

    Raises:
        ConfigError: Its rank, scale, modules or invocation tokens do not agree with the settings;
            all differences are listed.
        AdapterFormatError: It cannot be read.
        ShapeError: It is for another base model.
    """
    if config.peft.init_from is not None:
        with _opened(config, hf) as adapter:
            _restructured(adapter, config, hf)


def start_digest(config: TrainConfig, hf: HFConfig) -> str | None:
    """A digest of the adapter to start from: every factor, scale and number of blocks.

    Args:
        config: The run's settings.
        hf: The base model.

    Returns:
        The digest, in hexadecimal, on every rank; None where the run starts afresh.

    Raises:
        ConfigError: The adapter cannot be read, or is for another base model.

    Collectives:
        One small broadcast over all ranks, where there is an adapter.
    """
    if config.peft.init_from is None:
        return None

    def digest() -> str:
        found = hashlib.sha256()
        with _opened(config, hf) as adapter:
            for key in sorted(adapter.modules):
                factors = adapter.modules[key]
                found.update(f"{key} {factors.num_blocks} {factors.scale!r}".encode())
                for factor in (factors.A, factors.B):
                    found.update(f"{factor.dtype} {list(factor.shape)}".encode())
                    found.update(factor.contiguous().view(torch.uint8).numpy().tobytes())
        return found.hexdigest()

    return from_first_rank(digest)


@torch.no_grad()
def load_start(model: nn.Module, config: TrainConfig, hf: HFConfig) -> list[str]:
    """Put the adapter to start from into a model whose adapters are fresh.

    In mixed precision the optimizer's float32 copies get it too, unrounded.

    Args:
        model: This rank's pipeline stage, with the adapters that the settings describe.
        config: The run's settings.
        hf: The base model.

    Returns:
        What to tell of it, on the first rank; nothing on the others, or where the run starts
        afresh.

    Raises:
        ConfigError: The adapter cannot be read, or does not agree with the settings.

    Collectives:
        One broadcast over all ranks for each module, of its whole factors, and one more.
    """
    if config.peft.init_from is None:
        return []
    places = {
        key: (layer.adapter, plan)
        for name, layer in lora_layers(model)
        if layer.adapter is not None
        for plan in layer.adapter.plans
        for key in decoder_keys(name, plan.projection.name)
    }
    told: list[str] = []
    modules = _modules(config, hf, told)  # begun on the first rank alone
    with main_weights(model):
        while (item := from_first_rank(lambda: next(modules, None))) is not None:
            key, factors = item
            if key in places:
                _load(*places[key], factors)
        filled = [(factor, factor.data) for factor in model.parameters() if factor.requires_grad]
    for factor, main in filled:
        factor.data.copy_(main)
    return told


def _load(adapter: Any, plan: Any, factors: BlockFactors) -> None:
    """Fill one projection; rank that the factors lack keeps its fresh A, and gets a B of zero."""
    A, _ = adapter.factors(plan)
    fresh = A.weight.clone()
    whole = pad_rank(factors, plan.rank)
    adapter.load_whole(plan.projection.name, whole.A, whole.B)
    lacks = torch.arange(plan.rank) % (plan.rank // plan.num_blocks) >= (
        factors.rank // plan.num_blocks
    )
    keeps = A.cut(lacks[:, None].expand(whole.A.shape)).to(fresh.device)
    A.weight.copy_(torch.where(keeps, fresh, A.weight))


@contextmanager
def _opened(config: TrainConfig, hf: HFConfig) -> Iterator[Adapter]:
    folder = Path(cast("str", config.peft.init_from))
    with open_fitting(folder, hf, base_folder=Path(config.model.hf_path)) as adapter:
        yield adapter


def _modules(
    config: TrainConfig, hf: HFConfig, told: list[str]
) -> Iterator[tuple[ModuleKey, BlockFactors]]:
    """Every module as the run holds it; ``told`` gets what to say once all have been taken."""
    lora = cast("LoRAConfig", resolve_peft(config.peft, hf))
    with _opened(config, hf) as adapter:
        changed = _restructured(adapter, config, hf)
        for key in changed.adapter.modules:
            factors = reshard(changed.adapter.modules[key], lora.blocks)
            yield key, fold_scale(factors, lora.scale)
        targets = target_modules(chosen_section(config.peft), hf)
        missing = [key for key in targets if key not in changed.adapter.modules]
        told += [
            f"starts from {config.peft.init_from}: {_told_of(changed.report(), lora)}",
            *_told_of_scale(adapter, lora),
            *_told_of_rest(changed.adapter, lora, missing),
        ]


def _restructured(adapter: Adapter, config: TrainConfig, hf: HFConfig) -> Restructured:
    """The adapter in float32, and in blocks and a rank that the run has room for.

    Raises:
        ConfigError: It does not agree with the settings; all differences are listed.
    """
    peft, lora = config.peft, cast("LoRAConfig", resolve_peft(config.peft, hf))
    where = f"peft.{'bdlora' if peft.scheme == 'bdlora' else 'lora'}"
    changed = _fitted(_in_float32(adapter), lora, truncate=peft.init_structure == "truncate")
    problems = [
        *_strange_modules(adapter, config, hf, where),
        *_strange_scale(adapter, chosen_section(peft).alpha, lora, where),
        *_strange_invocation(adapter, lora),
    ]
    if (rank := _largest_rank(changed.adapter)) > lora.rank:
        blocks = f" in {lora.blocks} blocks" if lora.blocks > 1 else ""
        problems.append(
            f"{where}: the rank is {lora.rank}, and the adapter needs {rank}{blocks} to start "
            f"without loss; set rank: {rank}, or peft.init_structure: truncate"
        )
    if problems:
        raise ConfigError(
            f"the adapter {peft.init_from} (peft.init_from) does not agree with the settings:"
            + "".join(f"\n- {problem}" for problem in problems)
        )
    return changed


def _in_float32(adapter: Adapter) -> Adapter:
    # Before it is truncated: narrower factors would round what that computes.
    return map_modules(
        adapter,
        lambda _, factors: replace(factors, A=factors.A.float(), B=factors.B.float()),
        subject=f"cannot start from adapter {adapter.name!r}",
    )


def _fitted(adapter: Adapter, lora: LoRAConfig, *, truncate: bool) -> Restructured:
    """Copied where it fits so; else with repeated directions merged, or truncated."""
    blocks = lora.blocks
    copied = restructure(adapter, Structure(mode="reshard", num_blocks=blocks))
    if _largest_rank(copied.adapter) <= lora.rank:
        return copied
    exact = restructure(adapter, Structure(mode="exact", num_blocks=blocks))
    if _largest_rank(exact.adapter) <= lora.rank or not truncate:
        return exact
    return restructure(adapter, Structure(mode="truncate", num_blocks=blocks, rank=lora.rank))


def _largest_rank(adapter: Adapter) -> int:
    return max(factors.rank for factors in module_facts(adapter).values())


def _strange_modules(
    adapter: Adapter, config: TrainConfig, hf: HFConfig, where: str
) -> Iterator[str]:
    targets = target_modules(chosen_section(config.peft), hf)
    strange = [key for key in adapter.modules if key not in targets]
    if strange:
        layers = dict.fromkeys(facts_of(key.name)[0].name for key in strange)
        yield (
            f"{where}.target_modules: {len(strange)} modules of the adapter are no targets "
            f"({_some(strange)}); add {', '.join(layers)}"
        )


def _strange_scale(
    adapter: Adapter, alpha: float | None, lora: LoRAConfig, where: str
) -> Iterator[str]:
    scales = _scales(adapter)
    if alpha == 0:
        yield f"{where}.alpha is 0, which leaves nothing of the adapter; leave it out"
    elif alpha is not None and lora.scale not in scales:
        shown = ", ".join(f"{scale:g}" for scale in scales)
        yield (
            f"{where}.alpha is {alpha:g}, a scale of {lora.scale:g} at rank {lora.rank}, and the "
            f"adapter's is {shown}; set alpha: {scales[-1] * alpha / lora.scale:g}, or leave it "
            "out to have the scale folded into B"
        )


def _strange_invocation(adapter: Adapter, lora: LoRAConfig) -> Iterator[str]:
    own, wanted = adapter.invocation_tokens, lora.invocation_tokens
    if own != wanted:
        acts = "on every token" if own is None else f"from the tokens {list(own)} on"
        yield (
            f"peft.invocation_tokens is {list(wanted or ())}, and the adapter acts {acts}; set it "
            f"to {list(own or ())}"
        )


def _scales(adapter: Adapter) -> list[float]:
    return sorted({factors.scale for factors in module_facts(adapter).values()})


def _told_of(report: StructureReport, lora: LoRAConfig) -> str:
    before = sorted({change.rank_before for change in report.modules})
    shape = f"{len(report.modules)} modules of rank {_range(before)}"
    blocks = f" in {lora.blocks} blocks" if lora.blocks > 1 else ""
    if report.mode != "truncate":
        return f"{shape}, as rank {lora.rank}{blocks} without loss"
    worst = max(report.modules, key=lambda change: change.error)
    return (
        f"{shape}, truncated to rank {lora.rank}{blocks} with a relative error of "
        f"{report.error:.3g} ({worst.error:.3g} in {worst.key})"
    )


def _told_of_scale(adapter: Adapter, lora: LoRAConfig) -> Iterator[str]:
    folded = [scale for scale in _scales(adapter) if scale != lora.scale]
    if folded:
        shown = ", ".join(f"{scale:g}" for scale in folded)
        yield f"scale {shown} folded into B, which rounds it once; the run's is {lora.scale:g}"


def _told_of_rest(
    adapter: Adapter, lora: LoRAConfig, missing: Sequence[ModuleKey]
) -> Iterator[str]:
    small = [key for key, f in module_facts(adapter).items() if f.rank < lora.rank]
    if small:
        yield (
            f"{len(small)} modules have less rank than {lora.rank} ({_some(small)}); the rest of "
            "it starts fresh, with B at zero"
        )
    if missing:
        yield (
            f"{len(missing)} targets are not in the adapter and start fresh, with B at zero "
            f"({_some(missing)})"
        )


def _some(keys: Sequence[ModuleKey]) -> str:
    more = f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else ""
    return ", ".join(map(str, keys[:_NAMED])) + more


def _range(ranks: Sequence[int]) -> str:
    return f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
