"""What each layout communicates, call by call and byte by byte, forward and backward."""

from __future__ import annotations

import pytest
import torch
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region

from bdlora_megatron.config import Layout
from bdlora_megatron.runtime.collectives import Collective, record_collectives
from tests.harness import run_ranks
from tests.tp.layer_cases import (
    BATCH,
    HIDDEN,
    SEQUENCE,
    Case,
    Reference,
    build_base,
    build_layer,
    local_input,
    local_output,
    projections,
)
from tests.tp.session import model_parallel

LAYERS = ("linear_qkv", "linear_fc1", "linear_proj", "linear_fc2")
TOKENS, RANK, BYTES = SEQUENCE * BATCH, 24, 4


def record(layer, reference, rank):
    """The collectives of one forward and of one backward."""
    x = local_input(reference, rank)
    with record_collectives() as forward:
        y, _ = layer(x)
    grad_y = local_output(reference, reference.grad_y, rank).to(y.dtype)
    with record_collectives() as backward:
        y.backward(grad_y)
    assert x.grad is not None
    return forward.calls, backward.calls


def _record_pair(rank, world_size, case):
    with model_parallel(world_size):
        reference = Reference.make(case, world_size)
        plain = record(build_base(reference, rank), reference, rank)
        return plain, record(build_layer(reference, rank), reference, rank)


def _case(layer, layout, world_size, **more):
    blocks = world_size if layout is Layout.BDLORA else 1
    return Case(layer=layer, layout=layout, num_blocks=blocks, dtype=torch.float32, **more)


def _call(kind, shape, world_size):
    payload = BYTES * int(torch.Size(shape).numel())
    factor = {"all_reduce": 2}.get(kind, 1) * (world_size - 1) / world_size
    return Collective(
        kind=kind, payload_bytes=payload, wire_bytes=int(payload * factor), shape=tuple(shape)
    )


def _extra(case, world_size):
    """The calls a layout adds to the base layer's, as documented in ``layers.adapters``."""
    ranks = RANK * (1 if case.fused else len(projections(case)))
    if case.layout is Layout.BDLORA:
        return [], []
    if case.layout is Layout.HALF_SHARDED:
        shape = (ranks, HIDDEN) if case.column else (HIDDEN, RANK)
        return [], [_call("all_reduce", shape, world_size)]
    if not case.column:
        both = _call("all_reduce", (TOKENS, RANK), world_size)
        return [both], [both]
    shape = (ranks, TOKENS)
    return [_call("all_gather", shape, world_size)], [_call("reduce_scatter", shape, world_size)]


def _without(calls, base):
    """``calls`` less ``base``, which must all be there."""
    left = list(calls)
    for call in base:
        assert call in left, f"the base layer's {call} is missing from {calls}"
        left.remove(call)
    return left


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tensor", "sequence"])
@pytest.mark.parametrize("layout", list(Layout), ids=lambda layout: layout.value)
@pytest.mark.parametrize("layer", LAYERS)
def test_calls_and_bytes(layer, layout, sequence_parallel):
    for fused in {False, layer in LAYERS[:2]}:
        case = _case(layer, layout, 2, sequence_parallel=sequence_parallel, fused=fused)
        for (base_f, base_b), (lora_f, lora_b) in run_ranks(2, _record_pair, case):
            extra_f, extra_b = _extra(case, 2)
            assert _without(lora_f, base_f) == extra_f
            assert _without(lora_b, base_b) == extra_b


@pytest.mark.parametrize("world_size", [3, 4])
@pytest.mark.parametrize("layer", LAYERS)
def test_block_diagonal_communicates_like_the_base(layer, world_size):
    case = _case(layer, Layout.BDLORA, world_size)
    for base, lora in run_ranks(world_size, _record_pair, case):
        assert lora == base
        # The comparison would be empty if the base layer communicated nothing.
        assert base[1] if case.column else base[0]


@pytest.mark.parametrize("layer", LAYERS[:2])
def test_gathering_again_costs_one_gather_of_the_input(layer):
    case = _case(layer, Layout.BDLORA, 2, sequence_parallel=True, regather=True)
    for (base_f, base_b), (lora_f, lora_b) in run_ranks(2, _record_pair, case):
        assert lora_f == base_f
        assert _without(lora_b, base_b) == [
            _call("all_gather", (SEQUENCE, BATCH, HIDDEN), 2),
        ]


def _record_naive(rank, world_size, case):
    """An adapter beside an untouched base layer, with a copy of X of its own."""
    with model_parallel(world_size):
        reference = Reference.make(case, world_size)
        base, layer = build_base(reference, rank), build_layer(reference, rank)

        def naive(x):
            y, bias = base(x)
            z = layer.adapter.shrink(copy_to_tensor_model_parallel_region(x))
            return layer.adapter.expand(z, y), bias

        plain = record(base, reference, rank)
        return plain, record(naive, reference, rank)


def test_the_count_notices_a_second_copy_of_the_input():
    case = _case("linear_qkv", Layout.BDLORA, 2)
    for (_, base_b), (_, naive_b) in run_ranks(2, _record_naive, case):
        assert _without(naive_b, base_b) == [_call("all_reduce", (SEQUENCE, BATCH, HIDDEN), 2)]
