"""Adapters under Megatron-Core's data parallelism and optimizers, several micro-batches a step.

Gradient reduction that overlaps backward, the distributed optimizer, gathering of parameters that
overlaps forward, and Apex's fused accumulation: after steps of plain gradient descent, every factor
is where the whole model in fp64 puts it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module

from bdlora_megatron.config import Layout, LoRAConfig
from bdlora_megatron.layers import apply_lora, collect_adapter, lora_layers
from bdlora_megatron.layers.factors import Factor
from tests.fakes import apex
from tests.harness import run_ranks
from tests.tolerances import MODEL_BFLOAT16, MODEL_GRADIENTS, assert_close
from tests.tp.models import (
    BATCH,
    SEQUENCE,
    VOCAB,
    randomize_adapters,
    tiny_config,
    tiny_model,
    tokens,
)
from tests.tp.session import model_parallel

TP, DP, MICRO_BATCHES = 2, 2, 3
# Beside which the root of Adam's second moment is nothing, so that its steps are plain gradient
# descent's. The distributed optimizer knows no other optimizer.
EPSILON = 1e6
OVERLAP = {"overlap_grad_reduce": True}
SPLIT = {"use_distributed_optimizer": True}
GATHER = {**OVERLAP, **SPLIT, "overlap_param_gather": True}
WAYS = (OVERLAP, SPLIT, GATHER)


def _batch(number):
    """Micro-batches that have little in common."""
    batch = tokens()
    return {**batch, "input_ids": (batch["input_ids"] * (number + 1) + number) % VOCAB}


def _loss(model, batch):
    return model(**batch, labels=batch["input_ids"].roll(-1, dims=1))


def _build(tp, run, *, dtype, **changes):
    config = tiny_config(tp, params_dtype=dtype, pipeline_dtype=dtype, **changes)
    model = tiny_model(config).to(dtype)
    blocks = 4 if run.layout is Layout.BDLORA else None
    apply_lora(model, LoRAConfig(rank=8, alpha=32, layout=run.layout, num_blocks=blocks))
    if run.train_base:
        model.decoder.requires_grad_(True)
    randomize_adapters(model)
    for _, layer in lora_layers(model):
        for parameter in layer.adapter.parameters():
            parameter.data.mul_(0.2)
    for parameter in model.parameters():
        # Numbers that every type of these tests holds.
        parameter.data.copy_(parameter.data.bfloat16())
    return model


def _forward_step(batches, model):
    losses = _loss(model, next(batches))
    return losses, lambda losses: (losses.mean(), {})


def _steps(model: Any, wrapped: Any, optimizer: Any, count: int, numbers: list[int]) -> None:
    settings = model.config
    settings.no_sync_func = wrapped.no_sync
    settings.finalize_model_grads_func = finalize_model_grads
    for _ in range(count):
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=iter([_batch(number) for number in numbers]),
            model=[wrapped],
            num_microbatches=len(numbers),
            seq_length=SEQUENCE,
            micro_batch_size=BATCH,
            forward_only=False,
        )
        assert optimizer.step()[0]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A short training, and what may be different about it."""

    ddp: dict[str, bool]
    layout: Layout = Layout.BDLORA
    half: bool = False
    train_base: bool = False
    sequence_parallel: bool = False
    fused: bool = False
    steps: int = 2
    lr: float = 10.0


def _all_trained(rank, world_size, runs):
    with model_parallel(TP):
        apex.install()
        return [_trained(run) for run in runs]


def _trained(run):
    """What was trained, after a few steps, and how often Apex's extension was called."""
    apex.COUNTS.clear()
    dtype = torch.bfloat16 if run.half else torch.float32
    model = _build(
        TP,
        run,
        dtype=dtype,
        bf16=run.half,
        gradient_accumulation_fusion=run.fused,
        sequence_parallel=run.sequence_parallel,
    )
    # Small buckets, so that there are several to wait for.
    wrapped = DistributedDataParallel(
        model.config,
        DistributedDataParallelConfig(grad_reduce_in_fp32=True, bucket_size=500, **run.ddp),
        Float16Module(model.config, model) if run.half else model,
    )
    assert len(wrapped.bucket_groups) > 3 or "overlap_grad_reduce" not in run.ddp
    shared = {name: on for name, on in run.ddp.items() if name != "overlap_grad_reduce"}
    settings = OptimizerConfig(
        optimizer="adam", lr=run.lr * EPSILON, adam_eps=EPSILON, adam_beta1=0.0, weight_decay=0.0,
        clip_grad=0.0, bf16=run.half, params_dtype=dtype, **shared,
    )  # fmt: skip
    optimizer = get_megatron_optimizer(settings, [wrapped])
    first = parallel_state.get_data_parallel_rank() * MICRO_BATCHES
    _steps(model, wrapped, optimizer, run.steps, list(range(first, first + MICRO_BATCHES)))
    return _values(model, run), apex.COUNTS.get("wgrad", 0)


def _values(model, run):
    """Every factor, whole; and the weights of the base's linear layers, if they are trained."""
    modules = collect_adapter(model, "trained").modules
    values = {f"{key}.{w}": getattr(f, w) for key, f in modules.items() for w in "AB"}
    if run.train_base:
        for name, layer in lora_layers(model):
            values[name] = _gathered(layer)
    return values


def _gathered(layer):
    shares = [torch.empty_like(layer.weight.data) for _ in range(layer.tp_group.size())]
    torch.distributed.all_gather(shares, layer.weight.data, group=layer.tp_group)
    if layer.splits_input:
        return torch.cat(shares, dim=1)
    # A gated layer's halves are split each by itself; whole or not, a chunk is a stretch of rows.
    halves = [share.chunk(2) for share in shares]
    gated = layer.weight.size(0) * len(shares) == 2 * layer.config.ffn_hidden_size
    return torch.cat([half[i] for i in (0, 1) for half in halves] if gated else shares)


def _whole(rank, world_size, run):
    """The same in fp64 on one rank, by torch's autograd and a subtraction; before and after."""
    with model_parallel(1):
        model = _build(1, run, dtype=torch.float64)
        before = _values(model, run)
        trained = [p for p in model.parameters() if p.requires_grad]
        for _ in range(run.steps):
            losses = [_loss(model, _batch(number)).mean() for number in range(DP * MICRO_BATCHES)]
            grads = torch.autograd.grad(torch.stack(losses).mean(), trained)
            for parameter, gradient in zip(trained, grads, strict=True):
                parameter.data.sub_(run.lr * gradient)
        return before, _values(model, run)


def _check(runs, tolerance=MODEL_GRADIENTS):
    """Compare runs that differ in how they are carried out; returns their calls of Apex."""
    before, after = run_ranks(1, _whole, runs[0])[0]
    calls = []
    for found in zip(*run_ranks(TP * DP, _all_trained, runs), strict=True):
        for values, _ in found:
            assert values.keys() == after.keys()
            for name, start in before.items():
                assert_close(values[name] - start, after[name] - start, name, tolerance)
        calls += {fused for _, fused in found}
    return calls


@pytest.mark.parametrize("layout", Layout, ids=lambda layout: layout.value)
def test_factors_move_as_in_the_whole_model(layout):
    _check([Run(layout=layout, ddp=ddp) for ddp in (*WAYS, {})])


def test_sixteen_bit_factors_move_too():
    # A step so large that what is left of the start is nothing beside it.
    runs = [Run(ddp=ddp, half=True, steps=1, lr=1e3) for ddp in (*WAYS, {})]
    _check(runs, MODEL_BFLOAT16)


def test_fused_accumulation_leaves_a_frozen_base_alone():
    runs = [
        Run(ddp=ddp, fused=True, sequence_parallel=sequence_parallel)
        for ddp in WAYS
        for sequence_parallel in (False, True)
    ]
    assert _check(runs) == [0] * len(runs)


def test_fused_accumulation_of_a_base_that_is_trained_with_its_adapters():
    runs = [
        Run(ddp=GATHER, fused=True, train_base=True, sequence_parallel=sequence_parallel)
        for sequence_parallel in (False, True)
    ]
    # Four linear layers of two decoder layers, in every micro-batch of two steps.
    assert _check(runs) == [4 * 2 * MICRO_BATCHES * 2] * 2


def _hooked(rank, world_size):
    with model_parallel(world_size):
        for layout in Layout:
            model = _build(world_size, Run(ddp={}, layout=layout), dtype=torch.float32)
            factors = {n: m for n, m in model.named_modules() if isinstance(m, Factor)}
            called = set()
            for name, factor in factors.items():
                factor.register_forward_pre_hook(
                    lambda *_, name=name, called=called: called.add(name)
                )
            _loss(model, _batch(0))
            assert called == factors.keys()
            assert len(factors) == 2 * 2 * 7


def test_layers_call_the_module_of_every_factor():
    """Where Megatron waits for a parameter that is still being gathered."""
    run_ranks(2, _hooked)
