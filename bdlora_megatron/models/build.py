"""Building an empty ``HybridModel`` or ``GPTModel`` of a Hugging Face model's shape."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import ModuleSpec, TransformerConfig, TransformerLayer
from torch import Tensor, nn

from bdlora_megatron.decoder import ModelClass, heads_fit
from bdlora_megatron.errors import ConfigError, ShapeError, UnsupportedError
from bdlora_megatron.models.config import HFConfig
from bdlora_megatron.models.frequencies import set_frequencies
from bdlora_megatron.runtime import device
from bdlora_megatron.runtime.versions.layers import (
    has_hybrid_model,
    hybrid_norms,
    shares_kv_heads,
)

__all__ = [
    "build_model",
    "default_layer_spec",
    "hybrid_stack_spec",
    "padded_vocab_size",
    "transformer_config",
    "without_padding",
]


def transformer_config(
    hf: HFConfig,
    *,
    dtype: torch.dtype,
    settings: Mapping[str, Any] | None = None,
    model_class: ModelClass = "auto",
) -> TransformerConfig:
    """Megatron-Core's configuration of the model, for the parallel sizes now in force.

    Args:
        hf: The model; from ``for_serving`` to repeat key-value heads.
        dtype: Type of the parameters.
        settings: Further fields of ``TransformerConfig``, such as ``sequence_parallel`` or
            ``recompute_granularity``. Dropout is 0 unless it is set here.
        model_class: The class that ``build_model`` then builds.

    Returns:
        The configuration. A ``HybridModel``'s counts attention and MLP as a layer each.

    Raises:
        UnsupportedError: This release has no ``HybridModel`` to take ``GPTModel``'s place.
        ConfigError: ``settings`` would change what the weights or the process groups decide.
        ShapeError: The model cannot be divided over this many tensor-parallel ranks.
    """
    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    _check_division(hf, tp_size)
    fixed = _fixed_fields(hf, dtype)
    if _is_hybrid(model_class):
        fixed |= {"num_layers": 2 * hf.num_layers, "is_hybrid_model": True}
    clashing = sorted(fixed.keys() & (settings or {}).keys())
    if clashing:
        raise ConfigError(
            f"settings name {', '.join(clashing)}, which the model, dtype and the process groups "
            "decide; leave them out"
        )
    defaults = {"attention_dropout": 0.0, "hidden_dropout": 0.0}
    config = TransformerConfig(**{**defaults, **(settings or {}), **fixed})
    # For ``layers.geometry``: Megatron-Core takes every copy for a head of its own.
    config.kv_head_replicas = hf.kv_head_replicas
    # For ``layers.collect``: adapters are written under the names of the model's files.
    config.fused_projections = hf.fused_projections
    return config


def default_layer_spec(hf: HFConfig) -> ModuleSpec:
    """Transformer Engine's layers where it and CUDA are present, Megatron-Core's own elsewhere."""
    if torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None:
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=hf.qk_norm)
    return get_gpt_layer_local_spec(qk_layernorm=hf.qk_norm, normalization="RMSNorm")


def padded_vocab_size(hf: HFConfig, tp_size: int) -> int:
    """The vocabulary, rounded up to a multiple of the tensor-parallel size."""
    return -(-hf.vocab_size // tp_size) * tp_size


def without_padding(logits: Tensor, hf: HFConfig) -> Tensor:
    """The logits of tokens that exist.

    Args:
        logits: ``[..., padded vocabulary]``, gathered over the tensor-parallel ranks.
        hf: The model.

    Returns:
        ``[..., vocabulary]``, a view.

    Raises:
        ShapeError: The logits are not the whole vocabulary's.

    Collectives:
        None.
    """
    width = padded_vocab_size(hf, parallel_state.get_tensor_model_parallel_world_size())
    if logits.shape[-1] != width:
        raise ShapeError(
            f"logits are {list(logits.shape)}; {width} in the last dimension were expected: gather "
            "them with gather_from_tensor_model_parallel_region first"
        )
    return logits[..., : hf.vocab_size]


def build_model(
    hf: HFConfig,
    config: TransformerConfig,
    *,
    max_sequence_length: int | None = None,
    layer_spec: ModuleSpec | None = None,
    vp_stage: int | None = None,
) -> Any:
    """This rank's part of the model, its weights not yet set.

    Logits of padding, where the vocabulary was rounded up, are minus infinity.

    Args:
        hf: The model.
        config: From ``transformer_config``, which decides the model's class.
        max_sequence_length: Longest sequence that will be used; what the model was made for by
            default.
        layer_spec: Of one decoder layer, attention and MLP; from ``default_layer_spec`` unless
            given.
        vp_stage: Which chunk of this pipeline stage, where stages hold several.

    Returns:
        The ``HybridModel`` or ``GPTModel``, on this rank's device.

    Raises:
        ShapeError: The layers cannot be divided over the pipeline's stages.
        UnsupportedError: Attention would see less than ``max_sequence_length`` positions, or
            their frequencies would change within it.
    """
    hf.check_stages(_segments(config))
    length = max_sequence_length or hf.max_positions
    if hf.sliding_window is not None and hf.sliding_window < length:
        raise UnsupportedError(
            f"sliding_window={hf.sliding_window} of this model is shorter than "
            f"max_sequence_length={length}, and windows are not supported; pass "
            f"max_sequence_length={hf.sliding_window} or less and keep sequences within it"
        )
    short = hf.rope.original_positions
    if hf.rope.kind == "longrope" and short < length:
        raise UnsupportedError(
            f"rope_type='longrope' of this model turns to other frequencies beyond {short} "
            f"positions, and max_sequence_length={length}; they are not supported: pass "
            f"max_sequence_length={short} or less"
        )
    # Random numbers that the checkpoint overwrites would take longer than reading it.
    config.perform_initialization = False
    spec = layer_spec or default_layer_spec(hf)
    settings = {
        "vocab_size": padded_vocab_size(hf, config.tensor_model_parallel_size),
        "max_sequence_length": length,
        "pre_process": parallel_state.is_pipeline_first_stage(False, vp_stage),
        "post_process": parallel_state.is_pipeline_last_stage(False, vp_stage),
        "vp_stage": vp_stage,
        "share_embeddings_and_output_weights": hf.tied,
        "position_embedding_type": "rope",
        "rotary_base": hf.rope.theta,
        "rotary_percent": hf.rope.partial,
        "seq_len_interpolation_factor": hf.rope.factor if hf.rope.kind == "linear" else None,
    }
    if getattr(config, "is_hybrid_model", False):
        model = _hybrid_model(hf, config, spec, settings)
    else:
        model = GPTModel(config=config, transformer_layer_spec=spec, **settings)
    set_frequencies(model, hf)
    config.perform_initialization = True
    # Megatron-Core's own ``vocab_size`` counts the padding.
    model.unpadded_vocab_size = hf.vocab_size
    # Norms outside Transformer Engine are made in float32, whatever params_dtype says.
    model.to(device=device(), dtype=config.params_dtype)
    if model.post_process and padded_vocab_size(hf, config.tensor_model_parallel_size) != (
        hf.vocab_size
    ):
        model.output_layer.register_forward_hook(_PaddingLogits(hf.vocab_size))
    return model


def _segments(config: TransformerConfig) -> int:
    """Parts that pipeline stages and their chunks cut the layers into."""
    stages, chunks = (
        config.pipeline_model_parallel_size,
        config.virtual_pipeline_model_parallel_size or 1,
    )
    return int(stages * chunks)


def _is_hybrid(model_class: ModelClass) -> bool:
    if model_class == "hybrid" and not has_hybrid_model():
        raise UnsupportedError(
            "model_class='hybrid' needs Megatron-Core 0.19 or newer, whose HybridModel takes "
            "GPTModel's place; use model_class='auto', or pip install 'megatron-core>=0.19'"
        )
    return model_class != "gpt" and has_hybrid_model()


def _hybrid_model(
    hf: HFConfig,
    config: TransformerConfig,
    spec: ModuleSpec,
    settings: Mapping[str, Any],
) -> Any:
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.process_groups_config import ProcessGroupCollection

    segments = _segments(config)
    segment = "*-" * (hf.num_layers // segments)
    with hybrid_norms():
        return HybridModel(
            config=config,
            hybrid_stack_spec=hybrid_stack_spec(spec),
            hybrid_layer_pattern="|".join([segment] * segments),
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
            **settings,
        )


def hybrid_stack_spec(spec: ModuleSpec) -> ModuleSpec:
    """A hybrid stack whose attention and MLP are those of a decoder layer's specification.

    Args:
        spec: Of one ``TransformerLayer``, such as ``default_layer_spec`` returns, or
            ``layers.lora_spec`` of one.

    Returns:
        What ``HybridModel`` takes as ``hybrid_stack_spec``.

    Raises:
        ConfigError: It is no decoder layer's.
    """
    from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
    from megatron.core.ssm.mlp_layer import MLPLayer
    from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp

    if not isinstance(spec, ModuleSpec) or spec.module is not TransformerLayer:
        raise ConfigError(
            "layer_spec is not the ModuleSpec of one TransformerLayer, which is what a HybridModel "
            "takes its attention and MLP from; pass such a one, or model_class='gpt'"
        )
    layer = spec.submodules
    no_mlp = {"pre_mlp_layernorm": IdentityOp, "mlp": IdentityOp, "mlp_bda": IdentityFuncOp}
    no_attention = {
        "input_layernorm": IdentityOp,
        "self_attention": IdentityOp,
        "self_attn_bda": IdentityFuncOp,
    }
    return ModuleSpec(
        module=HybridStack,
        submodules=HybridStackSubmodules(
            attention_layer=replace(spec, submodules=replace(layer, **no_mlp)),
            mlp_layer=replace(spec, module=MLPLayer, submodules=replace(layer, **no_attention)),
        ),
    )


def _fixed_fields(hf: HFConfig, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "num_layers": hf.num_layers,
        "hidden_size": hf.hidden_size,
        "ffn_hidden_size": hf.ffn_size,
        "num_attention_heads": hf.num_heads,
        "num_query_groups": hf.num_kv_heads,
        "kv_channels": hf.head_dim,
        "normalization": "RMSNorm",
        "layernorm_epsilon": hf.norm_eps,
        "qk_layernorm": hf.qk_norm,
        "gated_linear_unit": True,
        "activation_func": nn.functional.silu,
        # One switch for both; what the files have no bias for gets zeros.
        "add_bias_linear": hf.proj_bias or hf.mlp_bias,
        "add_qkv_bias": hf.qkv_bias,
        "rotary_interleaved": False,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        # The fused kernel is not in Megatron-Core's wheel; Transformer Engine brings its own.
        "masked_softmax_fusion": False,
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "virtual_pipeline_model_parallel_size": (
            parallel_state.get_virtual_pipeline_model_parallel_world_size()
        ),
        "context_parallel_size": parallel_state.get_context_parallel_world_size(),
    }


def _check_division(hf: HFConfig, tp_size: int) -> None:
    problems = [
        f"{name}={value} is not a multiple of {tp_size}"
        for name, value in (
            ("num_attention_heads", hf.num_heads),
            ("intermediate_size", hf.ffn_size),
        )
        if value % tp_size
    ]
    if hf.num_kv_heads % tp_size and (tp_size % hf.num_kv_heads or not shares_kv_heads()):
        problems.append(
            f"num_key_value_heads={hf.num_kv_heads} is neither a multiple nor (from Megatron-Core "
            f"0.16 on) a divisor of {tp_size}"
        )
    if problems:
        raise ShapeError(
            f"the model cannot be divided over {tp_size} tensor-parallel ranks: "
            f"{'; '.join(problems)}; use one of {', '.join(map(str, _sizes(hf)))}"
        )


def _sizes(hf: HFConfig) -> list[int]:
    sizes = range(1, hf.num_heads + 1)
    most = hf.num_heads if shares_kv_heads() else hf.num_kv_heads
    return [
        size
        for size in sizes
        if size <= most
        and heads_fit(size, hf.num_heads, hf.num_kv_heads)
        and hf.ffn_size % size == 0
    ]


class _PaddingLogits:
    """A forward hook of the output layer: tokens that do not exist get no probability.

    A hook, because the output layer must stay the class that Megatron-Core made.
    """

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def __call__(self, layer: Any, inputs: Any, outputs: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        logits, bias = outputs
        width = logits.shape[-1]
        # Gathered logits hold the whole vocabulary, the others this rank's rows of the embedding.
        first = 0 if width == layer.output_size else width * _tp_rank()
        tokens = torch.arange(first, first + width, device=logits.device)
        return logits.masked_fill(tokens >= self._vocab_size, float("-inf")), bias


def _tp_rank() -> int:
    rank: int = parallel_state.get_tensor_model_parallel_rank()
    return rank
