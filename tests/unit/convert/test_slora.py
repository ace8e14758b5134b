"""S-LoRA's tensor-parallel shards: how they are cut, their names, and what it cannot serve."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from bdlora_megatron.convert import ModuleKey, WriteOptions, read_adapter, write_adapter
from bdlora_megatron.errors import AdapterFormatError, UnsupportedError
from tests.unit.convert.random_adapters import HIDDEN, adapter, assert_same, factors

NAMES = ("k_proj", "o_proj", "q_proj", "v_proj")
Q, O = ModuleKey(layer=0, name="q_proj"), ModuleKey(layer=0, name="o_proj")


def attention(rank=8, layers=2, scale=2.0, kv_heads=8, **changes):
    modules = {
        ModuleKey(layer=layer, name=name): factors(
            name, rank=rank, scale=scale, kv_heads=kv_heads, seed=10 * layer + n, **changes
        )
        for layer in range(layers)
        for n, name in enumerate(NAMES)
    }
    return adapter(modules, kv_heads=kv_heads, layers=layers)


def write(made, path, tp):
    return write_adapter(made, path, "slora", options=WriteOptions(tp=tp))


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_shards_are_cut_as_its_tp_branch_cuts_them(tp, tmp_path):
    wanted = attention()
    path = write(wanted, tmp_path / "a", tp)
    files = sorted(entry.name for entry in path.iterdir())
    assert files == [*(f"rank_{rank}.safetensors" for rank in range(tp)), "slora.json"]
    q, o = wanted.modules[Q], wanted.modules[O]
    for rank in range(tp):
        shard = load_file(path / f"rank_{rank}.safetensors")

        def rows(tensor, rank=rank):
            each = tensor.shape[0] // tp
            return tensor[rank * each : (rank + 1) * each]

        assert torch.equal(shard["layers.0.self_attn.q_proj.lora_A.weight"], rows(q.A))
        assert torch.equal(shard["layers.0.self_attn.q_proj.lora_B.weight"], rows(q.B))
        assert torch.equal(shard["layers.0.self_attn.o_proj.lora_A.weight"], rows(o.A.t()).t())
        assert torch.equal(shard["layers.0.self_attn.o_proj.lora_B.weight"], rows(o.B))
    assert_same(read_adapter(path), wanted)


def test_a_number_at_the_end_tells_copies_apart_and_is_no_part_of_the_name(tmp_path):
    path = write(attention(), tmp_path / "poet", 2)
    assert read_adapter(path).name == "poet"
    listed = read_adapter(tmp_path / "poet-17")
    assert listed.name == "poet"
    assert_same(listed, attention())
    path.rename(tmp_path / "poet-3")
    assert read_adapter(tmp_path / "poet-3").name == "poet"
    with pytest.raises(AdapterFormatError, match="is no folder"):
        read_adapter(tmp_path / "poet-4")


def test_all_that_it_cannot_serve_is_told_at_once(tmp_path):
    made = attention(kv_heads=4)
    made.modules.update(
        {
            ModuleKey(layer=0, name="up_proj"): factors("up_proj", rank=6, scale=1.0),
            ModuleKey(layer=3, name="q_proj"): factors("q_proj", rank=8, num_blocks=2),
        }
    )
    with pytest.raises(UnsupportedError) as caught:
        write(made, tmp_path / "a", 3)
    message = str(caught.value)
    for part in (
        "cannot write adapter 'random' for S-LoRA",
        "it adapts attention only, and would leave the MLP's modules out in silence",
        "(in layers.0.mlp.up_proj)",
        "modules have blocks, which it has not",
        "modules have ranks [6, 8], and it reads one r for all",
        "it needs q, k, v and o in every layer; these are missing (in layers.2.self_attn.k_proj",
        "fewer key-value heads than query heads (GQA)",
        "is no multiple of tp=3",
    ):
        assert part in message
    assert list(tmp_path.iterdir()) == []


def test_shards_that_do_not_fit_together_are_refused(tmp_path):
    path = write(attention(), tmp_path / "a", 2)
    shard = load_file(path / "rank_1.safetensors")
    shard["extra"] = torch.zeros(2)
    del shard["layers.1.self_attn.v_proj.lora_A.weight"]
    name = "layers.0.self_attn.q_proj.lora_A.weight"
    shard[name] = shard[name][:2].contiguous()
    shard["layers.1.self_attn.q_proj.lora_A.weight"] = torch.zeros(4, HIDDEN, dtype=torch.int8)
    save_file(shard, path / "rank_1.safetensors")
    with pytest.raises(AdapterFormatError) as caught:
        read_adapter(path)
    message = str(caught.value)
    assert message.count("\n- ") == 3
    assert "tensors are of no module in slora.json (in extra)" in message
    assert "the ranks' shares differ in shape or type (in layers.0.self_attn.q_proj)" in message
    assert "layers.1.self_attn.q_proj, layers.1.self_attn.v_proj" in message
    (path / "rank_1.safetensors").unlink()
    with pytest.raises(AdapterFormatError, match=r"rank_1\.safetensors cannot be read"):
        read_adapter(path)


MANIFESTS = {
    "format": ({"format": "other"}, "says format 'other', version 1; wanted 'slora-shards'"),
    "version": ({"version": 2}, "version 2; wanted 'slora-shards', version 1"),
    "unknown": ({"bases": {}}, "unknown key 'bases'; did you mean 'base'?"),
    "tp": ({"tp": 0}, "tp is 0, wanted 1 or more"),
    "type": ({"tp": "2"}, "tp is a str, wanted int"),
    "base": ({"base": {"heads": 2, "num_heads": 0}}, "base has the unknown key 'heads'"),
    "metadata": ({"metadata": {"a": 1}}, "metadata holds more than strings"),
    "key": ({"modules": {"layers.01.mlp.up_proj": {}}}, "modules has keys that are no module's"),
    "entry": (
        {"modules": {"layers.1.mlp.up_proj": {"scale": 1.0}}},
        "wanted an object with num_blocks and scale",
    ),
    "scale": (
        {"modules": {"layers.1.mlp.up_proj": {"scale": 1e999, "num_blocks": 1}}},
        "wanted a positive integer num_blocks and a finite scale",
    ),
    "module": (
        {"modules": {"layers.1.mlp.up_proj": {"scale": 1.0, "num_blocks": 1}}},
        "modules of slora.json are not what S-LoRA shards hold",
    ),
    "none": ({"modules": {}}, "slora.json has no modules"),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_manifests_are_checked_key_by_key(case, tmp_path):
    changes, why = MANIFESTS[case]
    path = write(attention(), tmp_path / "a", 2)
    raw = json.loads((path / "slora.json").read_text())
    (path / "slora.json").write_text(json.dumps(raw | changes))
    with pytest.raises(AdapterFormatError) as caught:
        read_adapter(path)
    assert why in str(caught.value)


def test_missing_keys_and_broken_files_are_refused(tmp_path):
    path = write(attention(), tmp_path / "a", 1)
    raw = json.loads((path / "slora.json").read_text())
    del raw["tp"], raw["base"]
    (path / "slora.json").write_text(json.dumps(raw))
    with pytest.raises(AdapterFormatError, match=r"'base' is missing(.|\n)*'tp' is missing"):
        read_adapter(path)
    for text, why in (("{", "cannot be read"), ("[]", "holds a JSON list")):
        (path / "slora.json").write_text(text)
        with pytest.raises(AdapterFormatError, match=why):
            read_adapter(path)
