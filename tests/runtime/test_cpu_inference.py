"""Attention over a cache in blocks, as the engine has it on a CPU."""

from __future__ import annotations

import math

import pytest
import torch

from tests.tolerances import assert_close

pytestmark = pytest.mark.engine

SIZE, BLOCKS, GROUPS, HEADS, WIDTH = 4, 40, 2, 6, 8
#: Queries and positions of each sequence.
BATCHES = {
    "one": ([1], [9]),
    "steps of one block and of many": ([1, 1, 1, 1], [1, 4, 5, 30]),
    "steps far apart": ([1] * 5, [2, 90, 3, 120, 88]),
    "whole prompts": ([7, 3], [7, 3]),
    "a prompt's next chunk between steps": ([1, 6, 1, 5], [11, 17, 1, 5]),
    "a sequence without queries": ([1, 0, 2], [6, 5, 9]),
}


def _batch(counts, lengths, dtype=torch.float32):
    torch.manual_seed(0)
    starts = [0, *torch.tensor(counts, dtype=torch.long).cumsum(0).tolist()]
    keys, values = (torch.randn(BLOCKS, SIZE, GROUPS, WIDTH, dtype=dtype) for _ in range(2))
    free = iter(torch.randperm(BLOCKS).repeat(3).tolist())
    table = torch.full((len(lengths), BLOCKS), -1, dtype=torch.int32)
    written = torch.zeros(BLOCKS, SIZE, dtype=torch.bool)
    for row, length in enumerate(lengths):
        for place in range(length):
            if place % SIZE == 0:
                table[row, place // SIZE] = next(free)
            written[table[row, place // SIZE], place % SIZE] = True
    # What nobody has written may be anything.
    keys[~written], values[~written] = math.nan, math.inf
    # Two tokens of padding behind the last sequence.
    query = torch.randn(starts[-1] + 2, HEADS, WIDTH, dtype=dtype)
    return query, keys, values, starts, table


def _reference(query, keys, values, starts, lengths, table, scale):
    """One query and one head at a time, in float64."""
    out = torch.zeros(query.shape, dtype=torch.float64)
    for row, length in enumerate(lengths):
        places = range(length)
        count = starts[row + 1] - starts[row]
        cached = [
            torch.stack([part[table[row, p // SIZE], p % SIZE].double() for p in places])
            for part in (keys, values)
        ]
        for number in range(count):
            seen = length - count + number + 1
            for head in range(HEADS):
                k, v = (part[:seen, head // (HEADS // GROUPS)] for part in cached)
                logits = k @ query[starts[row] + number, head].double() * scale
                out[starts[row] + number, head] = logits.softmax(0) @ v
    return out


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("positions", [32768, 100])
@pytest.mark.parametrize("name", BATCHES)
def test_each_query_sees_its_own_past_alone(name, positions, scale, monkeypatch):
    from bdlora_megatron.runtime import cpu_inference

    monkeypatch.setattr(cpu_inference, "_POSITIONS", positions)
    counts, lengths = BATCHES[name]
    query, keys, values, starts, table = _batch(counts, lengths)
    found = cpu_inference.paged_attention(
        *(query, keys, values),
        query_starts=starts,
        kv_lengths=lengths,
        block_table=table,
        scale=scale,
    )
    wanted = _reference(query, keys, values, starts, lengths, table, scale or WIDTH**-0.5)
    assert_close(found, wanted, name, (1e-6, 1e-5))
