"""A run that stopped and went on is the run that never stopped."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from bdlora_megatron.errors import ConfigError
from bdlora_megatron.train.checkpoint import checkpoints
from bdlora_megatron.train.loop import ADAPTER
from bdlora_megatron.train.metrics import read_metrics
from bdlora_megatron.train.stop import PreemptedError
from tests.harness import RankError, run_ranks
from tests.train.runs import make_base, make_files, settings, train_rank


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("train"))


def _losses(folder):
    return {m["step"]: m["loss"] for m in read_metrics(folder) if "loss" in m}


def _factors(folder):
    return load_file(folder / ADAPTER / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def whole(root):
    """Six steps at one rank, without a stop and with dropout."""
    folder = root / "whole"
    run_ranks(1, train_rank, _config(root, folder))
    assert len(_losses(folder)) == 6
    return folder


@pytest.fixture(scope="module")
def whole_without_dropout(root):
    """The same without dropout, whose masks are cut differently over other ranks."""
    folder = root / "plain"
    run_ranks(1, train_rank, _config(root, folder, dropout=0.0))
    return folder


def _config(root, folder, **changes):
    peft = {"bdlora": {"num_blocks": 6, "rank": 12, "dropout": changes.pop("dropout", 0.2)}}
    return settings(root, folder, peft=peft, **changes)


def test_the_loss_falls(whole):
    losses = _losses(whole)
    assert losses[6] < losses[1] - 0.1
    validation = [m["validation_loss"] for m in read_metrics(whole) if "validation_loss" in m]
    assert len(validation) == 1


def test_resumed_at_the_same_size_every_bit_is_the_same(root, whole, tmp_path):
    run_ranks(1, train_rank, _config(root, tmp_path, train__train_iters=2))
    (result,) = run_ranks(1, train_rank, _config(root, tmp_path))
    assert result.steps == 6
    assert _losses(tmp_path) == _losses(whole)
    resumed, uninterrupted = _factors(tmp_path), _factors(whole)
    assert resumed.keys() == uninterrupted.keys()
    for name, factor in uninterrupted.items():
        assert torch.equal(resumed[name], factor), name


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (3, {"model__tensor_model_parallel_size": 3, "model__model_class": "gpt"}),
        (2, {"model__tensor_model_parallel_size": 2, "model__sequence_parallel": True}),
        (2, {"model__pipeline_model_parallel_size": 2}),
        (4, {"model__tensor_model_parallel_size": 2, "model__pipeline_model_parallel_size": 2}),
        (2, {"train__micro_batch_size": 1}),
    ],
    ids=["tp3-gpt", "tp2-sequence", "pp2", "tp2-pp2", "dp2"],
)
def test_resumed_at_another_size_the_losses_are_the_same(
    root, whole_without_dropout, tmp_path, world_size, changes
):
    first = _config(root, tmp_path / "parts", dropout=0.0, train__train_iters=3, **changes)
    run_ranks(world_size, train_rank, first)
    # From 0.19 on: from one class of models to the other as well, in both directions.
    model_class = "gpt" if world_size == 4 else "auto"
    last = _config(root, tmp_path / "parts", dropout=0.0, model__model_class=model_class)
    run_ranks(1, train_rank, last)
    wanted, found = _losses(whole_without_dropout), _losses(tmp_path / "parts")
    assert found.keys() == wanted.keys()
    for step, loss in wanted.items():
        # Adam divides by gradients that are almost zero, which magnifies their rounding.
        assert found[step] == pytest.approx(loss, abs=2e-4), step


def test_context_parallel_ranks_train_and_one_rank_goes_on(root, tmp_path):
    packing = {"dataset__packing": False, "dropout": 0.0}
    run_ranks(1, train_rank, _config(root, tmp_path / "whole", **packing))
    changes = {"train__train_iters": 3, "model__context_parallel_size": 2}
    run_ranks(2, train_rank, _config(root, tmp_path / "parts", **packing, **changes))
    run_ranks(1, train_rank, _config(root, tmp_path / "parts", **packing))
    wanted, found = _losses(tmp_path / "whole"), _losses(tmp_path / "parts")
    assert found.keys() == wanted.keys()
    for step, loss in wanted.items():
        assert found[step] == pytest.approx(loss, abs=2e-4), step


@pytest.mark.parametrize("model_class", ["auto", "gpt"])
def test_an_interleaved_pipeline_trains_and_one_rank_goes_on(root, tmp_path, model_class):
    base = make_base(tmp_path / "base", num_hidden_layers=4)
    deep = {"model__hf_path": str(base), "dropout": 0.0}
    chunks = {
        "model__pipeline_model_parallel_size": 2,
        "model__virtual_pipeline_model_parallel_size": 2,
        "model__model_class": model_class,
        "train__micro_batch_size": 1,
        "optimizer": {"lr": 0.02, "use_distributed_optimizer": model_class == "auto"},
        "train__train_iters": 3,
    }
    run_ranks(2, train_rank, _config(root, tmp_path / "parts", **deep, **chunks))
    rest = {"optimizer": chunks["optimizer"]}
    run_ranks(1, train_rank, _config(root, tmp_path / "parts", **deep, **rest))
    run_ranks(1, train_rank, _config(root, tmp_path / "whole", **deep))
    wanted, found = _losses(tmp_path / "whole"), _losses(tmp_path / "parts")
    assert found.keys() == wanted.keys()
    for step, loss in wanted.items():
        assert found[step] == pytest.approx(loss, abs=2e-4), step


@pytest.mark.parametrize("layer", [0, 1])
def test_a_pipeline_stage_without_an_adapter_takes_part(root, tmp_path, layer):
    peft = {"bdlora": {"num_blocks": 6, "rank": 12, "target_modules": [f"*.layers.{layer}.*"]}}
    wanted, found = (
        settings(root, tmp_path / str(pp), peft=peft, model__pipeline_model_parallel_size=pp)
        for pp in (1, 2)
    )
    run_ranks(1, train_rank, wanted)
    run_ranks(2, train_rank, found)
    losses = _losses(tmp_path / "1")
    for step, loss in _losses(tmp_path / "2").items():
        assert loss == pytest.approx(losses[step], abs=2e-4)


def test_checkpoints_hold_no_base_model_and_old_ones_go(root, whole):
    assert [step for step, _ in checkpoints(whole)] == [4, 6]
    size = sum(f.stat().st_size for _, c in checkpoints(whole) for f in c.iterdir()) / 2
    factors = sum(f.numel() * 4 for f in _factors(whole).values())
    # The factors, Adam's two moments, and what names them.
    assert 3 * factors < size < 3 * factors + 200_000
    assert factors < (root / "base" / "model.safetensors").stat().st_size


def _run_until_killed(config):
    """A run in a process group of its own, with the processes that write its checkpoints."""
    os.setpgid(0, 0)
    torch.set_num_threads(1)
    store = os.path.join(config.checkpoint.save, f"store-{os.getpid()}")
    os.makedirs(config.checkpoint.save, exist_ok=True)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=0, world_size=1
    )
    train_rank(0, 1, config)
    os._exit(0)


def test_killed_at_any_moment_the_run_goes_on(root, tmp_path):
    """Kill -9 the whole process group again and again, at moments left to chance."""
    changes = {
        "train__train_iters": 16,
        "checkpoint": {"save": str(tmp_path / "killed"), "save_interval": 1},
        "scheduler": {"lr_decay_iters": 16},
    }
    config = _config(root, tmp_path / "killed", **changes)
    context = multiprocessing.get_context("forkserver")
    chance = random.Random(7)
    kills = 0
    for _ in range(6):
        done = len(_losses(tmp_path / "killed"))
        process = context.Process(target=_run_until_killed, args=(config,))
        process.start()
        _wait_for(lambda done=done: len(_losses(tmp_path / "killed")) > done, process)
        process.join(timeout=chance.uniform(0.0, 0.4))
        if process.exitcode is not None:
            break
        os.killpg(process.pid, 9)
        process.join()
        kills += 1
        found = checkpoints(tmp_path / "killed")
        assert all((path / "metadata.json").exists() for _, path in found)
    assert kills >= 3, "the run ended before it could be killed"
    run_ranks(1, train_rank, config)
    changes["checkpoint"] = {"save": str(tmp_path / "whole")}
    run_ranks(1, train_rank, _config(root, tmp_path / "whole", **changes))
    assert _losses(tmp_path / "killed") == _losses(tmp_path / "whole")
    for name, factor in _factors(tmp_path / "whole").items():
        assert torch.equal(_factors(tmp_path / "killed")[name], factor), name


def _wait_for(condition, process):
    deadline = time.monotonic() + 60.0
    while not condition() and process.is_alive():
        assert time.monotonic() < deadline, "the run does not start"
        time.sleep(0.01)


def _refusals(rank, world_size, cases):
    for config, match in cases:
        with pytest.raises(ConfigError, match=match):
            train_rank(rank, world_size, config)


def test_another_run_is_not_gone_on_with(root, whole, tmp_path):
    before = {path: path.stat().st_mtime for path in whole.rglob("*") if path.is_file()}
    changed = _config(
        root, whole, optimizer={"lr": 0.01}, rng={"seed": 5}, scheduler={}, train__train_iters=7
    )
    other = {"dataset": {"train": str(root / "validation.jsonl"), "too_long": "truncate"}}
    never = {"checkpoint": {"save": str(whole), "resume": False}}
    cases = [
        (changed, r"(?s)optimizer.lr was 0.02 and is 0.01.*rng.seed was 1234 and is 5"),
        (changed, r"moves the learning-rate schedule; set scheduler.lr_decay_iters"),
        (_config(root, whole, **other), "the training data differs"),
        (_config(root, whole, **never), "set checkpoint.resume=true"),
        (_config(root, whole, train__train_iters=5), "6 steps behind it, more than train.train_it"),
    ]
    run_ranks(1, _refusals, cases)
    assert before == {path: path.stat().st_mtime for path in whole.rglob("*") if path.is_file()}


def test_a_loss_that_is_no_number_stops_the_run(root, tmp_path):
    config = _config(root, tmp_path, optimizer={"lr": 1e30, "clip_grad": 0.0})
    with pytest.raises(RankError, match=r"DivergedError: the .* of step \d is (nan|inf).*lower"):
        run_ranks(1, train_rank, config)


def test_other_base_weights_are_not_gone_on_with(root, tmp_path):
    run_ranks(1, train_rank, _config(root, tmp_path / "run", train__train_iters=2))
    base = tmp_path / "base"
    shutil.copytree(root / "base", base)
    moved = _config(root, tmp_path / "run", model={"hf_path": str(base), "seq_length": 48})
    weights = load_file(base / "model.safetensors")
    for name in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight"):
        save_file({**weights, name: weights[name] * 1.3}, base / "model.safetensors")
        run_ranks(1, _refusals, [(moved, "the base model's weights differ from the checkpoint's")])
    save_file(weights, base / "model.safetensors")
    (result,) = run_ranks(1, train_rank, moved)
    assert result.steps == 6


def test_a_checkpoint_that_knows_no_weights_is_gone_on_with(root, tmp_path):
    run_ranks(1, train_rank, _config(root, tmp_path, train__train_iters=2))
    facts = tmp_path / "step_00000002" / "run.json"
    old = json.loads(facts.read_text())
    for section, key in (("dataset", "train_on"), ("dataset", "ignore_keys")):
        del old["settings"][section][key]
    facts.write_text(json.dumps({key: value for key, value in old.items() if key != "weights"}))
    (result,) = run_ranks(1, train_rank, _config(root, tmp_path, train__train_iters=4))
    assert result.steps == 4


def _asked_on_one_rank(rank, world_size, config):
    """A run in which the last rank is sent SIGTERM; where each rank stopped."""

    def ask():
        while len(_losses(config.checkpoint.save)) < 3:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    if rank == world_size - 1:
        threading.Thread(target=ask).start()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(PreemptedError, match="stopped by SIGTERM and saved after step") as stopped:
        train_rank(rank, world_size, config)
    assert signal.getsignal(signal.SIGTERM) == before
    return str(stopped.value)


@pytest.mark.parametrize("parallel", ["tensor", "pipeline"])
def test_all_ranks_stop_at_the_step_at_which_one_is_asked(root, tmp_path, parallel):
    sizes = {f"model__{parallel}_model_parallel_size": 2}
    endless = {"train__train_iters": 10_000, "scheduler": {"lr_decay_style": "constant"}}
    saves = {"checkpoint": {"save": str(tmp_path)}}
    config = _config(root, tmp_path, **sizes, **endless, **saves)
    told = run_ranks(2, _asked_on_one_rank, config)
    ((step, _),) = checkpoints(tmp_path)
    assert len(set(told)) == 1
    assert f"after step {step} of" in told[0]
    assert step == max(_losses(tmp_path)) >= 3
