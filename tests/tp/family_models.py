"""Tiny ``HybridModel``s of the families that only it mixes: Mamba-2, delta nets, latent attention.

The sizes divide over one, two and eight ranks.
"""

from __future__ import annotations

import zlib
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import MLATransformerConfig
from torch import Tensor

from bdlora_megatron.models.build import hybrid_stack_spec
from bdlora_megatron.runtime.versions.layers import hybrid_norms
from tests.fakes import hybrid_kernels
from tests.tp.models import PLAIN_FP64

VOCAB, SEQUENCE, BATCH = 56, 16, 2
#: A pattern of each family, with what it is like.
PATTERNS = {"nemotron_h": "M*-M", "qwen3_next": "G-*-", "deepseek": "+-+-", "deepseek_lite": "+-"}
#: Linear layers that an adapter can change, by family.
TARGETS = {
    "nemotron_h": ["in_proj", "out_proj", "linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"],
    "qwen3_next": ["in_proj", "out_proj", "linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"],
    "deepseek": ["linear_q_up_proj", "linear_kv_up_proj", "linear_proj", "linear_fc1"],
    "deepseek_lite": ["linear_q_proj", "linear_kv_up_proj", "linear_proj", "linear_fc2"],
}


def family_config(family: str, tp: int, **changes: Any) -> TransformerConfig:
    settings: dict[str, Any] = {
        "num_layers": len(PATTERNS[family].replace("|", "")),
        "hidden_size": 24,
        "num_attention_heads": 16,
        "num_query_groups": 8,
        "kv_channels": 4,
        "ffn_hidden_size": 40,
        "gated_linear_unit": family != "nemotron_h",
        "activation_func": squared_relu if family == "nemotron_h" else F.silu,
        "normalization": "RMSNorm",
        "layernorm_epsilon": 1e-6,
        "tensor_model_parallel_size": tp,
        **PLAIN_FP64,
        "is_hybrid_model": True,
    }
    if family.startswith("deepseek"):
        settings |= {
            "q_lora_rank": None if family == "deepseek_lite" else 16,
            "kv_lora_rank": 14,
            "qk_head_dim": 4,
            "qk_pos_emb_head_dim": 2,
            "v_head_dim": 3,
            "rope_type": "rope",
            "num_query_groups": 16,
            "qk_layernorm": family == "deepseek",
        }
        return MLATransformerConfig(**{**settings, **changes})
    settings |= {
        "mamba_num_heads": 16,
        "mamba_head_dim": 4,
        "mamba_num_groups": 8,
        "mamba_state_dim": 2,
        "linear_num_key_heads": 8,
        "linear_key_head_dim": 3,
        "linear_num_value_heads": 16,
        "linear_value_head_dim": 4,
    }
    return TransformerConfig(**{**settings, **changes})


def squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


def family_model(
    family: str, tp: int, *, pattern: str | None = None, spec: Any = None, **changes: Any
) -> Any:
    """A model whose weights depend neither on the parallel size nor on chance.

    ``spec`` is a stack's, or ``shipped`` for Megatron-Core's own of Transformer Engine's layers.
    """
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.process_groups_config import ProcessGroupCollection

    hybrid_kernels.install()
    if pattern is not None:
        changes["num_layers"] = len(pattern.replace("|", ""))
    config = family_config(family, tp, **changes)
    if spec == "shipped":
        from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec as spec
    with hybrid_norms():
        model = HybridModel(
            config=config,
            hybrid_stack_spec=spec or family_spec(family),
            hybrid_layer_pattern=pattern or PATTERNS[family],
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
            vocab_size=VOCAB,
            max_sequence_length=SEQUENCE,
            position_embedding_type="none" if family == "nemotron_h" else "rope",
            share_embeddings_and_output_weights=False,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
        )
    model.double()
    _draw(model, tp)
    return model


def family_spec(family: str, *, gathered: bool = False) -> ModuleSpec:
    """A stack's specification; ``gathered`` splits latent attention's down-projections."""
    from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
    from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
    from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules

    latent = family.startswith("deepseek")
    layer = get_gpt_layer_local_spec(
        normalization="RMSNorm",
        multi_latent_attention=latent,
        qk_layernorm=family == "deepseek",
    )
    if latent:
        attention = layer.submodules.self_attention
        attention.submodules.core_attention = hybrid_kernels.LatentAttention
        for down in () if gathered else ("linear_q_down_proj", "linear_kv_down_proj"):
            setattr(attention.submodules, down, hybrid_kernels.WholeLinear)
    stack = hybrid_stack_spec(layer)
    linears = {"in_proj": ColumnParallelLinear, "out_proj": RowParallelLinear}
    mamba = ModuleSpec(
        module=MambaLayer,
        submodules=MambaLayerSubmodules(
            norm=WrappedTorchNorm,
            mixer=ModuleSpec(module=MambaMixer, submodules=MambaMixerSubmodules(**linears)),
            mamba_bda=get_bias_dropout_add,
        ),
    )
    attention = stack.submodules.attention_layer
    delta = GatedDeltaNetSubmodules(out_norm=WrappedTorchNorm, **linears)
    net = replace(
        attention.submodules, self_attention=ModuleSpec(module=GatedDeltaNet, submodules=delta)
    )
    return replace(
        stack,
        submodules=replace(
            stack.submodules,
            mamba_layer=mamba,
            gdn_layer=replace(attention, submodules=net),
            # A copy: what changes one must not change the other.
            mla_layer=deepcopy(attention),
        ),
    )


def stretches_of(name: str, module: Any) -> list[int] | None:
    """One rank's rows of a parameter that holds several stretches; None for one stretch."""
    if "in_proj.weight" in name or "conv1d" in name:
        sizes = getattr(dict(module.named_parameters())[name], "partition_sizes", None)
        if sizes is not None:
            return list(sizes)
        net = module.get_submodule(name.partition(".self_attention")[0] + ".self_attention")
        if "in_proj" in name:
            return list(net.in_proj_split_sections)
        return [net.qk_dim_local_tp, net.qk_dim_local_tp, net.v_dim_local_tp]
    if name.endswith("linear_fc1.weight") and module.config.gated_linear_unit:
        return [dict(module.named_parameters())[name].size(0) // 2] * 2
    return None


def _draw(model: Any, tp: int) -> None:
    rank = parallel_state.get_tensor_model_parallel_rank()
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        split = getattr(parameter, "tensor_model_parallel", False)
        dim = parameter.partition_dim if split else 0
        shape = list(parameter.shape)
        shape[dim] *= tp if split else 1
        whole = 0.2 * torch.randn(shape, generator=generator, dtype=torch.float64)
        if "norm" in name:
            whole += 1
        sizes = stretches_of(name, model)
        parameter.data.copy_(cut(whole, dim, sizes, tp, rank) if split else whole)


def cut(whole: Tensor, dim: int, sizes: list[int] | None, tp: int, rank: int) -> Tensor:
    """One rank's share: of each stretch, whose local sizes are given, its piece."""
    parts = whole.split([size * tp for size in sizes], dim=dim) if sizes else [whole]
    return torch.cat([part.chunk(tp, dim=dim)[rank] for part in parts], dim=dim)


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(9)
    return {
        "input_ids": torch.randint(0, VOCAB, (BATCH, SEQUENCE), generator=generator),
        "position_ids": torch.arange(SEQUENCE).expand(BATCH, -1),
        "attention_mask": torch.ones(SEQUENCE, SEQUENCE).triu(1).bool().expand(BATCH, 1, -1, -1),
    }
