"""The cost model's counts of the benchmark's forward passes against the real ones."""

from __future__ import annotations

import pytest
import torch
from megatron.core.inference.contexts import StaticInferenceContext

from bdlora_megatron.bench.contenders import Contenders
from bdlora_megatron.bench.plan import BenchPlan
from bdlora_megatron.plan import AdapterLoad
from bdlora_megatron.plan.local import LocalStep
from bdlora_megatron.plan.predict import local_work
from bdlora_megatron.runtime.versions.inference import inference
from tests.harness import run_ranks
from tests.tp.session import model_parallel
from tests.tp.test_training_plan import kernels_of, messages_of, record


def _compare(rank, world_size):
    plan = BenchPlan(
        tp=world_size,
        layers=2,
        ranks=(4,),
        decode=((3, 5), (1, 40)),
        prefill=((2, 6), (1, 6)),
        train=(),
        latencies_s=(0.0,),
    )
    with model_parallel(world_size):
        contenders = Contenders(plan)
        for setting in plan.settings():
            decodes = setting.phase == "decode"
            step = LocalStep(
                sequences=setting.batch,
                new=1 if decodes else setting.length,
                cached=setting.length if decodes else 0,
            )
            cache = _fill(contenders, setting)
            for arm in plan.arms():
                load = arm.layout and AdapterLoad(layout=arm.layout, rank=arm.rank)
                work = local_work(plan.shape, step, world_size, load)
                _, kernels, calls = record(lambda: _run(contenders, arm, setting, cache))  # noqa: B023
                where = (arm.label, setting.label)
                assert calls == messages_of(work.messages), where
                wanted = kernels_of(work.products)
                found, counted = ({k: n for k, n in c.items() if k[0]} for c in (kernels, wanted))
                assert found == counted, where
                moved = [sum(k[1] * n for k, n in c.items()) for c in (kernels, wanted)]
                assert 0.9 < moved[1] / moved[0] < 1.1, (where, moved)
                started = [sum(c.values()) for c in (kernels, wanted)]
                assert 0.85 < started[1] / started[0] < 1.15, (where, started)


@torch.no_grad()
def _fill(contenders, setting):
    cache = StaticInferenceContext(setting.batch, setting.length + 1)
    inputs = contenders._inputs(setting.batch, setting.length, 0)
    contenders.model.eval()
    with inference():
        contenders.model(*inputs, inference_context=cache, runtime_gather_output=True)
    if setting.phase == "decode":
        cache.increment_sequence_len_offset(setting.length)
    return cache


@torch.no_grad()
def _run(contenders, arm, setting, cache):
    """As ``Contenders.step`` does, but outside of inference mode, where torch shows its kernels."""
    contenders.choose(arm)
    decodes = setting.phase == "decode"
    new, before = (1, setting.length) if decodes else (setting.length, 0)
    inputs = contenders._inputs(setting.batch, new, before)
    with inference():
        return contenders.model(*inputs, inference_context=cache, runtime_gather_output=True)


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_product_and_message_is_counted_and_nearly_every_byte(world_size):
    run_ranks(world_size, _compare)
