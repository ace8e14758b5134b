"""What a host trains is exported as PEFT's folders: from all ranks, gathered once, or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state

from bdlora_megatron.blocks import reshard
from bdlora_megatron.config import LoRAConfig
from bdlora_megatron.convert import read_adapter
from bdlora_megatron.errors import ConfigError
from bdlora_megatron.export import export_asked_for
from bdlora_megatron.integrations import BlockDiagonalSettings, export_adapter
from bdlora_megatron.layers import apply_lora, collect_adapter
from bdlora_megatron.runtime import record_collectives
from tests.harness import run_ranks
from tests.tp.models import randomize_adapters, tiny_config, tiny_model
from tests.tp.session import model_parallel


def _export(rank, world_size, folder):
    settings = BlockDiagonalSettings(num_blocks=2, dim=8, export_dense=True)
    with model_parallel(world_size):
        model = tiny_model(tiny_config(world_size))
        apply_lora(model, LoRAConfig(rank=8, num_blocks=2))
        randomize_adapters(model)
        with record_collectives() as once:
            whole = collect_adapter(model, "whole")
        with record_collectives() as both:
            written = export_asked_for(settings, [model], folder)
        assert both.counts()["all_gather"] == once.counts()["all_gather"]
        # A file in the place of a folder; only the first rank meets it.
        Path(folder, "taken").write_text("", "utf-8")
        with pytest.raises(ConfigError, match=r"was not exported to .*taken"):
            export_adapter(model, Path(folder, "taken"))
        return written, {key: (f.A, f.B) for key, f in whole.modules.items()}


def test_both_forms_are_written_of_one_gathered_adapter(tmp_path):
    for written, whole in run_ranks(2, _export, str(tmp_path)):
        assert [path.name for path in written] == ["hf_adapter", "hf_adapter-dense"]
        blocks, dense = map(read_adapter, written)
        assert blocks.modules.keys() == dense.modules.keys() == whole.keys()
        for key, (A, B) in whole.items():
            found = blocks.modules[key]
            assert (found.num_blocks, dense.modules[key].num_blocks) == (2, 1)
            torch.testing.assert_close(found.A, A, rtol=0, atol=0)
            torch.testing.assert_close(found.B, B, rtol=0, atol=0)
            torch.testing.assert_close(dense.modules[key].A, reshard(found, 1).A, rtol=0, atol=0)
            torch.testing.assert_close(dense.modules[key].B, reshard(found, 1).B, rtol=0, atol=0)


def _asked_for(rank, world_size, folder):
    """What is written on request: not at all, the base's name, and in place of what was there."""
    folder = Path(folder)
    base = {"num_blocks": 2, "dim": 8, "base_model": "some/base"}
    with model_parallel(world_size):
        model = tiny_model(tiny_config(world_size))
        apply_lora(model, LoRAConfig(rank=8, num_blocks=2))
        nothing = BlockDiagonalSettings(export_peft=False, **base)
        assert export_asked_for(nothing, model, folder) == []
        dense = BlockDiagonalSettings(export_peft=False, export_dense=True, **base)
        assert export_asked_for(dense, model, folder) == [folder / "hf_adapter-dense"]
        for seed in (1, 2):
            randomize_adapters(model, seed=seed)
            export_asked_for(BlockDiagonalSettings(**base), model, folder)
        return collect_adapter(model, "last").modules


def test_only_what_is_asked_for_is_written_and_replaces_the_older(tmp_path):
    last = run_ranks(2, _asked_for, str(tmp_path))[0]
    assert {path.name for path in tmp_path.iterdir()} == {"hf_adapter", "hf_adapter-dense"}
    for key, factors in read_adapter(tmp_path / "hf_adapter").modules.items():
        torch.testing.assert_close(factors.A, last[key].A, rtol=0, atol=0)
    for name in ("hf_adapter", "hf_adapter-dense"):
        config = json.loads((tmp_path / name / "adapter_config.json").read_text("utf-8"))
        assert config["base_model_name_or_path"] == "some/base"


def _keep_a_stretch(weight, number):
    """Split a copy as Megatron-Core's distributed optimizer does; some ranks have nothing of it."""
    flat = weight.main_param.flatten()
    cut = (0, len(flat) // 3, len(flat))[number % 3]
    first = parallel_state.get_data_parallel_rank() == 0
    part = flat[:cut] if first else flat[cut:]
    weight.main_param = part if len(part) else None
    weight.main_param_sharded = True


def _mixed(rank, world_size, folder, sharded):
    """Export a sixteen-bit model whose optimizer keeps copies, or stretches of them."""
    with model_parallel(2):
        config = tiny_config(2, params_dtype=torch.bfloat16, pipeline_dtype=torch.bfloat16)
        model = tiny_model(config)
        apply_lora(model, LoRAConfig(rank=8, num_blocks=2))
        randomize_adapters(model)
        narrow = collect_adapter(model, "narrow").modules
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        before = [weight.data.clone() for weight in weights]
        for number, weight in enumerate(weights):
            weight.main_param = weight.data.float() + 2.0**-12
            if sharded:
                _keep_a_stretch(weight, number)
        export_adapter(model, folder)
        for weight, own in zip(weights, before, strict=True):
            assert weight.dtype is torch.bfloat16
            assert torch.equal(weight.data, own)
        return narrow


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
def test_the_optimizers_copies_are_exported(tmp_path, sharded):
    narrow = run_ranks(4 if sharded else 2, _mixed, str(tmp_path / "adapter"), sharded)[0]
    exported = read_adapter(tmp_path / "adapter").modules
    assert exported.keys() == narrow.keys()
    for key, factors in exported.items():
        for found, weight in ((factors.A, narrow[key].A), (factors.B, narrow[key].B)):
            assert weight.dtype is torch.bfloat16
            assert found.dtype is torch.float32
            assert torch.equal(found, weight.float() + 2.0**-12)
