"""What a host trains is exported as PEFT's folders: from all ranks, gathered once, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bdlora_megatron.blocks import reshard
from bdlora_megatron.config import LoRAConfig
from bdlora_megatron.convert import read_adapter
from bdlora_megatron.errors import ConfigError
from bdlora_megatron.layers import apply_lora, collect_adapter
from bdlora_megatron.plugs import BlockDiagonalSettings, export_adapter
from bdlora_megatron.plugs.export import export_asked_for
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
