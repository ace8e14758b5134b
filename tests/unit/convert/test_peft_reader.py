"""Adapters read from files against the installed PEFT's own updates."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from peft import EvaConfig, LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.config import VeloraConfig
from peft.tuners.lora.variants import BdLoraLinearVariant
from transformers import LlamaModel

from bdlora_megatron.convert import BaseShape, ModuleKey, read_peft
from bdlora_megatron.convert.peft.options import _HARMLESS, _READ, _REFUSED
from tests.reference import dense_update
from tests.tolerances import assert_close
from tests.unit.convert.peft_files import (
    COLUMN,
    FFN,
    HIDDEN,
    KEY_VALUE,
    QUERY,
    ROW,
    blocks,
    peft_model,
    save,
    vanilla_tensors,
    write,
)

PATTERNS = {
    "rank_pattern": {
        "q_proj": 4,
        r"model.layers.1.mlp.up_proj": 16,
        r"layers\.0\.self_attn\.(k|v)_proj": 12,
        "proj": 2,  # matches the end of no path: "q_proj" has no dot before "proj"
    },
    "alpha_pattern": {"down_proj": 5, r"layers.\d+.self_attn.q_proj": 3, "q_proj": 100},
}
CASES = {
    "vanilla": {},
    "one_block": {"use_bdlora": blocks(1)},
    "two_blocks": {"use_bdlora": blocks(2)},
    "four_blocks": {"use_bdlora": blocks(4)},
    "rslora": {"use_rslora": True},
    "rslora_blocks": {"use_rslora": True, "use_bdlora": blocks(4)},
    "patterns": PATTERNS,
    # Alternatives without a group of their own: both are ends of a path.
    "alternatives": {"rank_pattern": {"q_proj|v_proj": 4}, "alpha_pattern": {"up_proj|k_proj": 3}},
    "caret": {
        "rank_pattern": {r"^model.layers.0.self_attn.q_proj": 2, "layers.0.self_attn.q_proj": 4}
    },
    "many_groups": {
        "rank_pattern": {r"model\.layers\.(\d+)\.(self_attn|mlp)\.(q_proj|up_proj)": 4},
        "alpha_pattern": {r".*\.(layers)\.(0|1|2)\.(self_attn|mlp)\.(k_proj|up_proj)": 4},
    },
    "long_alternation": {
        "rank_pattern": {
            rf"model\.layers\.({'|'.join(map(str, range(1, 120)))})\.self_attn\.q_proj": 4
        }
    },
    "repeated_group": {"rank_pattern": {r"(?:[a-z_0-9]+\.)*(?:q|k)_proj": 4, "(mlp.)+up_proj": 2}},
    "patterns_rslora_blocks": {**PATTERNS, "use_rslora": True, "use_bdlora": blocks(2)},
    "not_strict": {"use_bdlora": blocks(4, a=["down_proj"], b=["q_proj"], match_strict=False)},
    "by_substring": {
        "use_bdlora": blocks(2, a=["layers.0.self_attn.o"], b=["attn.q"], match_strict=False)
    },
    "swapped": {"use_bdlora": blocks(2, a=COLUMN, b=ROW)},
    "one_swapped": {"use_bdlora": blocks(4, a=["o_proj", "v_proj"], b=[*COLUMN[:2], "mlp"])},
    "some_modules": {"target_modules": ["q_proj", "down_proj"]},
    "some_layers": {"layers_to_transform": [1]},
    "regex_targets": {"target_modules": r".*\.1\..*(k|up)_proj"},
    "all_linear": {"target_modules": "all-linear", "task_type": "CAUSAL_LM"},
    "excluded_modules": {"exclude_modules": ["k_proj"]},
    "layers_pattern": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "bias_without_biases": {"bias": "all"},
    "lora_only_without_biases": {"bias": "lora_only"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "eva": {"init_lora_weights": "eva", "eva_config": EvaConfig()},
    "mica": {"init_lora_weights": "mica"},
    "lora_ga": {"init_lora_weights": "lora_ga"},
    "velora": {"velora_config": VeloraConfig()},
    "without_inner_model": {"cls": LlamaModel},
    "bfloat16": {"dtype": torch.bfloat16, "autocast": False},
}


def delta(layer):
    """PEFT's own update of one module, the one it merges with."""
    if "default" in layer.lora_variant:
        # get_delta_weight multiplies the packed factor as if it were dense, and fails.
        return BdLoraLinearVariant._get_bdlora_delta_weight(layer, "default").detach()
    return layer.get_delta_weight("default").detach()


def deltas(model):
    """The update of every adapted module, by the path in the base model."""
    return {
        name.removeprefix("base_model.model.").removeprefix("model."): delta(layer)
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


@pytest.mark.parametrize("case", CASES)
def test_every_update_is_pefts_own(case, tmp_path):
    settings = dict(CASES[case])
    bfloat16 = not settings.pop("autocast", True)
    model = peft_model(**settings)
    if bfloat16:
        model = model.to(torch.bfloat16)
    adapter = read_peft(save(model, tmp_path / case))
    expected = deltas(model.float())
    assert {str(key) for key in adapter.modules} == set(expected)
    assert list(adapter.modules) == sorted(adapter.modules)
    for key, factors in adapter.modules.items():
        assert factors.blocked == ("A" if key.name in ROW else "B")
        assert factors.dtype == (torch.bfloat16 if bfloat16 else torch.float32)
        update = dense_update(factors, dtype=torch.float32)
        assert_close(update, expected[str(key)], f"{case} {key}")


@pytest.mark.parametrize("nblocks", [1, 2, 4])
def test_factors_keep_pefts_bits_and_blocks(nblocks, tmp_path):
    model = peft_model(use_bdlora=blocks(nblocks))
    adapter = read_peft(save(model, tmp_path / "bd"))
    state = model.state_dict()
    for key, factors in adapter.modules.items():
        stem = f"base_model.model.model.{key}.lora_"
        assert factors.num_blocks == nblocks
        assert torch.equal(factors.A, state[f"{stem}A.default.weight"])
        assert torch.equal(factors.B, state[f"{stem}B.default.weight"])


def test_modules_that_no_list_names_stay_vanilla(tmp_path):
    adapter = read_peft(save(peft_model(**CASES["not_strict"]), tmp_path / "mixed"))
    blocked = {key.name for key, factors in adapter.modules.items() if factors.num_blocks == 4}
    assert blocked == {"q_proj", "down_proj"}
    assert {factors.num_blocks for factors in adapter.modules.values()} == {1, 4}


def test_swapped_modules_become_vanilla_with_a_warning(tmp_path, caplog):
    folder = save(peft_model(**CASES["one_swapped"]), tmp_path / "swapped")
    with caplog.at_level(logging.WARNING):
        adapter = read_peft(folder)
    vanilla = {key.name for key, factors in adapter.modules.items() if factors.num_blocks == 1}
    # v_proj is column-parallel and blocks A; down_proj is row-parallel and "mlp" blocks its B.
    assert vanilla == {"v_proj", "down_proj"}
    assert "blocks 4 modules on the side that tensor parallelism does not split" in caplog.text
    assert "layers.1.mlp.down_proj" in adapter.metadata["expanded_modules"]


def test_the_adapter_tells_its_origin_and_what_it_knows_of_the_base(tmp_path):
    adapter = read_peft(str(save(peft_model(), tmp_path / "fluent")))
    assert adapter.name == "fluent"
    assert adapter.base == BaseShape(
        hidden_size=HIDDEN, ffn_size=FFN, q_size=QUERY, kv_size=KEY_VALUE
    )
    assert adapter.metadata["format"] == "peft"
    assert adapter.metadata["peft_version"]


def test_scale_uses_the_modules_own_alpha_and_total_rank(tmp_path):
    folder = save(peft_model(**CASES["patterns_rslora_blocks"]), tmp_path / "patterns")
    modules = read_peft(folder).modules
    q, down = (ModuleKey(layer=1, name=name) for name in ("q_proj", "down_proj"))
    assert modules[q].scale == 3 / 4**0.5
    assert modules[down].scale == 5 / 8**0.5


def test_every_option_of_the_installed_peft_is_judged():
    judged = _READ | _HARMLESS | _REFUSED.keys()
    assert set(LoraConfig().to_dict()) <= judged


def test_config_fields_that_old_files_lack_have_pefts_defaults(tmp_path):
    bd = {"nblocks": 1, "target_modules_bd_a": ROW, "target_modules_bd_b": COLUMN}
    folder = write(tmp_path / "old", use_bdlora=bd, enable_lora=None, merge_weights=False)
    adapter = read_peft(folder)
    assert len(adapter.modules) == 14
    assert {factors.scale for factors in adapter.modules.values()} == {1.5}


def test_another_prefix_is_read_if_it_is_the_only_one(tmp_path):
    tensors = {
        name.replace("model.model.", "model.model.language_model."): tensor
        for name, tensor in vanilla_tensors().items()
    }
    adapter = read_peft(write(tmp_path / "nested", tensors))
    bare = {name.removeprefix("base_model.model.model."): t for name, t in tensors.items()}
    bare = read_peft(write(tmp_path / "bare", bare))
    assert adapter.modules.keys() == bare.modules.keys()
    assert len(bare.modules) == 14


def test_lora_ga_is_read_with_a_warning(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        read_peft(write(tmp_path / "ga", init_lora_weights="lora_ga"))
    assert "LoRA-GA, which changes the base weights" in caplog.text


def test_factors_do_not_change_with_the_file(tmp_path):
    folder = write(tmp_path / "rewritten")
    factors = next(iter(read_peft(folder).modules.values()))
    before = factors.A.clone()
    path = folder / "adapter_model.safetensors"
    size = path.stat().st_size
    with path.open("r+b") as file:  # in place: the same inode that was mapped
        file.seek(size // 8)
        file.write(bytes(size - size // 8))
    assert torch.equal(factors.A, before)
    assert before.any()


def test_a_pickle_is_read_only_on_request(tmp_path):
    folder = write(tmp_path / "pickle", bias="none")
    expected = read_peft(folder)
    (folder / "adapter_model.safetensors").unlink()
    torch.save(vanilla_tensors(), folder / "adapter_model.bin")
    adapter = read_peft(folder, allow_pickle=True)
    for key, factors in expected.modules.items():
        assert torch.equal(adapter.modules[key].A, factors.A)
        assert torch.equal(adapter.modules[key].B, factors.B)


def test_the_saved_config_is_that_of_the_documented_format(tmp_path):
    folder = save(peft_model(use_bdlora=blocks(2)), tmp_path / "format")
    raw = json.loads((folder / "adapter_config.json").read_text())
    assert raw["use_bdlora"] == {
        "match_strict": True,
        "nblocks": 2,
        "target_modules_bd_a": ROW,
        "target_modules_bd_b": COLUMN,
    }
