"""Counts of the cost model against the algebra's own, and against the layouts' table."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bdlora_megatron.blocks import num_parameters
from bdlora_megatron.config import Layout
from bdlora_megatron.errors import ConfigError
from bdlora_megatron.plan import (
    PRESETS,
    AdapterLoad,
    ModelShape,
    Step,
    adapter_bytes,
    adapter_work,
    base_layer_work,
)

SHAPE = ModelShape(
    num_layers=3,
    hidden_size=64,
    ffn_size=96,
    num_heads=8,
    num_kv_heads=4,
    head_dim=16,
    vocab_size=101,
)
STEP = Step(tokens=5, context=7, bytes_per_element=2)


def _whole(load: AdapterLoad, blocks: int) -> int:
    """Parameters of one adapter in one layer over all ranks, by the algebra's own count."""
    return sum(
        num_parameters(
            module.in_features,
            module.out_features,
            rank=load.rank,
            num_blocks=blocks,
            blocked=module.blocked,
        )
        for module in SHAPE.module_shapes()
    )


@given(tp=st.sampled_from([1, 2, 4]), per_block=st.integers(1, 5), more=st.sampled_from([1, 2]))
def test_a_bdlora_rank_holds_one_share_of_everything(tp, per_block, more):
    blocks = tp * more
    load = AdapterLoad(layout=Layout.BDLORA, rank=per_block * blocks, num_blocks=blocks)
    held = adapter_bytes(SHAPE, load, tp, bytes_per_element=1)
    assert held * tp == SHAPE.num_layers * _whole(load, blocks)


@given(tp=st.sampled_from([1, 2, 4]), rank=st.integers(1, 9))
def test_slora_holds_one_share_and_half_sharded_more(tp, rank):
    slora = AdapterLoad(layout=Layout.SLORA, rank=rank * tp)
    half = AdapterLoad(layout=Layout.HALF_SHARDED, rank=rank * tp)
    share = adapter_bytes(SHAPE, slora, tp, bytes_per_element=1)
    assert share * tp == SHAPE.num_layers * _whole(slora, 1)
    more = adapter_bytes(SHAPE, half, tp, bytes_per_element=1)
    assert (more > share) == (tp > 1)


@pytest.mark.parametrize("layout", [Layout.BDLORA, Layout.HALF_SHARDED])
def test_layouts_without_collectives(layout):
    load = AdapterLoad(layout=layout, rank=8)
    assert adapter_work(SHAPE, STEP, load, 4).messages == ()


def test_slora_packs_its_collectives():
    load = AdapterLoad(layout=Layout.SLORA, rank=8)
    messages = adapter_work(SHAPE, STEP, load, 4).messages
    assert Counter(m.kind for m in messages) == {"all_gather": 2, "all_reduce": 2}
    # q, k, v, o, gate, up and down: seven ranks of every token, two bytes each.
    assert sum(m.payload_bytes for m in messages) == 7 * 8 * STEP.tokens * 2
    assert adapter_work(SHAPE, STEP, load, 1).messages == ()


def test_slora_rounds_its_rank_up_to_the_ranks():
    uneven, even = (AdapterLoad(layout=Layout.SLORA, rank=rank) for rank in (5, 8))
    assert adapter_work(SHAPE, STEP, uneven, 4) == adapter_work(SHAPE, STEP, even, 4)


@given(tokens=st.integers(1, 600), distinct=st.integers(1, 64), tp=st.sampled_from([1, 2, 4]))
def test_weights_are_read_once_for_each_adapter_and_multiplied_once_for_each_token(
    tokens, distinct, tp
):
    step = Step(tokens=tokens, context=1, bytes_per_element=2)
    load = AdapterLoad(layout=Layout.BDLORA, rank=8, distinct=distinct)
    one = AdapterLoad(layout=Layout.BDLORA, rank=8)
    products = adapter_work(SHAPE, step, load, tp).products
    held = adapter_bytes(SHAPE, load, tp, bytes_per_element=1) // SHAPE.num_layers
    assert sum(p.flops for p in products) == 2 * tokens * held
    alone = sum(p.bytes for p in adapter_work(SHAPE, step, one, tp).products)
    assert sum(p.bytes for p in products) == alone + 2 * held * (distinct - 1)


@pytest.mark.parametrize("layout", Layout)
def test_adapters_of_some_layers_add_up_to_those_of_all(layout):
    attention, mlp = ("linear_qkv", "linear_proj"), ("linear_fc1", "linear_fc2")
    parts = [AdapterLoad(layout=layout, rank=8, target_modules=t) for t in (attention, mlp)]
    whole = AdapterLoad(layout=layout, rank=8)
    works = [adapter_work(SHAPE, STEP, load, 4) for load in (*parts, whole)]
    assert works[0].products + works[1].products == works[2].products
    assert works[0].messages + works[1].messages == works[2].messages
    sizes = [adapter_bytes(SHAPE, load, 4, bytes_per_element=2) for load in (*parts, whole)]
    assert sizes[0] + sizes[1] == sizes[2]
    assert min(sizes) > 0


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        ((), "target_modules=; wanted one or more of linear_qkv"),
        (("linear_qkv", "q_proj", "up_proj"), "q_proj is in linear_qkv, up_proj is in linear_fc1"),
        (("linear_fc3",), "target_modules=linear_fc3; wanted"),
        (("linear_fc1", "linear_fc1"), "each once"),
    ],
    ids=str,
)
def test_targets_are_layers_of_megatron(targets, words):
    with pytest.raises(ConfigError, match=words):
        AdapterLoad(layout=Layout.BDLORA, rank=8, target_modules=targets)


def test_base_layer_counts():
    work = base_layer_work(SHAPE, STEP, 2)
    weights = sum(m.in_features * m.out_features for m in SHAPE.module_shapes())
    cache = 4 * STEP.tokens * STEP.context * SHAPE.num_heads * SHAPE.head_dim
    assert sum(p.flops for p in work.products) == (2 * STEP.tokens * weights + cache) / 2
    assert [m.kind for m in work.messages] == ["all_reduce"] * 2
    assert {m.payload_bytes for m in work.messages} == {2 * STEP.tokens * SHAPE.hidden_size}
    assert base_layer_work(SHAPE, STEP, 1).messages == ()


def test_parameters_of_the_presets():
    """The models' published sizes, and the paper's ratio of 2r BD-LoRA to r LoRA on 8 ranks."""
    assert PRESETS["llama-3.1-8b"].num_parameters() == pytest.approx(8.03e9, rel=1e-3)
    assert PRESETS["llama-3.1-70b"].num_parameters() == pytest.approx(70.55e9, rel=1e-3)
    for name, ratio in (("llama-3.1-8b", 0.8625), ("llama-3.1-70b", 0.870)):
        shape = PRESETS[name]
        blocked = AdapterLoad(layout=Layout.BDLORA, rank=32)
        vanilla = AdapterLoad(layout=Layout.SLORA, rank=16)
        sizes = [adapter_bytes(shape, x, 8, bytes_per_element=1) for x in (blocked, vanilla)]
        assert sizes[0] / sizes[1] == pytest.approx(ratio, abs=5e-4)


@pytest.mark.parametrize(
    ("load", "tp", "words"),
    [
        (AdapterLoad(layout=Layout.BDLORA, rank=6), 4, "rank=6 in 4 blocks over 4 ranks"),
        (AdapterLoad(layout=Layout.BDLORA, rank=8, num_blocks=2), 4, "2 blocks over 4 ranks"),
        (AdapterLoad(layout=Layout.SLORA, rank=0), 4, "rank=0"),
        (AdapterLoad(layout=Layout.SLORA, rank=8), 3, "tp=3 does not divide .* use one of 1, 2, 4"),
    ],
)
def test_what_does_not_divide_is_refused(load, tp, words):
    with pytest.raises(ConfigError, match=words):
        adapter_work(SHAPE, STEP, load, tp)
