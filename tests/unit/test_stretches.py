"""Blocks that cut several stretches of rows, each by itself, against dense fp64 algebra."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from bdlora_megatron.blocks import (
    BlockFactors,
    compact,
    output_distances,
    output_norms,
    pad_rank,
    reshard,
    singular_values,
    truncate,
)
from bdlora_megatron.convert.adapter.rows import in_file_order, in_layer_order
from bdlora_megatron.errors import ShapeError

PARTS, COUNTS, IN = (8, 4, 12), (1, 2, 4), 7
FP64 = {"rtol": 1e-12, "atol": 1e-12}


def make(num_blocks, block_rank=3, *, seed=0, parts=PARTS):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(num_blocks * block_rank, IN, generator=generator, dtype=torch.float64)
    B = torch.randn(sum(parts), block_rank, generator=generator, dtype=torch.float64)
    return BlockFactors(A=A, B=B, num_blocks=num_blocks, blocked="B", scale=0.5, parts=parts)


def block_of_rows(num_blocks, parts=PARTS):
    """The block that each row belongs to, counted row by row."""
    return [row * num_blocks // part for part in parts for row in range(part)]


def dense(factors, parts=PARTS):
    """The update, each row times the rank of its own block."""
    rank = factors.rank // factors.num_blocks
    owner = block_of_rows(factors.num_blocks, parts)
    rows = [
        factors.B[row] @ factors.A[rank * owner[row] : rank * (owner[row] + 1)]
        for row in range(len(owner))
    ]
    return factors.scale * torch.stack(rows)


@pytest.mark.parametrize(("old", "new"), itertools.product(COUNTS, COUNTS))
def test_resharding_is_exact(old, new):
    factors = make(old)
    resharded = reshard(factors, new)
    assert resharded.num_blocks == new
    assert resharded.parts == (PARTS if new > 1 or old == 1 else ())
    torch.testing.assert_close(dense(resharded), dense(factors), **FP64)
    # Each number is copied: those of B that are not zero are the ones that were there.
    assert torch.equal(resharded.B[resharded.B != 0].unique(), factors.B[factors.B != 0].unique())
    assert output_distances(factors, resharded).max() == 0
    # One block has no stretches, until it is cut again.
    back = compact(reshard(replace(resharded, parts=PARTS), old))
    assert back.rank == factors.rank
    torch.testing.assert_close(dense(back), dense(factors), **FP64)


@pytest.mark.parametrize("blocks", COUNTS)
def test_norms_are_the_rows_own(blocks):
    factors, other = make(blocks), make(2, seed=1)
    torch.testing.assert_close(output_norms(factors), dense(factors).norm(dim=1), **FP64)
    wanted = (dense(factors) - dense(other)).norm(dim=1)
    torch.testing.assert_close(output_distances(factors, other), wanted, **FP64)
    # Against blocks that cut the rows as one stretch.
    whole = replace(other, parts=())
    rows = torch.block_diag(*whole.B.chunk(2)) @ whole.A * whole.scale
    wanted = (dense(factors) - rows).norm(dim=1)
    torch.testing.assert_close(output_distances(factors, whole), wanted, **FP64)


@pytest.mark.parametrize(("old", "new"), [(1, 2), (2, 4), (4, 2), (4, 1)])
def test_truncation_is_each_blocks_best(old, new):
    factors = make(old)
    update = dense(factors)
    owner = torch.tensor(block_of_rows(new))
    values = [torch.linalg.svdvals(update[owner == block]) for block in range(new)]
    lost = torch.cat([block[2:] for block in values]).norm() / update.norm()
    smaller, error = truncate(factors, num_blocks=new, rank=2 * new)
    assert error == pytest.approx(lost.item(), rel=1e-10)
    assert smaller.parts == (PARTS if new > 1 else ())
    gone = (dense(smaller) - update).norm() / update.norm()
    assert gone.item() == pytest.approx(error, rel=1e-10)
    found = singular_values(factors, num_blocks=new)
    for block, wanted in enumerate(values):
        torch.testing.assert_close(found[block], wanted[: found.shape[1]], **FP64)


def test_padding_keeps_the_update():
    factors = make(2)
    torch.testing.assert_close(dense(pad_rank(factors, 10)), dense(factors), **FP64)


@pytest.mark.parametrize("blocks", COUNTS)
def test_rows_grouped_by_head_come_back(blocks):
    """Four groups, of which each has two, one and three rows of the stretches."""
    factors = make(blocks)
    order = [
        sum(PARTS[:part]) + group * (PARTS[part] // 4) + row
        for group in range(4)
        for part in range(3)
        for row in range(PARTS[part] // 4)
    ]
    filed = in_file_order(factors, 4)
    assert filed.parts == ()
    # Blocks of whole groups stay blocks, and cut the rows as one stretch.
    assert filed.num_blocks == blocks
    update = torch.block_diag(*filed.B.chunk(blocks)) @ filed.A * filed.scale
    torch.testing.assert_close(update, dense(factors)[order], **FP64)
    back = in_layer_order(filed, PARTS, 4)
    assert torch.equal(back.B, factors.B)
    assert back.parts == PARTS


def test_blocks_that_end_inside_a_group_become_one():
    factors = make(4)
    filed = in_file_order(factors, 2)
    assert (filed.num_blocks, filed.rank) == (1, factors.rank)
    back = in_layer_order(filed, PARTS, 2)
    torch.testing.assert_close(dense(reshard(back, 4)), dense(factors), **FP64)


def test_blocks_of_other_rows_become_one():
    """As PEFT's blocks of Mamba's in_proj, which cut z, x, B, C and dt as one stretch."""
    factors = replace(make(4), parts=())
    update = torch.block_diag(*factors.B.chunk(4)) @ factors.A * factors.scale
    arranged = in_layer_order(factors, PARTS, 1)
    assert (arranged.num_blocks, arranged.parts) == (1, PARTS)
    torch.testing.assert_close(dense(reshard(arranged, 2)), update, **FP64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parts": (8, 4)}, "make 12 rows, and B has 24"),
        ({"parts": (10, 2, 12)}, "no multiples of num_blocks=4"),
        ({"blocked": "A"}, "A is blocked here"),
    ],
)
def test_stretches_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ShapeError, match=message):
        replace(make(4), **changes)
    with pytest.raises(ShapeError, match="not a multiple of num_blocks=3"):
        reshard(make(4), 3)
