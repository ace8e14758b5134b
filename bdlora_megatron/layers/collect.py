"""Taking an adapter out of a model: the inverse of ``load``.

Letters in shapes: P tensor-parallel ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bdlora_megatron.blocks import BlockFactors
from bdlora_megatron.convert.adapter.neutral import (
    FUSED,
    PROJECTIONS,
    Adapter,
    BaseShape,
    ModuleKey,
    blocked_factor,
)
from bdlora_megatron.convert.adapter.rows import in_file_order
from bdlora_megatron.decoder import Numbering
from bdlora_megatron.errors import TargetError, UnsupportedError
from bdlora_megatron.layers.activation import invocation_of
from bdlora_megatron.layers.anatomy import (
    check_place,
    from_all_stages,
    layer_numbering,
    model_class,
)
from bdlora_megatron.layers.apply import lora_layers
from bdlora_megatron.layers.factors import Factor
from bdlora_megatron.layers.geometry import check_own_heads

__all__ = ["collect_adapter", "file_names"]


@torch.no_grad()
def collect_adapter(model: nn.Module, name: str, base: BaseShape | None = None) -> Adapter:
    """Gather the whole adapter from all ranks' shards, on every rank's CPU.

    Args:
        model: A model with adapters, from ``apply_lora`` or ``load_adapter``; not wrapped in DDP.
        name: The adapter's name.
        base: The base model's sizes, if known.

    Returns:
        The adapter, which computes the same function as the model's layers.

    Raises:
        TargetError: The model has no adapter, or an adapter that no file format can name.
        UnsupportedError: A layer trains one pair of factors for a fused projection, or two decoders
            are adapted.

    Collectives:
        One all-gather per factor over tensor-parallel ranks; one of all factors over pipeline
        stages, if there are several.
    """
    modules: dict[ModuleKey, BlockFactors] = {}
    numbering = layer_numbering(model)
    for full_name, layer in lora_layers(model):
        if layer.adapter is None:
            continue
        check_own_heads(full_name, layer.config)
        for plan in layer.adapter.plans:
            key = _key(full_name, plan.projection.name, numbering)
            if key in modules:
                raise UnsupportedError(
                    f"{full_name}: {key} is adapted in two decoders of this model, and an adapter "
                    "has one; choose one of them by full names in target_modules"
                )
            A, B = (_whole(factor) for factor in layer.adapter.factors(plan))
            factors = BlockFactors(
                A=A,
                B=B,
                num_blocks=plan.num_blocks,
                blocked=blocked_factor(key.name),
                scale=plan.scale,
                parts=plan.projection.part_sizes,
            )
            modules[key] = in_file_order(factors, plan.projection.groups)
    modules, invocation = _from_all_stages(modules, invocation_of(model))
    if not modules:
        raise TargetError("the model carries no adapter; put one in with apply_lora() first")
    return Adapter(
        name=name,
        modules=dict(sorted(modules.items())),
        base=base or BaseShape(),
        invocation_tokens=invocation,
        metadata={"model_class": model_class(model), **file_names(model)},
    )


def file_names(model: nn.Module) -> dict[str, str]:
    """What the base model's files call its projections, where it is not the usual."""
    configs = (layer.config for _, layer in lora_layers(model))
    fused = any(getattr(config, "fused_projections", False) for config in configs)
    return {PROJECTIONS: FUSED} if fused else {}


def _key(full_name: str, projection: str, numbering: Numbering | None) -> ModuleKey:
    number, hf_names = check_place(full_name, numbering)
    if projection not in hf_names:
        raise UnsupportedError(
            f"the adapter of {full_name} is one pair of factors for several projections, for which "
            "this format has no place; train with LoRAConfig(fused=False)"
        )
    return ModuleKey(layer=number, name=hf_names[projection])


def _whole(factor: Factor) -> Tensor:
    """``[rows, columns]`` from every rank's share; the inverse of ``Factor.cut``."""
    weight: Tensor = factor()
    local, group = weight.detach().contiguous(), factor.tp_group
    if factor.shape.shard_dim is None or group.size() == 1:
        return local.cpu().clone()
    shares = [torch.empty_like(local) for _ in range(group.size())]
    torch.distributed.all_gather(shares, local, group=group)
    return factor.shape.join(shares).cpu()


def _from_all_stages(
    modules: dict[ModuleKey, BlockFactors], invocation: tuple[int, ...] | None
) -> tuple[dict[ModuleKey, BlockFactors], tuple[int, ...] | None]:
    stages = from_all_stages((modules, invocation))
    # A stage without an adapter knows no tokens either.
    known = next((tokens for _, tokens in stages if tokens is not None), None)
    return {key: factors for stage, _ in stages for key, factors in stage.items()}, known
