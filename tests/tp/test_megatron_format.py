"""Our sharded format between converters on one process and models on several."""

from __future__ import annotations

import json

import pytest
import torch
from megatron.core import dist_checkpointing

from bdlora_megatron.config import LoRAConfig
from bdlora_megatron.convert import Adapter, ModuleKey, read_adapter, write_adapter
from bdlora_megatron.convert.adapter.neutral import MODULE_NAMES
from bdlora_megatron.errors import (
    AdapterFormatError,
    ConfigError,
    TargetError,
)
from bdlora_megatron.layers import (
    apply_lora,
    load_adapter,
    lora_layers,
    merge_adapters,
    save_adapter,
)
from tests.harness import run_ranks
from tests.tp.models import randomize_adapters, tiny_config, tiny_model
from tests.tp.session import model_parallel
from tests.unit.convert.random_adapters import assert_same, build

WIDTHS = {
    "q_proj": (24, 48),
    "k_proj": (24, 24),
    "v_proj": (24, 24),
    "o_proj": (48, 24),
    "gate_proj": (24, 40),
    "up_proj": (24, 40),
    "down_proj": (40, 24),
}


def converted(*, ragged):
    """An adapter with four blocks; ragged: ranks and modules differ between the layers."""
    modules = {}
    for layer in range(2):
        for number, name in enumerate(MODULE_NAMES):
            if ragged and (layer, name) == (1, "k_proj"):
                continue
            rank = 12 if ragged and layer else 8
            key = ModuleKey(layer=layer, name=name)
            modules[key] = build(
                name,
                WIDTHS[name],
                rank=rank,
                num_blocks=4,
                scale=0.5 + number,
                dtype=torch.float64,
                seed=10 * layer + number,
            )
    return Adapter(name="converted", modules=modules)


def shards(model, path):
    metadata = dist_checkpointing.load_content_metadata(path)
    state = model.sharded_state_dict(metadata=dict(metadata))
    return {key: value for key, value in state.items() if ".adapter." in key}


def _load(rank, world_size, path, ragged):
    with model_parallel(world_size):
        wanted = tiny_model(tiny_config(world_size))
        adapter = converted(ragged=ragged)
        load_adapter(wanted, adapter)
        model = tiny_model(tiny_config(world_size))
        zeros = {
            key: build(
                key.name,
                WIDTHS[key.name],
                rank=f.rank,
                num_blocks=4,
                scale=f.scale,
                dtype=torch.float64,
                seed=99,
            )
            for key, f in adapter.modules.items()
        }
        load_adapter(model, Adapter(name="other", modules=zeros))
        loaded = dist_checkpointing.load(shards(model, f"{path}/weights"), f"{path}/weights")
        assert loaded.pop("content_metadata") == {"non_homogeneous_layers": ragged}
        missing, unexpected = model.load_state_dict(loaded, strict=False)
        assert not unexpected
        assert not [key for key in missing if ".adapter." in key]
        for (name, got), (_, right) in zip(
            model.named_parameters(), wanted.named_parameters(), strict=True
        ):
            assert torch.equal(got, right), name


@pytest.mark.parametrize("ragged", [False, True], ids=["uniform", "ragged"])
def test_a_converted_adapter_loads_into_models_at_any_parallel_size(ragged, tmp_path):
    path = write_adapter(converted(ragged=ragged), tmp_path / "a", "megatron")
    for world_size in (1, 2, 4):
        run_ranks(world_size, _load, str(path), ragged)


KINDS = {
    "bdlora": LoRAConfig(rank=8, alpha=16, num_blocks=4),
    "fused": LoRAConfig(rank=8, alpha=16, num_blocks=4, fused=True),
    "slora": LoRAConfig(rank=8, alpha=12, layout="slora"),
    "half_sharded": LoRAConfig(rank=8, alpha=12, layout="half_sharded", fused=True),
    "one_layer": LoRAConfig(rank=8, num_blocks=4, target_modules=["*.layers.1.*.linear_qkv"]),
}


def _updates(model):
    """What the adapter adds to every base weight that it adapts, on this rank."""
    base = {n: p.clone() for n, p in model.named_parameters() if ".adapter." not in n}
    adapted = [(name, layer) for name, layer in lora_layers(model) if layer.adapter is not None]
    merge_adapters(model)
    return {name: (layer.weight - base[f"{name}.weight"]).detach() for name, layer in adapted}


def _save(rank, world_size, folder):
    saved = {}
    with model_parallel(world_size):
        with pytest.raises(TargetError, match="no adapter to save"):
            save_adapter(tiny_model(tiny_config(world_size)), f"{folder}/none")
        for kind, lora in KINDS.items():
            model = tiny_model(tiny_config(world_size))
            apply_lora(model, lora)
            randomize_adapters(model)
            save_adapter(model, f"{folder}/{kind}", name="trained")
            with pytest.raises(ConfigError, match="is there already"):
                save_adapter(model, f"{folder}/{kind}")
            saved[kind] = _updates(model)
    return saved


def _load_read(rank, world_size, folder):
    loaded = {}
    with model_parallel(world_size):
        for kind in KINDS:
            model = tiny_model(tiny_config(world_size))
            load_adapter(model, read_adapter(f"{folder}/{kind}"))
            loaded[kind] = _updates(model)
    return loaded


def test_models_saved_on_four_ranks_are_read_on_one_process(tmp_path):
    saved = run_ranks(4, _save, str(tmp_path))
    for kind, lora in KINDS.items():
        adapter = read_adapter(tmp_path / kind)
        base = adapter.base
        assert adapter.name == "trained"
        assert (base.num_heads, base.num_kv_heads, base.num_layers) == (8, 4, 2)
        assert {f.num_blocks for f in adapter.modules.values()} == {lora.blocks}
        assert {f.scale for f in adapter.modules.values()} == {lora.scale}
        assert {key.layer for key in adapter.modules} == ({1} if kind == "one_layer" else {0, 1})
        again = read_adapter(write_adapter(adapter, tmp_path / f"{kind}-again", "megatron"))
        assert_same(again, adapter)
    # What was read does in the model what the saved adapter did, on every rank.
    for got, wanted in zip(run_ranks(4, _load_read, str(tmp_path)), saved, strict=True):
        for kind, updates in wanted.items():
            assert got[kind].keys() == updates.keys()
            for name, update in updates.items():
                assert update.abs().max() > 0.1
                torch.testing.assert_close(got[kind][name], update, rtol=1e-12, atol=1e-12)


def test_the_manifest_and_the_tensors_must_agree(tmp_path):
    path = write_adapter(converted(ragged=False), tmp_path / "a", "megatron")
    file = path / "adapter.json"
    raw = json.loads(file.read_text())
    del raw["modules"]["layers.1.mlp.up_proj"]
    raw["modules"]["layers.5.mlp.up_proj"] = {"num_blocks": 4, "scale": 1.0}
    raw["base"]["hidden_size"] = 32
    file.write_text(json.dumps(raw))
    with pytest.raises(AdapterFormatError) as caught:
        read_adapter(path)
    for part in (
        "modules are not in adapter.json (in layers.1.mlp.up_proj)",
        "modules of adapter.json have no tensors (in layers.5.mlp.up_proj)",
        "the base model's hidden_size is 32, but the factors are for 24",
    ):
        assert part in str(caught.value)
