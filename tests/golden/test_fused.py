"""Phi-3 with adapters on its fused projections: read, served, written back and trained."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from bdlora_megatron.blocks import reshard
from bdlora_megatron.config import Layout, LoRAConfig
from bdlora_megatron.convert import (
    ModuleKey,
    check_base,
    load_hf_model,
    open_adapter,
    read_hf_config,
    read_peft,
    write_adapter,
)
from bdlora_megatron.convert.merge import merge_adapter
from bdlora_megatron.errors import AdapterFormatError
from bdlora_megatron.export import export_adapter
from bdlora_megatron.layers import apply_lora, lora_layers
from bdlora_megatron.models.check import base_shape
from bdlora_megatron.serve import ModelSlots, SlotCapacity
from bdlora_megatron.serve.adapter_files import AdapterFiles
from tests.golden.peft_cases import blocks, make_adapter, make_base, peft_logits, token_ids
from tests.harness import run_ranks
from tests.tolerances import assert_close
from tests.tp.session import model_parallel

ALL = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
BLOCKED = {"target_modules_bd_a": ["o_proj", "down_proj"]}
BLOCKED |= {"target_modules_bd_b": ["qkv_proj", "gate_up_proj"]}
KINDS = {
    "vanilla": {"r": 6, "lora_alpha": 12, "target_modules": ALL},
    "rslora": {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ["gate_up_proj"]},
    # No o_proj beside it: the heads come from the base model.
    "attention": {"r": 4, "lora_alpha": 8, "target_modules": ["qkv_proj"]},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ALL,
        "rank_pattern": {"qkv_proj": 6},
        "alpha_pattern": {r"layers\.1\.mlp\.gate_up_proj": 24},
    },
    # Four blocks of 16 heads' rows, which end inside k and v.
    "bdlora": {
        "r": 8, "lora_alpha": 16, "target_modules": ALL, "use_bdlora": blocks(4, **BLOCKED)
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("fused")
    changes = {"hidden_size": 64, "head_dim": 8, "pad_token_id": 0}
    make_base(root / "base", family="Phi3", **changes)
    for kind, settings in KINDS.items():
        make_adapter(root / "base", root / kind, **settings)
    return root


def _base(root):
    return base_shape(read_hf_config(root / "base"))


def _mix(rank, world_size, root):
    with model_parallel(world_size):
        model = load_hf_model(root / "base", dtype=torch.float32).eval()
        slots = ModelSlots(
            model, SlotCapacity(max_loras=len(KINDS), max_lora_rank=16, layouts=tuple(Layout))
        )
        ids, rows, used = token_ids(), [], []
        for number, kind in enumerate([None, *KINDS]):
            if kind is not None:
                layout = list(Layout)[number % 3] if kind != "bdlora" else Layout.BDLORA
                slots.load(kind, slots.shard(read_peft(root / kind, base=_base(root)), layout))
            rows.append(ids)
            used += [-1 if kind is None else number - 1] * len(ids)
        length = ids.shape[1]
        ids = torch.cat(rows)
        mask = torch.ones(length, length).triu(1).bool().expand(len(ids), 1, -1, -1)
        positions = torch.arange(length).expand(len(ids), -1)
        batch = slots.batch(torch.tensor(used).expand(length, -1).flatten())
        with slots.serving(batch), torch.no_grad():
            return model(ids, positions, mask, runtime_gather_output=True)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_mixed_batch_has_pefts_logits(world_size, folder):
    wanted = [peft_logits(folder / "base", kind and folder / kind) for kind in (None, *KINDS)]
    for logits in run_ranks(world_size, _mix, folder):
        for own, kind, got in zip(wanted, [None, *KINDS], logits.chunk(len(wanted)), strict=True):
            assert_close(got[..., : own.shape[-1]], own, f"{kind}, TP={world_size}")
            assert kind is None or (own - wanted[0]).abs().max() > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_written_back_as_it_was(kind, folder, tmp_path):
    with open_adapter(folder / kind, base=_base(folder)) as adapter:
        assert all(key.name not in {"qkv_proj", "gate_up_proj"} for key in adapter.modules)
        write_adapter(adapter, tmp_path / "again", "peft")
    wanted = peft_logits(folder / "base", folder / kind)
    assert_close(peft_logits(folder / "base", tmp_path / "again"), wanted, kind)
    before, after = (
        safe_open(path / "adapter_model.safetensors", "pt")
        for path in (folder / kind, tmp_path / "again")
    )
    assert sorted(before.keys()) == sorted(after.keys())
    for name in before.keys() if kind != "bdlora" else ():
        # What q, k and v share is there once again.
        assert before.get_tensor(name).shape == after.get_tensor(name).shape, name


def test_other_formats_keep_the_names_and_merging_fuses(folder, tmp_path):
    wanted = peft_logits(folder / "base", folder / "patterns")
    with open_adapter(folder / "patterns") as adapter:
        write_adapter(adapter, tmp_path / "megatron", "megatron")
    with open_adapter(tmp_path / "megatron") as adapter:
        write_adapter(adapter, tmp_path / "peft", "peft")
        checked = check_base(adapter, read_hf_config(folder / "base"))
        merge_adapter(folder / "base", checked, tmp_path / "merged")
    assert_close(peft_logits(folder / "base", tmp_path / "peft"), wanted, "by way of megatron")
    assert_close(peft_logits(tmp_path / "merged", None), wanted, "merged")


def test_the_server_knows_the_heads(folder):
    found = AdapterFiles(folder / "attention", "attention", _base(folder)).read()
    assert {key.name for key in found.modules} == {"q_proj", "k_proj", "v_proj"}


def _trained(rank, world_size, root, out):
    with model_parallel(world_size):
        model = load_hf_model(root / "base", dtype=torch.float32).eval()
        apply_lora(model, LoRAConfig(rank=8, num_blocks=world_size))
        torch.manual_seed(7 + rank)
        for _, layer in lora_layers(model):
            for parameter in layer.adapter.parameters():
                torch.nn.init.normal_(parameter, std=0.1)
        export_adapter(model, out)
        ids = token_ids()
        length = ids.shape[1]
        mask = torch.ones(length, length).triu(1).bool().expand(len(ids), 1, -1, -1)
        with torch.no_grad():
            return model(
                ids, torch.arange(length).expand(len(ids), -1), mask, runtime_gather_output=True
            )


def test_peft_reads_what_is_trained_on_it(folder, tmp_path):
    logits = run_ranks(2, _trained, folder, tmp_path / "out")
    wanted = peft_logits(folder / "base", tmp_path / "out")
    for got in logits:
        assert_close(got[..., : wanted.shape[-1]], wanted, "exported")
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    names = {name for name, _ in PeftModel.from_pretrained(model, tmp_path / "out").named_modules()}
    assert any(name.endswith("qkv_proj.lora_A.default") for name in names)


def test_an_adapter_of_separate_names_is_fused_for_a_fused_base(folder, tmp_path):
    adapter = check_base(read_peft(folder / "patterns"), read_hf_config(folder / "base"))
    # k by itself in one layer, and another scale than q's and v's in the other.
    modules = dict(adapter.modules)
    for name in ("q_proj", "v_proj"):
        del modules[ModuleKey(layer=0, name=name)]
    key = ModuleKey(layer=1, name="k_proj")
    modules[key] = type(modules[key])(
        A=modules[key].A + 1, B=modules[key].B, num_blocks=1, blocked="B", scale=0.25
    )
    changed = type(adapter)(
        name="changed", modules=modules, base=adapter.base, metadata=adapter.metadata
    )
    again = read_peft(write_adapter(changed, tmp_path / "out", "peft"), base=_base(folder))
    for key, factors in again.modules.items():
        dense = reshard(factors, 1)
        got = dense.scale * dense.B.double() @ dense.A.double()
        if key not in modules:
            assert not got.any(), key
            continue
        wanted = modules[key].scale * modules[key].B.double() @ modules[key].A.double()
        assert_close(got.float(), wanted.float(), str(key))


def test_what_the_heads_do_not_tell_is_refused(folder):
    with pytest.raises(AdapterFormatError, match=r"qkv_proj has one pair .* pass --base HF_DIR"):
        read_peft(folder / "attention")
    other = read_hf_config(folder / "base")
    wrong = type(_base(folder))(q_size=64, kv_size=8)
    assert other.num_kv_heads == 4
    with pytest.raises(AdapterFormatError, match="128 rows, which are not 64 of q and two times 8"):
        read_peft(folder / "attention", base=wrong)
