"""The best step is kept, early stopping ends a run, and a stop in between changes neither."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from bdlora_megatron.convert import read_adapter
from bdlora_megatron.train.checkpoint import checkpoints, read_facts
from bdlora_megatron.train.loop import ADAPTER, BEST_ADAPTER
from bdlora_megatron.train.metrics import read_metrics
from tests.harness import run_ranks
from tests.train.runs import make_files, settings, train_each, train_rank

PATIENCE = 2


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("best"))


def _config(root, folder, iters=20, **changes):
    """A run that overfits after a few steps: too large a rate, and a lot of them."""
    train = {
        "train_iters": iters,
        "global_batch_size": 4,
        "micro_batch_size": 2,
        "eval_interval": 1,
        "early_stopping_patience": PATIENCE,
    }
    values = {
        "train": {**train, **changes.pop("train", {})},
        "checkpoint": {"save": str(folder), "keep": 1, "keep_best": True},
        "optimizer": {"lr": 0.08},
        "scheduler": {"lr_decay_style": "constant"},
    }
    return settings(root, folder, **{**values, **changes})


def _evaluations(folder):
    return {m["step"]: m["validation_loss"] for m in read_metrics(folder) if "best_step" in m}


def _same(one, other):
    one, other = read_adapter(one).modules, read_adapter(other).modules
    return one.keys() == other.keys() and all(
        torch.equal(one[key].A, other[key].A) and torch.equal(one[key].B, other[key].B)
        for key in one
    )


@pytest.fixture(scope="module")
def whole(root):
    """The result of a run that stops early, its folder, and what it said."""
    folder = root / "whole"
    (((result, told),),) = run_ranks(1, train_each, [_config(root, folder)])
    return result, folder, told


def test_the_best_step_is_kept_and_waiting_for_a_better_one_ends_the_run(root, whole, tmp_path):
    result, folder, told = whole
    losses = _evaluations(folder)
    best = min(losses, key=losses.get)
    assert 1 < best < result.steps == best + PATIENCE < 20
    assert (result.best_step, result.best_validation_loss) == (best, losses[best])
    assert result.stopped_early
    assert result.exported == (folder / ADAPTER, folder / BEST_ADAPTER)
    assert f"stopped after step {best + PATIENCE}: no validation loss below" in told
    assert [m["best_step"] for m in read_metrics(folder) if "best_step" in m][-1] == best
    # ``keep: 1`` would leave the last alone.
    kept = checkpoints(folder)
    assert [step for step, _ in kept] == [best, result.steps]
    assert _same(folder / BEST_ADAPTER, kept[0][1])
    assert _same(folder / ADAPTER, kept[1][1])
    assert not _same(folder / ADAPTER, folder / BEST_ADAPTER)
    peft = {"init_from": str(folder / BEST_ADAPTER), "bdlora": {"num_blocks": 6, "rank": 12}}
    again = settings(root, tmp_path / "again", peft=peft, train__train_iters=0)
    ended = _config(root, folder)
    patient = _config(root, tmp_path / "patient", 20, train={"early_stopping_patience": 4})
    shutil.copytree(folder, tmp_path / "patient")
    (((started, _), (same, told), (longer, _)),) = run_ranks(1, train_each, [again, ended, patient])
    assert started.validation_loss == pytest.approx(losses[best], rel=1e-6)
    assert same == result, "a run that has ended tells its result again"
    assert f"stopped after step {best + PATIENCE}: " in told
    assert longer.steps > result.steps, "with more patience it goes on"


@pytest.mark.parametrize("parallel", ["tensor", "pipeline"])
def test_stopped_and_resumed_at_another_size_the_end_is_the_same(root, whole, tmp_path, parallel):
    result, folder, _ = whole
    run_ranks(1, train_rank, _config(root, tmp_path, result.best_step + 1))
    facts = read_facts(checkpoints(tmp_path)[-1][1])["best"]
    assert (facts["step"], facts["waited"]) == (result.best_step, 1)
    # As after a kill between the export of a later best and its checkpoint.
    shutil.rmtree(tmp_path / BEST_ADAPTER)
    shutil.copytree(tmp_path / ADAPTER, tmp_path / BEST_ADAPTER)
    sizes = {f"model__{parallel}_model_parallel_size": 2}
    found = run_ranks(2, train_rank, _config(root, tmp_path, **sizes))
    for each in found:
        assert each == found[0]
        assert (each.steps, each.best_step) == (result.steps, result.best_step)
        assert each.best_validation_loss == result.best_validation_loss
        assert each.stopped_early
    assert _same(tmp_path / BEST_ADAPTER, folder / BEST_ADAPTER)
    assert json.loads((tmp_path / BEST_ADAPTER / "adapter_config.json").read_text()) == json.loads(
        (folder / BEST_ADAPTER / "adapter_config.json").read_text()
    )


def test_a_best_step_that_was_not_kept_is_looked_for_anew(root, whole, tmp_path):
    result, _, _ = whole
    plain = {"save": str(tmp_path), "keep": 1}
    first = _config(root, tmp_path, result.best_step + 1, checkpoint=plain)
    last = _config(root, tmp_path)
    (((begun, _), (ended, _)),) = run_ranks(1, train_each, [first, last])
    assert begun.best_step == result.best_step
    assert not (tmp_path / "step_00000001").exists()
    assert begun.exported == (tmp_path / ADAPTER,)
    assert ended.best_step == ended.steps == result.steps
    assert (tmp_path / BEST_ADAPTER).exists()
