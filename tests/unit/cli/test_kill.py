"""Conversions killed at random moments, and run again."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest

from bdlora_megatron.convert import read_adapter
from tests.unit.cli.adapters import assert_same_files, make_adapters, run, run_json, visible

COUNT = 50
COMMAND = [sys.executable, "-m", "bdlora_megatron", "convert"]
OPTIONS = ["--to", "peft", "--structure", "exact", "--tp", "4"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    make_adapters(folder, COUNT, rank=64, layers=1)
    return folder


def finished(out):
    return visible(out) if out.is_dir() else []


def start(sources, out, workers):
    return subprocess.Popen(
        [*COMMAND, str(sources), *OPTIONS, "--workers", str(workers), "--out", str(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def kill_after_progress(process, out, pause_s):
    """Kill -9 a while after at least one more adapter was finished."""
    before, deadline = len(finished(out)), time.monotonic() + 100
    while len(finished(out)) == before and process.poll() is None:
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.002)
    time.sleep(pause_s)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive, "workers must not outlive their run"


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_conversion_leaves_no_half_and_is_taken_up_again(
    workers, sources, tmp_path, capsys
):
    out, chance = tmp_path / "out", random.Random(workers)
    killed = 0
    for _ in range(2):
        process = start(sources, out, workers)
        kill_after_progress(process, out, chance.uniform(0.0, 0.15))
        killed += process.returncode == -signal.SIGKILL
        for name in finished(out):
            assert len(read_adapter(out / name).modules) == 7
    assert killed > 0, "the conversion was always faster than the test"
    done = finished(out)
    status, results = run_json(capsys, "convert", sources, *OPTIONS, "--workers", 1, "--out", out)
    assert status == 0
    # What was finished before the last kill is not made again, but for what that kill cut off.
    skipped = [result["name"] for result in results if result["status"] == "skipped"]
    assert len(done) - workers <= len(skipped) <= len(done)
    whole = tmp_path / "whole"
    again = run(capsys, "convert", sources, *OPTIONS, "--workers", 1, "--out", whole)
    assert again[0] == 0
    assert len(visible(out)) == COUNT
    for name in visible(out):
        assert_same_files(out / name, whole / name)
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == [".bdlora"]
    assert not list((out / ".bdlora").glob("*.partial"))
