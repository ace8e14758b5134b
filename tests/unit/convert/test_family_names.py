"""PEFT's names of families beyond the Llama-shaped: read, written, and never mixed up."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from bdlora_megatron.convert import WriteOptions, read_adapter, write_adapter
from bdlora_megatron.convert.adapter.neutral import ModuleKey
from bdlora_megatron.convert.bridge.config import read_settings
from bdlora_megatron.convert.structure import Structure, restructure
from bdlora_megatron.errors import AdapterFormatError, UnsupportedError

#: Output and input width of every module, by family.
MODULES = {
    "nemotron_h": {
        "layers.0.mixer.in_proj": (50, 12),
        "layers.0.mixer.out_proj": (12, 20),
        "layers.1.mixer.q_proj": (16, 12),
        "layers.1.mixer.o_proj": (12, 16),
        "layers.2.mixer.up_proj": (28, 12),
        "layers.2.mixer.down_proj": (12, 28),
    },
    "qwen3_next": {
        "layers.0.linear_attn.in_proj_qkvz": (40, 12),
        "layers.0.linear_attn.in_proj_ba": (8, 12),
        "layers.0.linear_attn.out_proj": (12, 14),
        "layers.1.self_attn.q_proj": (16, 12),
        "layers.1.self_attn.o_proj": (12, 16),
    },
    "deepseek": {
        "layers.0.self_attn.q_b_proj": (24, 10),
        "layers.0.self_attn.kv_b_proj": (28, 6),
        "layers.0.self_attn.o_proj": (12, 16),
    },
    # Queries are wider than what o_proj reads, as in no other attention.
    "deepseek_lite": {
        "layers.0.self_attn.q_proj": (24, 12),
        "layers.0.self_attn.kv_b_proj": (28, 6),
        "layers.0.self_attn.o_proj": (12, 16),
    },
}
NAMES = {
    "nemotron_h": [path.partition(".")[2].partition(".")[2] for path in MODULES["nemotron_h"]],
    "qwen3_next": [
        "linear_attn.in_proj_qkvz",
        "linear_attn.in_proj_ba",
        "linear_attn.out_proj",
        "q_proj",
        "o_proj",
    ],
    "deepseek": ["q_b_proj", "kv_b_proj", "o_proj"],
    "deepseek_lite": ["latent.q_proj", "kv_b_proj", "o_proj"],
}


def made(folder, family, *, prefix="base_model.model.model.", **config):
    folder.mkdir()
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for path, (out, into) in MODULES[family].items():
        tensors[f"{prefix}{path}.lora_A.weight"] = torch.randn(4, into, generator=generator)
        tensors[f"{prefix}{path}.lora_B.weight"] = torch.randn(out, 4, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 6,
        "target_modules": list(MODULES[family]),
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings | config))
    return folder


@pytest.mark.parametrize("family", MODULES)
def test_what_is_read_is_written_under_the_same_names(family, tmp_path):
    adapter = read_adapter(made(tmp_path / "a", family))
    assert {str(key) for key in adapter.modules} == set(MODULES[family])
    assert [key.name for key in sorted(adapter.modules, key=str)] == [
        name for _, name in sorted(zip(MODULES[family], NAMES[family], strict=True))
    ]
    write_adapter(adapter, tmp_path / "b", "peft")
    first, second = (load_file(tmp_path / x / "adapter_model.safetensors") for x in "ab")
    assert first.keys() == second.keys()
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())
    # What the config selects is what the file holds, whatever its order.
    targets = json.loads((tmp_path / "b" / "adapter_config.json").read_text())["target_modules"]
    assert all(
        any(path.endswith(f".{t}") or path == t for t in targets) for path in MODULES[family]
    )


@pytest.mark.parametrize("prefix", ["base_model.model.backbone.", "backbone."])
def test_nemotrons_own_code_calls_its_layers_backbone(prefix, tmp_path):
    adapter = read_adapter(made(tmp_path / "a", "nemotron_h", prefix=prefix))
    write_adapter(adapter, tmp_path / "b", "peft")
    names = load_file(tmp_path / "b" / "adapter_model.safetensors")
    assert all(name.startswith("base_model.model.backbone.layers.") for name in names)


def test_blocks_of_a_row_module_are_read_and_mambas_input_stays_whole(tmp_path):
    adapter = read_adapter(made(tmp_path / "a", "nemotron_h"))
    with pytest.raises(
        AdapterFormatError, match=r"cut z, x, B, C and dt.*layers\.0\.mixer\.in_proj"
    ):
        restructure(adapter, Structure(mode="reshard", num_blocks=2))


@pytest.mark.parametrize("family", ["nemotron_h", "qwen3_next"])
def test_formats_without_a_place_for_them_refuse(family, tmp_path):
    adapter = read_adapter(made(tmp_path / "a", family))
    for form, message in {
        "megatron": r"stored by stretch, and only the model knows.*in_proj",
        "bridge": "the seven projections alone",
        "slora": "it adapts attention only",
    }.items():
        with pytest.raises(UnsupportedError, match=f"(?s){message}"):
            write_adapter(adapter, tmp_path / form, form, options=WriteOptions(tp=2))
        assert not (tmp_path / form).exists()


@pytest.mark.parametrize("family", ["deepseek", "deepseek_lite"])
def test_latent_attention_goes_through_the_sharded_format(family, tmp_path):
    adapter = read_adapter(made(tmp_path / "a", family))
    write_adapter(adapter, tmp_path / "b", "megatron")
    again = read_adapter(tmp_path / "b")
    assert list(again.modules) == list(adapter.modules)
    for key, factors in adapter.modules.items():
        assert torch.equal(again.modules[key].A, factors.A)
        assert torch.equal(again.modules[key].B, factors.B)
    assert again.base == adapter.base


def test_a_query_projection_alone_is_that_of_any_attention(tmp_path):
    folder = made(tmp_path / "a", "deepseek_lite")
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(
        {name: tensor for name, tensor in tensors.items() if "q_proj" in name},
        folder / "adapter_model.safetensors",
    )
    assert list(read_adapter(folder).modules) == [ModuleKey(layer=0, name="q_proj")]


@pytest.mark.parametrize(
    ("changes", "known"),
    [
        ({"hybrid_layer_pattern": "G-*-"}, {"delta_heads": 4, "q_size": 16, "num_layers": 2}),
        ({}, {"delta_heads": None, "q_size": 16, "num_layers": 4}),
        ({"multi_latent_attention": True}, {"q_size": None, "kv_size": None, "num_heads": 4}),
    ],
)
def test_bridges_settings_tell_what_their_family_has(changes, known, tmp_path):
    model = {"num_layers": 4, "hidden_size": 12, "ffn_hidden_size": 28, "num_attention_heads": 4}
    model |= {"num_query_groups": 2, "kv_channels": 4, "linear_num_key_heads": 4, **changes}
    peft = {"_target_": "megatron.bridge.peft.lora.LoRA", "dim": 8, "alpha": 16}
    path = tmp_path / "run_config.yaml"
    path.write_text(json.dumps({"model": model, "peft": peft}))
    base = read_settings(path).base
    assert {name: getattr(base, name) for name in known} == known
