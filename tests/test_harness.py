"""The rank harness itself: results, failures and dead ranks are told apart."""

import os

import pytest
import torch

from tests.harness import RankError, run_ranks


def _sum(rank, world_size, offset):
    value = torch.full((2,), float(rank + offset))
    torch.distributed.all_reduce(value)
    return value


def _fail_on_one(rank, world_size):
    if rank == 1:
        raise ValueError("rank one objects")
    torch.distributed.barrier()


def _die(rank, world_size):
    os._exit(7)


def test_results_come_back_by_rank():
    first, second = run_ranks(2, _sum, 10)
    torch.testing.assert_close(first, torch.full((2,), 21.0), rtol=0, atol=0)
    torch.testing.assert_close(second, first, rtol=0, atol=0)


def test_a_failing_rank_is_named_with_its_traceback():
    with pytest.raises(RankError, match=r"(?s)rank 1 raised.*rank one objects"):
        run_ranks(2, _fail_on_one)


def test_a_dead_rank_is_reported():
    with pytest.raises(RankError, match="rank 0 died"):
        run_ranks(1, _die)
