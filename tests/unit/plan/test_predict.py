"""Times of the cost model: each formula on numbers that can be checked by hand."""

from __future__ import annotations

import pytest

from bdlora_megatron.config import Layout
from bdlora_megatron.errors import ConfigError
from bdlora_megatron.plan import (
    HARDWARE,
    PRESETS,
    AdapterLoad,
    Device,
    Hardware,
    Link,
    Protocol,
    Step,
    memory_plan,
    predict_step,
)
from bdlora_megatron.plan.predict import work_seconds
from bdlora_megatron.plan.work import Message, Product, Work

DEVICE = Device(flops=100.0, bandwidth=10.0, memory=1e9, launch=0.5)
LINK = Link(
    protocols=(
        Protocol(base=1.0, per_step=0.1, bandwidth=2.0),
        Protocol(base=3.0, per_step=0.2, bandwidth=8.0),
    )
)
HAND = Hardware(name="hand", device=DEVICE, link=LINK, source="made up")


def test_a_kernel_is_bound_by_the_slower_of_two():
    work = Work(products=(Product(flops=200, bytes=10), Product(flops=10, bytes=30)))
    assert work_seconds(work, HAND, 2) == (0.5 + 2 + 0.5 + 3, 0)


def test_a_ring_takes_steps_and_sends_shares():
    # Four ranks: an all-reduce takes six steps and sends 6/4 of the payload, a gather half of that.
    assert LINK.seconds("all_reduce", 4, 4) == pytest.approx(min(1 + 0.6 + 3, 3 + 1.2 + 0.75))
    assert LINK.seconds("all_gather", 4, 4) == pytest.approx(min(1 + 0.3 + 1.5, 3 + 0.6 + 0.375))
    # A large message takes the protocol with the larger bandwidth.
    assert LINK.seconds("all_gather", 400, 4) == pytest.approx(3 + 0.6 + 37.5)
    assert LINK.seconds("all_reduce", 400, 1) == 0
    messages = (Message(kind="all_reduce", payload_bytes=4),) * 3
    assert work_seconds(Work(messages=messages), HAND, 4)[1] == pytest.approx(3 * 4.6)


@pytest.mark.parametrize("name", sorted(HARDWARE))
@pytest.mark.parametrize("model", sorted(PRESETS))
def test_only_slora_pays_for_communication(name, model):
    step = Step(tokens=8, context=1024)
    base = predict_step(PRESETS[model], step, HARDWARE[name], 8)
    times = {
        layout: predict_step(
            PRESETS[model], step, HARDWARE[name], 8, AdapterLoad(layout=layout, rank=16)
        )
        for layout in Layout
    }
    for layout, time in times.items():
        assert time.base_compute == base.base_compute
        assert (time.adapter_communication > 0) == (layout is Layout.SLORA)
        assert time.total > base.total
    assert times[Layout.BDLORA].total < times[Layout.HALF_SHARDED].total
    assert times[Layout.BDLORA].total < times[Layout.SLORA].total


def test_a_step_cannot_be_faster_than_reading_the_weights():
    shape, hardware = PRESETS["llama-3.1-8b"], HARDWARE["a100-nvlink"]
    time = predict_step(shape, Step(tokens=1, context=1), hardware, 8)
    embedding = shape.vocab_size * shape.hidden_size
    read = 2 * (shape.num_parameters() - embedding) / 8 / hardware.device.bandwidth
    assert read < time.total < 5 * read


def test_memory_adds_up():
    shape, device = PRESETS["llama-3.1-8b"], HARDWARE["a100-nvlink"].device
    load = AdapterLoad(layout=Layout.BDLORA, rank=32)
    plan = memory_plan(shape, load, device, 8, requests=64, context=4096)
    assert plan.weights == shape.num_parameters() * 2 // 8
    # One key-value head of 128 on each rank, in 32 layers: keys and values of two bytes.
    assert plan.cache == 64 * 4096 * 2 * 128 * 32 * 2
    # The paper's parameters for rank 32 on eight ranks: 36.2 million.
    assert plan.adapter == pytest.approx(36.2e6 * 2 / 8, rel=1e-3)
    assert plan.free == int(0.9 * 80e9) - plan.weights - plan.cache
    assert plan.adapters_that_fit == plan.free // plan.adapter
    crowded = memory_plan(shape, load, device, 8, requests=10**6, context=4096)
    assert crowded.free == crowded.adapters_that_fit == 0


def test_memory_of_nothing_is_refused():
    load = AdapterLoad(layout=Layout.BDLORA, rank=32)
    device = HARDWARE["a100-nvlink"].device
    with pytest.raises(ConfigError, match="requests=0"):
        memory_plan(PRESETS["llama-3.1-8b"], load, device, 8, requests=0, context=1)
