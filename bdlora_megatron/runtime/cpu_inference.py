"""What Megatron-Core's dynamic inference engine needs on a CPU, beyond ``enable_cpu``.

The engine keeps its key-value cache in blocks and hands block tables to flash-attention. On a CPU
the same tables are read by a few lines of torch. Everything else here is what the engine asks of
CUDA in passing: events that time a step, ranges for a profiler, pinned memory.
"""

from __future__ import annotations

import itertools
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

#: Positions that any row may be padded by; a call of its own would cost as much.
_PADDING = 64
#: Positions of all rows that are read at once: what bounds the copy of the cache.
_POSITIONS = 32768


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
    counts = [last - first for first, last in itertools.pairwise(query_starts)]
    cache = _Cache(keys, values, block_table)
    for rows in _alike([row for row, count in enumerate(counts) if count == 1], kv_lengths):
        places = torch.tensor([query_starts[row] for row in rows])
        out[places] = _decode(query[places], cache, rows, [kv_lengths[row] for row in rows], scale)
    for row, count in enumerate(counts):
        if count > 1:
            own = slice(query_starts[row], query_starts[row + 1])
            out[own] = _prefill(query[own], cache, row, kv_lengths[row], scale)
    return out


def _alike(rows: list[int], lengths: list[int]) -> list[list[int]]:
    """Rows to read at once: of nearly one length, as all are padded to the longest."""
    groups: list[list[int]] = []
    for row in sorted(rows, key=lambda row: lengths[row]):
        length = lengths[row]
        shortest = lengths[groups[-1][0]] if groups else 0
        near = length - shortest <= max(_PADDING, shortest // 8)
        if groups and near and (len(groups[-1]) + 1) * length <= _POSITIONS:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


class _Cache:
    """Keys and values in blocks, read by sequence."""

    def __init__(self, keys: Tensor, values: Tensor, block_table: Tensor) -> None:
        self._size, self._heads = keys.shape[1:3]
        # One line for each position: whole lines are copied faster than parts of them.
        self._lines = [part.flatten(0, 1).flatten(1) for part in (keys, values)]
        self._table = block_table.long()

    def read(self, rows: list[int], ends: Tensor) -> tuple[Tensor, ...]:
        """Keys and values of rows with these last positions, each ``[rows, g, longest, d]``.

        A shorter row goes on with its last position: whatever lies in the cache behind it may be
        no number at all.
        """
        at = torch.minimum(torch.arange(int(ends.max()) + 1), ends[:, None])
        lines = self._table[rows].gather(1, at // self._size) * self._size + at % self._size
        return tuple(
            part.index_select(0, lines.flatten())
            .view(*lines.shape, self._heads, -1)
            .transpose(1, 2)
            for part in self._lines
        )


def _decode(
    query: Tensor, cache: _Cache, rows: list[int], lengths: list[int], scale: float | None
) -> Tensor:
    """One query of each row, ``[rows, h, d]``: the heads that share keys stand for queries."""
    ends = torch.tensor(lengths) - 1
    keys, values = cache.read(rows, ends)
    shared = query.unflatten(1, (keys.shape[1], -1))
    seen = (torch.arange(keys.shape[2]) <= ends[:, None])[:, None, None]
    attended = nn.functional.scaled_dot_product_attention(
        shared, keys, values, attn_mask=None if len(rows) == 1 else seen, scale=scale
    )
    return attended.flatten(1, 2)


def _prefill(query: Tensor, cache: _Cache, row: int, length: int, scale: float | None) -> Tensor:
    """A row's last queries, ``[queries, h, d]``."""
    keys, values = cache.read([row], torch.tensor([length - 1]))
    heads = query.shape[1] // keys.shape[1]
    keys, values = (part.repeat_interleave(heads, 1) for part in (keys, values))
    count = len(query)
    seen = None
    if length > count:
        seen = torch.ones(count, length).tril(length - count).bool()
    attended = nn.functional.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        keys,
        values,
        attn_mask=seen,
        is_causal=seen is None,
        scale=scale,
    )
    return attended[0].transpose(0, 1)


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
