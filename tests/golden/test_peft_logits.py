"""Logits of adapters that PEFT made, under Megatron at TP 1, 2 and 4, against PEFT's own."""

from __future__ import annotations

import pytest
import torch

from bdlora_megatron.config import Layout
from bdlora_megatron.convert import load_hf_model, read_peft
from bdlora_megatron.errors import ShapeError, TargetError
from bdlora_megatron.layers import LoadOptions, load_adapter, lora_layers, remove_lora
from tests.golden.peft_cases import (
    KINDS,
    NUM_LAYERS,
    VOCAB,
    make_adapter,
    make_base,
    peft_logits,
    token_ids,
)
from tests.harness import run_ranks
from tests.tolerances import assert_close
from tests.tp.session import model_parallel


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model and one adapter of each kind, with PEFT's logits beside each."""
    root = tmp_path_factory.mktemp("golden")
    base = make_base(root / "base")
    torch.save(peft_logits(base, None), root / "base.pt")
    for kind, settings in KINDS.items():
        make_adapter(base, root / kind, **settings)
        torch.save(peft_logits(base, root / kind), root / f"{kind}.pt")
    make_base(root / "other", intermediate_size=96)
    make_adapter(root / "other", root / "for_another", **KINDS["vanilla"])
    make_base(root / "deeper", num_hidden_layers=NUM_LAYERS + 1)
    make_adapter(root / "deeper", root / "for_a_deeper", **KINDS["vanilla"])
    return root


def megatron_logits(model):
    ids = token_ids()
    length = ids.size(1)
    hidden = torch.ones(length, length).triu(1).bool().expand(len(ids), 1, -1, -1)
    positions = torch.arange(length).expand(len(ids), -1)
    with torch.no_grad():
        logits = model(ids, positions, hidden, runtime_gather_output=True)
    return logits[..., :VOCAB]


def _compare(rank, world_size, root):
    with model_parallel(world_size):
        model = load_hf_model(root / "base", dtype=torch.float32).eval()
        base = torch.load(root / "base.pt")
        assert_close(megatron_logits(model), base, "base")
        for kind in KINDS:
            expected = torch.load(root / f"{kind}.pt")
            # An adapter that changed next to nothing would let any mistake pass.
            assert (expected - base).abs().max() > 0.1 * base.abs().max()
            for layout in Layout:
                names = load_adapter(model, read_peft(root / kind), LoadOptions(layout=layout))
                assert names == [n for n, layer in lora_layers(model) if layer.adapter is not None]
                logits = megatron_logits(model)
                assert_close(logits, expected, f"{kind} as {layout.value} at TP={world_size}")
        remove_lora(model)
        assert_close(megatron_logits(model), base, "base after all adapters")


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_megatron_gives_pefts_logits(world_size, folder):
    run_ranks(world_size, _compare, folder)


def _train_loaded(rank, world_size, root):
    with model_parallel(world_size):
        model = load_hf_model(root / "base", dtype=torch.float32)
        load_adapter(model, read_peft(root / "bdlora4"), LoadOptions(trainable=True))
        trainable = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trainable == {n for n, _ in model.named_parameters() if ".adapter." in n}
        load_adapter(model, read_peft(root / "bdlora4"))
        assert not any(p.requires_grad for p in model.parameters())


def _refuse(rank, world_size, root):
    with model_parallel(world_size):
        model = load_hf_model(root / "base", dtype=torch.float32)
        before = dict(model.named_modules())
        with pytest.raises(
            ShapeError, match=r"does not fit the base model in \d+ modules .*96.*64"
        ):
            load_adapter(model, read_peft(root / "for_another"))
        with pytest.raises(TargetError, match=f"model of {NUM_LAYERS} layers does not have"):
            load_adapter(model, read_peft(root / "for_a_deeper"))
        assert dict(model.named_modules()) == before, "a refusal leaves the model as it was"


def test_an_adapter_for_another_base_is_refused(folder):
    run_ranks(2, _refuse, folder)


def test_training_goes_on_only_if_asked(folder):
    run_ranks(2, _train_loaded, folder)
