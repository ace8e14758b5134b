"""Which runs go on from a checkpoint."""

from __future__ import annotations

import re

import pytest

from bdlora_megatron.models.config import parse_hf_config
from bdlora_megatron.train.resume import described

BASE = {
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 331,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "eos_token_id": 2,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
#: What is another in each, and what checkpoints of the time before Phi say of the base model.
_SIZES = (
    "HFConfig(num_layers=2, hidden_size=48, ffn_size=96, num_heads=8, num_kv_heads=4, head_dim=6, "
    "vocab_size=331, tied=False, model_type='{family}', max_positions=128, norm_eps=1e-05, "
    "rope=RopeSettings({rope}), qkv_bias={qkv}, linear_bias={linear}, qk_norm=False, "
    "sliding_window=None, eos_token_ids=(2,))"
)
_PLAIN = "kind='default', theta=10000.0, factor=1.0"
OLD = {
    "plain": ({}, ("llama", _PLAIN, False, False)),
    "biases": ({"attention_bias": True, "mlp_bias": True}, ("llama", _PLAIN, True, True)),
    "llama3": (
        {"rope_scaling": _LLAMA3},
        ("llama", "kind='llama3', theta=10000.0, factor=8.0", False, False),
    ),
    "linear": (
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        ("llama", "kind='linear', theta=10000.0, factor=2.0", False, False),
    ),
    "qwen2": ({"model_type": "qwen2"}, ("qwen2", _PLAIN, True, False)),
}


def _parts(text):
    """As resuming compares them."""
    return sorted(re.split(r"[(), ]+", text))


@pytest.mark.parametrize("name", OLD)
def test_a_base_model_is_described_as_before_phi(name):
    changes, (family, rope, qkv, linear) = OLD[name]
    before = _SIZES.format(family=family, rope=rope, qkv=qkv, linear=linear)
    assert _parts(described(parse_hf_config({**BASE, **changes}))) == _parts(before)


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": True},
        {"mlp_bias": True},
        {"model_type": "phi3"},
        {"rope_scaling": {**_LLAMA3, "high_freq_factor": 8.0}},
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
    ],
)
def test_what_was_not_read_before_tells_models_apart(changes):
    every = [described(parse_hf_config({**BASE, **more})) for more in ({}, changes)]
    assert _parts(every[0]) != _parts(every[1])
