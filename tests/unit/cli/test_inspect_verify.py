"""`bdlora inspect` and `bdlora verify`."""

from __future__ import annotations

import json

import torch
from safetensors.torch import load_file, save_file

from bdlora_megatron.convert import read_adapter
from tests.reference import dense_update
from tests.unit.cli.adapters import make_adapters, run, run_json
from tests.unit.convert.peft_files import COLUMN, ROW, vanilla_tensors, write


def nudge(folder, name, amount):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[name][0, 0] += amount
    save_file(tensors, path)


def test_inspect_lists_every_module(tmp_path, capsys):
    (source,) = make_adapters(tmp_path, 1, layers=2)
    status, told = run_json(capsys, "inspect", source)
    assert (status, told["format"], told["refused"], len(told["modules"])) == (0, "peft", [], 14)
    assert told["base"] == {"hidden_size": 48, "ffn_size": 104, "q_size": 80, "kv_size": 40}
    first = told["modules"][0]
    assert first["key"] == "layers.0.mlp.down_proj"
    assert (first["in_features"], first["out_features"], first["rank"]) == (104, 48, 4)
    assert (first["layout"], first["scale"], first["bytes"]) == ("vanilla", 3.0, 4 * 4 * 152)
    assert told["bytes"] == sum(module["bytes"] for module in told["modules"])
    status, out, _ = run(capsys, "inspect", source)
    assert status == 0
    assert "layers.1.self_attn.q_proj  " in out
    assert out.endswith("nothing would be refused\n")


def test_inspect_tells_blocks(tmp_path, capsys):
    tensors = {
        name: tensor[:, : tensor.shape[1] // 2]
        if ("lora_A" in name) == any(row in name for row in ROW)
        else tensor
        for name, tensor in vanilla_tensors().items()
    }
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    bd = {"nblocks": 2, "target_modules_bd_a": ROW, "target_modules_bd_b": COLUMN}
    told = run_json(capsys, "inspect", write(tmp_path / "bd", tensors, use_bdlora=bd))[1]
    layouts = {module["key"].rpartition(".")[2]: module["layout"] for module in told["modules"]}
    assert layouts == dict.fromkeys(ROW, "blocks in A") | dict.fromkeys(COLUMN, "blocks in B")


def test_inspect_tells_what_would_be_refused(tmp_path, capsys):
    (source,) = make_adapters(tmp_path, 1)
    config = source / "adapter_config.json"
    raw = json.loads(config.read_text())
    config.write_text(json.dumps({**raw, "use_dora": True, "lora_bias": True}))
    status, told = run_json(capsys, "inspect", source)
    assert status == 1
    assert "use_dora is set" in told["refused"][0]
    assert "lora_bias is set" in told["refused"][0]
    config.write_text(json.dumps(raw))
    for layer in ("q", "v"):
        name = f"base_model.model.model.layers.0.self_attn.{layer}_proj.lora_A.weight"
        nudge(source, name, float("nan"))
    status, out, _ = run(capsys, "inspect", source)
    assert status == 1
    assert out.count("refused: ") == 2
    assert "NaN or infinity" in out
    assert "layers.0.mlp.up_proj" in out


def test_verify_knows_the_same_function_in_another_structure(tmp_path, capsys):
    (source,) = make_adapters(tmp_path / "in", 1)
    options = ["--to", "peft", "--structure", "exact", "--tp", "4", "--workers", "1"]
    assert run(capsys, "convert", source, *options, "--out", tmp_path / "out")[0] == 0
    status, told = run_json(capsys, "verify", source, tmp_path / "out/a00", "--tolerance", "0")
    assert (status, told["same"], told["largest_relative"]) == (0, True, 0.0)
    assert "same function within 1e-06" in run(capsys, "verify", source, tmp_path / "out/a00")[1]


def test_verify_measures_a_difference(tmp_path, capsys):
    one, two = make_adapters(tmp_path, 1)[0], make_adapters(tmp_path / "other", 1)[0]
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
    nudge(two, name, 1e-3)
    status, told = run_json(capsys, "verify", one, two)
    assert (status, told["same"]) == (1, False)
    pairs = zip(read_adapter(one).modules.items(), read_adapter(two).modules.values(), strict=True)
    expected = {
        str(key): dense_update(first, dtype=torch.float64)
        - dense_update(second, dtype=torch.float64)
        for (key, first), second in pairs
    }
    for module in told["modules"]:
        difference = expected[module["key"]]
        torch.testing.assert_close(
            torch.tensor([module["difference"], module["worst_output"]], dtype=torch.float64),
            torch.stack([difference.norm(), difference.norm(dim=1).max()]),
            rtol=1e-9,
            atol=1e-12,
        )
    changed = [module["key"] for module in told["modules"] if module["difference"] > 0]
    assert changed == ["layers.0.mlp.up_proj"]
    status, out, _ = run(capsys, "verify", one, two, "--tolerance", "0.1")
    assert status == 0
    assert "largest relative difference" in out


def test_a_module_that_one_lacks_counts_as_zero(tmp_path, capsys):
    whole = write(tmp_path / "whole", vanilla_tensors(layers=1))
    part = {name: t for name, t in vanilla_tensors(layers=1).items() if "up_proj" not in name}
    status, told = run_json(capsys, "verify", whole, write(tmp_path / "part", part))
    assert status == 1
    different = {module["key"]: module["relative"] for module in told["modules"]}
    assert different.pop("layers.0.mlp.up_proj") == 1.0
    assert set(different.values()) == {0.0}
    zeros = {n: t * 0 if "up_proj.lora_B" in n else t for n, t in vanilla_tensors(layers=1).items()}
    assert run(capsys, "verify", write(tmp_path / "zeros", zeros), tmp_path / "part")[0] == 0


def test_verify_refuses_adapters_of_two_models(tmp_path, capsys):
    (one,) = make_adapters(tmp_path, 1)
    other = {
        name: tensor[:, :24].contiguous() if tensor.shape[1] == 48 else tensor
        for name, tensor in vanilla_tensors(rank=4, layers=1, modules=["mlp.up_proj"]).items()
    }
    status, out, err = run(capsys, "verify", one, write(tmp_path / "other", other, r=4))
    assert (status, out) == (2, "")
    assert "[out, in] = [104, 48], the other [104, 24]" in err
    status, _, err = run(capsys, "verify", one, tmp_path / "missing")
    assert status == 2
    assert "is no folder" in err
