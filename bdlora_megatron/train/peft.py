"""From ``peft.scheme`` to the adapter that is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from bdlora_megatron.blocks import ModuleShape, matching_rank
from bdlora_megatron.config import Layout, LoRAConfig, resolve
from bdlora_megatron.convert.adapter import ModuleKey
from bdlora_megatron.decoder import LINEARS
from bdlora_megatron.errors import ConfigError
from bdlora_megatron.layers.targets import TargetMatcher
from bdlora_megatron.train.schema import BDLoRASection, LoRASection, PeftSection

if TYPE_CHECKING:
    from bdlora_megatron.models import HFConfig

__all__ = ["chosen_section", "resolve_peft", "target_modules"]

_LAYOUTS = {"bdlora": Layout.BDLORA, "lora": Layout.HALF_SHARDED, "slora": Layout.SLORA}


def resolve_peft(peft: PeftSection, hf: HFConfig) -> LoRAConfig | None:
    """The adapter that the settings describe.

    Args:
        peft: The scheme and its settings.
        hf: The base model, whose sizes decide the rank that ``match_params_of_lora_rank`` asks for.

    Returns:
        The adapter's configuration, its factors in float32; None for scheme ``none``.

    Raises:
        ConfigError: Rank and blocks don't go together, no rank matches, or the model has no such
            token.
        TargetError: A target pattern matches no layer.
    """
    if peft.scheme == "none":
        return None
    tokens = peft.invocation_tokens or None
    if tokens and max(tokens) >= hf.vocab_size:
        raise ConfigError(
            f"peft.invocation_tokens is {list(tokens)}, and the base model's ids end at "
            f"{hf.vocab_size - 1}; set what its tokenizer makes of the invocation text"
        )
    blocked = peft.scheme == "bdlora"
    section = chosen_section(peft)
    num_blocks = peft.bdlora.num_blocks if blocked else None
    rank, alpha = resolve(
        rank=_blocked_rank(peft.bdlora, hf) if blocked else peft.lora.rank,
        alpha=section.alpha,
        num_blocks=num_blocks,
    )
    return LoRAConfig(
        rank=rank,
        alpha=alpha,
        use_rslora=section.use_rslora,
        layout=_LAYOUTS[peft.scheme],
        num_blocks=num_blocks,
        dropout=section.dropout,
        target_modules=section.target_modules,
        exclude_modules=section.exclude_modules,
        # Sixteen bits would lose the small steps of a small learning rate. Under mixed precision
        # Megatron-Core narrows them and keeps copies that it steps.
        dtype=torch.float32,
        invocation_tokens=tokens,
    )


def chosen_section(peft: PeftSection) -> BDLoRASection | LoRASection:
    """The settings that the scheme reads."""
    return peft.bdlora if peft.scheme == "bdlora" else peft.lora


def _blocked_rank(section: BDLoRASection, hf: HFConfig) -> int | None:
    """The rank that the settings ask for; None for the default.

    Raises:
        ConfigError: There is no number of blocks, or no rank matches.
    """
    blocks = section.num_blocks
    if blocks is None:
        raise ConfigError("peft.bdlora.num_blocks is missing; set it to the serving size")
    if section.match_params_of_lora_rank is not None:
        return matching_rank(
            list(target_modules(section, hf).values()),
            lora_rank=section.match_params_of_lora_rank,
            num_blocks=blocks,
        )
    return section.rank


def target_modules(
    section: BDLoRASection | LoRASection, hf: HFConfig
) -> dict[ModuleKey, ModuleShape]:
    """Every projection of every layer that the targets choose, with its widths.

    Args:
        section: The targets.
        hf: The base model.

    Returns:
        The projections, in order.

    Raises:
        TargetError: A target pattern matches no layer.
    """
    matcher = TargetMatcher(section.target_modules, section.exclude_modules)
    chosen: dict[ModuleKey, ModuleShape] = {}
    names = []
    linears = hf.linears()
    for layer in range(hf.num_layers):
        for facts, linear in zip(LINEARS, linears, strict=True):
            names.append(f"decoder.layers.{layer}.{facts.path}")
            if matcher.matches(names[-1]):
                keys = [ModuleKey(layer=layer, name=part.name) for part in facts.projections]
                chosen.update(zip(keys, linear.module_shapes(), strict=True))
    matcher.check_all_used(names)
    return chosen
