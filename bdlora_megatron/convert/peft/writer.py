"""Writing an adapter as PEFT reads it, LoRA or BD-LoRA."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from bdlora_megatron.blocks import BlockFactors, reshard
from bdlora_megatron.convert.adapter.lazy import map_modules, module_facts
from bdlora_megatron.convert.adapter.neutral import (
    ALL_MODULE_NAMES,
    Adapter,
    ModuleKey,
    ModuleName,
    blocked_factor,
)
from bdlora_megatron.convert.adapter.scale import choose_alphas, peft_scale, warn_inexact
from bdlora_megatron.convert.peft.config import ALORA, CONFIG_NAME
from bdlora_megatron.convert.peft.fused import fuse, is_fused
from bdlora_megatron.convert.peft.names import PEFT_PREFIX, peft_prefix
from bdlora_megatron.convert.peft.tensors import SAFETENSORS_NAME
from bdlora_megatron.convert.tensor_files import write_safetensors
from bdlora_megatron.convert.write_options import WriteOptions
from bdlora_megatron.decoder import FUSED_PARTS, facts_of, target_of
from bdlora_megatron.errors import UnsupportedError

__all__ = ["write_peft"]

logger = logging.getLogger(__name__)

_CAUSAL_PREFIX = f"{PEFT_PREFIX}model."


def write_peft(adapter: Adapter, folder: Path, options: WriteOptions) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        UnsupportedError: If modules differ in their number of blocks, which PEFT has one of.
    """
    if is_fused(adapter):
        _warn_of_blocks(adapter)
        adapter = fuse(adapter)
    facts = module_facts(adapter)
    _warn_of_peft(adapter, facts)
    if any(factors.parts for factors in facts.values()):
        subject = f"cannot write adapter {adapter.name!r}"
        adapter = map_modules(adapter, lambda _, factors: _as_peft(factors), subject=subject)
        facts = module_facts(adapter)
    prefix = peft_prefix(adapter.metadata.get("peft_prefix", _CAUSAL_PREFIX))
    config = _config(adapter, facts, prefix, options)
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    # The largest type first, so that every tensor is aligned; one module after the other.
    keys = sorted(facts, key=lambda key: (-facts[key].dtype.itemsize, key))
    tensors: dict[str, Tensor] = {}
    for key in keys:
        tensors.update(_named(prefix, key, facts[key]))
    with write_safetensors(folder / SAFETENSORS_NAME, tensors, {"format": "pt"}) as write:
        for key in keys:
            for name, tensor in _named(prefix, key, adapter.modules[key]).items():
                write(name, tensor)


def _warn_of_peft(adapter: Adapter, facts: Mapping[ModuleKey, BlockFactors]) -> None:
    """Name what PEFT 0.21 does not apply, although the file holds it under the right names."""
    name = adapter.name
    parents = {facts_of(key.name)[0].parent for key in facts}
    names = {key.name for key in facts}
    if "mixer.out_proj" in names:
        logger.warning(
            "%s: PEFT loads no adapter with Mamba's out_proj (a fused kernel reads its weight); "
            "export one trained without out_proj if PEFT is to read it",
            name,
        )
    if "mlp" in parents and ("linear_attn" in parents or {"q_b_proj", "kv_b_proj"} & names):
        logger.warning(
            "%s: PEFT takes gate_proj, up_proj and down_proj of Qwen3-Next and DeepSeek for their "
            "experts' and drops those of a dense MLP without an error; train without linear_fc1 "
            "and linear_fc2 if PEFT is to read it",
            name,
        )
    if adapter.invocation_tokens and any(factors.num_blocks > 1 for factors in facts.values()):
        logger.warning(
            "%s: PEFT loads no Activated LoRA with blocks; write the same function as vanilla LoRA "
            "(--dense, WriteOptions(dense=True)) if PEFT is to read it",
            name,
        )


def _warn_of_blocks(adapter: Adapter) -> None:
    """Name the blocks that fused rows cannot have."""
    parts = {part for parts in FUSED_PARTS.values() for part in parts}
    facts = module_facts(adapter)
    lost = [key for key, fact in facts.items() if key.name in parts and fact.num_blocks > 1]
    if lost:
        logger.warning(
            "%s: the base model has %s, whose rows cannot keep the blocks of %d modules, such as "
            "%s; they are written as vanilla LoRA. To serve the blocks, keep the adapter in the "
            "format megatron",
            adapter.name,
            " and ".join(FUSED_PARTS),
            len(lost),
            lost[0],
        )


def _as_peft(factors: BlockFactors) -> BlockFactors:
    """With blocks that PEFT has: each cuts one stretch of rows; else as vanilla LoRA, exactly."""
    return reshard(factors, 1) if factors.parts else factors


def _named(prefix: str, key: ModuleKey, factors: BlockFactors) -> dict[str, Tensor]:
    stem = f"{prefix}{key}.lora_"
    return {f"{stem}A.weight": factors.A, f"{stem}B.weight": factors.B}


def _config(
    adapter: Adapter, facts: Mapping[ModuleKey, BlockFactors], prefix: str, options: WriteOptions
) -> dict[str, Any]:
    use_rslora, alphas = choose_alphas({(f.rank, f.scale) for f in facts.values()})
    ranks = {key: factors.rank for key, factors in facts.items()}
    alpha_of = {key: alphas[factors.rank, factors.scale] for key, factors in facts.items()}
    missed = [
        key
        for key, factors in facts.items()
        if peft_scale(alpha_of[key], factors.rank, use_rslora=use_rslora) != factors.scale
    ]
    warn_inexact(adapter.name, missed)
    rank, rank_pattern = _patterns(ranks)
    alpha, alpha_pattern = _patterns(alpha_of)
    targets, layers = _targets(adapter, facts, prefix)
    causal = "CAUSAL_LM" if prefix == _CAUSAL_PREFIX else None
    task = adapter.metadata.get("task_type", causal)
    invocation = {}
    if adapter.invocation_tokens:
        # Of another task, PEFT does not look for them.
        task, invocation = "CAUSAL_LM", {ALORA: list(adapter.invocation_tokens)}
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": options.base_model
        or adapter.metadata.get("base_model_name_or_path"),
        "inference_mode": True,
        "r": rank,
        "rank_pattern": rank_pattern,
        "lora_alpha": alpha,
        "alpha_pattern": alpha_pattern,
        "use_rslora": use_rslora,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": targets,
        "layers_to_transform": layers,
        "use_bdlora": _bdlora(facts),
        **invocation,
    }


def _patterns(values: Mapping[ModuleKey, Any]) -> tuple[Any, dict[str, Any]]:
    """A default and what differs from it: by name of the projection, else module by module.

    PEFT takes the first pattern that matches, so a single module comes before its name.
    """
    default = _most_common(values.values())
    single, by_name = {}, {}
    for name in ALL_MODULE_NAMES:
        own = {key: value for key, value in values.items() if key.name == name}
        usual = _most_common(own.values()) if own else default
        single.update({str(key): value for key, value in own.items() if value != usual})
        if usual != default:
            by_name[target_of(name)] = usual
    return default, single | by_name


def _most_common(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def _targets(
    adapter: Adapter, facts: Mapping[ModuleKey, BlockFactors], prefix: str
) -> tuple[list[str], list[int] | None]:
    """`target_modules` and `layers_to_transform` that select these modules and no other."""
    layers = sorted({key.layer for key in facts})
    names = _names(facts)
    complete = len(facts) == len(layers) * len(names)
    targets = [target_of(name) for name in names]
    if complete and len(layers) == adapter.base.num_layers:
        return targets, None
    # PEFT finds a layer's number only below a parent module.
    if complete and prefix != PEFT_PREFIX:
        return targets, layers
    return [str(key) for key in facts], None


def _names(keys: Iterable[ModuleKey]) -> tuple[ModuleName, ...]:
    present = {key.name for key in keys}
    return tuple(name for name in ALL_MODULE_NAMES if name in present)


def _bdlora(facts: Mapping[ModuleKey, BlockFactors]) -> dict[str, Any] | None:
    counts = sorted({factors.num_blocks for factors in facts.values()} - {1})
    if not counts:
        return None
    if len(counts) > 1:
        raise UnsupportedError(
            f"modules have {', '.join(map(str, counts))} blocks, and a PEFT config has one number "
            "for all; reshard them to one number of blocks, or write vanilla LoRA "
            "(--dense, WriteOptions(dense=True))"
        )
    patterns: dict[str, list[str]] = {"A": [], "B": []}
    for name in _names(facts):
        own = {key: factors.num_blocks > 1 for key, factors in facts.items() if key.name == name}
        # Substrings of paths: a name stands for all of its modules, or each stands for itself.
        listed = (
            [target_of(name)]
            if all(own.values())
            else [str(key) for key, blocked in own.items() if blocked]
        )
        patterns[blocked_factor(name)] += listed
    return {
        "nblocks": counts[0],
        "target_modules_bd_a": patterns["A"],
        "target_modules_bd_b": patterns["B"],
        "match_strict": all(factors.num_blocks > 1 for factors in facts.values()),
    }
