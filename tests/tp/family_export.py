"""A family's model and adapter for PEFT; apart from transformers, which no rank needs to import."""

from __future__ import annotations

import torch

from bdlora_megatron.config import LoRAConfig
from bdlora_megatron.export import export_adapter
from bdlora_megatron.layers import apply_lora
from tests.tp.models import randomize_adapters
from tests.tp.session import model_parallel

PEFT_PATTERNS = {"nemotron_h": "M*-M-", "qwen3_next": "G-G-", "deepseek": "+-+-"}
# PEFT adapts no out_proj of a Nemotron-H, whose fused kernel reads the weight past the adapter. An
# MLP of the two others it takes for one of experts, and leaves its adapter out.
NOT_IN_PEFT = {
    "nemotron_h": {"out_proj"},
    "qwen3_next": {"linear_fc1", "linear_fc2"},
    "deepseek": {"linear_fc1", "linear_fc2"},
}


def _targets(family, model):
    own = {"linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "in_proj", "out_proj"}
    own |= {"linear_q_up_proj", "linear_kv_up_proj"}
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()} & own
    return sorted(names - NOT_IN_PEFT[family])


def export_for_peft(rank, world, family, folder):
    """Base logits, logits with the adapter, and on one rank the base's weights."""
    from tests.tp.family_models import batch, family_model

    with model_parallel(world):
        settings = {"sequence_parallel": world > 1, "layernorm_epsilon": 1e-5}
        model = family_model(family, world, pattern=PEFT_PATTERNS[family], **settings)
        weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        with torch.no_grad():
            base = model(**batch(), runtime_gather_output=True)
        targets = _targets(family, model)
        apply_lora(model, LoRAConfig(rank=8, alpha=12, num_blocks=4, target_modules=targets))
        randomize_adapters(model)
        with torch.no_grad():
            adapted = model(**batch(), runtime_gather_output=True)
        export_adapter(model, folder)
        return weights if world == 1 else {}, base, adapted, batch()["input_ids"]
