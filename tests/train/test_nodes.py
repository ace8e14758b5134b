"""Two launchers as two nodes: one is preempted, both have saved the same step, and go on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import yaml

from bdlora_megatron.train import to_mapping
from bdlora_megatron.train.checkpoint import checkpoints
from bdlora_megatron.train.metrics import read_metrics
from tests.harness import free_port, run_ranks
from tests.train.runs import make_files, settings, train_rank

SCRIPT = Path(__file__).parents[2] / "examples" / "slurm" / "train.sbatch"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def _nodes(path, *overrides):
    """Two torchruns, each with one of two data-parallel ranks."""
    port = free_port()
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run"]
    meeting = ["--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1"]
    program = ["-m", "bdlora_megatron.train", str(path), *overrides]
    return [
        subprocess.Popen(
            [*command, *meeting, f"--master-port={port}", f"--node-rank={node}", *program],
            env=ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in (0, 1)
    ]


def _losses(folder):
    return [line["loss"] for line in read_metrics(folder) if "loss" in line]


def test_one_of_two_nodes_is_preempted_and_both_go_on_from_one_step(tmp_path):
    root = make_files(tmp_path)
    constant = {"scheduler": {"lr_decay_style": "constant"}}
    split = {"optimizer": {"lr": 0.02, "use_distributed_optimizer": True}}
    saves = {"checkpoint": {"save": str(tmp_path / "run"), "async_save": True}}
    endless = settings(
        root, tmp_path / "run", **constant, **split, **saves, train__train_iters=10_000
    )
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(to_mapping(endless)))
    nodes = _nodes(path)
    try:
        deadline = time.monotonic() + 90.0
        while len(_losses(tmp_path / "run")) < 3:
            assert time.monotonic() < deadline, "the run does not start"
            assert [node.poll() for node in nodes] == [None, None]
            time.sleep(0.05)
        nodes[1].terminate()
        told = [node.communicate(timeout=60)[1] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    # Not 75: torchrun has a status of its own for ranks that end with one.
    assert all(node.returncode not in (0, None) for node in nodes)
    ((step, _),) = checkpoints(tmp_path / "run")
    for text in told:
        assert re.findall(r"saved after step (\d+) of 10000", text) == [str(step)]
    done = _nodes(path, f"train.train_iters={step + 2}")
    assert [node.communicate(timeout=90)[1] and node.returncode for node in done] == [0, 0]
    whole = settings(root, tmp_path / "whole", **constant, **split, train__train_iters=step + 2)
    run_ranks(2, train_rank, whole)
    assert _losses(tmp_path / "run") == _losses(tmp_path / "whole")


def test_the_slurm_example_is_a_shell_script():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
