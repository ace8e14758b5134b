"""From ``peft.scheme`` to a ``LoRAConfig``."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import BdLoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

from bdlora_megatron.config import Layout
from bdlora_megatron.convert import read_hf_config
from bdlora_megatron.errors import ConfigError, TargetError
from bdlora_megatron.train.peft import resolve_peft
from bdlora_megatron.train.schema import BDLoRASection, LoRASection, PeftSection
from tests.golden.peft_cases import COLUMN, ROW
from tests.train.runs import make_base


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    return read_hf_config(make_base(tmp_path_factory.mktemp("base")))


def test_schemes_and_defaults(hf):
    bdlora = resolve_peft(PeftSection(bdlora=BDLoRASection(num_blocks=6)), hf)
    assert (bdlora.layout, bdlora.rank, bdlora.num_blocks) == (Layout.BDLORA, 18, 6)
    assert bdlora.scale == 2.0
    assert bdlora.dtype is torch.float32
    lora = PeftSection(scheme="lora", lora=LoRASection(rank=4, alpha=1.0, use_rslora=True))
    assert resolve_peft(lora, hf).layout is Layout.HALF_SHARDED
    assert resolve_peft(lora, hf).scale == 0.5
    slora = resolve_peft(PeftSection(scheme="slora"), hf)
    assert (slora.layout, slora.num_blocks) == (Layout.SLORA, None)
    assert resolve_peft(PeftSection(scheme="none"), hf) is None


def _trained(hf, rank, blocks):
    """Trainable parameters by PEFT's own count."""
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.ffn_size,
        num_hidden_layers=hf.num_layers,
        num_attention_heads=hf.num_heads,
        num_key_value_heads=hf.num_kv_heads,
        head_dim=hf.head_dim,
    )
    names = {"target_modules_bd_a": ROW, "target_modules_bd_b": COLUMN}
    options = {"use_bdlora": BdLoraConfig(nblocks=blocks, **names)} if blocks > 1 else {}
    lora = LoraConfig(r=rank, target_modules=COLUMN + ROW, **options)
    return get_peft_model(LlamaForCausalLM(config), lora).get_nb_trainable_parameters()[0]


@pytest.mark.parametrize(("lora_rank", "blocks"), [(4, 2), (8, 6), (16, 3)])
def test_the_matching_rank_is_the_largest_with_no_more_parameters(hf, lora_rank, blocks):
    section = BDLoRASection(num_blocks=blocks, match_params_of_lora_rank=lora_rank)
    rank = resolve_peft(PeftSection(bdlora=section), hf).rank
    budget = _trained(hf, lora_rank, 1)
    assert _trained(hf, rank, blocks) <= budget < _trained(hf, rank + blocks, blocks)


def test_matching_counts_the_chosen_layers_only(hf):
    options = {"num_blocks": 6, "match_params_of_lora_rank": 24}
    qkv = BDLoRASection(target_modules=("linear_qkv",), **options)
    all_layers = BDLoRASection(**options)
    ranks = [resolve_peft(PeftSection(bdlora=section), hf).rank for section in (qkv, all_layers)]
    assert ranks[0] != ranks[1]
    wrong = BDLoRASection(target_modules=("linear_qvk",), **options)
    with pytest.raises(TargetError, match=r"'linear_qvk' .nearest: 'linear_qkv'"):
        resolve_peft(PeftSection(bdlora=wrong), hf)


def test_rank_and_blocks_that_do_not_go_together(hf):
    section = BDLoRASection(num_blocks=6, rank=8)
    with pytest.raises(ConfigError, match="rank=8 is not a multiple of num_blocks=6"):
        resolve_peft(PeftSection(bdlora=section), hf)
