"""Adapters held against a base model's own config."""

from __future__ import annotations

import json

import pytest

from bdlora_megatron.convert import (
    ModuleKey,
    check_base,
    open_adapter,
    read_hf_config,
    write_adapter,
)
from bdlora_megatron.errors import ShapeError
from tests.unit.convert.peft_files import FFN, HIDDEN, LAYERS, peft_model, save, tiny_llama
from tests.unit.convert.random_adapters import adapter, factors


def config(tmp_path, **changes):
    folder = tmp_path / f"base{len(list(tmp_path.iterdir()))}"
    tiny_llama(**changes).config.save_pretrained(folder)
    return read_hf_config(folder)


def test_an_adapter_of_the_base_model_learns_its_whole_shape(tmp_path):
    folder = save(peft_model(target_modules=["q_proj", "down_proj"]), tmp_path / "a")
    with open_adapter(folder) as opened:
        assert opened.base.num_heads is None
        checked = check_base(opened, config(tmp_path))
        assert (checked.base.num_heads, checked.base.num_kv_heads, checked.base.head_dim) == (
            4,
            2,
            20,
        )
        assert (checked.base.hidden_size, checked.base.ffn_size) == (HIDDEN, FFN)
        # A complete adapter of a model whose layers are known needs no list of them.
        path = write_adapter(checked, tmp_path / "b", "peft")
    assert json.loads((path / "adapter_config.json").read_text())["layers_to_transform"] is None


def test_another_base_model_is_refused_with_both_shapes(tmp_path):
    with open_adapter(save(peft_model(), tmp_path / "a")) as opened:
        other = config(tmp_path, hidden_size=56, num_key_value_heads=1)
        with pytest.raises(ShapeError) as caught:
            check_base(opened, other)
    message = str(caught.value)
    assert "hidden_size is 48 in the adapter and 56 in the base model" in message
    assert "kv_size is 40 in the adapter and 20 in the base model" in message
    assert "(adapter hidden_size 48, ffn_size 104, q_size 80, kv_size 40; base model" in message
    assert "num_layers 2)" in message


def test_layers_that_the_base_model_lacks_are_refused(tmp_path):
    key = ModuleKey(layer=LAYERS, name="gate_proj")
    base = config(tmp_path, hidden_size=48, intermediate_size=80)
    deep = adapter({key: factors("gate_proj", rank=4)})
    deep = type(deep)(name="deep", modules=deep.modules)
    with pytest.raises(ShapeError, match="layer 2 is adapted and the base model has 2, from 0 on"):
        check_base(deep, base)
