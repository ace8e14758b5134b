"""Saving while training goes on: the same checkpoints, or an error; never half of one."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter

import psutil
import pytest
import torch
from safetensors.torch import load_file

from bdlora_megatron.runtime import record_collectives
from bdlora_megatron.train.checkpoint import SaveError, Saver, checkpoints, load_checkpoint
from bdlora_megatron.train.loop import ADAPTER
from bdlora_megatron.train.metrics import read_metrics
from bdlora_megatron.train.model import build_model
from bdlora_megatron.train.step import Stepper
from tests.harness import RankError, run_ranks
from tests.tp.session import model_parallel
from tests.train.runs import (
    first_batches,
    make_files,
    settings,
    train_rank,
)

TP = 2


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("async"))


def _config(root, save, precision="fp32", background=True):
    return settings(
        root,
        save,
        model={"hf_path": str(root / "base"), "seq_length": 48, "tensor_model_parallel_size": TP},
        train__precision=precision,
        checkpoint={"save": str(save), "save_interval": 1, "async_save": background},
    )


def _train(rank, world_size, configs):
    """Runs, and how often each forked a process."""
    forks = []
    os.register_at_fork(before=lambda: forks.append(rank))
    for config in configs:
        train_rank(rank, world_size, config)
    return len(forks), psutil.Process().children(recursive=True)


def _tensors(folder):
    return load_file(folder / ADAPTER / "adapter_model.safetensors")


def test_a_run_saves_what_it_would_have_saved_while_it_waits(root, tmp_path):
    ways = {"meanwhile": True, "waiting": False}
    configs = [_config(root, tmp_path / name, "bf16", way) for name, way in ways.items()]
    # Nothing is forked, and no process is left.
    assert run_ranks(TP, _train, configs) == [(0, [])] * TP
    # From a checkpoint that was not the last one: what was saved is what was trained.
    found = checkpoints(tmp_path / "meanwhile")
    assert [step for step, _ in found] == [5, 6]
    (tmp_path / "rest").mkdir()
    (tmp_path / "rest" / found[0][1].name).symlink_to(found[0][1], target_is_directory=True)
    run_ranks(TP, _train, [_config(root, tmp_path / "rest", "bf16", background=False)])
    names = ("meanwhile", "waiting", "rest")
    losses = {n: [m["loss"] for m in read_metrics(tmp_path / n) if "loss" in m] for n in names}
    assert losses["meanwhile"] == losses["waiting"]
    assert losses["rest"] == losses["waiting"][5:]
    wanted = _tensors(tmp_path / "waiting")
    for name in ("meanwhile", "rest"):
        for key, factor in _tensors(tmp_path / name).items():
            assert torch.equal(factor, wanted[key]), f"{name}: {key}"


def _stepper(config):
    model, _ = build_model(config)
    return Stepper(model, config), first_batches(config, micro_batch_size=2)


def _factors(stepper):
    return [p.detach().clone() for p in stepper.model.parameters() if p.requires_grad]


def _hold(saver, rank):
    """Stop the process of the second rank, so that its save stays under way."""
    process = psutil.Process(saver._process._process.pid)
    if rank == 1:
        process.suspend()
    torch.distributed.barrier()
    return process


def _meanwhile(rank, world_size, config):
    """Steps while a save is under way; what they changed, and what a load of it gives."""
    folder = config.checkpoint.save
    with model_parallel(TP):
        stepper, batches = _stepper(config)
        stepper.train_step(0, batches)
        with Saver(folder, keep=2, background=True) as saver:
            saver.save(1, stepper, {})
            process, saved = _hold(saver, rank), _factors(stepper)
            for step in (1, 2):
                stepper.train_step(step, batches)
                with record_collectives() as log:
                    saver.poll()
                assert Counter(call.kind for call in log.calls) == {"all_reduce": 1}
                assert checkpoints(folder) == []
            # As a scheduler may tell every process of a job: only the rank is to heed it.
            process.terminate()
            process.resume()
            saver.wait()
            torch.distributed.barrier()
            assert [step for step, _ in checkpoints(folder)] == [1]
            with record_collectives() as log:
                saver.poll()
            assert not log.calls
            moved = [not torch.equal(a, b) for a, b in zip(_factors(stepper), saved, strict=True)]
        fresh, _ = _stepper(config)
        assert load_checkpoint(checkpoints(folder)[0][1], fresh) == 1
        same = [torch.equal(a, b) for a, b in zip(_factors(fresh), saved, strict=True)]
        return all(moved), all(same), process.is_running()


def test_training_goes_on_and_the_name_waits_for_every_ranks_files(root, tmp_path):
    assert run_ranks(TP, _meanwhile, _config(root, tmp_path)) == [(True, True, False)] * TP


def _failing(rank, world_size, config):
    """Saves that fail on one rank; what every rank is told."""
    folder, told = config.checkpoint.save, []
    with model_parallel(TP):
        stepper, batches = _stepper(config)
        stepper.train_step(0, batches)
        with Saver(folder, keep=2, background=True) as saver:
            saver.save(1, stepper, {})
            saver.wait()
            for step, ending in ((2, "folder"), (3, "process")):
                stepper.train_step(step, batches)
                saver.save(step, stepper, {})
                process = _hold(saver, rank)
                if rank == 1 and ending == "folder":
                    path = f"{folder}/step_00000002.unfinished"
                    os.rename(path, f"{folder}/moved")
                elif rank == 1:
                    process.kill()
                if process.is_running():
                    process.resume()
                with pytest.raises(SaveError) as error:
                    saver.wait()
                told.append(str(error.value))
                assert [step for step, _ in checkpoints(folder)] == [1]
    return told


def test_a_save_that_fails_is_an_error_of_every_rank(root, tmp_path):
    first, second = run_ranks(TP, _failing, _config(root, tmp_path))
    assert first == second
    whys = ((2, "FileNotFoundError"), (3, "rank 1: the process that writes ended with status -9"))
    for told, (step, why) in zip(first, whys, strict=True):
        assert f"the checkpoint of step {step} could not be written by rank" in told
        assert why in told
        assert f"the ones before it in {tmp_path} are kept" in told


def _killed(rank, world_size, config):
    with model_parallel(TP):
        stepper, batches = _stepper(config)
        stepper.train_step(0, batches)
        saver = Saver(config.checkpoint.save, keep=2, background=True)
        saver.save(1, stepper, {})
        saver.wait()
        stepper.train_step(1, batches)
        saver.save(2, stepper, {})
        process = _hold(saver, rank)
        with open(f"{config.checkpoint.save}/pid-{rank}", "w") as file:
            file.write(str(process.pid))
        torch.distributed.barrier()
        os.kill(os.getpid(), signal.SIGKILL)


def test_killed_while_a_save_is_under_way_the_one_before_is_good(root, tmp_path):
    config = _config(root, tmp_path)
    with pytest.raises(RankError, match="died"):
        run_ranks(TP, _killed, config)
    assert [step for step, _ in checkpoints(tmp_path)] == [1]
    assert (tmp_path / "step_00000002.unfinished").exists()
    pids = [int((tmp_path / f"pid-{rank}").read_text()) for rank in range(TP)]
    deadline = time.monotonic() + 30.0
    for pid in pids:
        while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline, "a process outlives its rank"
            psutil.Process(pid).resume()
            time.sleep(0.05)
    run_ranks(TP, _loads, config)


def _loads(rank, world_size, config):
    with model_parallel(TP):
        stepper, batches = _stepper(config)
        ((_, path),) = checkpoints(config.checkpoint.save)
        assert load_checkpoint(path, stepper) == 1
        with Saver(config.checkpoint.save, keep=2) as saver:
            stepper.train_step(1, batches)
            saver.save(2, stepper, {})
        torch.distributed.barrier()
    assert [step for step, _ in checkpoints(config.checkpoint.save)] == [1, 2]
