"""The Triton kernels of attention over a cache in blocks, for A100 and newer.

A program of `attend` holds some queries of one sequence with all the query heads that share a
key-value head, row by row, and walks over the positions that they see, so that keys and values are
read once for all of these heads. Where shapes alone make few programs, SPLITS of them share the
positions of the same rows; each leaves its own share, and `combine` adds the shares up in order. No
result depends on which program came first.

Grids depend on sizes alone; sequences, lengths and block tables are read here, so a captured graph
serves every batch of its size. What lies in the cache behind a sequence's end is never read, and
every row of the output is written: zeros where nothing is seen.

The softmax is summed as it goes, in float32, to the base 2: `tops` are the largest logits so far
times log2(e), `totals` the sums of exponentials under them, `sums` the weighted values.

`DOT` is the type that tensor cores are given: the cache's own, except under Triton's interpreter.

Letters: T tokens, B sequences, S queries of each sequence where all have as many, H query heads, G
query heads of a key-value head, D the width of a head; M rows of a program, N positions of a step.
"""

# A kernel's arguments are its interface to the launcher beside it, and not every supported Triton
# takes a tuple of pointers. Their types are Triton's own, which mypy knows nothing of.
# ruff: noqa: PLR0913, ANN001, ANN201, ANN202
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["attend", "combine"]


# What differs from step to step is compiled once, whether it be one, even or odd.
@triton.jit(do_not_specialize=["left", "T", "B", "S", "columns"])
def attend(
    q,
    k,
    v,
    table,
    query_starts,
    kv_lengths,
    out,
    lse,
    scale,
    left,
    T,
    B,
    S,
    columns,
    q_token,
    q_head,
    kv_block,
    kv_line,
    kv_head,
    table_row,
    H: tl.constexpr,
    G: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PACKED: tl.constexpr,
    WINDOW: tl.constexpr,
    LSE: tl.constexpr,
    PRECISION: tl.constexpr,
    DOT: tl.constexpr,
):
    """Attention of the tiles of queries, on the grid (tiles, key-value heads * parts, SPLITS).

    With PACKED, sequences of any length lie one after another: `query_starts` and `kv_lengths` are
    sums ``[B + 1]``. Without, each of B sequences has S queries, and `kv_lengths` is ``[B]``.
    """
    # A key-value head's query heads, in parts if there are more than a program has rows.
    parts: tl.constexpr = (G + HEADS - 1) // HEADS
    queries: tl.constexpr = BLOCK_M // HEADS
    group = tl.program_id(1) // parts
    sequence, start, count, length, first = _queries_of(
        query_starts, kv_lengths, T, B, S, queries, PACKED
    )
    if first < count:
        row = tl.arange(0, BLOCK_M)
        d = tl.arange(0, BLOCK_D)
        number = first + row // HEADS
        of_group = tl.program_id(1) % parts * HEADS + row % HEADS
        here = (row < queries * HEADS) & (number < count) & (of_group < G)
        held = here[:, None] & (d < D)[None, :]
        t = (start + number).to(tl.int64)
        head = group * G + of_group
        rows = tl.load(
            q + t[:, None] * q_token + head[:, None] * q_head + d[None, :], mask=held, other=0.0
        )

        # A sequence's queries are the last of its positions.
        lowest = length - count + first
        position = length - count + number
        end = tl.minimum(length - count + tl.minimum(first + queries, count), columns * SIZE)
        begin = 0
        if WINDOW:
            begin = tl.maximum(lowest - left, 0) // BLOCK_N * BLOCK_N
        share = tl.cdiv(tl.cdiv(end - begin, BLOCK_N), SPLITS) * BLOCK_N
        begin += tl.program_id(2) * share
        end = tl.minimum(end, begin + share)
        # Steps at whose positions every row looks need no mask: worth a loop of their own where a
        # tile sees many.
        open_end = begin
        if PACKED and not WINDOW:
            open_end += tl.maximum(tl.minimum(lowest + 1, end) - begin, 0) // BLOCK_N * BLOCK_N

        keys = k + group * kv_head
        values = v + group * kv_head
        blocks = table + sequence.to(tl.int64) * table_row
        rows = rows.to(DOT)
        sums = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
        totals = tl.zeros([BLOCK_M], dtype=tl.float32)
        tops = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        for masked in tl.static_range(2):
            sums, totals, tops = _walk(
                rows,
                keys,
                values,
                blocks,
                sums,
                totals,
                tops,
                scale,
                position,
                left,
                open_end if masked else begin,
                end if masked else open_end,
                kv_block,
                kv_line,
                D=D,
                SIZE=SIZE,
                BLOCK_N=BLOCK_N,
                MASKED=masked,
                WINDOW=WINDOW,
                PRECISION=PRECISION,
            )

        nothing = totals == 0.0
        totals = tl.where(nothing, 1.0, totals)
        line = (tl.program_id(2).to(tl.int64) * T + t) * H + head
        result = (sums / totals[:, None]).to(out.dtype.element_ty)
        tl.store(out + line[:, None] * D + d[None, :], result, mask=held)
        logarithm = tops + tl.log2(totals)
        if SPLITS > 1:
            tl.store(lse + line, tl.where(nothing, float("-inf"), logarithm), mask=here)
        elif LSE:
            place = _lse_place(t, head, T, S, H, PACKED)
            tl.store(lse + place, _natural(logarithm, nothing), mask=here)


@triton.jit(do_not_specialize=["T", "S"])
def combine(
    shares,
    share_lse,
    out,
    lse,
    T,
    S,
    H: tl.constexpr,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PACKED: tl.constexpr,
    LSE: tl.constexpr,
):
    """Add up the shares ``[SPLITS, T, H, D]`` of each row, on the grid (T, H)."""
    t = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    split = tl.arange(0, BLOCK_SPLITS)
    d = tl.arange(0, BLOCK_D)
    line = (split * T + t) * H + head
    logarithms = tl.load(share_lse + line, mask=split < SPLITS, other=float("-inf"))
    top = tl.max(logarithms, axis=0)
    nothing = top == float("-inf")
    top = tl.where(nothing, 0.0, top)
    weights = tl.exp2(logarithms - top)
    total = tl.where(nothing, 1.0, tl.sum(weights, axis=0))
    values = tl.load(
        shares + line[:, None] * D + d[None, :],
        mask=(split < SPLITS)[:, None] & (d < D)[None, :],
        other=0.0,
    )
    result = tl.sum(values * weights[:, None], axis=0) / total
    tl.store(out + (t * H + head) * D + d, result.to(out.dtype.element_ty), mask=d < D)
    if LSE:
        place = _lse_place(t, head, T, S, H, PACKED)
        tl.store(lse + place, _natural(top + tl.log2(total), nothing))


@triton.jit
def _queries_of(query_starts, kv_lengths, T, B, S, queries: tl.constexpr, PACKED: tl.constexpr):
    """A tile's sequence: its number, first token, queries and positions; the tile's first query."""
    # The last tiles first: a prompt's last queries see the most.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    if PACKED:
        sequence = _sequence_of(query_starts, tile, B, queries)
        real = sequence < B
        start = tl.load(query_starts + sequence)
        # Behind the last sequence lie tokens of none: they see nothing.
        count = tl.load(query_starts + sequence + 1, mask=real, other=T) - start
        length = tl.load(kv_lengths + sequence + 1, mask=real, other=0)
        length -= tl.load(kv_lengths + sequence, mask=real, other=0)
        first = (tile - start // queries - sequence) * queries
    else:
        tiles = tl.cdiv(S, queries)
        sequence = tile // tiles
        start = sequence * S
        count = S
        length = tl.load(kv_lengths + sequence)
        first = tile % tiles * queries
    return sequence, start, count, length, first


@triton.jit
def _sequence_of(query_starts, tile, B, queries: tl.constexpr):
    """Whose tile this is; B for those behind the last sequence.

    A sequence's tiles begin at ``start // queries + number``: what all before it need at most.
    """
    # Summed within the loop: summed behind it, Triton 3.7 no longer overlaps loads and products in
    # the loop over positions.
    found = -1
    for first in range(0, B + 1, 128):
        number = first + tl.arange(0, 128)
        start = tl.load(query_starts + number, mask=number <= B, other=0)
        begun = (number <= B) & (start // queries + number <= tile)
        found += tl.sum(begun.to(tl.int32), axis=0)
    return found


@triton.jit
def _walk(
    rows,
    k,
    v,
    blocks,
    sums,
    totals,
    tops,
    scale,
    position,
    left,
    begin,
    end,
    kv_block,
    kv_line,
    D: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Go on with the sums over the positions from `begin` to `end`."""
    d = tl.arange(0, sums.shape[1])
    for first in range(begin, end, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        inside = n < end
        if SIZE % BLOCK_N == 0:
            block = tl.load(blocks + first // SIZE)
            line = first % SIZE + tl.arange(0, BLOCK_N)
        else:
            block = tl.load(blocks + n // SIZE, mask=inside, other=0)
            line = n % SIZE
        # Rows of tables that stand for no request hold -1.
        place = tl.maximum(block, 0).to(tl.int64) * kv_block + line * kv_line
        keys = _read(k, place, d, inside, D, MASKED)
        values = _read(v, place, d, inside, D, MASKED)

        logits = tl.dot(rows, tl.trans(keys.to(rows.dtype)), input_precision=PRECISION) * scale
        if MASKED:
            seen = inside[None, :] & (n[None, :] <= position[:, None])
            if WINDOW:
                seen &= n[None, :] >= position[:, None] - left
            logits = tl.where(seen, logits, float("-inf"))
        new_tops = tl.maximum(tops, tl.max(logits, axis=1))
        # Nothing seen so far: exponentials under -inf would be no numbers.
        under = tl.where(new_tops == float("-inf"), 0.0, new_tops)
        weights = tl.exp2(logits - under[:, None])
        fade = tl.exp2(tops - under)
        totals = totals * fade + tl.sum(weights, axis=1)
        sums = tl.dot(
            weights.to(values.dtype).to(rows.dtype),
            values.to(rows.dtype),
            sums * fade[:, None],
            input_precision=PRECISION,
        )
        tops = new_tops
    return sums, totals, tops


@triton.jit
def _read(cache, place, d, inside, D: tl.constexpr, MASKED: tl.constexpr):
    """Lines of the cache ``[N, D]``, zeros where it must not be read."""
    at = cache + place[:, None] + d[None, :]
    if MASKED:
        return tl.load(at, mask=inside[:, None] & (d < D)[None, :], other=0.0)
    return tl.load(at, mask=(d < D)[None, :], other=0.0)


@triton.jit
def _lse_place(t, head, T, S, H: tl.constexpr, PACKED: tl.constexpr):
    """Where a row's logarithm lies: ``[H, T]``, or ``[B, H, S]`` where all have S queries."""
    if PACKED:
        return head * T + t
    return (t // S * H + head) * S + t % S


@triton.jit
def _natural(logarithm, nothing):
    """To the base e; as in flash-attention, +inf where a row has seen nothing."""
    return tl.where(nothing, float("inf"), logarithm * 0.6931471805599453)
