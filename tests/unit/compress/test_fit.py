"""The fit beside dense fp64 algebra."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from bdlora_megatron.compress.cores import Projector
from bdlora_megatron.compress.fit import fit_basis
from bdlora_megatron.compress.stack import gram_norm2, slices_of, stack_pairs
from tests.unit.compress.planted import dense, numbers
from tests.unit.convert.random_adapters import factors

#: More features than ranks, and fewer: one is reduced to its ranks first, the other is not.
SIZES = [(90, 70, 6), (30, 24, 12)]


def planted(outputs, inputs, count, *, k=5, noise=0.0, seed=0):
    """Updates of rank 2 to 4 in one space."""
    random = numbers(seed)
    U, V = (torch.linalg.qr(random(width, k)).Q for width in (outputs, inputs))
    pairs = []
    for number in range(count):
        rank = 2 + number % 3
        B, A = U @ random(k, rank), random(rank, k) @ V.t()
        B, A = B + noise * random(*B.shape), A + noise * random(*A.shape)
        pairs.append((B / (B @ A).norm(), A))
    return pairs


def fitted(pairs, rank, core="full"):
    return fit_basis(stack_pairs(pairs, [1.0] * len(pairs)), rank, core=core)


def lost2(pairs, U, V, *, diagonal=False):
    """The sum of squared errors, dense."""
    total = 0.0
    for B, A in pairs:
        update = B @ A
        S = U.t() @ update @ V
        total += float((update - U @ (S.diag().diag() if diagonal else S) @ V.t()).square().sum())
    return total


def hosvd(pairs, rank):
    """The truncated HOSVD: the leading directions of each side by itself."""
    updates = [B @ A for B, A in pairs]
    left = sum(update @ update.t() for update in updates)
    right = sum(update.t() @ update for update in updates)
    return (torch.linalg.eigh(gram).eigenvectors[:, -rank:] for gram in (left, right))


def assert_orthonormal(basis):
    for side in (basis.U, basis.V):
        eye = torch.eye(side.shape[1], dtype=side.dtype)
        torch.testing.assert_close(side.t() @ side, eye, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("outputs", "inputs", "count"), SIZES)
def test_a_shared_space_is_found(outputs, inputs, count):
    pairs = planted(outputs, inputs, count)
    basis = fitted(pairs, 5)
    assert_orthonormal(basis)
    assert lost2(pairs, basis.U, basis.V) < 1e-20


@pytest.mark.parametrize(("outputs", "inputs", "count"), SIZES)
@pytest.mark.parametrize("noise", [0.1, 10.0])
def test_it_is_no_worse_than_a_truncated_hosvd_and_never_gets_worse(outputs, inputs, count, noise):
    for seed in range(5):
        pairs = planted(outputs, inputs, count, noise=noise, seed=seed)
        basis = fitted(pairs, 5)
        assert_orthonormal(basis)
        assert lost2(pairs, basis.U, basis.V) <= lost2(pairs, *hosvd(pairs, 5)) + 1e-9
        steps = basis.energies
        assert all(after >= before - 1e-12 for before, after in pairwise(steps))
        # Energies are what is kept: all of it less the error.
        assert len(pairs) - steps[-1] == pytest.approx(lost2(pairs, basis.U, basis.V), abs=1e-9)


def test_one_adapter_gets_its_singular_vectors():
    pairs = planted(40, 30, 1, k=8)
    basis = fitted(pairs, 1)
    values = torch.linalg.svdvals(pairs[0][0] @ pairs[0][1])
    best = float(values[1:].square().sum())
    assert lost2(pairs, basis.U, basis.V) == pytest.approx(best, rel=1e-6)


def test_a_fixed_point_satisfies_its_equations():
    """U holds the leading eigenvectors of the sum of (M V)(M V)^T, as the algebra says."""
    pairs = planted(30, 24, 12, noise=0.3)
    basis = fitted(pairs, 5)
    gram = sum((B @ (A @ basis.V)) @ (B @ (A @ basis.V)).t() for B, A in pairs)
    leading = torch.linalg.eigvalsh(gram)[-5:].sum()
    held = torch.trace(basis.U.t() @ gram @ basis.U)
    assert float(held / leading) == pytest.approx(1, abs=1e-4)


def test_a_basis_has_no_columns_that_hold_nothing():
    pairs = planted(90, 70, 1, k=8) * 7
    basis = fitted(pairs, 32)
    assert basis.U.shape == (90, 2)
    assert basis.V.shape == (70, 2)
    assert lost2(pairs, basis.U, basis.V) < 1e-20


def test_directions_far_smaller_than_others_are_kept():
    """Of 1e-9, whose square is rounding."""
    random = numbers(3)
    frames = [torch.linalg.qr(random(width, 2)).Q for width in (40, 30)]
    sizes = torch.tensor([1.0, 1e-9], dtype=torch.float64)
    pairs = [(frames[0] * sizes, frames[1].t())]
    basis = fitted(pairs, 4)
    assert basis.U.shape[1] == 2
    assert float((basis.U.t() @ frames[0][:, 1]).norm()) == pytest.approx(1, abs=1e-5)


def test_updates_of_nothing_are_fitted_by_one_column():
    pairs = [(torch.zeros(9, 2).double(), torch.ones(2, 8).double())]
    basis = fitted(pairs, 4)
    assert basis.U.shape == (9, 1)
    assert_orthonormal(basis)


@pytest.mark.parametrize(("outputs", "inputs", "count"), SIZES)
@pytest.mark.parametrize("signs", [False, True])
def test_a_shared_frame_with_diagonal_cores_is_found(outputs, inputs, count, signs):
    """With signs alone every axis is as long as the others, and none is a principal one."""
    random = numbers(1)
    U, V = (torch.linalg.qr(random(width, 5)).Q for width in (outputs, inputs))
    cores = [random(5).sign() if signs else random(5) for _ in range(count)]
    pairs = [(U * core, V.t()) for core in cores]
    basis = fitted(pairs, 5, "diagonal")
    assert_orthonormal(basis)
    whole = sum(float((B @ A).square().sum()) for B, A in pairs)
    assert lost2(pairs, basis.U, basis.V, diagonal=True) < 1e-12 * whole


@pytest.mark.parametrize(("outputs", "inputs", "count"), SIZES)
def test_diagonal_cores_never_get_worse_and_beat_those_of_the_full_basis(outputs, inputs, count):
    pairs = planted(outputs, inputs, count, noise=0.3)
    basis, full = fitted(pairs, 5, "diagonal"), fitted(pairs, 5)
    assert_orthonormal(basis)
    own = lost2(pairs, basis.U, basis.V, diagonal=True)
    assert own < lost2(pairs, full.U, full.V, diagonal=True)
    assert own >= lost2(pairs, full.U, full.V)
    steps = basis.energies
    assert len(steps) > 2
    assert all(after >= before - 1e-12 for before, after in pairwise(steps))
    assert len(pairs) - steps[-1] == pytest.approx(own, abs=1e-9)


@pytest.mark.parametrize("core", ["full", "diagonal"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_error_is_that_of_what_is_stored(core, dtype):
    pairs = planted(30, 24, 4, noise=0.3)
    basis = fitted(pairs, 5, core)
    projector = Projector(basis.U.to(dtype), basis.V.to(dtype), core)
    for B, A in pairs:
        S, error2 = projector.project((B, A), -2.0)
        assert S.dtype == dtype
        whole = S.double() if core == "full" else S.double().diag()
        stored = projector.U.double() @ whole @ projector.V.double().t()
        assert error2 == pytest.approx(float((-2 * B @ A - stored).square().sum()), abs=1e-12)


@pytest.mark.parametrize("core", ["full", "diagonal"])
def test_a_core_is_the_best_in_a_rounded_basis(core):
    """A basis in bfloat16 is not orthonormal; the core makes up for it."""
    pairs = planted(30, 24, 4, noise=0.3)
    basis = fitted(pairs, 5, core)
    U, V = (side.bfloat16().double() for side in (basis.U, basis.V))
    for B, A in pairs:
        S, error2 = Projector(U, V, core).project((B, A), 1.0)
        spanning = [u[:, None] * v for u in U.t() for v in V.t()]
        if core == "diagonal":
            spanning = [u[:, None] * v for u, v in zip(U.t(), V.t(), strict=True)]
        columns = torch.stack(spanning).flatten(1).t()
        best = torch.linalg.lstsq(columns, (B @ A).flatten()[:, None]).solution
        torch.testing.assert_close(S.flatten(), best.flatten(), rtol=1e-9, atol=1e-12)
        left = (B @ A).flatten() - (columns @ best).flatten()
        assert error2 == pytest.approx(float(left.square().sum()), abs=1e-12)


@pytest.mark.parametrize("name", ["q_proj", "down_proj"])
@pytest.mark.parametrize("own_blocks", [1, 2, 8])
@pytest.mark.parametrize("num_blocks", [1, 2, 4])
def test_slices_are_those_of_tensor_parallelism(name, own_blocks, num_blocks):
    update = factors(name, rank=8, num_blocks=own_blocks, dtype=torch.float64)
    whole = dense(update) / update.scale
    parts = slices_of(update, num_blocks)
    cut = whole.chunk(num_blocks, dim=0 if name == "q_proj" else 1)
    assert len(parts) == num_blocks
    for (B, A), wanted in zip(parts, cut, strict=True):
        torch.testing.assert_close(B @ A, wanted, rtol=0, atol=1e-12)
    norm2 = sum(map(gram_norm2, parts))
    assert norm2 == pytest.approx(float(whole.square().sum()), rel=1e-12)
    if own_blocks == num_blocks:
        # Blocks that fit keep their rank.
        assert parts[0][1].shape[0] == 8 // num_blocks


def test_a_stack_keeps_updates_with_their_weights():
    pairs = planted(12, 10, 5)
    weights = [1.0, -2.0, 3.0, 0.5, 4.0]
    stack = stack_pairs(pairs, weights)
    assert stack.groups == ((2, 2), (2, 3), (1, 4))
    rebuilt = [
        left.t() @ right
        for lefts, rights in zip(
            stack.parts(stack.left.t()), stack.parts(stack.right.t()), strict=True
        )
        for left, right in zip(lefts, rights, strict=True)
    ]
    for place, i in enumerate([0, 3, 1, 4, 2]):
        B, A = pairs[i]
        torch.testing.assert_close(rebuilt[place], weights[i] * B @ A, rtol=0, atol=1e-12)
