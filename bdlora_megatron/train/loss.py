"""The loss of the tokens to learn, without the logits of a whole row in memory.

A long row's logits outweigh everything else: 32k tokens of a vocabulary of 128k take 16 GB in
float32. Letters in shapes: T tokens of a micro-batch, n of them to learn, H features, V this rank's
rows of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor
from torch.distributed import ReduceOp
from torch.nn.functional import linear

__all__ = ["token_losses"]

#: Logits of a chunk: 128 MB in float32.
_CHUNK_ELEMENTS = 2**25


def token_losses(model: Any, hidden: Tensor, labels: Tensor, learnt: Tensor) -> Tensor:
    """Cross-entropy of some tokens' predictions.

    Args:
        model: The last pipeline stage of what ``models.build_model`` made, frozen but for adapters.
        hidden: What its decoder gives, ``[T, 1, H]``; under sequence parallelism this rank's T / P.
        labels: The token that follows each, ``[T]``.
        learnt: Places of the tokens to learn, ``[n]``.

    Returns:
        ``[n]``, float32 or wider, the same on all tensor-parallel ranks.

    Collectives: as of Megatron-Core's output layer and loss, however many chunks there are: three
        all-reduces of n numbers forward, and one of the hidden states backward (an all-gather
        forward and a reduce-scatter backward under sequence parallelism).
    """
    weight = model.output_layer.weight
    if model.share_embeddings_and_output_weights:
        weight = model.shared_embedding_or_output_weight()
    if model.config.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
    else:
        hidden = copy_to_tensor_model_parallel_region(hidden)
    rows = hidden.flatten(0, 1).index_select(0, learnt).to(weight.dtype)
    losses: Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        rows, weight.detach(), labels.index_select(0, learnt), model.unpadded_vocab_size
    )
    return losses


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy over ranks' shares of the vocabulary; backward forms the logits again.

    Where they are a single chunk, they are kept instead.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, labels: Tensor, vocab_size: int) -> Tensor:
        first = parallel_state.get_tensor_model_parallel_rank() * len(weight)
        ctx.real = max(min(vocab_size - first, len(weight)), 0)
        ctx.chunk = max(_CHUNK_ELEMENTS // len(weight), 1)
        # Labels of other ranks' tokens point past this rank's.
        here = (labels >= first) & (labels < first + len(weight))
        places = torch.where(here, labels - first, 0)
        sums, picked, logits = [], [], None
        for some, place in zip(rows.split(ctx.chunk), places.split(ctx.chunk), strict=True):
            logits = _logits(some, weight, ctx.real)
            sums.append(logits.logsumexp(-1))
            picked.append(logits.gather(1, place[:, None])[:, 0])
        local, chosen = torch.cat(sums), torch.cat(picked).masked_fill(~here, 0.0)
        whole = _log_sum_over_ranks(local)
        _reduce(chosen, ReduceOp.SUM)
        kept = logits if len(sums) == 1 else None
        ctx.save_for_backward(rows, weight, places, here, whole, kept)
        return whole - chosen

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        rows, weight, places, here, whole, kept = ctx.saved_tensors
        parts = []
        for start in range(0, max(len(rows), 1), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            logits = _logits(rows[part], weight, ctx.real) if kept is None else kept
            slopes = (logits - whole[part, None]).exp_()
            slopes.scatter_add_(1, places[part, None], -here[part, None].to(slopes.dtype))
            slopes *= grad[part, None]
            parts.append(slopes.to(weight.dtype) @ weight)
        return torch.cat(parts), None, None, None


def _logits(rows: Tensor, weight: Tensor, real: int) -> Tensor:
    """``[some, V]`` in at least float32; tokens that do not exist have no probability."""
    logits = linear(rows, weight)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if real < len(weight):
        logits[:, real:] = float("-inf")
    return logits


def _log_sum_over_ranks(local: Tensor) -> Tensor:
    """The logarithm of the sum of all ranks' exponentials."""
    top = local.clone()
    _reduce(top, ReduceOp.MAX)
    total = (local - top).exp()
    _reduce(total, ReduceOp.SUM)
    return top + total.log()


def _reduce(numbers: Tensor, operation: Any) -> None:
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        group = parallel_state.get_tensor_model_parallel_group()
        torch.distributed.all_reduce(numbers, operation, group=group)
