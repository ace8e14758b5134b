"""The base model with fresh adapters in it, as the settings describe them."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from torch import nn

from bdlora_megatron.layers import apply_lora, lora_layers
from bdlora_megatron.layers.factors import kaiming_uniform
from bdlora_megatron.models import HFConfig, load_hf_model, read_hf_config
from bdlora_megatron.train.attention import with_packed_attention
from bdlora_megatron.train.peft import resolve_peft
from bdlora_megatron.train.schema import ModelSection, TrainConfig

__all__ = ["build_model", "model_chunks"]

_DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


def build_model(config: TrainConfig) -> tuple[Any, HFConfig]:
    """Load the base model at the parallel sizes now in force and put the adapters in.

    Args:
        config: The run's settings.

    Returns:
        This rank's part of the model, everything but adapters frozen, and the base model's facts.
        Where the pipeline interleaves, a ``ModuleList`` of this stage's chunks.
    """
    hf = read_hf_config(config.model.hf_path)
    # Before the weights are read: a wrong rank is known without them.
    lora = resolve_peft(config.peft, hf)
    count = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    chunks = [
        load_hf_model(
            config.model.hf_path,
            dtype=_DTYPES["bfloat16" if config.train.precision == "bf16" else config.model.dtype],
            max_sequence_length=config.model.seq_length,
            settings=_settings(config.model),
            layer_spec=with_packed_attention(
                get_gpt_layer_local_spec(qk_layernorm=hf.qk_norm, normalization="RMSNorm")
            ),
            model_class=config.model.model_class,
            vp_stage=vp_stage,
        )
        for vp_stage in ([None] if count is None else range(count))
    ]
    model = chunks[0] if count is None else nn.ModuleList(chunks)
    if lora is None:
        model.requires_grad_(False)
    else:
        apply_lora(chunks, lora)
        for chunk in chunks:
            _draw_factors(chunk, config.rng.seed)
    return model, hf


def model_chunks(model: nn.Module) -> list[Any]:
    """The chunks of this pipeline stage; one, where the pipeline does not interleave."""
    return list(model) if isinstance(model, nn.ModuleList) else [model]


@torch.no_grad()
def _draw_factors(model: nn.Module, seed: int) -> None:
    """Draw each A from the seed and its layer's name: the same start at any parallel size."""
    for name, layer in lora_layers(model):
        if layer.adapter is None:
            continue
        torch.manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        for plan in layer.adapter.plans:
            A, _ = layer.adapter.factors(plan)
            whole = torch.empty(A.shape.rows, A.shape.columns)
            kaiming_uniform(whole)
            A.weight.copy_(A.cut(whole))


def _settings(model: ModelSection) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "sequence_parallel": model.sequence_parallel,
        # The mean over tokens, not over micro-batches that hold different numbers of them.
        "calculate_per_token_loss": True,
    }
    if model.chunks_per_stage is not None:
        # Of two stages each is before and after the other: what they batch they would mix up.
        settings |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    if model.recompute_granularity == "selective":
        settings["recompute_granularity"] = "selective"
    elif model.recompute_granularity == "full":
        settings |= {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    return settings
