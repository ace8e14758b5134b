"""Megatron-Bridge's and NeMo's adapter checkpoints: settings, row orders and refusals."""

from __future__ import annotations

import json
import math
import shutil
import sys
from dataclasses import replace

import pytest
import torch
import yaml

from bdlora_megatron.convert import (
    BaseShape,
    ModuleKey,
    WriteOptions,
    detect_format,
    read_adapter,
    write_adapter,
)
from bdlora_megatron.convert.megatron.dist_tensors import Chunk, open_dist_tensors
from bdlora_megatron.convert.megatron.dist_writer import write_dist_tensors
from bdlora_megatron.errors import AdapterFormatError, MissingDependencyError, UnsupportedError
from tests.unit.convert.random_adapters import HEAD_DIM, adapter, assert_same, factors, seven

Q, K, V = (ModuleKey(layer=0, name=f"{name}_proj") for name in "qkv")
GATE, UP = (ModuleKey(layer=0, name=f"{name}_proj") for name in ("gate", "up"))


def run_config(folder, **changes):
    file = folder / "iter_0000000" / "run_config.yaml"
    raw = json.loads(file.read_text())
    for section, values in changes.items():
        raw[section].update(values)
    file.write_text(yaml.safe_dump(raw))


def refused(folder, **arguments):
    with pytest.raises(AdapterFormatError) as caught:
        read_adapter(folder, **arguments)
    return str(caught.value)


def test_fused_rows_stand_by_query_group(tmp_path):
    wanted = seven(shared=True, layers=2)
    path = write_adapter(wanted, tmp_path / "a", "bridge", options=WriteOptions(fused=True))
    tensors = open_dist_tensors(path / "iter_0000000")
    assert len(tensors.facts) == 8
    B = tensors.load("decoder.layers.self_attention.linear_qkv.adapter.linear_out.weight", 0)
    # Group 1 of 4: two query heads, a key head, a value head.
    q, k, v = (wanted.modules[key].B for key in (Q, K, V))
    group = torch.cat(
        [q[2 * HEAD_DIM : 4 * HEAD_DIM], k[HEAD_DIM : 2 * HEAD_DIM], v[HEAD_DIM : 2 * HEAD_DIM]]
    )
    assert torch.equal(B[4 * HEAD_DIM : 8 * HEAD_DIM], group)
    B = tensors.load("decoder.layers.mlp.linear_fc1.adapter.linear_out.weight", 0)
    assert torch.equal(B, torch.cat([wanted.modules[GATE].B, wanted.modules[UP].B]))
    assert_same(read_adapter(path), wanted)


def test_fused_rows_need_the_heads_from_somewhere(tmp_path):
    wanted = seven(shared=True)
    path = write_adapter(wanted, tmp_path / "a", "bridge", options=WriteOptions(fused=True))
    run_config(path, model={"num_attention_heads": None, "kv_channels": None})
    assert "pass --base HF_DIR, or base=BaseShape(num_heads=..., num_kv_heads" in refused(path)
    base = BaseShape(num_heads=8, num_kv_heads=4, head_dim=8)
    assert_same(read_adapter(path, base=base), wanted)
    wrong = BaseShape(num_heads=4, num_kv_heads=4, head_dim=8)
    assert "4 heads and 4 key-value heads of width 8 make 96" in refused(path, base=wrong)
    wrong = BaseShape(num_heads=8, num_kv_heads=2, head_dim=8)
    assert "num_kv_heads is 4, but the factors are for 2" in refused(path, base=wrong)
    bare = replace(wanted, base=BaseShape())
    with pytest.raises(AdapterFormatError, match="telling its rows apart needs"):
        write_adapter(bare, tmp_path / "b", "bridge", options=WriteOptions(fused=True))


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_canonical_gate_and_up_come_back_from_any_size(tp, tmp_path):
    wanted = seven()
    path = write_adapter(wanted, tmp_path / "a", "bridge", options=WriteOptions(tp=tp))
    assert detect_format(path) == detect_format(path / "iter_0000000") == "bridge"
    assert_same(read_adapter(path), wanted)
    name = "decoder.layers.mlp.linear_fc1.adapter.adapter_up.linear_out.weight"
    stored = open_dist_tensors(path / "iter_0000000").load(name, 0)
    assert torch.equal(stored, wanted.modules[UP].B) == (tp == 1)
    run_config(path, model={"tensor_model_parallel_size": 3})
    assert f"is in {2 * tp} parts, which tells no tensor-parallel size of 3" in refused(path)


def test_the_last_iteration_is_read_and_nemo_folders_too(tmp_path):
    old, new = seven(), seven(shared=True)
    path = write_adapter(old, tmp_path / "a", "bridge")
    later = write_adapter(new, tmp_path / "b", "bridge")
    shutil.copytree(later / "iter_0000000", path / "iter_0000020")
    torch.save({"step": torch.tensor(20)}, path / "latest_train_state.pt")
    assert_same(read_adapter(path), new)
    assert_same(read_adapter(path / "iter_0000000"), old)
    # NeMo 2: `weights` and `context`, every key below `module.`, settings with tags of Python's.
    nemo = tmp_path / "nemo"
    (nemo / "context").mkdir(parents=True)
    (nemo / "context" / "model.yaml").write_text(
        """
_target_: nemo.collections.llm.gpt.model.llama.LlamaModel
config:
  _target_: nemo.collections.llm.gpt.model.llama.Llama3Config8B
  num_attention_heads: 8
  num_query_groups: 4
  kv_channels: null
  hidden_size: 64
  init_method: !!python/name:torch.nn.init.zeros_
model_transform:
  _target_: nemo.collections.llm.peft.lora.LoRA
  dim: 8
  alpha: 16
"""
    )
    (nemo / "weights").mkdir()
    chunks, parts = [], []
    for key in (Q, K, V):
        part = key.name[0]
        for side, tensor in zip(
            ("in", "out"), (new.modules[key].A, new.modules[key].B), strict=True
        ):
            name = f"decoder.layers.self_attention.linear_qkv.adapter.adapter_{part}.linear_{side}"
            size = (1, *tensor.shape)
            chunks.append(
                Chunk(
                    name=f"module.{name}.weight",
                    size=size,
                    offsets=(0, 0, 0),
                    sizes=size,
                    dtype=tensor.dtype,
                )
            )
            parts.append(tensor.unsqueeze(0))
    write_dist_tensors(nemo / "weights", chunks, lambda number: parts[number], {})
    assert detect_format(nemo) == "bridge"
    message = refused(nemo)
    assert "the base model's hidden_size is 64, but the factors are for 48" in message
    text = (nemo / "context" / "model.yaml").read_text()
    (nemo / "context" / "model.yaml").write_text(text.replace("hidden_size: 64", "head_count: 8"))
    got = read_adapter(nemo)
    assert got.metadata["format"] == "nemo"
    assert {key: f.scale for key, f in got.modules.items()} == {Q: 2.0, K: 2.0, V: 2.0}
    assert all(torch.equal(got.modules[key].B, new.modules[key].B) for key in (Q, K, V))


SETTINGS = {
    "dora": ({"_target_": "megatron.bridge.peft.dora.DoRA"}, "DoRA rescales whole adapted weights"),
    "other": ({"_target_": "x.Prompt"}, "the adapter is a x.Prompt; wanted one of LoRA"),
    "dim": ({"dim": 0}, "dim is 0, wanted a positive integer"),
    "rank": ({"dim": 4}, "linear_in has rank 8, but the settings say dim 4"),
    "alpha": ({"alpha": "many"}, "peft alpha is 'many'"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_cannot_be_are_refused(case, tmp_path):
    changes, why = SETTINGS[case]
    path = write_adapter(seven(), tmp_path / "a", "bridge")
    run_config(path, peft=changes)
    assert why in refused(path)


def test_positions_of_a_hybrid_model_are_counted_by_occurrence(tmp_path):
    """Its names count positions: attention of a layer at an even one, its MLP at the next."""
    wanted = seven(layers=2)
    positions = {
        ModuleKey(
            layer=2 * key.layer + (key.name in ("gate_proj", "up_proj", "down_proj")),
            name=key.name,
        ): factors
        for key, factors in wanted.modules.items()
    }
    base = replace(wanted.base, num_layers=4)
    saved = replace(wanted, modules=dict(sorted(positions.items())), base=base)
    path = write_adapter(saved, tmp_path / "a", "bridge")
    run_config(path, model={"hybrid_layer_pattern": "*-|*-"})
    found = read_adapter(path)
    assert_same(found, wanted)
    assert found.base.num_layers == 2
    assert found.metadata["model_class"] == "HybridModel"
    for pattern in ("**--", "M-*-", None):
        target = "megatron.bridge.models.hybrid.hybrid_provider.HybridModelProvider"
        changes = {"_target_": target, "hybrid_layer_pattern": pattern}
        shutil.rmtree(path)
        write_adapter(saved, path, "bridge")
        run_config(path, model=changes)
        assert "hybrid_layer_pattern" in refused(path)


def test_models_without_our_projections_are_refused(tmp_path):
    path = write_adapter(seven(), tmp_path / "a", "bridge")
    run_config(path, model={"gated_linear_unit": False, "attention_output_gate": True})
    message = refused(path)
    assert "MLP is not gated" in message
    assert "output gate" in message
    file = path / "iter_0000000" / "run_config.yaml"
    for text, why in (("[1]", "holds a list"), ("a: [", "cannot be read"), ("a: 1", "no settings")):
        file.write_text(text)
        assert why in refused(path)
    file.write_text("a: &a [x]\n" + "b: [*a]\n" * 600_000)
    assert "larger than 4194304 bytes" in refused(path)


def test_tensors_beyond_the_seven_projections_are_refused_at_once(tmp_path):
    (tmp_path / "a" / "iter_0000000").mkdir(parents=True)
    names = [
        "decoder.layers.0.mlp.experts.linear_fc1.adapter.linear_in.weight",
        "decoder.layers.0.mlp.router.adapter.linear_in.weight",
        "decoder.layers.0.self_attention.linear_qkv.adapter.adapter_q.linear_in.weight",
        "embedding.word_embeddings.weight",
        "optimizer.state.exp_avg.decoder.layers.0.mlp.linear_fc1.adapter.linear_in.weight",
    ]
    chunks = [
        Chunk(name=name, size=(8, 48), offsets=(0, 0), sizes=(8, 48), dtype=torch.float32)
        for name in names
    ]
    write_dist_tensors(tmp_path / "a" / "iter_0000000", chunks, lambda _: torch.zeros(8, 48), {})
    source = write_adapter(seven(), tmp_path / "b", "bridge")
    file = "iter_0000000/run_config.yaml"
    shutil.copy(source / file, tmp_path / "a" / file)
    message = refused(tmp_path / "a")
    assert message.count("\n- ") == 3
    assert "adapter tensors that are no factors of the seven projections" in message
    assert "mlp.router.adapter" in message
    assert "tensors that are no adapter's" in message
    assert "one factor of a pair is missing" in message
    assert "optimizer" not in message


# --- writing ------------------------------------------------------------------------------------


def unwritable(made, tmp_path, **options):
    with pytest.raises(UnsupportedError) as caught:
        write_adapter(made, tmp_path / "x", "bridge", options=WriteOptions(**options))
    assert not (tmp_path / "x").exists()
    return str(caught.value)


def test_what_bridge_cannot_hold_is_refused_at_once(tmp_path):
    odd = adapter(
        {
            Q: factors("q_proj", rank=8, scale=1.0, num_blocks=2),
            K: factors("k_proj", rank=8, scale=2.0),
            GATE: factors("gate_proj", rank=8, scale=2.0),
        }
    )
    message = unwritable(odd, tmp_path, tp=16, fused=True)
    for part in (
        "modules have blocks, which its LoRA has not",
        "rows are no multiple of 32, as tp=16 needs (in layers.0.mlp.gate_proj)",
        "LoRA for the whole self_attention.linear_qkv needs all of its projections",
    ):
        assert part in message


def test_different_a_factors_cannot_be_fused(tmp_path):
    message = unwritable(seven(), tmp_path, fused=True)
    assert "the A factors of layers.0.mlp.gate_proj, layers.0.mlp.up_proj differ" in message
    assert "write canonical LoRA" in message


def test_ranks_are_padded_to_one_that_ranks_can_share(tmp_path):
    made = adapter(
        {Q: factors("q_proj", rank=3, scale=2.0), K: factors("k_proj", rank=5, scale=2.0)}
    )
    path = write_adapter(made, tmp_path / "a", "bridge", options=WriteOptions(tp=4))
    got = read_adapter(path)
    assert {f.rank for f in got.modules.values()} == {8}
    assert {f.scale for f in got.modules.values()} == {2.0}
    for key, factor in made.modules.items():
        assert torch.equal(got.modules[key].A[: factor.rank], factor.A)
        assert not got.modules[key].A[factor.rank :].any()
        assert torch.equal(got.modules[key].B @ got.modules[key].A, factor.B @ factor.A)


def test_a_scale_that_alpha_over_dim_does_not_reach_is_told(tmp_path, caplog):
    # With use_rslora PEFT reaches it; Bridge always divides by the rank.
    scale = next(
        s for s in (n / 5**0.5 for n in range(1, 100)) if all(a / 5 != s for a in around(5 * s))
    )
    made = adapter({Q: factors("q_proj", rank=5, scale=scale)})
    path = write_adapter(made, tmp_path / "a", "bridge")
    assert "the scale of 1 modules of adapter 'random', such as layers.0" in caplog.text
    got = read_adapter(path).modules[Q].scale
    assert 0 < abs(got - scale) <= math.ulp(scale)


def around(value):
    return (math.nextafter(value, 0), value, math.nextafter(value, math.inf), round(value))


def test_settings_need_pyyaml_and_say_so(tmp_path, monkeypatch):
    path = write_adapter(seven(), tmp_path / "a", "bridge")
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'bdlora-megatron\[convert\]'"):
        read_adapter(path)
