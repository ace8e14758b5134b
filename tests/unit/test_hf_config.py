"""What is read from a Hugging Face ``config.json``, and what is refused."""

import json
import math

import pytest
import transformers

from bdlora_megatron.errors import ConfigError, UnsupportedError
from bdlora_megatron.models import HFConfig, RopeSettings, parse_hf_config, read_hf_config

# As transformers 4 wrote Llama-3.1-8B and its relatives.
LLAMA_31 = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "hidden_act": "silu",
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "eos_token_id": [128001, 128008],
    "tie_word_embeddings": False,
}


def llama(**changes):
    return {**LLAMA_31, "rope_scaling": None, **changes}


def qwen(family="qwen2", **changes):
    return llama(model_type=family, sliding_window=4096, max_window_layers=28, **changes)


def test_llama_31():
    assert parse_hf_config(LLAMA_31) == HFConfig(
        model_type="llama",
        num_layers=32,
        hidden_size=4096,
        ffn_size=14336,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=128256,
        max_positions=131072,
        norm_eps=1e-5,
        rope=RopeSettings(
            kind="llama3", theta=500000.0, factor=8.0, low=1.0, high=4.0, original_positions=8192
        ),
        qkv_bias=False,
        proj_bias=False,
        mlp_bias=False,
        qk_norm=False,
        tied=False,
        sliding_window=None,
        eos_token_ids=(128001, 128008),
    )


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_files_of_the_installed_transformers_are_read(family, tmp_path):
    config = getattr(transformers, f"{family}Config")(head_dim=64, rope_theta=1234.0)
    config.save_pretrained(tmp_path)
    found = read_hf_config(tmp_path)
    assert found.model_type == config.model_type
    assert found.head_dim == 64
    assert found.rope == RopeSettings(kind="default", theta=1234.0, factor=1.0)
    assert found.num_kv_heads == config.num_key_value_heads
    assert found.tied == config.tie_word_embeddings
    assert found.sliding_window == getattr(config, "sliding_window", None)
    assert (found.qkv_bias, found.qk_norm) == (family == "Qwen2", family == "Qwen3")


def test_absent_keys_mean_what_the_family_means_by_them():
    without = llama()
    del without["num_key_value_heads"], without["rope_theta"], without["tie_word_embeddings"]
    found = parse_hf_config(without)
    assert (found.num_kv_heads, found.rope.theta, found.tied) == (32, 10000.0, False)
    assert parse_hf_config(qwen("qwen3", hidden_size=2048)).head_dim == 128
    assert parse_hf_config(qwen("qwen3", hidden_size=2048, head_dim=None)).head_dim == 64
    assert parse_hf_config(llama(model_type="mistral")).sliding_window == 4096
    assert parse_hf_config(llama(eos_token_id=2)).eos_token_ids == (2,)
    assert parse_hf_config(llama(eos_token_id=None)).eos_token_ids == ()


@pytest.mark.parametrize(
    ("raw", "window"),
    [
        (llama(model_type="mistral", sliding_window=None), None),
        (llama(model_type="mistral", sliding_window=1024), 1024),
        (llama(sliding_window=1024), None),
        (qwen(use_sliding_window=False), None),
        (qwen(use_sliding_window=True), 4096),
        (qwen(use_sliding_window=True, num_hidden_layers=28), None),
        ({**qwen(use_sliding_window=True), "max_window_layers": 0, "num_hidden_layers": 24}, 4096),
        ({**qwen(use_sliding_window=True), "sliding_window": None}, None),
        (qwen("qwen3", layer_types=["full_attention"] * 32), None),
        (qwen("qwen3", layer_types=["full_attention", "sliding_attention"] * 16), 4096),
    ],
)
def test_windows_follow_each_familys_rule(raw, window):
    assert parse_hf_config(raw).sliding_window == window


ROPES = {
    "four-default": ({"rope_theta": 5.0}, ("default", 5.0, 1.0)),
    "four-old-key": (
        {"rope_theta": 5.0, "rope_scaling": {"type": "linear", "factor": 2}},
        ("linear", 5.0, 2.0),
    ),
    "five": (
        {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 7}},
        ("default", 7.0, 1.0),
    ),
    "five-linear": (
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 7.0, "factor": 4.0}},
        ("linear", 7.0, 4.0),
    ),
    "both-agreeing": (
        {
            "rope_scaling": {"rope_type": "linear", "factor": 4.0},
            "rope_parameters": {"rope_type": "linear", "rope_theta": 7.0, "factor": 4.0},
        },
        ("linear", 7.0, 4.0),
    ),
}


@pytest.mark.parametrize("name", ROPES)
def test_rotary_settings_of_both_transformers(name):
    changes, (kind, theta, factor) = ROPES[name]
    assert parse_hf_config(llama(**changes)).rope == RopeSettings(
        kind=kind, theta=theta, factor=factor
    )


def phi3(**rope):
    rest = {"partial_rotary_factor": 0.75, "max_position_embeddings": 131072}
    own = {"original_max_position_embeddings": 4096}
    return llama(model_type="phi3", rope_scaling=rope, head_dim=96, **rest, **own)


def test_stretched_embeddings_as_published():
    qwen25 = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    found = parse_hf_config(qwen(rope_scaling=qwen25)).rope
    assert (found.kind, found.factor, found.original_positions) == ("yarn", 4.0, 32768)
    assert (found.low, found.high, found.truncate) == (1.0, 32.0, True)
    assert found.attention_factor == 0.1 * math.log(4.0) + 1.0
    for name in ("longrope", "su"):
        found = parse_hf_config(phi3(type=name, short_factor=[1.0] * 36)).rope
        assert (found.kind, found.rotary_dim(96), found.original_positions) == (
            "longrope", 72, 4096
        )  # fmt: skip
        assert found.attention_factor == math.sqrt(1 + math.log(32) / math.log(4096))
    with pytest.raises(ConfigError, match="has 35 numbers; 36 are needed"):
        parse_hf_config(phi3(type="longrope", short_factor=[1.0] * 35))
    with pytest.raises(ConfigError, match="short_factor=None"):
        parse_hf_config(phi3(type="longrope"))


def test_phi3_has_fused_projections_and_may_leave_its_heads_unsaid():
    found = parse_hf_config(llama(model_type="phi3", num_key_value_heads=None))
    assert found.fused_projections
    assert found.num_kv_heads == found.num_heads
    assert found.sliding_window is None
    assert parse_hf_config(llama(model_type="phi3", sliding_window=2047)).sliding_window == 2047


@pytest.mark.parametrize(
    ("changes", "biases"),
    [
        ({"attention_bias": True}, (True, True, False)),
        ({"mlp_bias": True}, (False, False, True)),
        ({"model_type": "qwen3", "attention_bias": True}, (True, True, False)),
    ],
)
def test_biases_on_one_side(changes, biases):
    found = parse_hf_config(llama(**changes))
    assert (found.qkv_bias, found.proj_bias, found.mlp_bias) == biases


def compressed(strategy, kind="float", num_bits=8, **more):
    weights = {"type": kind, "num_bits": num_bits, "strategy": strategy, **more}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "config_groups": groups, "ignore": ["lm_head"]}


@pytest.mark.parametrize(
    ("settings", "block"),
    [
        (None, None),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, (128, 128)),
        ({"quant_method": "fp8", "activation_scheme": "static"}, (0, 0)),
        ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, (0, 0)),
        (compressed("channel"), (0, 0)),
        (compressed("tensor"), (0, 0)),
        (compressed("block", block_structure=[64, 32]), (64, 32)),
    ],
)
def test_fp8_as_published(settings, block):
    assert parse_hf_config(llama(quantization_config=settings)).fp8_block == block


UNSUPPORTED = {
    "family": ({"model_type": "gemma3"}, r"model_type='gemma3'.*supported are llama"),
    "moe": ({"model_type": "mixtral"}, "model_type='mixtral'"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act='gelu'; only 'silu'"),
    "quantised": ({"quantization_config": {"bits": 4}}, "unquantised weights"),
    "bitsandbytes": (
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        r"quant_method='bitsandbytes'.* call model.dequantize\(\) and save_pretrained",
    ),
    "awq": ({"quantization_config": {"quant_method": "awq"}}, "take the unquantised model"),
    "gptq": ({"quantization_config": {"quant_method": "gptq"}}, "or its FP8 version"),
    "int4": ({"quantization_config": compressed("group", "int", 4)}, "type 'int' with 4 bits"),
    "gemma2": ({"model_type": "gemma2"}, "norms multiply by 1 .*nor do they cap .*are llama"),
    "dynamic": ({"rope_scaling": {"type": "dynamic", "factor": 4}}, "rope_type='dynamic'"),
    "partial": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    "rope-by-layer": (
        {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}},
        "differ by layer type",
    ),
    "layer-types": (
        {"model_type": "qwen3", "layer_types": ["chunked_attention"]},
        "layer_types chunked_attention",
    ),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_cannot_be_computed_alike_is_refused(name):
    changes, match = UNSUPPORTED[name]
    with pytest.raises(UnsupportedError, match=match):
        parse_hf_config(llama(**changes))


MALFORMED = {
    "missing": ({"hidden_size": None}, "hidden_size=None; a positive integer"),
    "boolean": ({"vocab_size": True}, "vocab_size=True; a positive integer"),
    "flag": ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes'; true or false"),
    "heads": ({"num_key_value_heads": 5}, "=32 is not a multiple of num_key_value_heads=5"),
    "head-width": ({"hidden_size": 4100}, "and there is no head_dim"),
    "odd-heads": ({"head_dim": 5}, "head_dim=5 is odd"),
    "epsilon": ({"rms_norm_eps": 0}, "rms_norm_eps=0; a positive number"),
    "theta": ({"rope_theta": "big"}, "rope_theta='big'"),
    "factor": ({"rope_scaling": {"rope_type": "linear"}}, "factor=None of the rotary"),
    "rope": ({"rope_scaling": [8]}, r"rope_scaling=\[8\]; an object"),
    "rope-twice": (
        {"rope_scaling": {"factor": 2}, "rope_parameters": {"rope_type": "linear", "factor": 4}},
        "differ in factor; remove one",
    ),
    "end": ({"eos_token_id": "</s>"}, "eos_token_id='</s>'"),
    "window-layers": (
        {"model_type": "qwen2", "max_window_layers": -1},
        "max_window_layers=-1; an integer from 0 up",
    ),
    "kv-heads": ({"model_type": "mistral", "num_key_value_heads": None}, "num_key_value_heads"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_impossible_values_are_refused(name):
    changes, match = MALFORMED[name]
    with pytest.raises(ConfigError, match=match):
        parse_hf_config(llama(**changes))


def test_all_problems_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        parse_hf_config(llama(vocab_size=-1, hidden_act="relu", head_dim=3), where="x/config.json")
    assert str(caught.value).splitlines() == [
        "x/config.json (llama):",
        "- head_dim=3 is odd; rotary embeddings need pairs",
        "- vocab_size=-1; a positive integer is needed",
        "- hidden_act='relu'; only 'silu' is supported",
    ]


def test_no_folder_no_json_no_object(tmp_path):
    with pytest.raises(ConfigError, match="does not exist; pass the folder"):
        read_hf_config(tmp_path)
    for text, match in (("{", "is not JSON"), (json.dumps([1]), "holds a list")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=match):
            read_hf_config(tmp_path)
