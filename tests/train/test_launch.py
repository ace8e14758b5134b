"""The command: it starts its ranks, tells what is wrong, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from bdlora_megatron.errors import ConfigError
from bdlora_megatron.train import to_mapping
from bdlora_megatron.train.checkpoint import checkpoints
from bdlora_megatron.train.cli import add_parser
from bdlora_megatron.train.launch import RankDiedError, launch
from bdlora_megatron.train.loop import ADAPTER
from bdlora_megatron.train.metrics import read_metrics
from tests.harness import run_ranks
from tests.train.runs import make_base, make_files, settings, train_rank

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("launch"))


def _command(*arguments, program=(sys.executable, "-W", "ignore")):
    command = [*program, "-m", "bdlora_megatron.train", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=ENVIRONMENT, check=False
    )


def _yaml(config, path):
    path.write_text(yaml.safe_dump(to_mapping(config)))
    return path


def _processes(folder):
    """Processes whose command line or environment names the folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                text = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
            except OSError:
                continue
            if str(folder).encode() in text:
                found.append(int(entry.name))
    return found


def test_the_command_trains_on_ranks_of_its_own(root, tmp_path):
    config = settings(
        root,
        tmp_path / "run",
        model={"hf_path": str(root / "base"), "seq_length": 48, "tensor_model_parallel_size": 2},
        logger={},
        train__train_iters=2,
        train__eval_interval=1,
    )
    done = _command(_yaml(config, tmp_path / "run.yaml"), "train.train_iters=3", "--json")
    assert done.returncode == 0, done.stderr
    for line in ("parameters trained on this rank of 2", "step 3/3  loss ", "tokens/s"):
        assert line in done.stdout
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["exported"] == [str(tmp_path / "run" / ADAPTER)]
    assert result["steps"] == 3
    assert "100%" in done.stderr, "a progress bar"
    kinds = ["loss" if "loss" in m else "validation_loss" for m in read_metrics(tmp_path / "run")]
    assert kinds == ["loss", "validation_loss"] * 3
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    (events,) = (tmp_path / "run" / "tensorboard").iterdir()
    for name in (b"train/loss", b"train/tokens_per_second", b"validation/loss"):
        assert name in events.read_bytes()


def test_torchrun_and_the_launcher_train_the_same(root, tmp_path):
    model = {"hf_path": str(root / "base"), "seq_length": 48, "tensor_model_parallel_size": 2}
    config = settings(root, tmp_path / "one", model=model, train__train_iters=2)
    program = (sys.executable, "-W", "ignore", "-m", "torch.distributed.run")
    standalone = (*program, "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2")
    done = _command(_yaml(config, tmp_path / "one.yaml"), program=standalone)
    assert done.returncode == 0, done.stderr
    assert launch(settings(root, tmp_path / "two", model=model, train__train_iters=2)).steps == 2
    losses = [[m.get("loss") for m in read_metrics(tmp_path / name)] for name in ("one", "two")]
    assert losses[0] == losses[1]


def test_problems_are_one_message_and_nothing_is_written(root, tmp_path):
    path = _yaml(settings(root, tmp_path / "run"), tmp_path / "run.yaml")
    done = _command(path, "peft.bdlora.rnk=8", "--check")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("did you mean peft.bdlora.rank?")
    assert _command(path, "--check").returncode == 0
    assert not (tmp_path / "run").exists()
    done = _command(
        path,
        "model.pipeline_model_parallel_size=3",
        "model.tensor_model_parallel_size=5",
        "peft.bdlora.num_blocks=5",
        "--ranks=16",
        "--check",
    )
    assert done.returncode == 2
    assert "num_hidden_layers=2 cannot be divided over 3 pipeline stages; use one of [1, 2]" in (
        done.stderr
    )
    for problem in (
        "tp=5 does not divide 12 heads",
        "rank=12",
        "16 ranks; one copy of the model takes 15",
    ):
        assert problem in done.stderr
    two = settings(root, tmp_path / "run", model__pipeline_model_parallel_size=2)
    with pytest.raises(ConfigError, match="3 ranks; one copy of the model takes 2"):
        launch(two, ranks=3)


def test_an_error_of_a_rank_is_the_launchers(root, tmp_path):
    config = settings(root, tmp_path / "run", dataset={"train": str(tmp_path / "none.jsonl")})
    with pytest.raises(ConfigError, match=r"cannot read .*none\.jsonl"):
        launch(config, ranks=2)
    # Tokens without a row in the embedding, which a rank of two would look up as zeros.
    make_base(root / "small", vocab_size=270)
    small = settings(
        root,
        tmp_path / "run",
        model={"hf_path": str(root / "small"), "tensor_model_parallel_size": 2},
    )
    with pytest.raises(ConfigError, match=r"line 2: token \d+ .* is not among the 270 of the base"):
        launch(small)
    (root / "broken").mkdir(exist_ok=True)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        source = root / "base" / name
        if source.exists():
            (root / "broken" / name).write_bytes(source.read_bytes())
    broken = settings(root, tmp_path / "run", model={"hf_path": str(root / "broken")})
    with pytest.raises((ConfigError, RankDiedError), match="safetensors"):
        launch(broken)


def _start(path, tmp_path, **how):
    """A training, whose processes `_processes` finds."""
    command = [sys.executable, "-W", "ignore", "-m", "bdlora_megatron.train", str(path)]
    environment = {**ENVIRONMENT, "RUN_OF_THIS_TEST": str(tmp_path)}
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, **how}
    return subprocess.Popen(command, env=environment, text=True, **streams)


@pytest.mark.parametrize(
    ("ending", "status"),
    [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)],
    ids=["killed", "interrupted"],
)
def test_no_rank_outlives_its_launcher(root, tmp_path, ending, status):
    config = settings(root, tmp_path / "run", train__train_iters=10_000, scheduler={})
    path = _yaml(config, tmp_path / "run.yaml")
    process = _start(path, tmp_path, stderr=subprocess.DEVNULL)
    _wait(lambda: len(read_metrics(tmp_path / "run")) > 2)
    assert len(_processes(tmp_path)) > 1
    process.send_signal(ending)
    assert process.wait(timeout=60) == status
    _wait(lambda: not _processes(tmp_path))


@pytest.mark.parametrize("told", ["launcher", "all processes"])
def test_a_run_that_is_sent_sigterm_saves_and_goes_on_as_if_it_had_not_stopped(
    root, tmp_path, told
):
    changes = {"model__tensor_model_parallel_size": 2, "scheduler": {"lr_decay_style": "constant"}}
    saves = {"checkpoint": {"save": str(tmp_path / "run")}, "train__train_iters": 10_000}
    path = _yaml(settings(root, tmp_path / "run", **changes, **saves), tmp_path / "run.yaml")
    process = _start(path, tmp_path, start_new_session=True)
    _wait(lambda: len(read_metrics(tmp_path / "run")) > 2)
    # A scheduler tells the first process, or every one that belongs to the job.
    (os.kill if told == "launcher" else os.killpg)(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    ((step, _),) = checkpoints(tmp_path / "run")
    assert f"saved after step {step} of 10000; the same command goes on from there" in errors
    _wait(lambda: not _processes(tmp_path))
    changes["train__train_iters"] = step + 2
    for name in ("run", "whole"):
        launch(settings(root, tmp_path / name, **changes))
    runs = (read_metrics(tmp_path / name) for name in ("run", "whole"))
    stopped, never = ([m["loss"] for m in run if "loss" in m] for run in runs)
    assert stopped == never
    assert len(never) == step + 2


def test_a_run_that_is_sent_sigterm_before_its_first_step_has_the_same_status(root, tmp_path):
    config = settings(root, tmp_path / "run", train__train_iters=10_000, scheduler={})
    path = _yaml(config, tmp_path / "run.yaml")
    process = _start(path, tmp_path)
    _wait((tmp_path / "run" / ".lock").exists)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "stopped by SIGTERM" in errors
    _wait(lambda: not _processes(tmp_path))


def _without_children(rank, world_size, config):
    """A run that saves in every step; how often the process forked, and what it left running."""
    forks = []
    os.register_at_fork(before=lambda: forks.append(rank))
    train_rank(rank, world_size, config)
    return len(forks), psutil.Process().children(recursive=True)


def test_a_rank_that_saves_starts_no_process(root, tmp_path):
    """A rank may be killed at any moment, and nobody would be left to end what it started."""
    config = settings(
        root,
        tmp_path / "run",
        model={"hf_path": str(root / "base"), "seq_length": 48, "tensor_model_parallel_size": 2},
        train__train_iters=3,
        checkpoint={"save": str(tmp_path / "run"), "save_interval": 1},
    )
    assert run_ranks(2, _without_children, config) == [(0, []), (0, [])]
    assert len(checkpoints(tmp_path / "run")) > 1


def _wait(condition):
    deadline = time.monotonic() + 120.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _second(rank, world_size, config):
    import fcntl

    folder = Path(config.checkpoint.save)
    folder.mkdir(parents=True)
    with (folder / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another run writes into"):
            train_rank(rank, world_size, config)


def test_two_runs_do_not_share_a_folder(root, tmp_path):
    run_ranks(1, _second, settings(root, tmp_path / "run"))
    assert run_ranks(1, train_rank, settings(root, tmp_path / "run", train__train_iters=2))


def test_the_sub_command_has_the_same_arguments():
    import argparse

    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    args = parser.parse_args(["train", "run.yaml", "a=1", "b=2", "--ranks", "2"])
    assert (args.config, args.overrides, args.ranks) == ("run.yaml", ["a=1", "b=2"], 2)
    assert callable(args.run)


def test_metrics_of_half_a_line_are_read(tmp_path):
    line = json.dumps({"step": 1, "loss": 2.0})
    (tmp_path / "metrics.jsonl").write_text(f'{line}\n{{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]
