"""The plug in the real Megatron-Bridge: `make test-bridge` makes an environment that has it."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from bdlora_megatron.blocks import reshard
from bdlora_megatron.convert import read_adapter
from tests.harness import run_ranks


def has_bridge():
    try:
        return importlib.util.find_spec("megatron.bridge") is not None
    except ImportError:
        return False


pytestmark = pytest.mark.skipif(
    not has_bridge(), reason="megatron-bridge is not installed; make test-bridge installs it"
)


def on_cpu():
    """Bridge, imported for real over stand-ins for Transformer Engine."""
    from tests.fakes.transformer_engine import forget_megatron

    forget_megatron()
    from tests.fakes.bridge_on_cpu import prepare

    prepare()


def _train(rank, world_size, folder):
    on_cpu()
    from pathlib import Path

    from megatron.bridge.training import train as bridge_train
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator

    from bdlora_megatron.bridge import AdapterExport, BDLoRA, apply_settings
    from bdlora_megatron.layers import lora_layers
    from examples.bridge.finetune import YAML, tiny_config

    folder = Path(folder)
    seen = []
    step = bridge_train.train_step

    def watched(*args, **kwargs):
        model = args[2] if len(args) > 2 else kwargs["model"]
        chunk = model[0]
        before = {n: p.detach().clone() for n, p in chunk.named_parameters() if p.requires_grad}
        result = step(*args, **kwargs)
        factors = {n: p.detach().clone() for n, p in chunk.named_parameters() if p.requires_grad}
        frozen = {n: p.detach().clone() for n, p in chunk.named_parameters() if not p.requires_grad}
        layers = len(list(lora_layers(chunk)))
        seen.append({"before": before, "factors": factors, "frozen": frozen, "layers": layers})
        return result

    bridge_train.train_step = watched
    config = tiny_config(folder / "base", cpu=True)
    apply_settings(config, YAML, ["peft.scheme=none", "train.train_iters=1"])
    assert config.peft is None
    pretrain(config, forward_step)

    seen.clear()
    destroy_num_microbatches_calculator()
    config = tiny_config(folder / "adapter", cpu=True)
    config.checkpoint.pretrained_checkpoint = str(folder / "base")
    apply_settings(config, YAML, ["train.train_iters=5", "peft.bdlora.export_dense=true"])
    assert isinstance(config.peft, BDLoRA)
    export = AdapterExport()
    pretrain(config, forward_step, callbacks=[export])
    assert [path.name for path in export.exported] == ["hf_adapter", "hf_adapter-dense"]
    first, seen[:] = list(seen), []

    # Started again for more steps, from the last checkpoint.
    destroy_num_microbatches_calculator()
    config = tiny_config(folder / "adapter", cpu=True)
    config.checkpoint.pretrained_checkpoint = str(folder / "base")
    config.checkpoint.load = str(folder / "adapter")
    apply_settings(config, YAML, ["train.train_iters=6"])
    # Its length, which follows from train_iters, is no longer the checkpoint's.
    config.scheduler.override_opt_param_scheduler = True
    pretrain(config, forward_step)
    return first, seen


def saved_keys(folder):
    """The names of what a checkpoint holds."""
    return list(FileSystemReader(folder).read_metadata().state_dict_metadata)


def test_bridges_finetune_trains_and_saves_the_adapter_only(tmp_path):
    for steps, more in run_ranks(2, _train, str(tmp_path), timeout_s=280):
        assert len(steps) == 5
        assert all(step["layers"] == 8 for step in steps)
        first, last = steps[0], steps[-1]
        for name, value in first["factors"].items():
            assert ".adapter." in name
            assert not torch.equal(value, last["factors"][name]), f"{name} did not train"
        for name, value in first["frozen"].items():
            assert torch.equal(value, last["frozen"][name]), f"{name} is not frozen"
        assert len(more) == 1, "the run did not go on where it ended"
        for name, value in more[0]["before"].items():
            assert torch.equal(value, last["factors"][name]), f"{name} was not resumed"
    keys = saved_keys(tmp_path / "adapter" / "iter_0000005")
    weights = [key for key in keys if not key.startswith(("optimizer", "rng", "rerun"))]
    assert weights
    assert all(".adapter." in key for key in weights)
    blocks, dense = (
        read_adapter(tmp_path / "adapter" / name) for name in ("hf_adapter", "hf_adapter-dense")
    )
    assert len(blocks.modules) == len(dense.modules) == 14
    for key, factors in blocks.modules.items():
        assert (factors.num_blocks, dense.modules[key].num_blocks) == (2, 1)
        torch.testing.assert_close(reshard(factors, 1).A, dense.modules[key].A, rtol=0, atol=0)
        torch.testing.assert_close(reshard(factors, 1).B, dense.modules[key].B, rtol=0, atol=0)
    base = saved_keys(tmp_path / "base" / "iter_0000001")
    assert not any(".adapter." in key for key in base)


def _settings(rank, world_size):
    on_cpu()
    from pathlib import Path

    from megatron.bridge.peft.lora import LoRA

    from bdlora_megatron.bridge import BDLoRA, apply_settings, build_peft
    from bdlora_megatron.errors import ConfigError, UnsupportedError
    from examples.bridge.finetune import YAML, tiny_config

    def config():
        return tiny_config(Path("unused"), cpu=True)

    made = apply_settings(config(), YAML, ["peft.bdlora.rank=12", "train.train_iters=9"])
    assert isinstance(made.peft, BDLoRA)
    assert (made.peft.dim, made.train.train_iters) == (12, 9)
    chosen = config()
    chosen.peft = LoRA(dim=4)
    # Bridge's own overrides would leave the recipe's LoRA in place here.
    assert isinstance(apply_settings(chosen, YAML).peft, BDLoRA)
    kept = config()
    kept.peft = LoRA(dim=4)
    assert apply_settings(kept, None, ["train.train_iters=9"]).peft.dim == 4
    assert isinstance(build_peft({"scheme": "lora", "lora": {"rank": 4}}), LoRA)
    with pytest.raises(ConfigError, match="did you mean 'bdlora'"):
        apply_settings(config(), None, ["peft.scheme=bdlor"])
    with pytest.raises(ConfigError, match="cannot read"):
        apply_settings(config(), "absent.yaml")
    with pytest.raises(UnsupportedError, match="whole model"):
        BDLoRA(num_blocks=2).transform(torch.nn.Linear(2, 2), "linear_qkv")


def test_yaml_and_arguments_choose_the_method():
    run_ranks(1, _settings, timeout_s=200)


def _counts(rank, world_size):
    on_cpu()
    from bdlora_megatron import runtime
    from benchmarks import bridge

    bridge.MODEL.update(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=96,
    )
    found = {}
    with runtime.model_parallel(world_size):
        for sequence_parallel in (False, True):
            models = {name: bridge.build(name, sequence_parallel) for name in bridge.METHODS}
            found[sequence_parallel] = {n: bridge.count(model) for n, model in models.items()}
            model = models["bdlora"]
            peft = bridge.block_diagonal()
            bridge.step(model)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if ".adapter." in name:
                        parameter.normal_()
            tokens = bridge.batch()
            on = model(**tokens)
            with peft.disable_adapter(model):
                off = model(**tokens)
            base = models["base"](**tokens)
            torch.testing.assert_close(off, base, rtol=0, atol=0)
            assert (on - base).abs().max() > 1e-3
    return found


def test_a_step_communicates_what_the_base_model_does_and_bridges_lora_more():
    for found in run_ranks(2, _counts, timeout_s=200):
        for rows in found.values():
            base, ours, theirs = (rows[name] for name in ("base", "bdlora", "bridge_lora"))
            assert (ours["calls"], ours["wire_bytes"]) == (base["calls"], base["wire_bytes"])
            assert ours["adapter_parameters_per_rank"] > 0
            assert theirs["total_calls"] > base["total_calls"]
            assert theirs["wire_bytes"] > base["wire_bytes"]


def _contender(rank, world_size):
    on_cpu()
    from bdlora_megatron import runtime
    from bdlora_megatron.bench.contenders import Contenders
    from bdlora_megatron.bench.plan import Arm, BenchPlan
    from bdlora_megatron.bench.run import measure_rank
    from bdlora_megatron.config import Layout, LoRAConfig
    from bdlora_megatron.layers import lora_layers

    small = {"ranks": (4,), "layers": 2, "repeats": 1, "bridge": True, "latencies_s": (0.0,)}
    plan = BenchPlan(decode=((2, 4),), prefill=((1, 4),), train=((2, 4),), **small)
    with runtime.model_parallel(world_size):
        contenders = Contenders(plan)
        theirs = contenders.model_of(Arm(rank=4, bridge=True))
        ours = contenders.model
        lora = LoRAConfig(rank=4, alpha=4.0, layout=Layout.SLORA, fused=True)
        pairs = []
        for name, layer in lora_layers(ours):
            adapter = layer.attach_config(lora, name.rpartition(".")[2])
            other = theirs.get_submodule(name).adapter
            for factor in ("linear_in", "linear_out"):
                mine, yours = (getattr(x, factor).weight for x in (adapter, other))
                mine.data.copy_(torch.nn.init.normal_(yours, std=0.3))
                pairs.append((mine, yours))
        assert len(pairs) == 2 * 4 * plan.shape.num_layers
        inputs = contenders._inputs(2, 4, 0)
        losses = [model(*inputs, labels=inputs[0]) for model in (ours, theirs)]
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
        for loss in losses:
            loss.mean().backward()
        for mine, yours in pairs:
            assert yours.grad.abs().max() > 0
            torch.testing.assert_close(mine.grad, yours.grad, rtol=1e-4, atol=1e-6)
        for _, layer in lora_layers(ours):
            layer.adapter_enabled = False
        # Equal because of the adapters, and not because they are too small to be seen.
        plain = ours(*inputs, labels=inputs[0])
        assert (plain - losses[1]).abs().max() > 0.01, (plain, losses)
        cells = measure_rank(plan, _say_nothing)
    return {(cell.setting.phase, cell.arm.label): cell.collectives for cell in cells}


def _say_nothing(text):
    del text


def test_bridges_lora_in_the_benchmark_computes_what_our_slora_layout_does():
    for counts in run_ranks(2, _contender, timeout_s=300):
        assert len(counts) == 3 * 6
        for phase in ("decode", "prefill", "train"):
            base, slora, bridge = (
                sum(counts[phase, arm].values()) for arm in ("base", "slora 4", "bridge 4")
            )
            # S-LoRA packs; Bridge gathers a row layer's output beside that.
            assert base < slora < bridge
