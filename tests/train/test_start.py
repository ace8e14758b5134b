"""A run that starts from an adapter computes that adapter's function, whoever trained it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from bdlora_megatron.convert import read_adapter, write_adapter
from bdlora_megatron.convert.adapter.compare import compare_adapters
from bdlora_megatron.convert.merge import merge_adapter
from bdlora_megatron.convert.structure import Structure, restructure
from bdlora_megatron.errors import ConfigError
from bdlora_megatron.train.checkpoint import checkpoints
from bdlora_megatron.train.config import load_config
from bdlora_megatron.train.launch import check_launch
from bdlora_megatron.train.loop import ADAPTER, BEST_ADAPTER
from tests.harness import run_ranks
from tests.tolerances import assert_close
from tests.train.logits import checkpoint_logits, peft_logits, tokens
from tests.train.runs import make_files, settings, train_each, train_rank

EXAMPLES = Path(__file__).parents[2] / "examples" / "train"
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def vanilla(root):
    return _train_in_peft(root, root / "vanilla", r=4, lora_alpha=6, target_modules=ALL)


def _train_in_peft(root, folder, **options):
    """A vanilla LoRA after a few steps of PEFT and torch's Adam."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(**options))
    factors = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.Adam(factors, lr=0.05)
    for _ in range(3):
        adam.zero_grad()
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        adam.step()
    model.save_pretrained(folder)
    return folder


def _start(root, save, init_from, peft, **changes):
    return settings(root, save, peft={"init_from": str(init_from), **peft}, **changes)


BLOCKS = {"bdlora": {"num_blocks": 6, "rank": 24}}
TENSOR, STAGES = "model__tensor_model_parallel_size", "model__pipeline_model_parallel_size"
#: What PEFT's vanilla LoRA of rank 4 becomes, and over which ranks, by their number.
BECOMES = {
    3: [(BLOCKS, {TENSOR: 3})],
    2: [
        (BLOCKS, {STAGES: 2}),
        ({"bdlora": {"num_blocks": 6, "rank": 36, "alpha": 54}}, {TENSOR: 2}),
        ({"scheme": "lora", "lora": {"rank": 4}}, {TENSOR: 2}),
        ({"scheme": "slora", "lora": {"rank": 6}}, {TENSOR: 2}),
    ],
}


@pytest.mark.parametrize("ranks", BECOMES)
def test_a_run_starts_with_the_function_of_pefts_adapter(root, vanilla, tmp_path, ranks):
    configs = [
        _start(root, tmp_path / str(number), vanilla, peft, train__train_iters=0, **changes)
        for number, (peft, changes) in enumerate(BECOMES[ranks])
    ]
    run_ranks(ranks, train_each, configs)
    wanted, base = peft_logits(root / "base", vanilla), peft_logits(root / "base")
    assert (wanted - base).abs().max() > 0.05 * base.abs().max()
    for number, (peft, _) in enumerate(BECOMES[ranks]):
        adapter = tmp_path / str(number) / ADAPTER
        found = peft_logits(root / "base", adapter)
        assert_close(found, wanted, f"PEFT's logits of {peft}", (1e-5, 1e-4))
        options = json.loads((adapter / "adapter_config.json").read_text())
        section = peft.get("bdlora") or peft["lora"]
        assert options["r"] == section["rank"]
        assert options["lora_alpha"] == section.get("alpha", 2 * section["rank"])


def _told(*configs):
    """What each of several runs says, or why it is refused."""
    (ended,) = run_ranks(1, train_each, configs)
    return [f"refused: {end}" if isinstance(end, ConfigError) else said for end, said in ended]


def test_every_format_starts_the_same_run_to_the_bit(root, vanilla, tmp_path):
    """The adapter of a run in four formats; in mixed precision the float32 copies have it too."""
    first = _start(root, tmp_path / "first", vanilla, BLOCKS, train__train_iters=2)
    run_ranks(1, train_rank, first)
    trained = read_adapter(tmp_path / "first" / ADAPTER)
    sources = {"peft": tmp_path / "first" / ADAPTER, "run": checkpoints(tmp_path / "first")[-1][1]}
    sources["megatron"] = write_adapter(trained, tmp_path / "megatron", "megatron")
    sources["bf16"] = sources["run"]
    # Formats without blocks: against the same LoRA from PEFT's folder.
    sources["vanilla"] = vanilla
    sources["bridge"] = write_adapter(read_adapter(vanilla), tmp_path / "bridge", "bridge")
    precision = {name: "bf16" if name == "bf16" else "fp32" for name in sources}
    configs = [
        _start(
            root,
            tmp_path / f"from-{name}",
            source,
            {"bdlora": {"num_blocks": 6, "rank": 24}},
            train__train_iters=0,
            train__precision=precision[name],
        )
        for name, source in sources.items()
    ]
    for name, told in zip(sources, _told(*configs), strict=True):
        blocked = name not in {"vanilla", "bridge"}
        rank = 24 if blocked else 4
        assert f"14 modules of rank {rank}, as rank 24 in 6 blocks without loss" in told, name
        found = read_adapter(tmp_path / f"from-{name}" / ADAPTER).modules
        wanted = trained if blocked else read_adapter(tmp_path / "from-vanilla" / ADAPTER)
        assert found.keys() == wanted.modules.keys()
        for key, factors in wanted.modules.items():
            assert torch.equal(found[key].A, factors.A), (name, key)
            assert torch.equal(found[key].B, factors.B), (name, key)


def test_truncated_the_error_is_told(root, vanilla, tmp_path):
    peft = {"init_structure": "truncate", "bdlora": {"num_blocks": 6, "rank": 12, "alpha": 18}}
    (told,) = _told(_start(root, tmp_path, vanilla, peft, train__train_iters=0))
    structure = Structure(mode="truncate", num_blocks=6, rank=12)
    wanted = restructure(read_adapter(vanilla), structure)
    error = wanted.report().error
    assert error > 0.1
    assert f"truncated to rank 12 in 6 blocks with a relative error of {error:.3g} (" in told
    found = compare_adapters(read_adapter(tmp_path / ADAPTER), wanted.adapter)
    assert found.is_same(1e-5), found.table()


def test_what_the_adapter_lacks_starts_fresh_and_is_told(root, tmp_path):
    """Two projections, of two ranks and scales, where the run has seven of one."""
    options = {"target_modules": ["q_proj", "down_proj"], "alpha_pattern": {"down_proj": 3}}
    source = _train_in_peft(
        root, tmp_path / "two", r=2, lora_alpha=4, rank_pattern={"q_proj": 4}, **options
    )
    configs = [
        _start(root, tmp_path / "warm", source, BLOCKS, train__train_iters=0),
        settings(root, tmp_path / "cold", peft=BLOCKS, train__train_iters=0),
    ]
    told, _ = _told(*configs)
    assert "4 modules of rank 2 to 4, as rank 24 in 6 blocks without loss" in told
    assert "scale 1, 1.5 folded into B, which rounds it once; the run's is 2" in told
    assert "2 modules have less rank than 24 (layers.0.mlp.down_proj, layers.1." in told
    assert "10 targets are not in the adapter and start fresh, with B at zero" in told
    assert_close(
        peft_logits(root / "base", tmp_path / "warm" / ADAPTER),
        peft_logits(root / "base", source),
        "PEFT's logits",
        (1e-5, 1e-4),
    )
    warm, cold = (read_adapter(tmp_path / name / ADAPTER).modules for name in ("warm", "cold"))
    given = read_adapter(source).modules
    for key, factors in cold.items():
        if key not in given:
            assert torch.equal(warm[key].A, factors.A), key
            assert not warm[key].B.any()
        elif key.name == "down_proj":
            # Of each block's four directions the first two are the adapter's.
            fresh = torch.arange(24) % 4 >= 2
            assert torch.equal(warm[key].A[fresh], factors.A[fresh])
            assert not torch.equal(warm[key].A[~fresh], factors.A[~fresh])
            assert not warm[key].B[:, fresh].any()


def test_settings_that_disagree_are_refused_and_all_listed(root, vanilla, tmp_path):
    section = {
        "num_blocks": 6,
        "rank": 12,
        "alpha": 12,
        "target_modules": ["linear_qkv", "linear_proj", "linear_fc2"],
    }
    config = _start(root, tmp_path / "run", vanilla, {"bdlora": section})
    wanted = (
        r"(?s)does not agree with the settings:.*"
        r"target_modules: 4 modules of the adapter are no targets \(layers.0.mlp.gate_proj, .*"
        r"; add linear_fc1.*alpha is 12, a scale of 1 at rank 12, and the adapter's is 1.5; set "
        r"alpha: 18, or.*rank is 12, and the adapter needs 24 in 6 blocks to start without loss"
    )
    with pytest.raises(ConfigError, match=wanted):
        check_launch(config)
    (told,) = _told(config)
    assert "does not agree with the settings" in told
    assert not list((tmp_path / "run").glob("step_*"))
    shutil.copytree(vanilla, tmp_path / "other")
    options = json.loads((tmp_path / "other" / "adapter_config.json").read_text())
    other = {**options, "use_dora": True}
    (tmp_path / "other" / "adapter_config.json").write_text(json.dumps(other))
    with pytest.raises(ConfigError, match="dora"):
        check_launch(_start(root, tmp_path / "run", tmp_path / "other", BLOCKS))
    with pytest.raises(ConfigError, match="nowhere is no folder"):
        check_launch(_start(root, tmp_path / "run", tmp_path / "nowhere", BLOCKS))


def test_a_resumed_run_goes_on_from_its_checkpoint_and_from_the_same_start(root, vanilla, tmp_path):
    whole = _start(root, tmp_path / "whole", vanilla, BLOCKS, train__train_iters=4)
    parts = tmp_path / "parts"
    begun = _start(root, parts, vanilla, BLOCKS, train__train_iters=2)
    moved, other = tmp_path / "moved", tmp_path / "other"
    shutil.copytree(vanilla, moved)
    options = {"train__train_iters": 4}
    _train_in_peft(root, other, r=4, lora_alpha=6, target_modules=ALL[:4])
    told = _told(
        whole,
        begun,
        _start(root, parts, other, BLOCKS, **options),
        settings(root, parts, peft=BLOCKS, **options),
        _start(root, parts, moved, BLOCKS, **options),
    )
    for refused in told[2:4]:
        assert "the adapter that the run starts from (peft.init_from) differs" in refused
    assert "starts from" not in told[4]
    assert "resumed after step 2" in told[4]
    once, twice = (read_adapter(folder / ADAPTER).modules for folder in (tmp_path / "whole", parts))
    for key, factors in once.items():
        assert torch.equal(twice[key].A, factors.A), key
        assert torch.equal(twice[key].B, factors.B), key


def test_from_peft_to_a_merged_model_the_logits_stay_at_every_hand_over(root, tmp_path):
    """The example for a warm start: PEFT's LoRA, two tensor-parallel sizes, best step, merged."""
    source = _train_in_peft(
        root, tmp_path / "vanilla", r=8, lora_alpha=16, target_modules=ALL, lora_dropout=0.05
    )

    def config(save, tp, iters):
        overrides = {
            "model.hf_path": root / "base",
            "model.seq_length": 48,
            "model.tensor_model_parallel_size": tp,
            "peft.init_from": source,
            "dataset.train": root / "train.jsonl",
            "dataset.validation": root / "validation.jsonl",
            "dataset.too_long": "truncate",
            "train.train_iters": iters,
            "train.eval_interval": 1,
            "optimizer.lr": 0.1,
            "scheduler.lr_warmup_iters": 0,
            "scheduler.lr_decay_style": "constant",
            "checkpoint.save": tmp_path / save,
            "logger.tensorboard": "false",
        }
        return load_config(
            EXAMPLES / "warm_start.yaml", [f"{key}={value}" for key, value in overrides.items()]
        )

    base = root / "base"
    run_ranks(1, train_each, [config("start", 1, 0), config("run", 1, 2)])
    given = peft_logits(base, source)
    started = peft_logits(base, tmp_path / "start" / ADAPTER)
    assert_close(started, given, "PEFT's logits at the start", (1e-5, 1e-4))
    last = config("run", 3, 10)
    result, *_ = run_ranks(3, train_rank, last)
    assert result.best_step < result.steps
    for name, step in ((ADAPTER, result.steps), (BEST_ADAPTER, result.best_step)):
        trained, *_ = run_ranks(3, checkpoint_logits, last, step)
        found = peft_logits(base, tmp_path / "run" / name)
        assert_close(found, trained, f"PEFT's logits of {name}", (1e-5, 1e-4))
    assert (found - given).abs().max() > 0.02 * given.abs().max()
    merge_adapter(base, read_adapter(tmp_path / "run" / BEST_ADAPTER), tmp_path / "merged")
    assert_close(peft_logits(tmp_path / "merged"), found, "logits merged", (1e-5, 1e-4))
