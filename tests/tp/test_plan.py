"""The cost model's counts against the real layers: elements held and collectives, call by call."""

from __future__ import annotations

import pytest
import torch

from bdlora_megatron import runtime
from bdlora_megatron.config import DEFAULT_TARGETS, Layout
from bdlora_megatron.convert import load_hf_model, read_hf_config, read_peft
from bdlora_megatron.layers import LoadOptions, adapters_disabled, load_adapter, lora_layers
from bdlora_megatron.plan import AdapterLoad, Step, adapter_bytes, adapter_work
from bdlora_megatron.plan.work import base_layer_work
from tests.golden.peft_cases import blocks, make_adapter, make_base, token_ids
from tests.harness import run_ranks
from tests.tp.session import model_parallel

FLOAT = 4
ATTENTION = ("linear_qkv", "linear_proj")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("plan")
    base = make_base(root / "base")
    make_adapter(base, root / "vanilla", r=6, lora_alpha=12)
    make_adapter(base, root / "bdlora", r=8, lora_alpha=8, use_bdlora=blocks(4))
    column = ["q_proj", "k_proj", "v_proj"]
    only = {"target_modules": [*column, "o_proj"]}
    sides = {"target_modules_bd_a": ["o_proj"], "target_modules_bd_b": column}
    make_adapter(base, root / "attention-vanilla", r=6, lora_alpha=12, **only)
    split = blocks(4, **sides)
    make_adapter(base, root / "attention-bdlora", r=8, lora_alpha=8, use_bdlora=split, **only)
    return root


def _calls(model):
    ids = token_ids()
    length = ids.size(1)
    hidden = torch.ones(length, length).triu(1).bool().expand(len(ids), 1, -1, -1)
    positions = torch.arange(length).expand(len(ids), -1)
    with torch.no_grad(), runtime.record_collectives() as log:
        model(ids, positions, hidden)
    return [(call.kind, call.payload_bytes) for call in log.calls]


def _compare(rank, world_size, root, kind, targets):
    with model_parallel(world_size):
        model = load_hf_model(root / "base", dtype=torch.float32).eval()
        hf = read_hf_config(root / "base")
        shape, step = hf, Step(tokens=token_ids().numel(), context=1)
        step = Step(tokens=step.tokens, context=1, bytes_per_element=FLOAT)
        for name, layout, rank_of, num_blocks in (
            ("bdlora", Layout.BDLORA, 8, 4),
            ("vanilla", Layout.SLORA, 6, None),
            ("vanilla", Layout.HALF_SHARDED, 6, None),
        ):
            load_adapter(model, read_peft(root / f"{kind}{name}"), LoadOptions(layout=layout))
            load = AdapterLoad(
                layout=layout, rank=rank_of, num_blocks=num_blocks, target_modules=targets
            )
            adapted = [name.rpartition(".")[2] for name, _ in lora_layers(model)]
            assert sorted(adapted) == sorted(targets * shape.num_layers)
            held = sum(
                parameter.numel() * FLOAT
                for _, layer in lora_layers(model)
                for parameter in layer.adapter.parameters()
            )
            assert held == adapter_bytes(shape, load, world_size, bytes_per_element=FLOAT)
            with adapters_disabled(model):
                plain = _calls(model)
            whole = _calls(model)
            base = base_layer_work(shape, step, world_size).messages
            extra = adapter_work(shape, step, load, world_size).messages
            for message in base * shape.num_layers:
                plain.remove((message.kind, message.payload_bytes))
                whole.remove((message.kind, message.payload_bytes))
            for message in extra * shape.num_layers:
                whole.remove((message.kind, message.payload_bytes))
            # What is left is the embedding's, with and without adapters.
            assert plain == whole
            assert len(plain) == 1


@pytest.mark.parametrize(("kind", "targets"), [("", DEFAULT_TARGETS), ("attention-", ATTENTION)])
@pytest.mark.parametrize("world_size", [2, 4])
def test_counts_are_those_of_the_layers(folder, world_size, kind, targets):
    run_ranks(world_size, _compare, folder, kind, targets)
