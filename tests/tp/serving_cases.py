"""A tiny model and neutral adapters for it, made in memory: every rank makes the same."""

from __future__ import annotations

import torch

from bdlora_megatron.blocks import BlockFactors
from bdlora_megatron.convert import Adapter, ModuleKey
from tests.tp.models import tiny_config, tiny_model

HIDDEN, FFN, Q, KV = 24, 40, 48, 24
SIDES = {
    "q_proj": (HIDDEN, Q),
    "k_proj": (HIDDEN, KV),
    "v_proj": (HIDDEN, KV),
    "o_proj": (Q, HIDDEN),
    "gate_proj": (HIDDEN, FFN),
    "up_proj": (HIDDEN, FFN),
    "down_proj": (FFN, HIDDEN),
}


def serving_model(world_size, **changes):
    settings = {"params_dtype": torch.float32, "pipeline_dtype": torch.float32, **changes}
    return tiny_model(tiny_config(world_size, **settings)).eval()


def make_adapter(
    seed, *, rank=4, num_blocks=1, scale=None, modules=tuple(SIDES), layers=(0, 1), name=None
):
    """An adapter whose factors depend on ``seed`` alone."""
    generator = torch.Generator().manual_seed(1000 + seed)
    made = {}
    for layer in layers:
        for module in modules:
            blocked = "A" if module in ("o_proj", "down_proj") else "B"
            inputs, outputs = SIDES[module]
            a_columns = inputs // num_blocks if blocked == "A" else inputs
            b_columns = rank // num_blocks if blocked == "B" else rank
            made[ModuleKey(layer=layer, name=module)] = BlockFactors(
                A=torch.randn(rank, a_columns, generator=generator) * 0.3,
                B=torch.randn(outputs, b_columns, generator=generator) * 0.3,
                num_blocks=num_blocks,
                blocked=blocked,
                scale=2.0 / rank if scale is None else scale,
            )
    return Adapter(name=name or f"adapter{seed}", modules=made)
