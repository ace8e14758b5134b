"""The frequencies of a rotary embedding, as transformers computes them, in a built model.

Megatron-Core's own embedding knows plain and linear ones, llama3 with fixed limits, and yarn on
CUDA alone. All of them multiply positions by ``inv_freq``, so that is what is replaced here.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.transformer.attention import Attention
from torch import Tensor

from bdlora_megatron.errors import UnsupportedError
from bdlora_megatron.models.config import HFConfig
from bdlora_megatron.models.rope import RopeSettings

__all__ = ["inverse_frequencies", "set_frequencies"]


def set_frequencies(model: Any, hf: HFConfig) -> None:
    """Give a built model the frequencies and the scale that its config asks for.

    Args:
        model: A ``HybridModel`` or ``GPTModel``.
        hf: The model's facts.

    Raises:
        UnsupportedError: The embedding scales cosines and sines, and this release of
            Megatron-Core's attention does not.
    """
    if hf.rope.kind in {"default", "linear"}:
        return
    rotary = model.rotary_pos_emb
    rotary.inv_freq = inverse_frequencies(hf.rope, hf.head_dim).to(rotary.inv_freq.device)
    if hf.rope.attention_factor == 1.0:
        return
    for module in model.modules():
        if not isinstance(module, Attention):
            continue
        if not hasattr(module, "_yarn_concentration_factor"):
            raise UnsupportedError(
                f"rope_type={hf.rope.kind!r} scales cosines and sines by "
                f"{hf.rope.attention_factor}, and attention of this Megatron-Core does not; "
                "pip install 'megatron-core>=0.19'"
            )
        module._yarn_concentration_factor = hf.rope.attention_factor


def inverse_frequencies(rope: RopeSettings, head_dim: int) -> Tensor:
    """Radians per position of each pair of a head's rotated part, ``[rotary_dim / 2]`` in fp32.

    Args:
        rope: The settings; of ``longrope`` its short factors.
        head_dim: Width of a head, of which ``rope.partial`` is rotated.
    """
    dim = rope.rotary_dim(head_dim)
    plain = 1.0 / (rope.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    if rope.kind == "llama3":
        return _llama3(plain, rope)
    if rope.kind == "yarn":
        return _yarn(plain, rope, dim)
    if rope.kind == "longrope":
        return plain / torch.tensor(rope.short_factor, dtype=torch.float32)
    return plain


def _llama3(plain: Tensor, rope: RopeSettings) -> Tensor:
    """Low frequencies are divided, high ones kept, those between are mixed."""
    turns = rope.original_positions * plain / (2 * math.pi)
    kept = (turns - rope.low) / (rope.high - rope.low)
    kept = kept.clamp(0, 1)
    return plain * kept + plain / rope.factor * (1 - kept)


def _yarn(plain: Tensor, rope: RopeSettings, dim: int) -> Tensor:
    """Dimensions that turn often are kept, those that turn less than once are divided."""

    def dimension(turns: float) -> float:
        length = rope.original_positions / (turns * 2 * math.pi)
        return dim * math.log(length) / (2 * math.log(rope.theta))

    first, last = dimension(rope.high), dimension(rope.low)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    if first == last:
        last += 0.001
    divided = ((torch.arange(dim // 2, dtype=torch.float32) - first) / (last - first)).clamp(0, 1)
    return plain / rope.factor * divided + plain * (1 - divided)
