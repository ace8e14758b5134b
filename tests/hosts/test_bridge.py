"""The plug in the real Megatron-Bridge: `make test-bridge` makes an environment that has it."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from bdlora_megatron.blocks import reshard
from bdlora_megatron.config import DEFAULT_TARGETS
from bdlora_megatron.convert import read_adapter
from tests.harness import run_ranks
from tests.hosts.bridge_runs import (
    TOKENS,
    Case,
    has_hybrid_models,
    make_bridge_base,
    make_hf_base,
    on_cpu,
    reads_hf_bases,
    refused_export,
    train,
)
from tests.hosts.logits import peft_logits
from tests.tolerances import MODEL_BFLOAT16, assert_close


def has_bridge():
    try:
        return importlib.util.find_spec("megatron.bridge") is not None
    except ImportError:
        return False


pytestmark = [
    pytest.mark.skipif(
        not has_bridge(), reason="megatron-bridge is not installed; make test-bridge installs it"
    ),
    pytest.mark.timeout(900),
]


CASES = {
    "tp2": Case(),
    "tp2-hybrid": Case(hybrid=True),
    "tp2-bf16": Case(precision="bf16_mixed"),
    "dp2-bf16-distributed": Case(tensor_parallel=1, precision="bf16_mixed", distributed=True),
}
STEPS, SAVED = 20, 12


def _train_all(rank, world_size, folder):
    """Every case in the same processes, which spend most of their time on importing Bridge."""
    on_cpu()
    hf = Path(folder, "hf")
    found = {
        name: _train(Path(folder, name), hf, case)
        for name, case in CASES.items()
        if has_hybrid_models() or not case.hybrid
    }
    if reads_hf_bases():
        found["hf base"] = train(Path(folder, "from-hf"), hf, CASES["tp2"], 1)
    base = Path(folder, "tp2", "base")
    found["refused"] = refused_export(Path(folder, "refused"), base, CASES["tp2"])
    return found


def _train(folder, hf, case):
    make_bridge_base(hf, folder / "base", case)
    whole = train(
        *(folder / "whole", folder / "base", case, STEPS),
        *(f"checkpoint.save_interval={SAVED}", "peft.bdlora.export_dense=true"),
        keep_after=SAVED,
    )
    # Stopped after its first checkpoint, and started again into another folder.
    rest = train(folder / "rest", folder / "base", case, STEPS, resume=(folder / "whole", SAVED))
    return whole, rest


def saved_keys(folder):
    """The names of what a checkpoint holds."""
    return list(FileSystemReader(folder).read_metadata().state_dict_metadata)


def common_state(folder):
    """What is saved once for all ranks: a file of its own, since Megatron-Core 0.19 a key."""
    from megatron.core import dist_checkpointing

    state = dist_checkpointing.load_common_state_dict(str(folder))
    assert "iteration" in state
    return state


def _assert_trained(seen, case):
    """The loss fell, the adapter alone changed, and its main copies are wider than it."""
    assert len(seen["losses"]) == STEPS
    assert sum(seen["losses"][-5:]) < sum(seen["losses"][:5]) - 5 * 0.3
    start, end = seen["start"], seen["end"]
    assert start["layers"] == end["layers"] == 8
    assert start["trained"].keys() == end["trained"].keys()
    for name, value in start["trained"].items():
        assert ".adapter." in name
        assert not torch.equal(value, end["trained"][name]), f"{name} did not train"
    for name, value in start["frozen"].items():
        assert torch.equal(value, end["frozen"][name]), f"{name} is not frozen"
    narrow = torch.bfloat16 if case.precision else torch.float32
    assert {value.dtype for value in end["trained"].values()} == {narrow}
    assert len(end["moments"]) > 0
    assert {value.dtype for value in end["moments"]} == {torch.float32}
    if case.precision and not case.distributed:
        assert end["copies"].keys() == end["trained"].keys()
    for name, copy in end["copies"].items():
        assert copy.dtype is torch.float32
        weight = end["trained"][name]
        if not case.distributed:
            # Otherwise a rank has its share, a stretch of the flattened weight.
            assert torch.equal(copy.to(narrow), weight)
        assert (copy != copy.to(narrow).float()).any(), "nothing was kept that bfloat16 would lose"


def _assert_same_state(found, wanted):
    for kind in ("trained", "frozen", "copies"):
        assert found[kind].keys() == wanted[kind].keys()
        for name, value in wanted[kind].items():
            assert torch.equal(found[kind][name], value), f"{kind}: {name}"
    assert len(found["moments"]) == len(wanted["moments"])
    assert all(map(torch.equal, found["moments"], wanted["moments"]))


def _assert_exported(folder, hf, logits, precision):
    """PEFT, with either form of the export, computes what Bridge computed."""
    base = peft_logits(hf, None, TOKENS)
    assert (logits - base).abs().max() > 0.2 * base.abs().max()
    tolerance = MODEL_BFLOAT16 if precision else (1e-5, 1e-4)
    names = ("hf_adapter", "hf_adapter-dense")
    for name in names:
        found = peft_logits(hf, folder / "whole" / name, TOKENS)
        assert_close(found, logits, name, tolerance)
    blocks, dense = (read_adapter(folder / "whole" / name) for name in names)
    assert len(blocks.modules) == len(dense.modules) == 14
    for key, factors in blocks.modules.items():
        assert (factors.num_blocks, dense.modules[key].num_blocks) == (2, 1)
        torch.testing.assert_close(reshard(factors, 1).A, dense.modules[key].A, rtol=0, atol=0)
        torch.testing.assert_close(reshard(factors, 1).B, dense.modules[key].B, rtol=0, atol=0)
    return blocks


def _assert_float32_copies(adapter, ranks):
    """Every exported factor is made of the optimizer's copies, bit for bit."""
    copies = torch.cat([c.flatten() for seen in ranks for c in seen["end"]["copies"].values()])
    exported = [t.flatten() for f in adapter.modules.values() for t in (f.A, f.B)]
    assert {t.dtype for t in exported} == {torch.float32}
    assert torch.equal(torch.cat(exported).sort().values, copies.sort().values)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Where the runs of every case are, and what each rank saw in them."""
    root = tmp_path_factory.mktemp("bridge")
    make_hf_base(root / "hf")
    return root, run_ranks(2, _train_all, str(root), timeout_s=800)


@pytest.mark.parametrize("name", CASES)
def test_pretrain_trains_goes_on_and_peft_computes_the_same(name, runs):
    (root, found), case = runs, CASES[name]
    if name not in found[0]:
        pytest.skip("this Bridge provides no HybridModel")
    folder, ranks = root / name, [seen[name] for seen in found]
    for whole, rest in ranks:
        _assert_trained(whole, case)
        _assert_same_state(rest["start"], whole["kept"])
        assert rest["losses"] == whole["losses"][SAVED:]
        _assert_same_state(rest["end"], whole["end"])
        assert [path.name for path in whole["exported"]] == ["hf_adapter", "hf_adapter-dense"]
        assert [path.name for path in rest["exported"]] == ["hf_adapter"]
    adapter = _assert_exported(folder, root / "hf", ranks[0][0]["logits"], case.precision)
    if case.precision and not case.distributed:
        _assert_float32_copies(adapter, [whole for whole, _ in ranks])
    if not case.distributed:
        # The checkpoint itself is an adapter too, at any step.
        saved = read_adapter(folder / "whole" / f"iter_{STEPS:07}")
        assert saved.modules.keys() == adapter.modules.keys()
        for key, factors in adapter.modules.items():
            assert (saved.modules[key].scale, saved.modules[key].num_blocks) == (
                factors.scale,
                factors.num_blocks,
            )
            assert torch.equal(saved.modules[key].A, factors.A)
            assert torch.equal(saved.modules[key].B, factors.B)
    resumed = read_adapter(folder / "rest" / "hf_adapter")
    for key, factors in adapter.modules.items():
        assert torch.equal(resumed.modules[key].A, factors.A)
        assert torch.equal(resumed.modules[key].B, factors.B)
    for step in (SAVED, STEPS):
        keys = saved_keys(folder / "whole" / f"iter_{step:07}")
        weights = [
            key for key in keys if not key.startswith(("optimizer", "rng", "rerun", "common_state"))
        ]
        assert weights
        assert all(".adapter." in key for key in weights)
        # Beside them stands what is not sharded: steps, the schedule, the optimizer's settings.
        assert "model" not in common_state(folder / "whole" / f"iter_{step:07}")
    assert not any(".adapter." in key for key in saved_keys(folder / "base" / "iter_0000001"))


def test_the_base_model_can_be_hugging_faces_own_folder(runs):
    _, ranks = runs
    if "hf base" not in ranks[0]:
        pytest.skip("this Bridge reads base models from its own checkpoints alone")
    for seen in ranks:
        found, wanted = seen["hf base"]["start"]["frozen"], seen["tp2"][0]["start"]["frozen"]
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], value) for name, value in wanted.items())
        assert seen["hf base"]["losses"] == seen["tp2"][0]["losses"][:1]


def test_bridges_own_export_is_refused_before_training(runs):
    root, ranks = runs
    for seen in ranks:
        assert "also_save_hf_checkpoint" in seen["refused"]
    assert not list((root / "refused").glob("iter_*"))


def _settings(rank, world_size, folder):
    on_cpu()
    from megatron.bridge.peft.lora import LoRA
    from megatron.bridge.utils.instantiate_utils import instantiate
    from omegaconf import OmegaConf

    from bdlora_megatron.bridge import BDLoRA, apply_settings, build_peft
    from bdlora_megatron.errors import ConfigError, UnsupportedError
    from examples.bridge.finetune import YAML, tiny_config

    def config():
        return tiny_config(Path("unused"), cpu=True)

    made = apply_settings(config(), YAML, ["peft.bdlora.rank=12", "train.train_iters=9"])
    assert isinstance(made.peft, BDLoRA)
    assert (made.peft.dim, made.train.train_iters) == (12, 9)
    made.peft.lora_dtype = torch.bfloat16
    made.peft.set_params_to_save(torch.nn.Linear(2, 2))
    assert made.peft.params_to_save
    made.to_yaml(str(Path(folder, "run_config.yaml")))
    # Not the whole: Bridge 0.3 cannot make its random data again.
    again = instantiate(OmegaConf.load(Path(folder, "run_config.yaml")).peft)
    assert again == dataclasses.replace(made.peft)
    # Hydra's way to add a key, which Bridge wants for its own PEFT objects.
    assert apply_settings(config(), YAML, ["+peft.bdlora.rank=6"]).peft.dim == 6
    sections = Path(folder, "sections.yaml")
    sections.write_text("train: {train_iters: 7}\npeft: {scheme: none}\n")
    assert apply_settings(config(), sections).train.train_iters == 7
    chosen = config()
    chosen.peft = LoRA(dim=4)
    # Bridge's own overrides would leave the recipe's LoRA in place here.
    assert isinstance(apply_settings(chosen, YAML).peft, BDLoRA)
    chosen.peft = LoRA(dim=4)
    assert apply_settings(chosen, None, ["peft.scheme=none"]).peft is None
    kept = config()
    kept.peft = LoRA(dim=4)
    assert apply_settings(kept, None, ["train.train_iters=9"]).peft.dim == 4
    assert isinstance(build_peft({"scheme": "lora", "lora": {"rank": 4}}), LoRA)
    by_class = Path(folder, "target.yaml")
    by_class.write_text("peft: {_target_: bdlora_megatron.bridge.BDLoRA, dim: 8, num_blocks: 2}\n")
    for recipe in (None, LoRA(dim=4)):
        chosen = config()
        chosen.peft = recipe
        assert apply_settings(chosen, by_class).peft == BDLoRA(dim=8, num_blocks=2)
    by_class.write_text("peft: {_target_: bdlora_megatron.bridge.BDLoRA, dim: 8}\n")
    with pytest.raises(ConfigError, match=r"peft._target_=bdlora_megatron.bridge.BDLoRA"):
        apply_settings(config(), by_class)
    exported = config()
    exported.checkpoint.also_save_hf_checkpoint = True
    assert apply_settings(exported, None, ["peft.scheme=lora"]).peft == LoRA()
    with pytest.raises(UnsupportedError, match="AdapterExport"):
        apply_settings(exported, YAML)
    with pytest.raises(ConfigError, match="did you mean 'bdlora'"):
        apply_settings(config(), None, ["peft.scheme=bdlor"])
    with pytest.raises(ConfigError, match="cannot read"):
        apply_settings(config(), "absent.yaml")
    with pytest.raises(UnsupportedError, match="whole model"):
        BDLoRA(num_blocks=2).transform(torch.nn.Linear(2, 2), "linear_qkv")


def test_yaml_and_arguments_choose_the_method(tmp_path):
    run_ranks(1, _settings, str(tmp_path), timeout_s=200)


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


def _contender(rank, world_size, targets):
    on_cpu()
    from bdlora_megatron import runtime
    from bdlora_megatron.bench.contenders import Contenders
    from bdlora_megatron.bench.plan import BenchPlan, Variant
    from bdlora_megatron.bench.run import measure_rank
    from bdlora_megatron.config import Layout, LoRAConfig
    from bdlora_megatron.layers import lora_layers
    from bdlora_megatron.layers.anatomy import named_modules_global

    small = {"ranks": (4,), "layers": 2, "repeats": 1, "bridge": True, "latencies_s": (0.0,)}
    sizes = {"decode": ((2, 4),), "mixed": ((2, 4),), "prefill": ((1, 4),), "train": ((2, 4),)}
    plan = BenchPlan(**sizes, adapters=(2,), target_modules=targets, **small)
    with runtime.model_parallel(world_size):
        contenders = Contenders(plan)
        theirs = contenders.model_of(Variant(rank=4, bridge=True))
        ours = contenders.model
        lora = LoRAConfig(rank=4, alpha=4.0, layout=Layout.SLORA, fused=True)
        pairs, counterparts = [], dict(named_modules_global(theirs))
        for name, layer in lora_layers(ours):
            adapter = layer.attach_config(lora, name.rpartition(".")[2])
            other = counterparts[name].adapter
            for factor in ("linear_in", "linear_out"):
                mine, yours = (getattr(x, factor).weight for x in (adapter, other))
                mine.data.copy_(torch.nn.init.normal_(yours, std=0.3))
                pairs.append((mine, yours))
        assert len(pairs) == 2 * len(targets) * plan.shape.num_layers
        adapted = [name for name, _ in theirs.named_modules() if name.endswith(".adapter")]
        assert len(adapted) == len(pairs) / 2
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
    return {(cell.setting.phase, cell.variant.label): cell.collectives for cell in cells}


def _say_nothing(text):
    del text


@pytest.mark.parametrize(
    "targets", [DEFAULT_TARGETS, DEFAULT_TARGETS[:2]], ids=["all", "attention"]
)
def test_bridges_lora_in_the_benchmark_computes_what_our_slora_layout_does(targets):
    for counts in run_ranks(2, _contender, targets, timeout_s=300):
        # Bridge's layers hold one adapter.
        assert len(counts) == 4 * 6 - 1
        assert ("mixed", "bridge 4") not in counts
        for phase in ("decode", "prefill", "train"):
            base, slora, bridge = (
                sum(counts[phase, variant].values()) for variant in ("base", "slora 4", "bridge 4")
            )
            # S-LoRA packs; Bridge gathers a row layer's output beside that.
            assert base < slora < bridge
