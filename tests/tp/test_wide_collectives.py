"""What each layout communicates at TP=8 and TP=64, counted in one process.

torch's fake process group completes every call at once and moves nothing: right for counting, and
for nothing else. ``test_collectives`` counts the same on real ranks, and ``test_layers`` computes.
"""

from __future__ import annotations

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    model_parallel_cuda_manual_seed,
)
from megatron.core.transformer import TransformerConfig
from torch.testing._internal.distributed.fake_pg import FakeStore

from bdlora_megatron import runtime
from bdlora_megatron.config import Layout, LoRAConfig
from bdlora_megatron.layers import LoRAColumnParallelLinear, LoRARowParallelLinear
from bdlora_megatron.runtime.collectives import Collective, record_collectives
from tests.harness import run_ranks

HIDDEN, HEADS, FFN, RANK, SEQUENCE, BATCH, BYTES = 256, 64, 512, 64, 64, 2, 4
#: Input and output over all ranks, and the projections that a column layer holds.
LAYERS = {
    "linear_qkv": (HIDDEN, 3 * HIDDEN, 3),
    "linear_fc1": (HIDDEN, 2 * FFN, 2),
    "linear_proj": (HIDDEN, HIDDEN, 1),
    "linear_fc2": (FFN, HIDDEN, 1),
}
COLUMN = ("linear_qkv", "linear_fc1")


def _layer(name, layout, tp, sequence_parallel):
    inputs, outputs, _ = LAYERS[name]
    config = TransformerConfig(
        num_layers=1, hidden_size=HIDDEN, num_attention_heads=HEADS, num_query_groups=HEADS,
        kv_channels=HIDDEN // HEADS, ffn_hidden_size=FFN, gated_linear_unit=True,
        tensor_model_parallel_size=tp, sequence_parallel=sequence_parallel,
        params_dtype=torch.float32, use_cpu_initialization=True, add_bias_linear=False,
    )  # fmt: skip
    lora = None
    if layout is not None:
        blocks = tp if layout is Layout.BDLORA else None
        lora = LoRAConfig(rank=RANK, layout=layout, num_blocks=blocks)
    settings = {"config": config, "init_method": torch.nn.init.zeros_, "bias": False}
    settings |= {"skip_bias_add": False}
    if lora is not None:
        settings |= {"lora": lora, "lora_name": name}
    if name in COLUMN:
        kind = ColumnParallelLinear if lora is None else LoRAColumnParallelLinear
        layer = kind(inputs, outputs, gather_output=False, **settings)
    else:
        kind = RowParallelLinear if lora is None else LoRARowParallelLinear
        layer = kind(inputs, outputs, input_is_parallel=True, **settings)
    layer.weight.requires_grad_(False)
    return layer


def _record(name, layout, tp, sequence_parallel):
    """The calls of one forward and of one backward."""
    layer = _layer(name, layout, tp, sequence_parallel)
    column = name in COLUMN
    tokens = SEQUENCE // tp if sequence_parallel and column else SEQUENCE
    width = LAYERS[name][0] if column else LAYERS[name][0] // tp
    x = torch.ones(tokens, BATCH, width, requires_grad=True)
    with record_collectives() as forward:
        y, _ = layer(x)
    with record_collectives() as backward:
        y.backward(torch.ones_like(y))
    return forward.calls, backward.calls


def _all(rank, world_size, tp):
    torch.distributed.destroy_process_group()
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=tp)
    runtime.enable_cpu()
    # Groups of gloo's would wait for ranks that are not there.
    parallel_state.initialize_model_parallel(tp, create_gloo_process_groups=False)
    model_parallel_cuda_manual_seed(1)
    return {
        (name, layout, parallel): _record(name, layout, tp, parallel)
        for name in LAYERS
        for layout in (None, *Layout)
        for parallel in (False, True)
    }


def _call(kind, shape, tp):
    payload = BYTES * int(torch.Size(shape).numel())
    wire = int(payload * {"all_reduce": 2}.get(kind, 1) * (tp - 1) / tp)
    return Collective(kind=kind, payload_bytes=payload, wire_bytes=wire, shape=tuple(shape))


def _extra(name, layout, tp):
    """The calls that a layout adds to the base layer's, forward and backward."""
    inputs, outputs, projections = LAYERS[name]
    tokens, ranks = SEQUENCE * BATCH, projections * RANK
    if layout is Layout.BDLORA:
        return [], []
    if layout is Layout.HALF_SHARDED:
        # The gradient of the factor that every rank holds whole.
        shape = (ranks, inputs) if name in COLUMN else (outputs, RANK)
        return [], [_call("all_reduce", shape, tp)]
    if name in COLUMN:
        shape = (ranks, tokens)
        return [_call("all_gather", shape, tp)], [_call("reduce_scatter", shape, tp)]
    both = [_call("all_reduce", (tokens, RANK), tp)]
    return both, both


def _without(calls, base):
    left = list(calls)
    for call in base:
        left.remove(call)
    return left


@pytest.mark.parametrize("tp", [8, 64])
def test_only_other_layouts_add_calls(tp):
    (found,) = run_ranks(1, _all, tp)
    for (name, layout, parallel), calls in found.items():
        base = found[name, None, parallel]
        if layout is None:
            # The comparison would be empty if the base layer communicated nothing.
            assert sum(map(len, base)) >= 1
            continue
        if layout is Layout.BDLORA:
            assert calls == base, (name, parallel)
        added = [_without(*pair) for pair in zip(calls, base, strict=True)]
        assert added == list(_extra(name, layout, tp)), (name, layout, parallel)
