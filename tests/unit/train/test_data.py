"""Rows, masks and the order of data."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bdlora_megatron.errors import ConfigError
from bdlora_megatron.train.data import RowDataset, ShareOfBatch, pack
from bdlora_megatron.train.examples import Example


def example(first, length, learnt_from=1):
    tokens = np.arange(first, first + length + 1, dtype=np.int32)
    return Example(tokens, np.arange(length + 1) >= learnt_from)


@given(st.lists(st.integers(1, 20), max_size=300))
def test_packing_loses_nothing_and_overfills_nothing(lengths):
    order, starts = pack(np.array(lengths, dtype=np.int64), 20)
    rows = [order[start:stop].tolist() for start, stop in pairwise(starts.tolist())]
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in row) <= 20 for row in rows)
    # No two neighbours among open rows could have been one.
    if len(rows) <= 64:
        sums = [sum(lengths[index] for index in row) for row in rows]
        assert all(a + b > 20 for a, b in pairwise(sums))


def test_examples_of_a_row_do_not_see_one_another():
    dataset = RowDataset([example(10, 3), example(50, 2, 2)], 7, packing=True, seed=0)
    assert len(dataset) == 1
    batch = dataset.batch([0, None])
    # Either of them comes first; what is left of each row is an example that teaches nothing.
    ten_first = batch.tokens[0, 0] == 10
    assert batch.starts.tolist() == ([0, 3, 5, 7, 14] if ten_first else [0, 2, 5, 7, 14])
    assert batch.starts.dtype == torch.int32
    assert batch.longest == 7
    ten, fifty = (slice(0, 3), slice(3, 5)) if ten_first else (slice(2, 5), slice(0, 2))
    assert batch.tokens[0, ten].tolist() == [10, 11, 12]
    assert batch.labels[ten].tolist() == [11, 12, 13]
    assert batch.tokens[0, fifty].tolist() == [50, 51]
    assert batch.learnt.tolist() == sorted([*range(ten.start, ten.stop), fifty.stop - 1])


def test_padding_is_cut_so_that_attention_over_it_costs_little():
    batch = RowDataset([example(1, 200)], 1000, packing=True, seed=0).batch([0])
    assert batch.starts.diff().tolist() == [200, *[128] * 6, 32]
    assert batch.longest == 200


@pytest.mark.parametrize("size", [2, 3])
def test_context_parallel_ranks_hold_two_pieces_of_each_example(size):
    examples = [example(100 * number, length, 2) for number, length in enumerate((5, 13, 2, 40))]
    dataset = RowDataset(examples, 60, packing=True, seed=0, cp_size=size)
    assert len(dataset) == 2
    whole = dataset.batch([0, 1])
    shares = [whole.on_context_rank(rank, size) for rank in range(size)]
    gathered = torch.cat([share.tokens[0] for share in shares])
    for rank, share in enumerate(shares):
        pieces = []
        for start, stop in pairwise(whole.starts.tolist()):
            length, rest = divmod(stop - start, 2 * size)
            assert rest == 0
            for number in (rank, 2 * size - 1 - rank):
                pieces.append((start, start + number * length, start + (number + 1) * length))
        own = [place for _, first, last in pieces for place in range(first, last)]
        assert torch.equal(share.tokens, whole.tokens[:, own])
        assert torch.equal(share.labels, whole.labels[own])
        assert [own[place] for place in share.learnt] == sorted(
            set(own) & set(whole.learnt.tolist()), key=own.index
        )
        found = share.share
        queries = [last - first for _, first, last in pieces]
        keys = [last - start for start, _, last in pieces]
        assert found.query_starts.diff().tolist() == queries
        assert found.key_starts.diff().tolist() == keys
        assert (found.longest_query, found.longest_key) == (max(queries), max(keys))
        # What a piece sees are its example's tokens up to its own end, in their order.
        seen = [place for start, _, last in pieces for place in range(start, last)]
        assert torch.equal(gathered[found.keys], whole.tokens[0, seen])
    assert len({len(share.share.keys) for share in shares}) == 1, "ranks do unequal work"


def test_an_interleaved_pipeline_takes_whole_rounds_of_its_stages():
    sizes = {"micro_batch_size": 2, "dp_rank": 0, "dp_size": 2, "multiple": 2}
    assert ShareOfBatch(global_batch_size=16, **sizes).num_microbatches == 4
    with pytest.raises(
        ConfigError, match=r"has 3 micro-batches in a step; an interleaved pipeline"
    ):
        ShareOfBatch(global_batch_size=12, **sizes)


def test_unpacked_rows_hold_one_example_each():
    dataset = RowDataset([example(0, 2), example(9, 2)], 7, packing=False, seed=0)
    assert len(dataset) == 2
    assert sorted(dataset.batch([0, 1]).tokens[0, [0, 7]].tolist()) == [0, 9]


def test_every_epoch_takes_every_row_once_in_an_order_of_its_own():
    examples = [example(10 * n, 6) for n in range(30)]
    dataset = RowDataset(examples, 6, packing=True, seed=5)
    walk = [dataset.in_training_order(number) for number in range(90)]
    epochs = [walk[start : start + 30] for start in (0, 30, 60)]
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    again = RowDataset(examples, 6, packing=True, seed=5)
    assert [again.in_training_order(number) for number in (70, 3, 45)] == [
        walk[70],
        walk[3],
        walk[45],
    ]
    assert torch.equal(again.batch([4]).tokens, dataset.batch([4]).tokens)
    other = RowDataset(examples, 6, packing=True, seed=6)
    assert [other.in_training_order(number) for number in range(30)] != epochs[0]


@pytest.mark.parametrize(("dp_size", "micro"), [(1, 1), (1, 4), (2, 2), (4, 3)])
def test_ranks_share_a_batch_without_gap_or_overlap(dp_size, micro):
    shares = [
        ShareOfBatch(global_batch_size=24, micro_batch_size=micro, dp_rank=rank, dp_size=dp_size)
        for rank in range(dp_size)
    ]
    for step in (0, 3):
        numbers = [n for share in shares for batch in share.numbers(step) for n in batch]
        assert sorted(numbers) == list(range(24 * step, 24 * step + 24))
        assert all(len(share.numbers(step)) == share.num_microbatches for share in shares)


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match=r"multiple of micro_batch_size=2 x 3 data-parallel"):
        ShareOfBatch(global_batch_size=8, micro_batch_size=2, dp_rank=0, dp_size=3)
