"""Adapter layers on 1 to 4 ranks: outputs and every gradient against a whole fp64 reference."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from bdlora_megatron.config import Layout
from tests.harness import run_ranks
from tests.tolerances import assert_close
from tests.tp.layer_cases import (
    Case,
    Reference,
    build_layer,
    local_dx,
    local_input,
    local_output,
)
from tests.tp.session import model_parallel

LAYERS = ("linear_qkv", "linear_fc1", "linear_proj", "linear_fc2")
WORLDS = (1, 2, 3, 4)


def _cases(sequence_parallel, **common):
    for layer, layout in product(LAYERS, Layout):
        # 12 blocks divide over every world here; a rank then holds 12, 6, 4 or 3 of them.
        blocks = (12,) if layout is Layout.BDLORA else (1,)
        fused_too = (False, True) if layer in ("linear_qkv", "linear_fc1") else (False,)
        for num_blocks, fused in product(blocks, fused_too):
            yield Case(
                layer=layer,
                layout=layout,
                num_blocks=num_blocks,
                fused=fused,
                sequence_parallel=sequence_parallel,
                **common,
            )


def check(case, rank, world_size):
    """One forward and backward of one rank, compared tensor by tensor."""
    reference = Reference.make(case, world_size)
    expected = reference.run()
    layer = build_layer(reference, rank)
    x = local_input(reference, rank)
    y, _ = layer(x)
    assert_close(y, local_output(reference, expected, rank), f"y [{case.label}]")
    y.backward(local_output(reference, reference.grad_y, rank).to(y.dtype))
    assert_close(x.grad, local_dx(reference, rank), f"dX [{case.label}]")
    for plan in layer.adapter.plans:
        name = plan.projection.name
        for factor, which in zip(layer.adapter.factors(plan), "AB", strict=True):
            assert_close(
                factor.weight.grad,
                reference.share(name, which, rank, grad=True),
                f"d{which} of {name!r} [{case.label}]",
            )


def _check_all(rank, world_size, cases):
    with model_parallel(world_size):
        for case in cases:
            check(case, rank, world_size)


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tensor", "sequence"])
@pytest.mark.parametrize("world_size", WORLDS)
def test_outputs_and_gradients_match_the_whole_layer(world_size, sequence_parallel):
    run_ranks(world_size, _check_all, list(_cases(sequence_parallel)))


@pytest.mark.parametrize("world_size", [2, 4])
def test_one_block_per_rank(world_size):
    cases = [
        Case(layer=layer, layout=Layout.BDLORA, num_blocks=world_size, fused=fused)
        for layer in LAYERS
        for fused in ((False, True) if layer in LAYERS[:2] else (False,))
    ]
    run_ranks(world_size, _check_all, cases)


def test_a_plain_mlp_has_one_projection():
    cases = [
        Case(layer="linear_fc1", layout=layout, num_blocks=blocks, gated=False)
        for layout, blocks in ((Layout.BDLORA, 2), (Layout.SLORA, 1), (Layout.HALF_SHARDED, 1))
    ]
    run_ranks(2, _check_all, cases)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lower_precision_stays_close(dtype):
    cases = [*_cases(False, dtype=dtype), *_cases(True, dtype=dtype)]
    run_ranks(2, _check_all, cases)


def test_factors_may_be_wider_than_the_base():
    cases = list(_cases(False, dtype=torch.bfloat16, factor_dtype=torch.float32))
    run_ranks(2, _check_all, cases)


def test_a_trainable_base_gets_the_same_gradients():
    cases = [*_cases(False, base_trainable=True), *_cases(True, base_trainable=True)]
    run_ranks(2, _check_all, cases)


def test_gathering_the_input_again_changes_nothing():
    cases = list(_cases(True, regather=True))
    run_ranks(2, _check_all, cases)
