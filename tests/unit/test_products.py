"""Products of blocks against a dense product with zeros, in fp64, forward and backward."""

from __future__ import annotations

import pytest
import torch

from bdlora_megatron.layers.adapters.products import Block, add_blocks

S, BATCH, O, K = 3, 2, 11, 7
T = S * BATCH
#: Top, left, rows, columns, scale: two blocks share columns, and no block reads the last one.
PLACES = ((0, 0, 3, 2, 2.0), (3, 2, 2, 4, 0.5), (5, 0, 4, 2, 2.0), (10, 5, 1, 1, -1.0))


def _weights(dtype=torch.float64):
    torch.manual_seed(0)
    return [
        torch.randn(rows, columns, dtype=dtype, requires_grad=True)
        for _, _, rows, columns, _ in PLACES
    ]


def _blocks(weights):
    return [
        Block(top, left, scale, weight)
        for (top, left, _, _, scale), weight in zip(PLACES, weights, strict=True)
    ]


def _dense(base, z, weights):
    whole = z.new_zeros(O, K)
    for (top, left, rows, columns, scale), weight in zip(PLACES, weights, strict=True):
        whole = whole + torch.nn.functional.pad(
            weight * scale, (left, K - left - columns, top, O - top - rows)
        )
    return base + (z @ whole.t()).view(base.shape)


class _Viewed(torch.autograd.Function):
    """What Transformer Engine's layers return: a view made inside a function."""

    @staticmethod
    def forward(ctx, x):
        return (x * 3).view(S, BATCH, O)

    @staticmethod
    def backward(ctx, grad):
        return (grad * 3).flatten()


@pytest.mark.parametrize("how", ["own", "leaf", "viewed"])
def test_blocks_give_what_the_dense_product_gives(how):
    weights, z = _weights(), torch.randn(T, K, dtype=torch.float64, requires_grad=True)
    x = torch.randn(T * O, dtype=torch.float64, requires_grad=True)
    inputs = (x, z, *weights)

    def base(x):
        return _Viewed.apply(x) if how == "viewed" else (x * 3).reshape(S, BATCH, O).clone()

    own = base(x).detach().requires_grad_() if how == "leaf" else base(x)
    wanted = _dense(base(x), z, weights)
    found = add_blocks(own, z, _blocks(weights))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-13)
    if how == "leaf":
        inputs = inputs[1:]
    seed = torch.randn_like(wanted)
    pairs = zip(
        torch.autograd.grad(found, inputs, seed),
        torch.autograd.grad(wanted, inputs, seed),
        strict=True,
    )
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_the_sum_takes_the_base_products_memory():
    weights, z = _weights(torch.float32), torch.randn(T, K)
    base = torch.zeros(S, BATCH, O, requires_grad=True) + 1
    found = add_blocks(base, z, _blocks(weights))
    assert found.data_ptr() == base.data_ptr()
    # Not wrapped in what autograd makes of a view that is written to.
    assert type(found.grad_fn).__name__ == "_AddBlocksBackward"


def test_factors_wider_than_the_base_are_added_in_its_type():
    weights, z = _weights(torch.float32), torch.randn(T, K)
    found = add_blocks(torch.ones(S, BATCH, O, dtype=torch.bfloat16), z, _blocks(weights))
    wanted = _dense(torch.ones(S, BATCH, O), z, weights)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), wanted, rtol=2**-7, atol=2**-6)
    found.float().sum().backward()
    assert all(weight.grad.dtype == torch.float32 for weight in weights)


def test_autocast_chooses_the_type_of_both_products():
    weights, x = _weights(torch.float32), torch.randn(T, K)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = torch.nn.functional.linear(x, torch.eye(K))
        ones = torch.ones(O, K, requires_grad=True)
        base = torch.nn.functional.linear(x.view(S, BATCH, K), ones)
        found = add_blocks(base, z, _blocks(weights))
    assert found.dtype == torch.bfloat16
    found.sum().backward()
    assert all(weight.grad is not None for weight in weights)
