"""What a host's settings become: every one of them reaches the layers."""

from __future__ import annotations

from dataclasses import fields

import torch

from bdlora_megatron.config import LoRAConfig
from bdlora_megatron.integrations import BlockDiagonalSettings, make_peft

EVERYTHING = {
    "target_modules": ["*.layers.0.*.linear_qkv", "linear_fc1"],
    "exclude_modules": ["*.layers.0.mlp.*"],
    "dim": 12,
    "alpha": 7.0,
    "num_blocks": 3,
    "dropout": 0.25,
    "use_rslora": True,
    "fused": True,
    "regather_input": True,
    "lora_dtype": torch.float32,
}
NOT_THE_LAYERS = {"export_peft", "export_dense", "base_model", "match_params_of_lora_rank"}


def test_every_setting_reaches_the_layers():
    known = {entry.name for entry in fields(BlockDiagonalSettings)}
    assert EVERYTHING.keys() | NOT_THE_LAYERS == known
    made = make_peft({"scheme": "bdlora", "bdlora": EVERYTHING}, BlockDiagonalSettings, dict)
    assert made.lora_config([]) == LoRAConfig(
        rank=12,
        alpha=7.0,
        num_blocks=3,
        dropout=0.25,
        use_rslora=True,
        target_modules=("*.layers.0.*.linear_qkv", "linear_fc1"),
        exclude_modules=("*.layers.0.mlp.*",),
        fused=True,
        regather_input=True,
        dtype=torch.float32,
    )
