"""Predictions of training steps: parts to be checked by hand, and what layouts must differ in."""

from __future__ import annotations

from collections import Counter

import pytest

from bdlora_megatron.config import Layout
from bdlora_megatron.errors import ConfigError
from bdlora_megatron.plan import HARDWARE, PRESETS, AdapterLoad, Device, TrainStep, predict_training
from bdlora_megatron.plan.local import LocalStep, local_forward
from bdlora_megatron.plan.training import (
    adapter_training_work,
    base_training_work,
    optimizer_work,
    training_work,
)
from bdlora_megatron.plan.work import multiply

SHAPE = PRESETS["llama-3.1-8b"]
STEP = TrainStep(sequences=2, length=512)


def test_a_backward_kernel_starts_by_itself_and_a_cpu_packs_and_waits():
    device = Device(
        flops=100.0, bandwidth=10.0, memory=1e9, launch=0.5, backward_launch=0.25, cpu=True
    )
    # Ten operations after twenty bytes, of which the second matrix's eight count once more.
    product = multiply(2, 1, 2, 4)
    assert (product.bytes, product.panel) == (4 * (2 + 2 + 4), 8)
    spent = device.seconds(10.0, 20.0, panel=8.0, backward=False)
    assert spent == pytest.approx(0.5 + 0.1 + 2.8)
    assert device.seconds(10.0, 20.0, panel=8.0, backward=True) == pytest.approx(0.25 + 0.1 + 2.8)
    assert multiply(1, 5, 7, 4).panel == 0, "one row is multiplied as the matrix lies there"


def test_a_frozen_base_multiplies_twice():
    """Forward and for its inputs' gradients, not for its weights'."""
    weights = sum(line.in_features * sum(line.out_features) for line in SHAPE.linears())
    for fused in (True, False):
        step = TrainStep(sequences=2, length=512, fused=fused)
        there, back = base_training_work(SHAPE, step, 8)
        products = [sorted(p.flops for p in work.products)[-4:] for work in (there, back)]
        assert sum(products[0]) == sum(products[1]) == 2 * STEP.tokens * weights / 8


def test_an_adapter_multiplies_three_times():
    load = AdapterLoad(layout=Layout.BDLORA, rank=32)
    there, back = adapter_training_work(SHAPE, STEP, load, 8)
    flops = [sum(p.flops for p in work.products) for work in (there, back)]
    assert flops[1] == 2 * flops[0]


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_who_sends_what(sequence_parallel):
    step = TrainStep(sequences=2, length=512, sequence_parallel=sequence_parallel)
    sent = {}
    for layout in Layout:
        works = adapter_training_work(SHAPE, step, AdapterLoad(layout=layout, rank=16), 8)
        sent[layout] = [Counter(m.kind for m in work.messages) for work in works]
    assert sent[Layout.BDLORA] == [Counter(), Counter()]
    assert sent[Layout.HALF_SHARDED] == [Counter(), {"all_reduce": 4}]
    assert sent[Layout.SLORA] == [
        {"all_gather": 2, "all_reduce": 2},
        {"reduce_scatter": 2, "all_reduce": 2},
    ]
    there, back = training_work(SHAPE, step, 1, AdapterLoad(layout=Layout.SLORA, rank=16))
    assert there.messages == back.messages == ()


@pytest.mark.parametrize("name", sorted(HARDWARE))
def test_layouts_in_training(name):
    base = predict_training(SHAPE, STEP, HARDWARE[name], 8)
    times = {
        layout: predict_training(
            SHAPE, STEP, HARDWARE[name], 8, AdapterLoad(layout=layout, rank=16)
        )
        for layout in Layout
    }
    assert base.optimizer == base.adapter_compute == 0
    for layout, time in times.items():
        assert time.base_compute == base.base_compute
        assert (time.adapter_communication > 0) == (layout is not Layout.BDLORA)
        assert time.total > base.total
        assert 0 < time.optimizer < 0.05 * time.total
    assert min(times, key=lambda layout: times[layout].total) is Layout.BDLORA


def test_adamw_visits_every_factor():
    load = AdapterLoad(layout=Layout.BDLORA, rank=32)
    apart = optimizer_work(SHAPE, TrainStep(sequences=1, length=1, fused=False), load, 8)
    assert len(apart.products) == 9 * 14, "nine kernels for both factors of seven projections"
    assert len(optimizer_work(SHAPE, STEP, load, 8).products) == 1


def test_a_static_cache_is_rotated_whole():
    """What made a decoding step grow with its context faster than a server's."""
    short, long = (
        sum(p.bytes for p in local_forward(SHAPE, LocalStep(sequences=1, new=1, cached=c), 8))
        for c in (0, 1000)
    )
    keys = 1000 * SHAPE.head_dim
    assert long - short > 4 * 12 * keys


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TrainStep(sequences=0, length=8), "0 sequences of 8 tokens"),
        (
            lambda: optimizer_work(
                SHAPE, STEP, AdapterLoad(layout=Layout.BDLORA, rank=32, num_blocks=16), 8
            ),
            "num_blocks=16 over 8 ranks",
        ),
        (lambda: base_training_work(SHAPE, STEP, 3), "tp=3 does not divide"),
    ],
)
def test_what_is_not_counted_is_refused(make, words):
    with pytest.raises(ConfigError, match=words):
        make()
