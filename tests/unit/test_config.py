"""The adapter's settings: what is accepted, computed and refused."""

import math

import pytest
import torch

from bdlora_megatron.config import DEFAULT_TARGETS, Layout, LoRAConfig
from bdlora_megatron.errors import BDLoRAError, ConfigError
from bdlora_megatron.integrations import BlockDiagonalSettings
from bdlora_megatron.train.peft import resolve_peft
from bdlora_megatron.train.schema import BDLoRASection, PeftSection


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


@pytest.mark.parametrize("blocks", [1, 3, 8])
@pytest.mark.parametrize("rank", [None, 24, 96])
@pytest.mark.parametrize("alpha", [None, 5.0])
def test_the_same_words_mean_the_same_update_at_every_door(blocks, rank, alpha):
    """The layers', the trainer's, and the one that Bridge's and NeMo's integrations share."""
    own = LoRAConfig(num_blocks=blocks, **_given(rank=rank, alpha=alpha))
    section = BDLoRASection(num_blocks=blocks, rank=rank, alpha=alpha)
    trained = resolve_peft(PeftSection(bdlora=section), hf=None)
    hosted = BlockDiagonalSettings(num_blocks=blocks, dim=rank, alpha=alpha).lora_config([])
    wanted = rank or {1: 16, 3: 18, 8: 16}[blocks]
    for config in (own, trained, hosted, LoRAConfig(num_blocks=blocks, rank=rank, alpha=alpha)):
        assert (config.rank, config.alpha) == (wanted, 2.0 * wanted if alpha is None else alpha)
        assert config.scale == (2.0 if alpha is None else alpha / wanted)


def _given(**values):
    return {name: value for name, value in values.items() if value is not None}


def test_a_rank_of_zero_is_no_default():
    with pytest.raises(ConfigError, match="rank=0"):
        BlockDiagonalSettings(num_blocks=2, dim=0)
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        BDLoRASection(num_blocks=2, rank=0)
