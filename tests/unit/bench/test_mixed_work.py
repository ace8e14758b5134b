"""A mixed step on a GPU, as counted; tests/tp/test_local_plan.py holds a CPU's to the layers."""

from __future__ import annotations

import pytest

from bdlora_megatron.bench.mixed_work import mixed_work
from bdlora_megatron.bench.plan import MODELS
from bdlora_megatron.config import Layout
from bdlora_megatron.plan import AdapterLoad
from bdlora_megatron.plan.local import LocalStep
from bdlora_megatron.plan.predict import local_work
from bdlora_megatron.plan.work import factor_sizes

SHAPE = MODELS["small"]
STEP = LocalStep(sequences=32, new=1, cached=128, bytes_per_element=2)


def _added(layout, distinct):
    """Products and messages beyond the base model's."""
    base = local_work(SHAPE, STEP, 2)
    load = AdapterLoad(layout=layout, rank=32, distinct=distinct)
    work = mixed_work(SHAPE, STEP, 2, load, fused=True)
    assert work.products[: len(base.products)] == base.products
    assert work.messages[: len(base.messages)] == base.messages
    return work.products[len(base.products) :], work.messages[len(base.messages) :]


@pytest.mark.parametrize("layout", Layout)
def test_two_kernels_a_layer_read_each_adapter_once(layout):
    (few, sent), (many, _) = _added(layout, 1), _added(layout, 9)
    assert len(few) == len(many) == 2 * 4 * SHAPE.num_layers
    assert sum(p.flops for p in few) == sum(p.flops for p in many)
    sizes = [factor_sizes(x, AdapterLoad(layout=layout, rank=32), 2) for x in SHAPE.linears()]
    held = 2 * SHAPE.num_layers * sum(sum(a) + sum(b) for a, b, _ in sizes)
    assert sum(p.bytes for p in many) - sum(p.bytes for p in few) == 8 * held
    kinds = ["all_gather", "all_reduce"] * 2 if layout is Layout.SLORA else []
    assert [message.kind for message in sent] == kinds * SHAPE.num_layers


@pytest.mark.parametrize("fused", [False, True])
def test_the_base_model_alone_is_a_decoding_step(fused):
    assert mixed_work(SHAPE, STEP, 2, None, fused=fused) == local_work(SHAPE, STEP, 2)
