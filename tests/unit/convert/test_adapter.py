"""The neutral adapter's names and inferred widths."""

from __future__ import annotations

import pytest

from bdlora_megatron.convert.adapter.neutral import (
    MODULE_NAMES,
    BaseShape,
    ModuleKey,
    blocked_factor,
    infer_base_shape,
)
from bdlora_megatron.errors import ShapeError


def key(name, layer=0):
    return ModuleKey(layer=layer, name=name)


def test_row_parallel_modules_block_the_other_factor():
    sides = {name: blocked_factor(name) for name in MODULE_NAMES}
    assert {name for name, side in sides.items() if side == "A"} == {"o_proj", "down_proj"}
    assert len(sides) == 7


def test_keys_read_as_paths_and_sort_by_layer():
    keys = [key("up_proj", 10), key("q_proj", 2), key("o_proj", 2)]
    assert [str(k) for k in sorted(keys)] == [
        "layers.2.self_attn.o_proj",
        "layers.2.self_attn.q_proj",
        "layers.10.mlp.up_proj",
    ]


def test_each_module_tells_the_widths_it_touches():
    assert infer_base_shape([(key("k_proj"), 48, 40)]) == BaseShape(hidden_size=48, kv_size=40)
    assert infer_base_shape([(key("down_proj"), 104, 48), (key("o_proj"), 80, 48)]) == BaseShape(
        hidden_size=48, ffn_size=104, q_size=80
    )
    assert infer_base_shape([]) == BaseShape()


def test_modules_of_different_models_are_refused_with_all_widths():
    features = [(key("q_proj"), 48, 80), (key("o_proj", 1), 40, 48), (key("up_proj"), 64, 104)]
    with pytest.raises(ShapeError, match=r"hidden_size is 48 by .*q_proj but 64 by") as caught:
        infer_base_shape(features)
    assert "q_size is 80 by layers.0.self_attn.q_proj but 40 by layers.1" in str(caught.value)
