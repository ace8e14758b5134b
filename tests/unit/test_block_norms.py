"""Norms, differences and singular values of updates against dense fp64 algebra."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bdlora_megatron.blocks import (
    ModuleShape,
    all_finite,
    num_parameters,
    output_distances,
    output_norms,
    rank_within,
    reshard,
    singular_values,
    subtract,
    truncate,
    update_norm,
)
from bdlora_megatron.errors import ConfigError, ShapeError
from tests.unit.test_blocks import (
    FP64,
    any_factors,
    dense_by_block_diag,
    factors_and_count,
    make,
    quick,
)


@quick
@given(any_factors)
def test_output_norms_are_those_of_the_dense_rows(factors):
    dense = dense_by_block_diag(factors)
    torch.testing.assert_close(output_norms(factors), dense.norm(dim=1), **FP64)
    assert update_norm(factors) == pytest.approx(dense.norm().item(), rel=1e-12)


@quick
@given(factors_and_count(), st.integers(1, 3), st.sampled_from([1.0, -0.7]))
def test_a_difference_is_that_of_the_dense_updates(pair, block_rank, scale):
    first, blocks = pair
    width, other = first.out_features, first.in_features
    if first.blocked == "A":
        width, other = other, width
    second = make(first.blocked, blocks, block_rank, width, other, seed=7, scale=scale)
    expected = dense_by_block_diag(first) - dense_by_block_diag(second)
    difference = subtract(first, second)
    torch.testing.assert_close(dense_by_block_diag(difference), expected, **FP64)
    torch.testing.assert_close(output_distances(first, second), expected.norm(dim=1), **FP64)


@quick
@given(factors_and_count())
def test_a_resharding_is_at_no_distance_at_all(pair):
    factors, blocks = pair
    for one, two in ((factors, reshard(factors, blocks)), (reshard(factors, blocks), factors)):
        assert output_distances(one, two).count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_small_difference_is_not_lost_in_cancellation(dtype):
    first = make("B", 1, 16, 96, 64, dtype=dtype)
    nudge = make("B", 1, 16, 96, 64, dtype=dtype)
    nudge.B[5, 3] *= 1 + 2**-7
    expected = dense_by_block_diag(first) - dense_by_block_diag(nudge)
    norms = output_norms(subtract(first, reshard(nudge, 4)))
    assert norms[5] == pytest.approx(expected[5].norm().item(), rel=1e-9)
    norms[5] = 0
    assert norms.max() < 1e-13 * update_norm(first)


def test_updates_of_two_modules_are_not_compared():
    with pytest.raises(ShapeError, match=r"\[12, 8, 'B'\] with one of \[12, 10, 'B'\]"):
        subtract(make("B", 1, 2, 12, 8), make("B", 1, 2, 12, 10))


@quick
@given(factors_and_count())
def test_singular_values_are_those_of_the_dense_blocks(pair):
    factors, blocks = pair
    dense = dense_by_block_diag(factors)
    pieces = dense.chunk(blocks, dim=0 if factors.blocked == "B" else 1)
    expected = torch.stack([torch.linalg.svdvals(piece) for piece in pieces])
    values = singular_values(factors, num_blocks=blocks)
    kept = min(values.shape[1], expected.shape[1])
    torch.testing.assert_close(values[:, :kept], expected[:, :kept], **FP64)
    assert (values[:, kept:] < 1e-12).all()
    assert (expected[:, kept:] < 1e-12).all()


@quick
@given(factors_and_count(), st.integers(1, 4))
def test_singular_values_foretell_what_truncation_loses(pair, keep):
    factors, blocks = pair
    values = singular_values(factors, num_blocks=blocks)
    result, error = truncate(factors, num_blocks=blocks, rank=keep * blocks)
    lost = values[:, keep:].norm().item()
    difference = dense_by_block_diag(factors) - dense_by_block_diag(result)
    assert lost == pytest.approx(difference.norm().item(), rel=1e-9, abs=1e-12)
    assert error * values.norm().item() == pytest.approx(lost, rel=1e-9, abs=1e-12)


def test_singular_values_ask_for_blocks_that_divide_the_width():
    with pytest.raises(ShapeError, match="out_features=12 is not a multiple of num_blocks=8"):
        singular_values(make("B", 1, 2, 12, 8), num_blocks=8)
    with pytest.raises(ShapeError, match="in_features=12 is not a multiple of num_blocks=8"):
        truncate(make("A", 2, 2, 12, 8), num_blocks=8, rank=8)


@quick
@given(st.integers(1, 4), st.integers(0, 4000))
def test_the_rank_within_a_budget_is_the_largest(num_blocks, budget):
    shapes = [
        ModuleShape(in_features=12, out_features=24, blocked="B"),
        ModuleShape(in_features=36, out_features=12, blocked="A"),
    ]

    def cost(rank):
        return sum(
            num_parameters(
                s.in_features, s.out_features, rank=rank, num_blocks=num_blocks, blocked=s.blocked
            )
            for s in shapes
        )

    rank = rank_within(shapes, num_parameters=budget, num_blocks=num_blocks)
    assert rank % num_blocks == 0
    assert rank == 0 or cost(rank) <= budget
    assert cost(rank + num_blocks) > budget


def test_a_budget_without_modules_is_refused():
    with pytest.raises(ConfigError, match="got no modules"):
        rank_within([], num_parameters=100, num_blocks=2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_number_that_is_not_finite_is_found_anywhere(value, dtype):
    good = torch.linspace(-3, 3, 99).to(dtype).reshape(9, 11)
    assert all_finite(good, good.t())
    for place in range(99):
        bad = good.clone()
        bad.view(-1)[place] = value
        assert not all_finite(good, bad)
        assert not all_finite(bad.t())
