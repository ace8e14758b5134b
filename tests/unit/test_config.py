"""The adapter's settings: what is accepted, computed and refused."""

import math

import pytest
import torch

from bdlora_megatron.config import DEFAULT_TARGETS, Layout, LoRAConfig
from bdlora_megatron.errors import BDLoRAError, ConfigError


def test_defaults_need_only_the_block_count():
    config = LoRAConfig(num_blocks=8)
    assert config.layout is Layout.BDLORA
    assert config.blocks == 8
    assert config.target_modules == DEFAULT_TARGETS
    assert config.scale == 2.0


def test_the_scale_uses_the_total_rank():
    assert LoRAConfig(num_blocks=4, rank=64, alpha=16).scale == 0.25
    assert LoRAConfig(num_blocks=4, rank=64, alpha=16, use_rslora=True).scale == 16 / math.sqrt(64)


def test_vanilla_layouts_have_one_block():
    assert LoRAConfig(layout="slora").blocks == 1
    assert LoRAConfig(layout=Layout.HALF_SHARDED, num_blocks=1).blocks == 1


def test_from_dict_takes_plain_values():
    config = LoRAConfig.from_dict(
        {"layout": "bdlora", "num_blocks": 2, "target_modules": ["linear_qkv"]}
    )
    assert config == LoRAConfig(num_blocks=2, target_modules=("linear_qkv",))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"num_blocks": 8, "rank": 12},
            r"rank=12 is not a multiple of num_blocks=8; use rank 8 or",
        ),
        ({"num_blocks": 8, "rank": 4}, "rank=4 is not a multiple of num_blocks=8; use rank 8"),
        ({}, "num_blocks=None with layout='bdlora'; set it to the tensor-parallel size"),
        ({"num_blocks": 0}, "num_blocks=0"),
        ({"layout": "slora", "num_blocks": 4}, "only 'bdlora' has blocks"),
        ({"layout": "lora"}, r"layout='lora'; wanted one of \['bdlora', 'slora', 'half_sharded'\]"),
        ({"num_blocks": 1, "rank": 0}, "rank=0; the rank must be at least 1"),
        ({"num_blocks": 1, "alpha": math.inf}, "alpha=inf"),
        ({"num_blocks": 1, "dropout": 1.0}, "dropout=1.0"),
        ({"num_blocks": 1, "target_modules": []}, "target_modules is empty"),
        ({"num_blocks": 1, "target_modules": "linear_qkv"}, "wanted a list of names"),
        ({"num_blocks": 1, "target_modules": [3]}, "wanted a list of names"),
        ({"num_blocks": 1, "dtype": torch.int8}, "floating-point"),
        ({"num_block": 1}, "unknown key 'num_block' .* did you mean 'num_blocks'"),
        ({"zzz": 1}, "unknown key 'zzz' .* known: "),
    ],
)
def test_bad_values_are_refused_with_the_way_out(values, message):
    with pytest.raises(ConfigError, match=message) as caught:
        LoRAConfig.from_dict(values)
    assert isinstance(caught.value, BDLoRAError)
    assert isinstance(caught.value, ValueError)
