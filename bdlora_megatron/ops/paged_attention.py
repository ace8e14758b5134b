"""Attention over a key-value cache in blocks, called as flash-attention's two functions are.

Megatron-Core's dynamic engine calls ``flash_attn_varlen_func`` for steps with prompts in them and
``flash_attn_with_kvcache`` for steps that only decode. These two take its calls, on an A100 or
newer, by Triton kernels. What flash-attention can do beyond them is refused.

Nothing here waits for the device or depends on what a batch holds, so that a CUDA graph can capture
it: sizes come from shapes, and everything else is read by the kernels.

Shapes: T tokens of all sequences one after another, B sequences, S queries of each sequence where
all have as many, h query heads, g key-value heads, d their width, n blocks of m positions, c
columns of the block table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bdlora_megatron.errors import (
    ConfigError,
    MissingDependencyError,
    ShapeError,
    UnsupportedError,
)

try:
    import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]

    from bdlora_megatron.ops import attention_kernels as kernels
    from bdlora_megatron.ops.gpu import dot_type, interpreted, on_device_of
except ImportError as error:
    raise MissingDependencyError(
        f"attention over a cache in blocks on a GPU needs triton ({error}): "
        "pip install triton, or install flash-attn for Megatron-Core to use"
    ) from error

__all__ = ["flash_attn_varlen_func", "flash_attn_with_kvcache"]

#: Programs that fill a large GPU twice (A100: 108 multiprocessors, H100: 132).
ENOUGH_PROGRAMS = 256
#: More shares of a row than this cost more to add up than they save.
MAX_SPLITS = 64
WIDEST_HEAD = 256
#: Of Triton's pipeline: keys, found by way of the block table, are then read two steps ahead. With
#: four, each step would wait for its own.
STAGES = 5

#: What flash-attention's further arguments are when they ask for nothing.
_NEUTRAL: dict[str, Any] = {
    **dict.fromkeys(("dropout_p", "softcap"), 0.0),
    **dict.fromkeys(("alibi_slopes", "k", "v", "rotary_cos", "rotary_sin"), None),
    **dict.fromkeys(("cache_batch_idx", "cache_leftpad"), None),
    "deterministic": False,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Call:
    """One call as the kernels see it.

    Attributes:
        q: ``[T, h, d]``.
        keys: ``[n, m, g, d]``.
        values: ``[n, m, g, d]``, with the same strides.
        table: ``[B, c]``: in which block each stretch of positions lies.
        query_starts: ``[B + 1]``, or None where each sequence has ``queries``.
        kv_lengths: Their sums ``[B + 1]`` with ``query_starts``, else ``[B]``.
        queries: Of a sequence; where they differ, of the longest at most.
        scale: Of the logits.
        left: Positions that a query sees before its own, -1 for all.
        splits: Programs that share a row's positions, 0 for what shapes suggest.
        want_lse: Whether logarithms of the softmax's sums are asked for.
    """

    q: Tensor
    keys: Tensor
    values: Tensor
    table: Tensor
    query_starts: Tensor | None
    kv_lengths: Tensor
    queries: int
    scale: float
    left: int
    splits: int
    want_lse: bool

    @property
    def heads_each(self) -> int:
        """Query heads of a key-value head."""
        return self.q.shape[1] // self.keys.shape[2]


@dataclass(frozen=True, slots=True)
class _Tile:
    """Rows of a program, positions of a step, and the warps that run it."""

    rows: int
    positions: int
    warps: int


def flash_attn_varlen_func(  # noqa: PLR0913 - flash-attention's own
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    block_table: Tensor | None = None,
    return_attn_probs: bool = False,
    **others: Any,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """Causal attention of sequences of any length, whose keys and values lie in blocks.

    Args:
        q: ``[T, h, d]``; a sequence's queries are the last of its positions.
        k: The keys' cache ``[n, m, g, d]``.
        v: The values' cache ``[n, m, g, d]``.
        cu_seqlens_q: ``[B + 1]``: where each sequence's queries begin, and the last's end. Tokens
            behind that belong to no sequence.
        cu_seqlens_k: ``[B + 1]``: the same for positions, a sequence's queries among them.
        max_seqlen_q: Queries of a sequence at most; it only decides how work is cut.
        max_seqlen_k: Not needed.
        softmax_scale: Of the logits; ``d ** -0.5`` when None.
        causal: Must be True.
        window_size: How many positions to the left and right of its own a query sees, -1 for all.
            As in flash-attention, causal leaves none to the right.
        block_table: ``[B, c]``: in which block each stretch of m positions lies. A row that stands
            for no request may hold anything; an entry below zero is read as block 0.
        return_attn_probs: Also return the softmax's logarithms.
        others: Further arguments of flash-attention, which must ask for nothing.

    Returns:
        ``[T, h, d]``, zeros where a query sees nothing; with ``return_attn_probs``, that, the
        logarithms of the softmax's sums ``[h, T]`` (float32, +inf where a query sees nothing), and
        None in the place of the probabilities.

    Raises:
        ShapeError: The shapes do not fit together.
        UnsupportedError: The arguments ask for what the kernels do not compute.

    Collectives:
        None.
    """
    del max_seqlen_k
    table = _check_request(causal=causal, block_table=block_table, others=others)
    if not len(cu_seqlens_q) == len(cu_seqlens_k) == len(table) + 1:
        raise ShapeError(
            f"cu_seqlens_q has {len(cu_seqlens_q)} entries and cu_seqlens_k {len(cu_seqlens_k)}, "
            f"wanted {len(table) + 1} of each: one more than block_table has rows"
        )
    call = _Call(
        q=q,
        keys=k,
        values=v,
        table=table,
        query_starts=cu_seqlens_q,
        kv_lengths=cu_seqlens_k,
        queries=max_seqlen_q,
        scale=_scale(q, softmax_scale),
        left=window_size[0],
        splits=0,
        want_lse=return_attn_probs,
    )
    out, lse = _attend(call)
    return (out, lse, None) if lse is not None else out


def flash_attn_with_kvcache(  # noqa: PLR0913 - flash-attention's own
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor | int | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    block_table: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    **others: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention of the last queries of each sequence, whose cache lies in blocks.

    Args:
        q: ``[B, S, h, d]``: the last S positions of each sequence.
        k_cache: ``[n, m, g, d]``; it holds the queries' own positions already.
        v_cache: ``[n, m, g, d]``.
        cache_seqlens: ``[B]``: positions of each sequence; 0 for a row that stands for no request.
        softmax_scale: Of the logits; ``d ** -0.5`` when None.
        causal: Must be True.
        window_size: As in `flash_attn_varlen_func`.
        block_table: As in `flash_attn_varlen_func`.
        num_splits: Programs that share a row's positions, 0 for what shapes suggest.
        return_softmax_lse: Also return the softmax's logarithms.
        others: Further arguments of flash-attention, which must ask for nothing.

    Returns:
        ``[B, S, h, d]``, zeros where a query sees nothing; with ``return_softmax_lse``, that and
        the logarithms of the softmax's sums ``[B, h, S]`` (float32, +inf where a query sees
        nothing).

    Raises:
        ShapeError: The shapes do not fit together.
        UnsupportedError: The arguments ask for what the kernels do not compute.

    Collectives:
        None.
    """
    table = _check_request(causal=causal, block_table=block_table, others=others)
    if not isinstance(cache_seqlens, Tensor):
        raise UnsupportedError(
            f"cache_seqlens={cache_seqlens!r}, wanted a tensor with every sequence's length"
        )
    if q.dim() != 4 or not len(q) == len(cache_seqlens) == len(table):
        raise ShapeError(
            f"q {tuple(q.shape)}, cache_seqlens {tuple(cache_seqlens.shape)} and block_table "
            f"{tuple(table.shape)}, wanted [B, S, h, d], [B] and [B, columns]"
        )
    if not 0 <= num_splits <= 128:
        raise UnsupportedError(f"num_splits={num_splits}, wanted 1 to 128, or 0 for a choice")
    batch, queries, heads, width = q.shape
    call = _Call(
        q=q.reshape(batch * queries, heads, width),
        keys=k_cache,
        values=v_cache,
        table=table,
        query_starts=None,
        kv_lengths=cache_seqlens,
        queries=queries,
        scale=_scale(q, softmax_scale),
        left=window_size[0],
        splits=num_splits,
        want_lse=return_softmax_lse,
    )
    out, lse = _attend(call)
    out = out.view(q.shape)
    return (out, lse.view(batch, heads, queries)) if lse is not None else out


def _attend(call: _Call) -> tuple[Tensor, Tensor | None]:
    """Launch what gives the output ``[T, h, d]`` and, where asked for, the logarithms."""
    _check(call)
    q = call.q if call.q.stride(2) == 1 else call.q.contiguous()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    tokens, heads, _ = out.shape
    lse = out.new_empty((heads, tokens), dtype=torch.float32) if call.want_lse else None
    if not out.numel():
        return out, lse
    tile = _tile(call)
    grid = _grid(call, tile)
    splits = call.splits or _splits(call, tile, math.prod(grid))
    shares, share_lse = out, lse
    if splits > 1:
        shares = out.new_empty((splits, *out.shape), dtype=torch.float32)
        share_lse = out.new_empty((splits, tokens, heads), dtype=torch.float32)
    sizes = _sizes(call, splits)
    with on_device_of(out):
        kernels.attend[(*grid, splits)](
            *(q, call.keys, call.values, call.table, call.query_starts, call.kv_lengths),
            *(shares, share_lse),
            *_numbers(call, q),
            **sizes,
            **_rest(call, tile),
            num_warps=tile.warps,
            num_stages=STAGES,
        )
        if splits > 1:
            kernels.combine[(tokens, heads)](
                *(shares, share_lse, out, lse, tokens, call.queries),
                **sizes,
                BLOCK_SPLITS=triton.next_power_of_2(splits),
            )
    return out, lse


def _grid(call: _Call, tile: _Tile) -> tuple[int, int]:
    """Tiles of queries, and key-value heads with all their query heads."""
    each = call.heads_each
    together = min(each, tile.rows)
    queries = tile.rows // together
    sequences = len(call.table)
    if call.query_starts is None:
        tiles = sequences * triton.cdiv(call.queries, queries)
    else:
        # As many as any lengths can need: each sequence's last tile may be nearly empty, and what
        # lies behind the last sequence is one more.
        tiles = len(call.q) // queries + sequences + 1
    return tiles, call.keys.shape[2] * triton.cdiv(each, together)


def _splits(call: _Call, tile: _Tile, programs: int) -> int:
    """Programs to share a row's positions, where shapes alone make too few."""
    steps = triton.cdiv(call.table.shape[1] * call.keys.shape[1], tile.positions)
    wanted: int = min(ENOUGH_PROGRAMS // programs, steps // 2, MAX_SPLITS)
    # A power of two, as each number is compiled for itself.
    return 1 << max(wanted, 1).bit_length() - 1


def _tile(call: _Call) -> _Tile:
    """What Triton 3.7 compiles for an A100 without spilling registers."""
    if call.q.dtype == torch.float32:
        # No tensor core multiplies float32: each thread holds whole rows.
        return _Tile(16, 16, warps=4)
    # On average; the longest sequence of a step with prompts in it says little about the others.
    queries = triton.cdiv(len(call.q), max(len(call.table), 1))
    rows = triton.next_power_of_2(min(queries, call.queries) * call.heads_each)
    wide = _capacity(call.q.shape[-1]) > 128
    rows = min(max(rows, 16), 64 if wide else 128)
    return _Tile(
        rows,
        positions=64 if rows == 16 and not wide else 32,
        warps=8 if rows * (1 + wide) == 128 else 4,
    )


def _capacity(width: int) -> int:
    """A head's width as the kernels hold it."""
    return max(16, int(triton.next_power_of_2(width)))


def _numbers(call: _Call, q: Tensor) -> tuple[float | int, ...]:
    lengths = (len(call.q), len(call.table), call.queries, call.table.shape[1])
    # The exponentials are to the base 2.
    scale = call.scale * math.log2(math.e)
    strides = (*q.stride()[:2], *call.keys.stride()[:3], call.table.stride(0))
    return scale, call.left, *lengths, *strides


def _sizes(call: _Call, splits: int) -> dict[str, Any]:
    """What both kernels are compiled for."""
    _, heads, width = call.q.shape
    return {
        "H": heads,
        "D": width,
        "SPLITS": splits,
        "BLOCK_D": _capacity(width),
        "PACKED": call.query_starts is not None,
        "LSE": call.want_lse,
    }


def _rest(call: _Call, tile: _Tile) -> dict[str, Any]:
    """What the first is compiled for besides."""
    return {
        "G": call.heads_each,
        "HEADS": min(call.heads_each, tile.rows),
        "SIZE": call.keys.shape[1],
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.positions,
        "WINDOW": call.left >= 0,
        "PRECISION": "ieee",
        "DOT": dot_type(call.q.dtype),
    }


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def _check_request(*, causal: bool, block_table: Tensor | None, others: dict[str, Any]) -> Tensor:
    """Refuse what the kernels do not compute, and give the block table.

    Raises:
        UnsupportedError: Something is asked for that is not here.
    """
    if not causal:
        raise UnsupportedError(f"causal={causal}, wanted True: a query sees its own past alone")
    if block_table is None:
        raise UnsupportedError(
            "block_table=None, wanted the blocks of each sequence's cache; install flash-attn for "
            "caches that lie otherwise"
        )
    for name, value in others.items():
        plain = value is None or isinstance(value, (bool, float, int))
        if name not in _NEUTRAL or not plain or value not in {None, _NEUTRAL[name]}:
            raise UnsupportedError(
                f"{name}={value if plain else type(value).__name__} is not supported here; leave "
                "it out, or install flash-attn for it"
            )
    return block_table


def _check(call: _Call) -> None:
    """Refuse what the kernels would compute wrongly or not at all.

    Raises:
        ConfigError: The tensors are on a CPU, and Triton's interpreter is off.
        ShapeError: The shapes do not fit together.
    """
    if not (call.q.is_cuda or interpreted()):
        raise ConfigError(
            f"attention by Triton kernels for tensors on {call.q.device}; on a CPU, use "
            "runtime.cpu_inference, or set TRITON_INTERPRET=1 before triton is imported to run the "
            "kernels step by step"
        )
    q, keys, values = call.q.shape, call.keys.shape, call.values.shape
    shapes = f"q {tuple(q)}, k {tuple(keys)} and v {tuple(values)}"
    if len(q) != 3 or len(keys) != 4 or keys != values or q[2] != keys[3]:
        raise ShapeError(f"{shapes}, wanted [tokens, h, d] and twice [blocks, positions, g, d]")
    if q[1] % keys[2]:
        raise ShapeError(f"{shapes}, wanted a multiple of {keys[2]} query heads")
    _check_memory(call)


def _check_memory(call: _Call) -> None:
    """Refuse types and layouts that are not known to the kernels.

    Raises:
        UnsupportedError: One is not.
    """
    if call.q.shape[2] > WIDEST_HEAD:
        raise UnsupportedError(f"heads of {call.q.shape[2]}, wanted {WIDEST_HEAD} at most")
    types = {tensor.dtype for tensor in (call.q, call.keys, call.values)}
    if len(types) > 1 or not types <= {torch.float16, torch.bfloat16, torch.float32}:
        raise UnsupportedError(
            f"{' and '.join(sorted(map(str, types)))}, wanted float16, bfloat16 or float32 for "
            "queries, keys and values alike"
        )
    if call.keys.stride() != call.values.stride() or call.keys.stride(3) != 1:
        raise UnsupportedError(
            f"strides of k {call.keys.stride()} and v {call.values.stride()}, wanted the same, and "
            "each head's numbers side by side"
        )
    if call.table.dim() != 2 or call.table.stride(1) != 1:
        raise UnsupportedError(
            f"block_table {tuple(call.table.shape)} with strides {call.table.stride()}, wanted "
            "[sequences, columns] with a row's entries side by side"
        )
    if torch.is_grad_enabled() and any(t.requires_grad for t in (call.q, call.keys, call.values)):
        raise UnsupportedError("gradients through attention over a cache; call it under no_grad")
