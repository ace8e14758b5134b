"""Tiny models for tests, of both classes: odd sizes, GQA, a gated MLP."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig

from bdlora_megatron.models.build import hybrid_stack_spec
from bdlora_megatron.runtime.versions.layers import has_hybrid_model, hybrid_norms

#: The classes of models that this release has.
MODEL_CLASSES = ("gpt", "hybrid") if has_hybrid_model() else ("gpt",)
VOCAB, SEQUENCE, BATCH = 56, 12, 2


#: Settings of a model in fp64, without chance, fusions or biases.
PLAIN_FP64 = {
    "params_dtype": torch.float64,
    "pipeline_dtype": torch.float64,
    "use_cpu_initialization": True,
    "add_bias_linear": False,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "bias_activation_fusion": False,
    "attention_softmax_in_fp32": False,
    "apply_query_key_layer_scaling": False,
}


def tiny_config(world_size: int, **changes: Any) -> TransformerConfig:
    settings: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 24,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "kv_channels": 6,
        "ffn_hidden_size": 40,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "normalization": "RMSNorm",
        "tensor_model_parallel_size": world_size,
        **PLAIN_FP64,
    }
    if changes.pop("model_class", "gpt") == "hybrid":
        layers = changes.pop("num_layers", settings["num_layers"])
        changes |= {"num_layers": 2 * layers, "is_hybrid_model": True}
    return TransformerConfig(**{**settings, **changes})


def tiny_model(
    config: TransformerConfig, spec: Any = None, *, seed: int = 3, pattern: str | None = None
) -> Any:
    """A model whose weights depend on ``seed`` alone: not on the parallel size, nor on its class.

    ``pattern`` is a ``HybridModel``'s, where it is not to be a ``GPTModel``'s layers one by one.
    """
    torch.manual_seed(seed)
    spec = spec or get_gpt_layer_local_spec(normalization="RMSNorm")
    settings: dict[str, Any] = {
        "config": config,
        "vocab_size": VOCAB,
        "max_sequence_length": SEQUENCE,
        "position_embedding_type": "rope",
        "share_embeddings_and_output_weights": False,
        "pre_process": parallel_state.is_pipeline_first_stage(),
        "post_process": parallel_state.is_pipeline_last_stage(),
    }
    if getattr(config, "is_hybrid_model", False):
        model = _hybrid_model(config, spec, settings, pattern)
    else:
        model = GPTModel(transformer_layer_spec=spec, **settings)
    _draw_gated_layers(model, seed)
    return model


def _hybrid_model(config: Any, spec: Any, settings: dict[str, Any], pattern: str | None) -> Any:
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.process_groups_config import ProcessGroupCollection

    stages = config.pipeline_model_parallel_size
    segment = "*-" * (config.num_layers // 2 // stages)
    with hybrid_norms():
        return HybridModel(
            hybrid_stack_spec=hybrid_stack_spec(spec),
            hybrid_layer_pattern=pattern or "|".join([segment] * stages),
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
            **settings,
        )


def _draw_gated_layers(model: Any, seed: int) -> None:
    """Before 0.16, Megatron-Core cuts a fresh ``linear_fc1`` as if it had one half, not two."""
    generator = torch.Generator().manual_seed(seed)
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    for name, layer in model.named_modules():
        # An expert has rows of its own; layers of Transformer Engine do not say that they are none.
        if not name.endswith("linear_fc1") or getattr(layer, "is_expert", False):
            continue
        rows, columns = size * layer.weight.size(0), layer.weight.size(1)
        whole = 0.02 * torch.randn(rows, columns, generator=generator, dtype=torch.float64)
        halves = [half.chunk(size)[rank] for half in whole.chunk(2)]
        layer.weight.data.copy_(torch.cat(halves))


def tokens() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    ids = torch.randint(0, VOCAB, (BATCH, SEQUENCE), generator=generator)
    positions = torch.arange(SEQUENCE).expand(BATCH, -1)
    mask = torch.ones(SEQUENCE, SEQUENCE).triu(1).bool().expand(BATCH, 1, -1, -1)
    return {"input_ids": ids, "position_ids": positions, "attention_mask": mask}


def randomize_adapters(model: Any, *, seed: int = 4) -> None:
    """Fill every factor with numbers that do not depend on the tensor-parallel size."""
    from bdlora_megatron.layers import lora_layers

    generator = torch.Generator().manual_seed(seed)
    for _, layer in lora_layers(model):
        for plan in layer.adapter.plans:
            for factor in layer.adapter.factors(plan):
                whole = torch.randn(
                    factor.shape.rows,
                    factor.shape.columns,
                    generator=generator,
                    dtype=torch.float64,
                )
                factor.weight.data.copy_(factor.cut(whole * 0.3))
