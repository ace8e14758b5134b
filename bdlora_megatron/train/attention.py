"""Attention over packed examples that never forms a mask or a matrix of scores.

Megatron-Core's ``DotProductAttention`` refuses packed sequences, and with a mask its memory grows
with the square of a row. Letters in shapes: T tokens of a micro-batch, or of a context-parallel
rank's share of it; H and G query and key-value heads of this rank; D width of a head.
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from bdlora_megatron.errors import UnsupportedError
from bdlora_megatron.train.data import Batch, ContextShare

varlen_attn: Any = None
# Torch has it since 2.10.
with suppress(ImportError):
    from torch.nn.attention.varlen import varlen_attn

__all__ = ["PackedAttention", "packed_seq_params", "with_packed_attention"]


@dataclass
class _SplitSeqParams(PackedSeqParams):
    """Of a batch that context-parallel ranks share."""

    share: ContextShare | None = None


def packed_seq_params(batch: Batch) -> PackedSeqParams:
    """Where a batch's examples begin, as Megatron-Core's layers take it.

    Args:
        batch: The whole batch, or a context-parallel rank's share of it.

    Returns:
        What the model's ``forward`` takes under this name.
    """
    return _SplitSeqParams(
        qkv_format="thd",
        cu_seqlens_q=batch.starts,
        cu_seqlens_kv=batch.starts,
        max_seqlen_q=batch.longest,
        max_seqlen_kv=batch.longest,
        share=batch.share,
    )


class PackedAttention(nn.Module):
    """Causal attention within each example of a micro-batch, in Megatron-Core's place for it.

    On a GPU with 16-bit types torch's variable-length kernel (flash attention) takes all examples
    at once; elsewhere ``scaled_dot_product_attention`` takes them one by one. Memory grows with T,
    but for the masks of a context-parallel rank's pieces where that kernel does not run. Rows that
    are not packed are attended to under a mask, as by Megatron-Core's own.

    Collectives: none over tensor-parallel ranks, which have heads of their own. Over
        context-parallel ranks one all-gather of keys and values together forward, and one
        reduce-scatter of their gradients backward.
    """

    def __init__(
        self, config: Any, layer_number: int, attn_mask_type: Any, attention_type: str, **more: Any
    ) -> None:
        """Take what Megatron-Core gives any core attention.

        Args:
            config: The model's ``TransformerConfig``.
            layer_number: Unused.
            attn_mask_type: Unused: examples are causal.
            attention_type: Unused: there is no other than self-attention.
            more: ``softmax_scale``, if it is not one over the root of D; the rest is unused.

        Raises:
            UnsupportedError: Attention drops probabilities out, which is not done here.
        """
        super().__init__()
        if config.attention_dropout:
            raise UnsupportedError(
                f"attention_dropout={config.attention_dropout}; packed attention has none: set it "
                "to 0, and dropout on the adapter's path instead"
            )
        self._scale = more.get("softmax_scale") or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: ``[T, H, D]``; without ``packed_seq_params`` ``[S, b, H, D]``, b rows of S.
            key: The same with G heads.
            value: Likewise.
            attention_mask: Without ``packed_seq_params``: True hides; causal when None.
            attn_mask_type: Unused.
            attention_bias: Unused.
            packed_seq_params: Where each example begins; they cover all T tokens.

        Returns:
            ``[T, H D]``, or ``[S, b, H D]``.
        """
        if packed_seq_params is None:
            return self._fused(query, key, value, attention_mask).flatten(2)
        starts, longest = packed_seq_params.cu_seqlens_q, packed_seq_params.max_seqlen_q
        share = getattr(packed_seq_params, "share", None)
        if share is None:
            return self._packed(query, key, value, (starts, starts), (longest, longest))
        both = gather_from_sequence_parallel_region(
            torch.cat((key, value), dim=1), group=parallel_state.get_context_parallel_group()
        )
        key, value = both.index_select(0, share.keys).chunk(2, dim=1)
        return self._packed(
            query, key, value,
            (share.query_starts, share.key_starts), (share.longest_query, share.longest_key),
        )  # fmt: skip

    def _packed(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        starts: tuple[Tensor, Tensor],
        longest: tuple[int, int],
    ) -> Tensor:
        """Pieces of queries, each of which ends where its keys end."""
        if varlen_attn is not None and query.is_cuda and query.element_size() == 2:
            mixed: Tensor = varlen_attn(
                query, key, value, *starts, *longest,
                scale=self._scale, window_size=(-1, 0), enable_gqa=key.shape[1] < query.shape[1],
            )  # fmt: skip
            return mixed.flatten(1)
        queries, keys = (each.diff().tolist() for each in starts)
        rows = (
            tensor.unsqueeze(1).split(lengths)
            for tensor, lengths in ((query, queries), (key, keys), (value, keys))
        )
        return torch.cat([self._fused(*row) for row in zip(*rows, strict=True)]).flatten(1, 3)

    def _fused(
        self, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None = None
    ) -> Tensor:
        """``[S, b, H, D]`` by torch's kernel, which takes ``[b, H, S, D]``."""
        each = query.shape[2] // key.shape[2]
        if each > 1:
            key, value = (tensor.repeat_interleave(each, dim=2) for tensor in (key, value))
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        seen = None if hidden is None else ~hidden
        if len(query) < len(key):
            # Of this piece alone: torch's own mask would let query 0 see key 0 only.
            seen = torch.ones(len(query), len(key), dtype=torch.bool, device=query.device)
            seen = seen.tril_(len(key) - len(query))
        mixed = scaled_dot_product_attention(
            q, k, v, attn_mask=seen, is_causal=seen is None, scale=self._scale
        )
        return mixed.permute(2, 0, 1, 3)


def with_packed_attention(spec: ModuleSpec) -> ModuleSpec:
    """The specification of a decoder layer, with packed attention in it.

    Args:
        spec: Of one ``TransformerLayer``.

    Returns:
        A new one.
    """
    attention = spec.submodules.self_attention
    inside = replace(attention.submodules, core_attention=PackedAttention)
    layer = replace(spec.submodules, self_attention=replace(attention, submodules=inside))
    return replace(spec, submodules=layer)
