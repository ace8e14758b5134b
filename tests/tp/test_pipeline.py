"""Adapters of a model in pipeline stages: saved, loaded and collected at any parallel size."""

from __future__ import annotations

import pytest
import torch

from bdlora_megatron.config import LoRAConfig
from bdlora_megatron.convert import read_adapter
from bdlora_megatron.layers import (
    LoadOptions,
    apply_lora,
    collect_adapter,
    load_adapter,
    save_adapter,
)
from tests.harness import run_ranks
from tests.tp.models import randomize_adapters, tiny_config, tiny_model
from tests.tp.session import model_parallel

KINDS = {
    "all": LoRAConfig(rank=8, alpha=16, num_blocks=4),
    "first": LoRAConfig(rank=8, num_blocks=4, target_modules=["*.layers.0.*"]),
    "last": LoRAConfig(rank=8, num_blocks=4, target_modules=["*.layers.1.*.linear_fc1"]),
    "vanilla": LoRAConfig(rank=6, layout="half_sharded"),
}
# Ranks, tensor-parallel and pipeline-parallel size.
SIZES = {"one": (1, 1, 1), "pp2": (2, 1, 2), "tp2": (2, 2, 1), "tp2-pp2": (4, 2, 2)}


def _model(tp, pp):
    return tiny_model(tiny_config(tp, pipeline_model_parallel_size=pp))


def _save(rank, world_size, tp, pp, folder):
    """Save adapters, and put each together from its stages."""
    whole = {}
    with model_parallel(tp, pp=pp):
        for kind, lora in KINDS.items():
            model = _model(tp, pp)
            apply_lora(model, lora)
            # Stages draw alike; so that a stage's factors are its own, they get its number.
            randomize_adapters(model, seed=4 + model.decoder.layers[0].layer_number)
            save_adapter(model, f"{folder}/{kind}", name=kind)
            whole[kind] = collect_adapter(model, kind).modules
    return whole


def _load(rank, world_size, tp, pp, folder):
    found = {}
    with model_parallel(tp, pp=pp):
        for kind, lora in KINDS.items():
            model = _model(tp, pp)
            load_adapter(model, read_adapter(f"{folder}/{kind}"), LoadOptions(layout=lora.layout))
            found[kind] = collect_adapter(model, kind).modules
    return found


def _check(found, wanted):
    for kind, modules in wanted.items():
        assert found[kind].keys() == modules.keys()
        for key, factors in modules.items():
            other = found[kind][key]
            assert (other.num_blocks, other.scale) == (factors.num_blocks, factors.scale)
            assert torch.equal(other.A, factors.A), (kind, key)
            assert torch.equal(other.B, factors.B), (kind, key)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_what_is_saved_is_what_the_stages_hold_together(size, tmp_path):
    wanted, *others = run_ranks(size[0], _save, *size[1:], str(tmp_path))
    for other in others:
        _check(other, wanted)
    read = {kind: read_adapter(tmp_path / kind) for kind in KINDS}
    _check({kind: adapter.modules for kind, adapter in read.items()}, wanted)
    assert {key.layer for key in wanted["first"]} == {0}
    assert {key.name for key in wanted["last"]} == {"gate_proj", "up_proj"}
    assert {adapter.base.num_layers for adapter in read.values()} == {2}
    for ranks, tp, pp in SIZES.values():
        for found in run_ranks(ranks, _load, tp, pp, str(tmp_path)):
            _check(found, wanted)
