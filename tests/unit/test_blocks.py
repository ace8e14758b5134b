"""The block-diagonal algebra against dense fp64 algebra."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bdlora_megatron.blocks import (
    BlockFactors,
    ModuleShape,
    compact,
    matching_rank,
    num_parameters,
    pad_rank,
    replicate,
    reshard,
    resharded_rank,
    truncate,
)
from bdlora_megatron.errors import ConfigError, ShapeError, UnsupportedError
from tests.reference import dense_update, forward, shard, unshard

EXACT = {"rtol": 0.0, "atol": 0.0}
# fp64 sums of at most a few hundred products of numbers of order one.
FP64 = {"rtol": 1e-12, "atol": 1e-12}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

quick = settings(max_examples=80, deadline=None)
block_counts = st.integers(1, 8)
sides = st.sampled_from(["A", "B"])


def make(blocked, num_blocks, block_rank, width, other, *, seed=0, dtype=torch.float64, scale=0.5):
    """Random factors whose blocked side is `width` wide and whose dense side is `other` wide."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    rank = num_blocks * block_rank
    A = random(rank, width // num_blocks if blocked == "A" else other)
    B = random(*((other, rank) if blocked == "A" else (width, block_rank)))
    return BlockFactors(A=A, B=B, num_blocks=num_blocks, blocked=blocked, scale=scale)


def dense_by_block_diag(factors):
    """The update as PEFT's definition gives it: expand the packed factor, multiply, scale."""
    A, B = factors.A.double(), factors.B.double()
    packed = A if factors.blocked == "A" else B
    expanded = torch.block_diag(*packed.chunk(factors.num_blocks, dim=0))
    product = B @ expanded if factors.blocked == "A" else expanded @ A
    return factors.scale * product


@st.composite
def factors_and_count(draw, dtypes=(torch.float64,)):
    """Factors with N blocks, and an M that divides the same width."""
    old, new = draw(block_counts), draw(block_counts)
    width = math.lcm(old, new) * draw(st.integers(1, 3))
    factors = make(
        draw(sides),
        old,
        draw(st.integers(1, 3)),
        width,
        draw(st.integers(1, 9)),
        seed=draw(st.integers(0, 2**31)),
        dtype=draw(st.sampled_from(dtypes)),
        scale=draw(st.sampled_from([2.0, 0.3, -1.5])),
    )
    return factors, new


any_factors = factors_and_count().map(lambda pair: pair[0])


def blocks_of(update, blocked, num_blocks):
    return update.chunk(num_blocks, dim=0 if blocked == "B" else 1)


# --- the record -------------------------------------------------------------------------------


@given(any_factors)
@quick
def test_the_record_reports_the_shapes_of_the_module(factors):
    out_features, in_features = dense_by_block_diag(factors).shape
    assert (factors.out_features, factors.in_features) == (out_features, in_features)
    assert factors.rank == max(factors.A.shape[0], factors.B.shape[1])
    assert factors.dtype == torch.float64
    assert factors.num_parameters == num_parameters(
        in_features,
        out_features,
        rank=factors.rank,
        num_blocks=factors.num_blocks,
        blocked=factors.blocked,
    )


def build(A=(4, 6), B=(6, 2), **overrides):
    arguments = {"num_blocks": 2, "blocked": "B", "scale": 1.0}
    return BlockFactors(A=torch.zeros(*A), B=torch.zeros(*B), **(arguments | overrides))


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        pytest.param(ConfigError, "num_blocks=0 is not", {"num_blocks": 0}, id="blocks"),
        pytest.param(ConfigError, "blocked='C' names no factor", {"blocked": "C"}, id="side"),
        pytest.param(ConfigError, "scale=nan is not finite", {"scale": math.nan}, id="nan"),
        pytest.param(ConfigError, "scale=inf is not finite", {"scale": math.inf}, id="inf"),
        pytest.param(ShapeError, "factor A has shape .*two dim", {"A": (4, 6, 1)}, id="dims-A"),
        pytest.param(ShapeError, "factor B has shape .*two dim", {"B": (6,)}, id="dims-B"),
        pytest.param(ShapeError, "no empty dimension", {"A": (0, 6)}, id="empty"),
        pytest.param(ShapeError, "rank 5 .* num_blocks=2", {"A": (5, 6)}, id="rank"),
        pytest.param(ShapeError, r"B \[O, R / 2\]", {"B": (6, 4)}, id="B-not-packed"),
        pytest.param(ShapeError, "out_features 7", {"B": (7, 2)}, id="out-features"),
        pytest.param(ShapeError, r'blocked="A".*B \[O, R\]', {"blocked": "A"}, id="A-other-rank"),
    ],
)
def test_factors_of_no_module_are_refused(error, message, arguments):
    with pytest.raises(error, match=message):
        build(**arguments)


def test_integer_and_mixed_factors_are_refused():
    A, B = torch.zeros(4, 6), torch.zeros(6, 2)
    settings_ = {"num_blocks": 2, "blocked": "B", "scale": 1.0}
    with pytest.raises(ShapeError, match=r"factor B has dtype torch.int8"):
        BlockFactors(A=A, B=B.to(torch.int8), **settings_)
    with pytest.raises(ShapeError, match=r"A is torch.float32 and factor B is torch.float16"):
        BlockFactors(A=A, B=B.half(), **settings_)


# --- the product ------------------------------------------------------------------------------


@given(any_factors)
@quick
def test_dense_update_is_the_block_diagonal_product(factors):
    torch.testing.assert_close(dense_update(factors), dense_by_block_diag(factors), **FP64)


@given(factors_and_count(dtypes=DTYPES))
@quick
def test_dense_update_computes_in_the_dtype_asked_for(pair):
    factors, _ = pair
    assert dense_update(factors).dtype == factors.dtype
    update = dense_update(factors, dtype=torch.float64)
    torch.testing.assert_close(update, dense_by_block_diag(factors), **FP64)


@given(any_factors, st.sampled_from([(), (1,), (3,), (2, 3)]))
@quick
def test_forward_is_the_dense_product(factors, leading):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(*leading, factors.in_features, generator=generator, dtype=torch.float64)
    y = forward(factors, x)
    assert y.shape == (*leading, factors.out_features)
    torch.testing.assert_close(y, x @ dense_by_block_diag(factors).t(), **FP64)


@pytest.mark.parametrize("blocked", ["A", "B"])
def test_forward_passes_gradients_to_both_factors_and_the_input(blocked):
    factors = make(blocked, 3, 2, 9, 5)
    factors.A.requires_grad_()
    factors.B.requires_grad_()
    x = torch.ones(2, factors.in_features, dtype=torch.float64, requires_grad=True)
    inputs = (x, factors.A, factors.B)
    got = torch.autograd.grad(forward(factors, x).square().sum(), inputs)
    wanted = torch.autograd.grad((x @ dense_by_block_diag(factors).t()).square().sum(), inputs)
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-10)


def test_forward_refuses_a_shard_of_the_input():
    with pytest.raises(ShapeError, match=r"wanted \[\.\.\., 9\]"):
        forward(make("A", 3, 2, 9, 5), torch.zeros(2, 3, dtype=torch.float64))


# --- resharding -------------------------------------------------------------------------------


@given(factors_and_count(dtypes=DTYPES))
@quick
def test_reshard_keeps_the_update(pair):
    factors, num_blocks = pair
    other = reshard(factors, num_blocks)
    assert (other.num_blocks, other.blocked, other.scale, other.dtype) == (
        num_blocks,
        factors.blocked,
        factors.scale,
        factors.dtype,
    )
    torch.testing.assert_close(dense_by_block_diag(other), dense_by_block_diag(factors), **FP64)


@given(factors_and_count(dtypes=DTYPES))
@quick
def test_reshard_only_copies_numbers_and_adds_zeros(pair):
    factors, num_blocks = pair
    other = reshard(factors, num_blocks)
    for before, after in ((factors.A, other.A), (factors.B, other.B)):
        assert set(after.flatten().tolist()) <= set(before.flatten().tolist()) | {0.0}


@given(factors_and_count())
@quick
def test_reshard_has_the_rank_announced(pair):
    factors, num_blocks = pair
    old = factors.num_blocks
    rank = reshard(factors, num_blocks).rank
    assert rank == resharded_rank(factors.rank, num_blocks=old, new_num_blocks=num_blocks)
    if num_blocks % old == 0:
        assert rank == factors.rank * num_blocks // old
    elif old % num_blocks == 0:
        assert rank == factors.rank
    else:
        assert rank <= factors.rank * math.lcm(old, num_blocks) // old


def test_vanilla_to_blocks_repeats_the_dense_factor():
    column = make("B", 1, 2, 12, 5)
    fine = reshard(column, 4)
    torch.testing.assert_close(fine.A, column.A.repeat(4, 1), **EXACT)
    torch.testing.assert_close(fine.B, column.B, **EXACT)
    row = make("A", 1, 2, 12, 5)
    fine = reshard(row, 4)
    torch.testing.assert_close(fine.A, torch.cat(row.A.chunk(4, dim=1)), **EXACT)
    torch.testing.assert_close(fine.B, row.B.repeat(1, 4), **EXACT)


def test_coarsening_keeps_the_dense_factor_and_merges_the_packed_one():
    column = make("B", 4, 2, 12, 5)
    coarse = reshard(column, 2)
    parts = column.B.chunk(4)
    wanted = torch.cat([torch.block_diag(*parts[:2]), torch.block_diag(*parts[2:])])
    torch.testing.assert_close(coarse.A, column.A, **EXACT)
    torch.testing.assert_close(coarse.B, wanted, **EXACT)
    row = make("A", 4, 2, 12, 5)
    coarse = reshard(row, 1)
    torch.testing.assert_close(coarse.A, torch.block_diag(*row.A.chunk(4)), **EXACT)
    torch.testing.assert_close(coarse.B, row.B, **EXACT)


def test_resharding_to_the_same_count_is_the_same_object():
    factors = make("B", 4, 2, 12, 5)
    assert reshard(factors, 4) is factors


def test_reshard_between_coprime_counts_needs_less_than_the_common_multiple():
    # Each third overlaps two quarters: rank 3 * 2 * 1, where 12 blocks merged would give 12.
    assert reshard(make("B", 4, 1, 12, 5), 3).rank == 6


def test_reshard_refuses_what_does_not_divide():
    with pytest.raises(ShapeError, match="out_features=12 is not a multiple of num_blocks=5"):
        reshard(make("B", 4, 2, 12, 5), 5)
    with pytest.raises(ShapeError, match="in_features=12 is not a multiple of num_blocks=5"):
        reshard(make("A", 4, 2, 12, 5), 5)
    with pytest.raises(ConfigError, match="num_blocks=0"):
        reshard(make("A", 4, 2, 12, 5), 0)
    with pytest.raises(ConfigError, match="rank=3, num_blocks=2"):
        resharded_rank(3, num_blocks=2, new_num_blocks=4)


@given(factors_and_count(dtypes=DTYPES))
@quick
def test_compact_gives_the_original_back_after_a_round_trip(pair):
    factors, num_blocks = pair
    back = compact(reshard(reshard(factors, num_blocks), factors.num_blocks))
    assert torch.equal(back.A, factors.A)
    assert torch.equal(back.B, factors.B)


def test_compact_keeps_repeated_directions_whose_sum_would_round():
    factors = make("B", 1, 2, 6, 5)
    factors.A[1] = factors.A[0]
    assert compact(factors) is factors


def test_compact_pads_blocks_of_unequal_rank_and_keeps_the_update():
    factors = make("A", 2, 3, 6, 5)
    factors.A[1] = 0.0  # block 0 keeps two directions
    factors.B[:, 4] = 0.0  # block 1 keeps one
    factors.B[:, 5] = 0.0
    small = compact(factors)
    assert small.rank == 4
    torch.testing.assert_close(dense_update(small), dense_update(factors), **FP64)


def test_compact_leaves_a_zero_update_one_direction_per_block():
    factors = pad_rank(make("B", 2, 1, 6, 5), 6)
    factors.B.zero_()
    small = compact(factors)
    assert small.rank == 2
    assert not dense_update(small).any()


@given(any_factors, st.integers(0, 3))
@quick
def test_pad_rank_adds_zeros_to_every_block(factors, more):
    blocks = factors.num_blocks
    padded = pad_rank(factors, factors.rank + more * blocks)
    torch.testing.assert_close(dense_by_block_diag(padded), dense_by_block_diag(factors), **FP64)
    block_rank = factors.rank // blocks
    for n in range(blocks):
        old = slice(n * block_rank, (n + 1) * block_rank)
        begin = n * (block_rank + more)
        assert torch.equal(padded.A[begin : begin + block_rank], factors.A[old])
        assert not padded.A[begin + block_rank : begin + block_rank + more].any()


def test_pad_rank_refuses_to_shrink_and_uneven_ranks():
    factors = make("B", 4, 2, 12, 5)
    assert pad_rank(factors, 8) is factors
    with pytest.raises(ShapeError, match="pad rank 8 to 4"):
        pad_rank(factors, 4)
    with pytest.raises(ShapeError, match="pad rank 8 to 10 with num_blocks=4"):
        pad_rank(factors, 10)


# --- tensor-parallel parts --------------------------------------------------------------------


@given(any_factors, st.data())
@quick
def test_shards_are_views_that_compute_their_part_and_join_bit_for_bit(factors, data):
    tp_size = data.draw(st.sampled_from([p for p in range(1, 9) if factors.num_blocks % p == 0]))
    shards = [shard(factors, tp_rank=i, tp_size=tp_size) for i in range(tp_size)]
    storage = {factors.A.untyped_storage().data_ptr(), factors.B.untyped_storage().data_ptr()}
    update = dense_by_block_diag(factors)
    for i, (A, B) in enumerate(shards):
        assert {A.untyped_storage().data_ptr(), B.untyped_storage().data_ptr()} == storage
        local = BlockFactors(
            A=A,
            B=B,
            num_blocks=factors.num_blocks // tp_size,
            blocked=factors.blocked,
            scale=factors.scale,
        )
        wanted = blocks_of(update, factors.blocked, tp_size)[i]
        torch.testing.assert_close(dense_by_block_diag(local), wanted, **FP64)
    whole = unshard(
        shards, num_blocks=factors.num_blocks, blocked=factors.blocked, scale=factors.scale
    )
    assert torch.equal(whole.A, factors.A)
    assert torch.equal(whole.B, factors.B)


def test_shard_and_unshard_refuse_what_is_no_rank():
    factors = make("B", 4, 2, 12, 5)
    with pytest.raises(ConfigError, match="tp_rank=2 is not one of tp_size=2"):
        shard(factors, tp_rank=2, tp_size=2)
    with pytest.raises(ShapeError, match="num_blocks=4 is not a multiple of tp_size=3"):
        shard(factors, tp_rank=0, tp_size=3)
    parts = [shard(factors, tp_rank=i, tp_size=4) for i in range(4)]
    layout = {"num_blocks": 4, "blocked": "B", "scale": 1.0}
    with pytest.raises(ShapeError, match="got 3 shards"):
        unshard(parts[:3], **layout)
    with pytest.raises(ShapeError, match="got 0 shards"):
        unshard([], **layout)
    with pytest.raises(ShapeError, match="shards have different shapes"):
        unshard([parts[0], shard(factors, tp_rank=0, tp_size=2)], **layout)


# --- truncation -------------------------------------------------------------------------------


@given(factors_and_count(), st.integers(1, 4))
@settings(max_examples=120, deadline=None)
def test_truncation_is_the_truncated_svd_of_every_block(pair, block_rank):
    factors, num_blocks = pair
    result, error = truncate(factors, num_blocks=num_blocks, rank=num_blocks * block_rank)
    assert (result.num_blocks, result.rank) == (num_blocks, num_blocks * block_rank)
    update, got = dense_by_block_diag(factors), dense_by_block_diag(result)
    dropped = []
    for block, approximation in zip(
        blocks_of(update, factors.blocked, num_blocks),
        blocks_of(got, factors.blocked, num_blocks),
        strict=True,
    ):
        tail = torch.linalg.svdvals(block)[block_rank:]
        dropped.append(tail)
        assert (block - approximation).norm().item() == pytest.approx(
            tail.norm().item(), rel=1e-9, abs=1e-9
        )
    norm = update.norm().item()
    assert error == pytest.approx(torch.cat(dropped).norm().item() / norm, rel=1e-9, abs=1e-9)
    assert error == pytest.approx(((update - got).norm() / update.norm()).item(), abs=1e-9)


def test_truncation_splits_the_singular_values_evenly():
    result, _ = truncate(make("B", 2, 3, 12, 7), num_blocks=2, rank=4)
    for A, B in zip(result.A.chunk(2), result.B.chunk(2), strict=True):
        singular = torch.linalg.svdvals(B @ A)[:2]
        torch.testing.assert_close(A @ A.t(), torch.diag(singular), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(B.t() @ B, torch.diag(singular), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("blocked", ["A", "B"])
def test_truncation_to_a_sufficient_rank_loses_nothing(blocked):
    factors = make(blocked, 1, 2, 12, 5)
    result, error = truncate(factors, num_blocks=4, rank=12)  # 3 per block, where 2 suffice
    assert error == 0.0
    torch.testing.assert_close(dense_update(result), dense_update(factors), **FP64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_truncation_returns_the_input_dtype_and_the_error_of_exact_arithmetic(dtype):
    factors = make("A", 1, 4, 24, 9, dtype=dtype)
    result, error = truncate(factors, num_blocks=4, rank=8)
    in_fp64 = BlockFactors(
        A=factors.A.double(), B=factors.B.double(), num_blocks=1, blocked="A", scale=0.5
    )
    exact, error_fp64 = truncate(in_fp64, num_blocks=4, rank=8)
    assert result.dtype == dtype
    assert error == error_fp64
    assert torch.equal(result.A, exact.A.to(dtype))
    assert torch.equal(result.B, exact.B.to(dtype))


def test_truncating_a_zero_update_has_no_error():
    factors = make("B", 2, 2, 12, 5)
    zero = BlockFactors(
        A=factors.A, B=torch.zeros_like(factors.B), num_blocks=2, blocked="B", scale=1.0
    )
    result, error = truncate(zero, num_blocks=4, rank=4)
    assert error == 0.0
    assert not dense_update(result).any()
    assert truncate(make("B", 2, 2, 12, 5, scale=0.0), num_blocks=2, rank=2)[1] == 0.0


def test_truncation_refuses_uneven_ranks_and_numbers_that_are_none():
    factors = make("B", 4, 2, 12, 5)
    for rank, num_blocks in ((6, 4), (0, 4), (4, 0)):
        with pytest.raises(ShapeError, match=f"rank={rank} is not a positive multiple"):
            truncate(factors, num_blocks=num_blocks, rank=rank)
    factors.A[0, 0] = math.nan
    with pytest.raises(UnsupportedError, match="hold NaN or infinity"):
        truncate(factors, num_blocks=2, rank=2)


# --- parameter counts -------------------------------------------------------------------------


def llama(hidden, ffn, kv, layers, only=None):
    """The seven target modules of every layer of a Llama."""
    column, row = "B", "A"
    modules = {
        "q": (hidden, hidden, column),
        "k": (hidden, kv, column),
        "v": (hidden, kv, column),
        "o": (hidden, hidden, row),
        "gate": (hidden, ffn, column),
        "up": (hidden, ffn, column),
        "down": (ffn, hidden, row),
    }
    chosen = [modules[name] for name in only or modules]
    return [ModuleShape(in_features=i, out_features=o, blocked=b) for i, o, b in chosen] * layers


LLAMA = {
    "3.1-8B": llama(4096, 14336, 1024, 32),
    "3.1-70B": llama(8192, 28672, 1024, 80),
    "3.2-1B": llama(2048, 8192, 512, 16),
    "3.2-3B": llama(3072, 8192, 1024, 28),
}
LLAMA_3B_MLP = llama(3072, 8192, 1024, 28, only=["gate", "up", "down"])


def count(shapes, rank, num_blocks):
    return sum(
        num_parameters(
            s.in_features, s.out_features, rank=rank, num_blocks=num_blocks, blocked=s.blocked
        )
        for s in shapes
    )


@pytest.mark.parametrize(
    ("model", "num_blocks", "lora", "bd"),
    [
        ("3.1-8B", 8, 2_621_440, 1_130_496),
        ("3.1-8B", 4, 2_621_440, 1_343_488),
        ("3.1-8B", 2, 2_621_440, 1_769_472),
        ("3.1-70B", 8, 12_943_360, 5_632_000),
        ("3.1-70B", 4, 12_943_360, 6_676_480),
        ("3.2-1B", 2, 704_512, 466_944),
        ("3.2-3B", 2, 1_519_616, 1_060_864),
    ],
)
def test_counts_per_rank_are_the_published_ones(model, num_blocks, lora, bd):
    assert count(LLAMA[model], num_blocks, 1) == num_blocks * lora
    assert count(LLAMA[model], num_blocks, num_blocks) == num_blocks * bd


def test_matching_ranks_are_the_published_ones():
    assert matching_rank(LLAMA["3.2-1B"], lora_rank=64, num_blocks=2) == 96
    assert count(LLAMA["3.2-1B"], 64, 1) == 45_088_768
    assert count(LLAMA["3.2-1B"], 96, 2) == 44_826_624
    assert matching_rank(LLAMA_3B_MLP, lora_rank=10, num_blocks=2) == 14
    assert count(LLAMA_3B_MLP, 10, 1) == 9_461_760
    assert count(LLAMA_3B_MLP, 14, 2) == 8_429_568


@given(st.sampled_from(sorted(LLAMA)), st.integers(8, 256), st.sampled_from([1, 2, 4, 8]))
@quick
def test_the_matching_rank_is_the_largest_within_the_budget(model, lora_rank, num_blocks):
    shapes = LLAMA[model]
    rank = matching_rank(shapes, lora_rank=lora_rank, num_blocks=num_blocks)
    budget = count(shapes, lora_rank, 1)
    assert count(shapes, rank, num_blocks) <= budget
    assert count(shapes, rank + num_blocks, num_blocks) > budget


def test_counts_and_matching_refuse_what_they_cannot_count():
    with pytest.raises(ShapeError, match="out_features=9 are not both"):
        num_parameters(8, 9, rank=4, num_blocks=2, blocked="B")
    with pytest.raises(ShapeError, match="rank=3 and in_features=8"):
        num_parameters(8, 9, rank=3, num_blocks=2, blocked="A")
    with pytest.raises(ConfigError, match="got 0 modules"):
        matching_rank([], lora_rank=8, num_blocks=2)
    with pytest.raises(ConfigError, match="lora_rank=0"):
        matching_rank(LLAMA["3.2-1B"], lora_rank=0, num_blocks=2)
    with pytest.raises(ConfigError, match="use a lora_rank of at least 4") as caught:
        matching_rank(LLAMA["3.1-8B"], lora_rank=1, num_blocks=8)
    assert "or fewer blocks" in str(caught.value)
    assert matching_rank(LLAMA["3.1-8B"], lora_rank=4, num_blocks=8) == 8


@pytest.mark.parametrize("num_blocks", [1, 2, 4, 8])
def test_replicas_have_the_update_of_their_head(num_blocks):
    factors = make("B", num_blocks, 2, 32, 5)
    made = replicate(factors, 4, 3)
    # Vanilla: only B's rows are there again. Blocks of two heads become blocks of one.
    assert made.rank == (2 if num_blocks == 1 else 3 * 2 * max(num_blocks, 4))
    assert made.num_blocks == (1 if num_blocks == 1 else 3 * max(num_blocks, 4))
    heads = dense_update(factors).unflatten(0, (4, 8))
    wanted = heads.repeat_interleave(3, dim=0).flatten(0, 1)
    torch.testing.assert_close(dense_update(made), wanted, **FP64)
