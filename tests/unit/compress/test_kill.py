"""A compression that is killed, and taken up again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from bdlora_megatron.compress import CompressOptions, compress_adapters
from bdlora_megatron.compress.work import work_folder
from bdlora_megatron.errors import AdapterFormatError, ConfigError
from tests.unit.cli.adapters import make_adapters, visible
from tests.unit.compress.planted import contents, sources_of

COMMAND = [sys.executable, "-m", "bdlora_megatron", "compress"]
LAYERS = 6


def finished(out):
    return list(out.parent.glob(f".{out.name}.work/*/*.safetensors"))


def test_a_killed_compression_is_taken_up_again(tmp_path):
    folders = make_adapters(tmp_path / "src", 12, rank=8, layers=LAYERS)
    out, whole = tmp_path / "out", tmp_path / "whole"
    process = subprocess.Popen(
        [*COMMAND, *folders, "--out", out, "--rank", "16", "--workers", "2"],
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 100
    while len(finished(out)) < 3 and process.poll() is None:
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.001)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, "it was faster than the test"
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive, "workers must not outlive their run"
    assert not out.exists()
    before = {path: path.stat().st_mtime_ns for path in finished(out)}
    stages = []

    def show(results, total, unit):
        stages.append((unit, total))
        kept = {path: path.stat().st_mtime_ns for path in finished(out)}
        assert kept == before or unit == "adapter"
        return results

    options = CompressOptions(rank=16)
    compress_adapters(sources_of(*folders), out, options, show=show)
    assert stages == [("adapter", 12), ("module", 7 * LAYERS - len(before))]
    compress_adapters(sources_of(*folders), whole, options)
    assert contents(out) == contents(whole)
    assert visible(tmp_path) == ["out", "src", "whole"]
    assert not list(tmp_path.glob(".*"))


def test_an_adapter_that_goes_away_is_told(tmp_path):
    """By the worker that wanted it."""
    folders = make_adapters(tmp_path / "src", 3)

    def show(results, total, unit):
        if unit == "module":
            (folders[1] / "adapter_model.safetensors").unlink()
        return results

    options = CompressOptions(rank=4)
    with pytest.raises(AdapterFormatError, match=r"holds no adapter_model\.safetensors"):
        compress_adapters(sources_of(*folders), tmp_path / "out", options, workers=2, show=show)
    assert not (tmp_path / "out").exists()
    assert compress_adapters(sources_of(folders[0]), tmp_path / "out", options).clusters


def test_what_other_adapters_left_is_of_no_use(tmp_path):
    folders = make_adapters(tmp_path / "src", 2)
    left = tmp_path / ".out.work" / "other"
    left.mkdir(parents=True)
    (left / "a.safetensors").write_text("")
    compress_adapters(sources_of(*folders), tmp_path / "out", CompressOptions(rank=4))
    assert not left.parent.exists()


def test_one_process_at_a_time(tmp_path):
    folders = make_adapters(tmp_path / "src", 2)
    with (
        work_folder(tmp_path / "out", "other"),
        pytest.raises(ConfigError, match="another process compresses to"),
    ):
        compress_adapters(sources_of(*folders), tmp_path / "out", CompressOptions(rank=4))
    assert not (tmp_path / "out").exists()
