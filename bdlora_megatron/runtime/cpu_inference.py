"""What Megatron-Core's dynamic inference engine needs on a CPU, beyond ``enable_cpu``.

The engine keeps its key-value cache in blocks and hands block tables to flash-attention. On a CPU
the same tables are read by a few lines of torch. Everything else here is what the engine asks of
CUDA in passing: events that time a step, ranges for a profiler, pinned memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.inference.contexts import dynamic_context
from megatron.core.transformer import attention
from torch import Tensor, nn

from bdlora_megatron.runtime.cpu import enable_cpu
from bdlora_megatron.runtime.versions.engine import engine_modules
from bdlora_megatron.runtime.versions.known import require_engine

__all__ = ["enable_cpu_inference", "paged_attention"]


def enable_cpu_inference() -> None:
    """Let Megatron-Core's dynamic engine run on this machine's CPU; calls ``enable_cpu`` first.

    Raises:
        ConfigError: CUDA is present, where Megatron-Core must be left as it is.
        UnsupportedError: The installed Megatron-Core's engine is not known here.
    """
    require_engine()
    enable_cpu()
    replacements: dict[Any, dict[str, Any]] = {
        torch.cuda: {"Event": _Event, "Stream": _Stream},
        # Appends to the cache with Triton where that is installed; torch's indexing does it here.
        dynamic_context: {"triton_append_key_value_cache": None},
        attention: {"is_fa_min_version": _has_attention},
        attention.Attention: {"flash_decode_and_prefill": _decode_and_prefill},
    }
    for module in engine_modules():
        asked = {"range_push": _no_range, "range_pop": _no_range, "torch": _TorchWithoutPinning()}
        present = {name: value for name, value in asked.items() if hasattr(module, name)}
        replacements.setdefault(module, {}).update(present)
    for owner, attributes in replacements.items():
        for name, value in attributes.items():
            setattr(owner, name, value)


def paged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    query_starts: list[int],
    kv_lengths: list[int],
    block_table: Tensor,
    scale: float | None = None,
) -> Tensor:
    """Causal attention of several sequences whose keys and values lie in blocks.

    Shapes: T tokens of all sequences one after another, h query heads, g key-value heads, d their
    width, n blocks of m positions.

    Args:
        query: ``[T, h, d]``; a sequence's queries are the last of its positions.
        keys: ``[n, m, g, d]``.
        values: ``[n, m, g, d]``.
        query_starts: Where each sequence's tokens begin, and after the last where they end.
        kv_lengths: Positions of each sequence, its queries among them.
        block_table: ``[sequences, blocks]``: in which block each stretch of positions lies.
        scale: Of the logits; ``d ** -0.5`` when None.

    Returns:
        ``[T, h, d]``; zeros where a token belongs to no sequence.

    Collectives:
        None.
    """
    out = torch.zeros_like(query)
    size, heads = keys.shape[1], query.shape[1] // keys.shape[2]
    for row, length in enumerate(kv_lengths):
        first, last = query_starts[row], query_starts[row + 1]
        if first == last:
            continue
        blocks = block_table[row, : -(-length // size)].long()
        # [1, g, length, d], and each key-value head once per query head that reads it.
        k, v = (
            part[blocks].flatten(0, 1)[:length].transpose(0, 1).repeat_interleave(heads, 0)[None]
            for part in (keys, values)
        )
        q = query[first:last].transpose(0, 1)[None]
        count = last - first
        seen = None if count == 1 else torch.ones(count, length).tril(length - count).bool()
        attended = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)
        out[first:last] = attended[0].transpose(0, 1)
    return out


def _decode_and_prefill(
    self: Any, q: Tensor, k: Tensor, v: Tensor, *lengths: Any, **unused: Any
) -> Tensor:
    """Stands for ``Attention.flash_decode_and_prefill``: ``q`` is ``[T, 1, h, d]``."""
    del unused
    _, _, query_starts, _, kv_lengths, block_table, _ = lengths
    attended = paged_attention(
        q.squeeze(1),
        k,
        v,
        query_starts=query_starts.tolist(),
        kv_lengths=kv_lengths.tolist(),
        block_table=block_table,
        scale=getattr(self, "softmax_scale", None),
    )
    return attended.unsqueeze(1)


class _Event:
    """A CUDA event's part in timing a step, by the wall clock: a CPU has no queue."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        del args, kwargs
        self._at = 0.0

    def record(self, stream: Any = None) -> None:
        del stream
        self._at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: _Event) -> float:
        return (end._at - self._at) * 1e3


class _Stream:
    """A CUDA stream that is made, since 0.19, and used where steps overlap, which they do not."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        del args, kwargs


class _TorchWithoutPinning:
    """What a module sees as ``torch``: torch, whose factories pin no memory."""

    def __getattr__(self, name: str) -> Any:
        value = getattr(torch, name)
        return _without_pinning(value) if name in _FACTORIES else value


_FACTORIES = frozenset({"empty", "empty_like", "full", "full_like", "ones", "tensor", "zeros"})


def _without_pinning(factory: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def make(*args: Any, **kwargs: Any) -> Tensor:
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return make


def _no_range(*args: Any) -> None:
    del args


def _has_attention(version: str, *args: Any, **kwargs: Any) -> bool:
    del version, args, kwargs
    return True
