"""One batch of base, vanilla and BD-LoRA requests against PEFT's own mixed batch, at TP 1, 2, 4."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from bdlora_megatron.config import Layout
from bdlora_megatron.convert import load_hf_model, read_peft
from bdlora_megatron.serve import ModelSlots, SlotCapacity
from tests.golden.peft_cases import KINDS, VOCAB, make_adapter, make_base
from tests.harness import run_ranks
from tests.tolerances import assert_close
from tests.tp.session import model_parallel

LENGTH = 9
#: Who asks, row by row; None is the base model. Two share an adapter, and most ranks differ.
REQUESTS = [None, "vanilla", "bdlora2", "bdlora4", "rslora", "patterns", "vanilla", None]
REQUESTS += ["bdlora_patterns", "some_modules", "some_layers", "partly_blocked", "bdlora_rslora"]


def token_ids():
    shape = (len(REQUESTS), LENGTH)
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(6))


@torch.no_grad()
def peft_mixed_logits(base, root):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    names = list(KINDS)
    model = PeftModel.from_pretrained(model, root / names[0], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(root / name, adapter_name=name)
    wanted = [name or "__base__" for name in REQUESTS]
    return model.eval()(token_ids(), adapter_names=wanted).logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("mixed"))


@pytest.fixture(scope="module", params=[1, 2], ids="kv{}".format)
def few_heads(request, tmp_path_factory):
    """A base model of Qwen2.5's shape, with biases, and fewer key-value heads than four ranks."""
    root = tmp_path_factory.mktemp("few_heads")
    return make_folder(root, family="Qwen2", num_key_value_heads=request.param, head_dim=8)


def make_folder(root, **changes):
    base = make_base(root / "base", **changes)
    for kind, settings in KINDS.items():
        make_adapter(base, root / kind, **settings)
    torch.save(peft_mixed_logits(base, root), root / "mixed.pt")
    return root


@torch.no_grad()
def megatron_logits(model, rows):
    ids = token_ids()[rows]
    mask = torch.ones(LENGTH, LENGTH).triu(1).bool().expand(len(ids), 1, -1, -1)
    positions = torch.arange(LENGTH).expand(len(ids), -1)
    return model(ids, positions, mask, runtime_gather_output=True)[..., :VOCAB]


def token_slots(slot_of, rows):
    """Megatron's tokens stand sequence by batch, ``[S, b]``."""
    per_row = torch.tensor([slot_of[REQUESTS[row]] for row in rows])
    return per_row.expand(LENGTH, -1).flatten()


def _layout_of(kind, world_size):
    """Hold a vanilla adapter each way that there is, in one batch with the others."""
    if kind == "vanilla":
        return Layout.HALF_SHARDED
    return Layout.SLORA if kind == "rslora" and world_size > 1 else Layout.BDLORA


def _mix(rank, world_size, root):
    with model_parallel(world_size):
        model = load_hf_model(root / "base", dtype=torch.float32, for_serving=True).eval()
        room = SlotCapacity(max_loras=len(KINDS) + 1, max_lora_rank=16, layouts=tuple(Layout))
        slots = ModelSlots(model, room)
        slot_of = {None: -1}
        for kind in KINDS:
            shard = slots.shard(read_peft(root / kind), _layout_of(kind, world_size))
            slot_of[kind] = slots.load(kind, shard)
        rows = list(range(len(REQUESTS)))
        with slots.serving(slots.batch(token_slots(slot_of, rows))):
            mixed = megatron_logits(model, rows)
        assert_close(mixed, torch.load(root / "mixed.pt"), f"PEFT's mixed batch, TP={world_size}")
        for row in (0, 1, 2, 3, 4, 8):
            with slots.serving(slots.batch(token_slots(slot_of, [row]))):
                alone = megatron_logits(model, [row])
            assert_close(mixed[row : row + 1], alone, f"{REQUESTS[row]} alone")
        base = megatron_logits(model, rows)
        for row, kind in enumerate(REQUESTS):
            difference = (mixed[row] - base[row]).abs().max()
            assert (difference > 0.05) == (kind is not None), f"{kind} must change its row alone"


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_mixed_batch_is_pefts_and_each_request_alone(world_size, folder):
    run_ranks(world_size, _mix, folder)


def test_ranks_share_key_value_heads_in_a_mixed_batch(few_heads):
    run_ranks(4, _mix, few_heads)
