"""Adapter checkpoints as Megatron-Bridge saves and loads them on several ranks.

Megatron-Bridge needs Transformer Engine to import, so its adapter is rebuilt here from the
Megatron-Core layers that it is made of, with its own rule for `linear_fc1`.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory

from bdlora_megatron.convert import (
    Adapter,
    BaseShape,
    ModuleKey,
    WriteOptions,
    read_adapter,
    write_adapter,
)
from bdlora_megatron.convert.adapter.neutral import MODULE_NAMES
from tests.harness import run_ranks
from tests.tp.models import tiny_config
from tests.tp.session import model_parallel
from tests.unit.convert.random_adapters import assert_same, build

RANK, HEADS, GROUPS, WIDTH, HIDDEN, FFN, LAYERS = 8, 8, 4, 6, 24, 40, 2
WIDTHS = {
    "q_proj": (HIDDEN, HEADS * WIDTH),
    "k_proj": (HIDDEN, GROUPS * WIDTH),
    "v_proj": (HIDDEN, GROUPS * WIDTH),
    "o_proj": (HEADS * WIDTH, HIDDEN),
    "gate_proj": (HIDDEN, FFN),
    "up_proj": (HIDDEN, FFN),
    "down_proj": (FFN, HIDDEN),
}
PLACES = {
    "q_proj": ("self_attention.linear_qkv", "adapter_q."),
    "k_proj": ("self_attention.linear_qkv", "adapter_k."),
    "v_proj": ("self_attention.linear_qkv", "adapter_v."),
    "o_proj": ("self_attention.linear_proj", ""),
    "gate_proj": ("mlp.linear_fc1", "adapter_gate."),
    "up_proj": ("mlp.linear_fc1", "adapter_up."),
    "down_proj": ("mlp.linear_fc2", ""),
}


def converted(*, fused):
    modules = {
        ModuleKey(layer=layer, name=name): build(
            name, WIDTHS[name], rank=RANK, scale=2.0, seed=10 * layer + number
        )
        for layer in range(LAYERS)
        for number, name in enumerate(MODULE_NAMES)
    }
    if fused:
        for layer in range(LAYERS):
            for name, first in (("k", "q"), ("v", "q"), ("up", "gate")):
                key = ModuleKey(layer=layer, name=f"{name}_proj")
                A = modules[ModuleKey(layer=layer, name=f"{first}_proj")].A
                modules[key] = replace(modules[key], A=A)
    base = BaseShape(num_heads=HEADS, num_kv_heads=GROUPS, head_dim=WIDTH, num_layers=LAYERS)
    return Adapter(name="bridged", modules=dict(sorted(modules.items())), base=base)


class BridgeAdapter:
    """Parameters and shards of Bridge's `ParallelLinearAdapter` beside one layer."""

    def __init__(self, linear, inner, layer, widths, *, config):
        self.linear, self.layer = linear, layer
        self.stem = f"decoder.layers.{layer}.{linear}.adapter.{inner}"
        self.common = f"decoder.layers.{linear}.adapter.{inner}"
        options = {"config": config, "bias": False, "init_method": torch.nn.init.zeros_}
        row = linear in ("self_attention.linear_proj", "mlp.linear_fc2")
        self.a_dim = 1 if row else 0
        if row:
            self.linear_in = RowParallelLinear(
                widths[0], RANK, input_is_parallel=True, skip_bias_add=True, **options
            )
        else:
            self.linear_in = ColumnParallelLinear(widths[0], RANK, gather_output=True, **options)
        self.linear_out = ColumnParallelLinear(RANK, widths[1], gather_output=row, **options)

    def shards(self):
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        offsets, metadata = [(0, self.layer, LAYERS)], {"dp_cp_group": group}
        state = {}
        for name in ("linear_in", "linear_out"):
            module = getattr(self, name)
            state |= module.sharded_state_dict(f"{self.stem}{name}.", offsets, metadata)
        if "linear_fc1" in self.linear:
            key = f"{self.stem}linear_out.weight"
            state[key] = apply_swiglu_sharded_factory(state[key], offsets)
        replace_prefix_for_sharding(state, self.stem, self.common)
        return {key: value for key, value in state.items() if key.endswith(".weight")}


def adapters(config, modules, rank, tp, *, fused):
    """Every adapter with what its two local weights should be."""
    for layer in range(LAYERS):
        of = {name: modules[ModuleKey(layer=layer, name=name)] for name in MODULE_NAMES}
        for name, (linear, inner) in PLACES.items():
            if fused and name in ("k_proj", "v_proj", "up_proj"):
                continue
            widths, local = WIDTHS[name], of[name].B.chunk(tp)[rank]
            if fused and name == "q_proj":
                widths = (HIDDEN, (HEADS + 2 * GROUPS) * WIDTH)
                groups = [of[f"{x}_proj"].B.view(GROUPS, -1, RANK) for x in "qkv"]
                local = torch.cat(groups, dim=1).view(-1, RANK).chunk(tp)[rank]
            elif fused and name == "gate_proj":
                widths = (HIDDEN, 2 * FFN)
                local = torch.cat([of[f"{x}_proj"].B.chunk(tp)[rank] for x in ("gate", "up")])
            inner = "" if fused else inner
            adapter = BridgeAdapter(linear, inner, layer, widths, config=config)
            yield adapter, of[name].A.chunk(tp, dim=adapter.a_dim)[rank], local


def _save(rank, world_size, path, fused):
    with model_parallel(world_size):
        config = tiny_config(world_size, params_dtype=torch.float32)
        shards = {}
        modules = converted(fused=fused).modules
        for adapter, A, B in adapters(config, modules, rank, world_size, fused=fused):
            adapter.linear_in.weight.data.copy_(A)
            adapter.linear_out.weight.data.copy_(B)
            shards |= adapter.shards()
        dist_checkpointing.save(shards, path)


def _load(rank, world_size, path, fused):
    with model_parallel(world_size):
        config = tiny_config(world_size, params_dtype=torch.float32)
        modules = converted(fused=fused).modules
        wanted = list(adapters(config, modules, rank, world_size, fused=fused))
        shards = {}
        for adapter, _, _ in wanted:
            shards |= adapter.shards()
        loaded = dist_checkpointing.load(shards, path)
        for adapter, A, B in wanted:
            assert torch.equal(loaded[f"{adapter.stem}linear_in.weight"], A), adapter.stem
            assert torch.equal(loaded[f"{adapter.stem}linear_out.weight"], B), adapter.stem


@pytest.mark.parametrize("fused", [False, True], ids=["canonical", "fused"])
def test_checkpoints_of_two_ranks_are_read_and_written(fused, tmp_path):
    saved = tmp_path / "iter_0000100"
    saved.mkdir()
    run_ranks(2, _save, str(saved), fused)
    kind = "lora.LoRA" if fused else "canonical_lora.CanonicalLoRA"
    model = {
        "tensor_model_parallel_size": 2,
        "num_attention_heads": HEADS,
        "num_query_groups": GROUPS,
        "kv_channels": WIDTH,
    }
    peft = {"_target_": f"megatron.bridge.peft.{kind}", "dim": RANK, "alpha": 16}
    (saved / "run_config.yaml").write_text(json.dumps({"model": model, "peft": peft}))
    wanted = converted(fused=fused)
    assert_same(read_adapter(tmp_path), wanted)
    for tp in (2,) if fused else (4,):
        options = WriteOptions(tp=tp, fused=fused)
        path = write_adapter(wanted, tmp_path / f"for{tp}", "bridge", options=options)
        run_ranks(tp, _load, str(path / "iter_0000000"), fused)
