"""Where each Megatron-Core parameter's numbers stand in Hugging Face's tensors.

Every whole Megatron parameter is a stack of row ranges of Hugging Face tensors, in an order under
which each tensor-parallel rank holds one contiguous part: rows of a column-parallel layer, columns
of a row-parallel one. Plain names and numbers; no tensor and no process group.

    linear_qkv   for each key-value head: its query heads' rows, its key's, its value's; a head
                 that several ranks hold is there once for each, with that rank's query heads
    linear_fc1   for each rank: its share of gate_proj, then its share of up_proj
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bdlora_megatron.models.config import HFConfig

__all__ = ["ZEROS", "RowRange", "WeightSource", "hf_shapes", "layer_sources", "model_sources"]

Split = Literal["rows", "columns", "none"]


@dataclass(frozen=True, slots=True)
class RowRange:
    """Rows ``start`` to ``stop`` of the Hugging Face tensor ``name``."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class WeightSource:
    """A whole Megatron parameter.

    Attributes:
        parts: The stack, from the first row down; rows that no part reaches are zero, and all
            are where there is none.
        split: What tensor-parallel ranks divide among themselves.
    """

    parts: tuple[RowRange, ...]
    split: Split


ZEROS = WeightSource((), "none")
_BIASES = (
    "self_attention.linear_qkv.bias",
    "self_attention.linear_proj.bias",
    "mlp.linear_fc1.bias",
    "mlp.linear_fc2.bias",
)


def hf_shapes(hf: HFConfig) -> dict[str, tuple[int, ...]]:
    """The tensors that a complete checkpoint of this model holds, by name."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (hf.vocab_size, hf.hidden_size),
        "model.norm.weight": (hf.hidden_size,),
    }
    if not hf.tied:
        shapes["lm_head.weight"] = (hf.vocab_size, hf.hidden_size)
    for layer in range(hf.num_layers):
        shapes.update(_layer_shapes(hf, f"model.layers.{layer}."))
    return shapes


def model_sources(hf: HFConfig) -> dict[str, WeightSource]:
    """Sources of the parameters outside the layers, by both model classes' names for them."""
    norm = _whole("model.norm.weight", hf.hidden_size, "none")
    head = "model.embed_tokens.weight" if hf.tied else "lm_head.weight"
    return {
        "embedding.word_embeddings.weight": _whole(
            "model.embed_tokens.weight", hf.vocab_size, "rows"
        ),
        "decoder.final_layernorm.weight": norm,
        "decoder.final_norm.weight": norm,
        "output_layer.weight": _whole(head, hf.vocab_size, "rows"),
    }


def layer_sources(hf: HFConfig, layer: int, tp_size: int) -> dict[str, WeightSource]:
    """Sources of one decoder layer's parameters.

    Args:
        hf: The model.
        layer: Number of the layer in the whole model, from 0.
        tp_size: Tensor-parallel ranks.

    Returns:
        By name within the layer. A norm appears twice: under its own name, and under the name that
        Transformer Engine's fused norm-and-linear layer gives it.
    """
    prefix = f"model.layers.{layer}."
    attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
    input_norm = _whole(f"{prefix}input_layernorm.weight", hf.hidden_size, "none")
    mlp_norm = _whole(f"{prefix}post_attention_layernorm.weight", hf.hidden_size, "none")
    sources = {
        "input_layernorm.weight": input_norm,
        "self_attention.linear_qkv.layer_norm_weight": input_norm,
        "pre_mlp_layernorm.weight": mlp_norm,
        "mlp.linear_fc1.layer_norm_weight": mlp_norm,
        "self_attention.linear_proj.weight": _whole(
            f"{attention}o_proj.weight", hf.hidden_size, "columns"
        ),
        "mlp.linear_fc2.weight": _whole(f"{mlp}down_proj.weight", hf.hidden_size, "columns"),
        "self_attention.linear_qkv.weight": _qkv(hf, attention, "weight"),
        "mlp.linear_fc1.weight": _gate_and_up(hf, mlp, "weight", tp_size),
    }
    if hf.proj_bias or hf.mlp_bias:
        # Megatron-Core has biases on either side if the files have them on one.
        sources |= dict.fromkeys(_BIASES, ZEROS)
    if hf.qkv_bias:
        sources["self_attention.linear_qkv.bias"] = _qkv(hf, attention, "bias")
    # Those of row layers are added after the ranks' sum, so every rank holds the whole.
    if hf.proj_bias:
        sources["self_attention.linear_proj.bias"] = _whole(
            f"{attention}o_proj.bias", hf.hidden_size, "none"
        )
    if hf.mlp_bias:
        sources["mlp.linear_fc1.bias"] = _gate_and_up(hf, mlp, "bias", tp_size)
        sources["mlp.linear_fc2.bias"] = _whole(f"{mlp}down_proj.bias", hf.hidden_size, "none")
    if hf.qk_norm:
        for which in ("q", "k"):
            sources[f"self_attention.{which}_layernorm.weight"] = _whole(
                f"{attention}{which}_norm.weight", hf.head_dim, "none"
            )
    return sources


def _layer_shapes(hf: HFConfig, prefix: str) -> dict[str, tuple[int, ...]]:
    q, kv = hf.num_heads * hf.head_dim, hf.own_kv_heads * hf.head_dim
    apart: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (q, hf.hidden_size),
        "self_attn.k_proj": (kv, hf.hidden_size),
        "self_attn.v_proj": (kv, hf.hidden_size),
        "mlp.gate_proj": (hf.ffn_size, hf.hidden_size),
        "mlp.up_proj": (hf.ffn_size, hf.hidden_size),
    }
    fused: dict[str, tuple[int, ...]] = {
        "self_attn.qkv_proj": (q + 2 * kv, hf.hidden_size),
        "mlp.gate_up_proj": (2 * hf.ffn_size, hf.hidden_size),
    }
    linears = {
        **(fused if hf.fused_projections else apart),
        "self_attn.o_proj": (hf.hidden_size, q),
        "mlp.down_proj": (hf.hidden_size, hf.ffn_size),
    }
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}input_layernorm.weight": (hf.hidden_size,),
        f"{prefix}post_attention_layernorm.weight": (hf.hidden_size,),
    }
    for name, shape in linears.items():
        shapes[f"{prefix}{name}.weight"] = shape
        biases = {"o_proj": hf.proj_bias, "gate_proj": hf.mlp_bias, "up_proj": hf.mlp_bias}
        biases |= {"down_proj": hf.mlp_bias}
        if biases.get(name.rpartition(".")[2], hf.qkv_bias):
            shapes[f"{prefix}{name}.bias"] = shape[:1]
    if hf.qk_norm:
        shapes[f"{prefix}self_attn.q_norm.weight"] = (hf.head_dim,)
        shapes[f"{prefix}self_attn.k_norm.weight"] = (hf.head_dim,)
    return shapes


def _whole(name: str, rows: int, split: Split) -> WeightSource:
    return WeightSource((RowRange(name, 0, rows),), split)


def _qkv(hf: HFConfig, attention: str, kind: str) -> WeightSource:
    q, kv = hf.num_heads * hf.head_dim, hf.own_kv_heads * hf.head_dim
    first = {"q": 0, "k": q, "v": q + kv} if hf.fused_projections else {}
    queries = hf.num_heads // hf.num_kv_heads * hf.head_dim
    parts = []
    for group in range(hf.num_kv_heads):
        head = group // hf.kv_head_replicas
        for which, place, rows in (
            ("q", group, queries),
            ("k", head, hf.head_dim),
            ("v", head, hf.head_dim),
        ):
            name = f"{attention}{'qkv' if first else which}_proj.{kind}"
            start = first.get(which, 0) + place * rows
            parts.append(RowRange(name, start, start + rows))
    return WeightSource(tuple(parts), "rows")


def _gate_and_up(hf: HFConfig, mlp: str, kind: str, tp_size: int) -> WeightSource:
    rows = hf.ffn_size // tp_size
    names = (("gate", 0), ("up", 0))
    if hf.fused_projections:
        names = (("gate_up", 0), ("gate_up", hf.ffn_size))
    parts = [
        RowRange(f"{mlp}{name}_proj.{kind}", first + rank * rows, first + (rank + 1) * rows)
        for rank in range(tp_size)
        for name, first in names
    ]
    return WeightSource(tuple(parts), "rows")
