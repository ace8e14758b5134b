"""The cost model's counts of the benchmark's forward passes against the real ones."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from megatron.core.inference.contexts import StaticInferenceContext

from bdlora_megatron.bench.contenders import Contenders
from bdlora_megatron.bench.mixed_work import mixed_work
from bdlora_megatron.bench.plan import BenchPlan
from bdlora_megatron.plan import AdapterLoad
from bdlora_megatron.plan.local import LocalStep
from bdlora_megatron.plan.predict import local_work
from bdlora_megatron.runtime.versions.inference import inference
from tests.harness import run_ranks
from tests.tp.session import model_parallel
from tests.tp.test_training_plan import SOME_TARGETS, kernels_of, messages_of, record


def _recorded(plan, world_size):
    """Each step of each contender: what it ran, what it sent, and what the cost model takes."""
    with model_parallel(world_size):
        contenders = Contenders(plan)
        for setting in plan.settings():
            step = LocalStep(
                sequences=setting.batch,
                new=setting.new,
                cached=setting.cached,
            )
            cache = _fill(contenders, setting)
            for variant in plan.variants():
                load = variant.layout and AdapterLoad(
                    layout=variant.layout,
                    rank=variant.rank,
                    distinct=setting.adapters or 1,
                    target_modules=plan.target_modules,
                )
                _, kernels, calls = record(lambda: _run(contenders, variant, setting, cache))  # noqa: B023
                yield step, load, kernels, calls, (variant.label, setting.label)


def _plan(world_size, rank, **sizes):
    none = {"decode": (), "mixed": (), "prefill": (), "train": (), "latencies_s": (0.0,)}
    return BenchPlan(tp=world_size, layers=2, ranks=(rank,), **{**none, **sizes})


def _check_sums(kernels, wanted, where):
    moved = [sum(k[1] * n for k, n in c.items()) for c in (kernels, wanted)]
    assert 0.9 < moved[1] / moved[0] < 1.1, (where, moved)
    started = [sum(c.values()) for c in (kernels, wanted)]
    assert 0.85 < started[1] / started[0] < 1.15, (where, started)


def _compare(rank, world_size, sizes):
    plan = _plan(world_size, 4, **sizes)
    for step, load, kernels, calls, where in _recorded(plan, world_size):
        work = local_work(plan.shape, step, world_size, load)
        assert calls == messages_of(work.messages), where
        wanted = kernels_of(work.products)
        found, counted = ({k: n for k, n in c.items() if k[0]} for c in (kernels, wanted))
        assert found == counted, where
        _check_sums(kernels, wanted, where)


def _compare_mixed(rank, world_size, sizes):
    plan = _plan(world_size, 8 * world_size, **sizes)
    seen = set()
    for step, load, kernels, calls, where in _recorded(plan, world_size):
        work = mixed_work(plan.shape, step, world_size, load, fused=False)
        assert calls == messages_of(work.messages), where
        wanted = kernels_of(work.products)
        found, counted = (_multiplications(c) for c in (kernels, wanted))
        assert found == counted, where
        _check_sums(kernels, wanted, where)
        seen.add((load is None, *sorted(found)))
    assert len(seen) > len(plan.adapters) * len(plan.mixed)


def _multiplications(kernels):
    """Kernels by their operations; how long a list of rows is, the counts leave out."""
    found = Counter()
    for (flops, _), number in kernels.items():
        if flops:
            found[flops] += number
    return found


@torch.no_grad()
def _fill(contenders, setting):
    cache = StaticInferenceContext(setting.batch, setting.length + 1)
    inputs = contenders._inputs(setting.batch, setting.length, 0)
    contenders.model.eval()
    with inference():
        contenders.model(*inputs, inference_context=cache, runtime_gather_output=True)
    if setting.decodes:
        cache.increment_sequence_len_offset(setting.length)
    return cache


@torch.no_grad()
def _run(contenders, variant, setting, cache):
    """As ``Contenders.step`` does, but outside of inference mode, where torch shows its kernels."""
    contenders.choose(variant, setting)
    inputs = contenders._inputs(setting.batch, setting.new, setting.cached)
    with inference(), contenders._slots.serving(variant, setting)():
        return contenders.model(*inputs, inference_context=cache, runtime_gather_output=True)


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_product_and_message_is_counted_and_nearly_every_byte(world_size):
    sizes = {"decode": ((3, 5), (1, 40)), "prefill": ((2, 6), (1, 6))}
    run_ranks(world_size, _compare, sizes)


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_mixed_batch_is_counted_too(world_size):
    """Adapters of which all have several tokens, none has, and one has not."""
    sizes = {"mixed": ((8, 5), (16, 5)), "adapters": (1, 2, 3, 8)}
    run_ranks(world_size, _compare_mixed, sizes)


@pytest.mark.parametrize("targets", SOME_TARGETS, ids=" ".join)
def test_adapters_of_some_layers_are_counted(targets):
    some = {"target_modules": targets}
    run_ranks(2, _compare, {"decode": ((3, 5),), "prefill": ((2, 6),), **some})
    run_ranks(2, _compare_mixed, {"mixed": ((8, 5),), "adapters": (2, 3), **some})
