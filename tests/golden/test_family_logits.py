"""Adapters trained on Megatron's Mamba, delta nets and latent attention, as PEFT applies them.

A Megatron model's weights and its exported adapter go into a tiny model of transformers, row by row
as written down here, and PEFT's logits are compared with Megatron's.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from torch import Tensor

from tests.harness import run_ranks
from tests.tolerances import assert_close
from tests.tp.family_export import PEFT_PATTERNS, export_for_peft
from tests.tp.models import MODEL_CLASSES

pytestmark = pytest.mark.skipif(
    "hybrid" not in MODEL_CLASSES, reason="HybridModel takes GPTModel's place from 0.19 on"
)
#: transformers computes norms and gates in float32, whatever its weights are.
IN_FLOAT32 = (2e-6, 2e-5)


def _hf_model(family) -> Any:
    sizes = {"vocab_size": 56, "hidden_size": 24, "intermediate_size": 40}
    sizes |= {"num_attention_heads": 16, "max_position_embeddings": 64}
    sizes |= {"tie_word_embeddings": False, "use_cache": False}
    if family == "nemotron_h":
        kinds = {"M": "linear_attention", "*": "full_attention", "-": "mlp"}
        config = transformers.NemotronHConfig(
            **sizes, layers_block_type=[kinds[symbol] for symbol in PEFT_PATTERNS[family]],
            num_key_value_heads=8, head_dim=4, mamba_num_heads=16, mamba_head_dim=4, n_groups=8,
            ssm_state_size=2, layer_norm_epsilon=1e-5, time_step_min=1e-30,
        )  # fmt: skip
        return transformers.NemotronHForCausalLM(config)
    if family == "qwen3_next":
        config = transformers.Qwen3NextConfig(
            **sizes, num_hidden_layers=2, layer_types=["linear_attention"] * 2,
            mlp_only_layers=[0, 1], num_key_value_heads=8, head_dim=4, linear_num_key_heads=8,
            linear_key_head_dim=3, linear_num_value_heads=16, linear_value_head_dim=4,
            rms_norm_eps=1e-5,
        )  # fmt: skip
        return transformers.Qwen3NextForCausalLM(config)
    config = transformers.DeepseekV3Config(
        **sizes, num_hidden_layers=2, first_k_dense_replace=2, num_key_value_heads=16,
        q_lora_rank=16, kv_lora_rank=14, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=3,
        rms_norm_eps=1e-5,
    )  # fmt: skip
    model = transformers.DeepseekV3ForCausalLM(config)
    for layer in model.model.layers:
        # Fixed at 1e-6 there; Megatron-Core's follow the model's.
        layer.self_attn.q_a_layernorm.variance_epsilon = 1e-5
        layer.self_attn.kv_a_layernorm.variance_epsilon = 1e-5
    return model


def _query_groups(weight: Tensor) -> dict[str, Tensor]:
    """linear_qkv: eight groups of two queries, a key and a value, each four rows."""
    q, k, v = weight.unflatten(0, (8, 16)).split([8, 4, 4], dim=1)
    return {"q_proj": q.flatten(0, 1), "k_proj": k.flatten(0, 1), "v_proj": v.flatten(0, 1)}


def _nemotron_h(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    made = {
        "model.embeddings.weight": weights["embedding.word_embeddings.weight"],
        "model.norm_f.weight": weights["decoder.final_norm.weight"],
        "lm_head.weight": weights["output_layer.weight"],
    }
    names = {"conv1d_weight": "conv1d.weight", "conv1d_bias": "conv1d.bias"}
    for name, weight in weights.items():
        _, _, path = name.partition("decoder.layers.")
        number, _, rest = path.partition(".")
        stem = f"model.layers.{number}"
        own = {"norm.weight", "input_layernorm.weight", "pre_mlp_layernorm.weight"}
        if rest in own:
            made[f"{stem}.norm.weight"] = weight
        elif rest.endswith("linear_qkv.weight"):
            parts = _query_groups(weight)
            made |= {f"{stem}.mixer.{part}.weight": rows for part, rows in parts.items()}
        elif rest.startswith("mixer."):
            own = rest.removeprefix("mixer.")
            made[f"{stem}.mixer.{names.get(own, own)}"] = weight
        elif number:
            own = {"linear_proj": "o_proj", "linear_fc1": "up_proj", "linear_fc2": "down_proj"}
            made[f"{stem}.mixer.{own[rest.split('.')[1]]}.weight"] = weight
    return made


def _by_key_head(parts: list[Tensor]) -> Tensor:
    """Rows of eight key heads, of each its share of every part."""
    rows = [[part.chunk(8)[head] for part in parts] for head in range(8)]
    return torch.cat([torch.cat(head) for head in rows])


def _pairs(weights: dict[str, Tensor], attention: Any, shift: float) -> dict[str, Tensor]:
    """Models whose layers are a mixer and a gated MLP; ``shift`` of the norms' weights."""
    made = {
        "model.embed_tokens.weight": weights["embedding.word_embeddings.weight"],
        "model.norm.weight": weights["decoder.final_norm.weight"] - shift,
        "lm_head.weight": weights["output_layer.weight"],
    }
    for layer in range(2):
        mixer, mlp = f"decoder.layers.{2 * layer}", f"decoder.layers.{2 * layer + 1}"
        stem = f"model.layers.{layer}"
        gate, up = weights[f"{mlp}.mlp.linear_fc1.weight"].chunk(2)
        norms = {"input_layernorm": mixer, "pre_mlp_layernorm": mlp}
        norm, after = (weights[f"{at}.{name}.weight"] - shift for name, at in norms.items())
        made |= {
            f"{stem}.input_layernorm.weight": norm,
            f"{stem}.post_attention_layernorm.weight": after,
            f"{stem}.mlp.gate_proj.weight": gate,
            f"{stem}.mlp.up_proj.weight": up,
            f"{stem}.mlp.down_proj.weight": weights[f"{mlp}.mlp.linear_fc2.weight"],
        }
        own = {
            name.removeprefix(f"{mixer}.self_attention."): weight
            for name, weight in weights.items()
            if name.startswith(f"{mixer}.self_attention.")
        }
        made |= {f"{stem}.{name}": weight for name, weight in attention(own).items()}
    return made


def _delta_net(own: dict[str, Tensor]) -> dict[str, Tensor]:
    parts = own["in_proj.weight"].split([24, 24, 64, 64, 16, 16])
    return {
        "linear_attn.in_proj_qkvz.weight": _by_key_head(list(parts[:4])),
        "linear_attn.in_proj_ba.weight": _by_key_head(list(parts[4:])),
        "linear_attn.out_proj.weight": own["out_proj.weight"],
        "linear_attn.conv1d.weight": own["conv1d.weight"],
        "linear_attn.A_log": own["A_log"],
        "linear_attn.dt_bias": own["dt_bias"],
        "linear_attn.norm.weight": own["out_norm.weight"],
    }


def _latent(own: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {
        "linear_q_down_proj": "q_a_proj",
        "q_layernorm": "q_a_layernorm",
        "linear_q_up_proj": "q_b_proj",
        "linear_kv_down_proj": "kv_a_proj_with_mqa",
        "kv_layernorm": "kv_a_layernorm",
        "linear_kv_up_proj": "kv_b_proj",
        "linear_proj": "o_proj",
    }
    return {f"self_attn.{hf}.weight": own[f"{name}.weight"] for name, hf in names.items()}


def _hf_weights(family: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    if family == "nemotron_h":
        return _nemotron_h(weights)
    if family == "qwen3_next":
        # Its norms are stored as what they differ from one.
        return _pairs(weights, _delta_net, 1.0)
    return _pairs(weights, _latent, 0.0)


@pytest.mark.parametrize("family", PEFT_PATTERNS)
def test_peft_computes_what_megatron_trained(family, tmp_path):
    ((weights, base, adapted, ids),) = run_ranks(1, export_for_peft, family, str(tmp_path / "one"))
    (_, _, again, _), _ = run_ranks(2, export_for_peft, family, str(tmp_path / "two"))
    assert_close(again, adapted, "on two ranks")
    # An adapter that changed next to nothing would let any mistake pass.
    assert (adapted - base).abs().max() > 0.1 * base.abs().max()
    model = _hf_model(family).double().eval()
    model.load_state_dict(_hf_weights(family, weights), strict=True)
    with torch.no_grad():
        assert_close(model(ids).logits, base, "the base", IN_FLOAT32)
        for folder in ("one", "two"):
            peft = PeftModel.from_pretrained(_copy(model, family), tmp_path / folder)
            assert_close(peft(ids).logits, adapted, f"the adapter of {folder}", IN_FLOAT32)


def _copy(model: Any, family: str) -> Any:
    """PEFT changes the model that it is given."""
    other = _hf_model(family).double().eval()
    other.load_state_dict(model.state_dict())
    return other
