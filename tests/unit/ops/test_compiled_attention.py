"""Attention's kernels compile for A100 and H100, to what they were written for; needs no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.ops.cases import HAS_TRITON

ROOT = Path(__file__).parents[3]
#: CUDA C++ Programming Guide, table of compute capabilities: of one block.
SHARED_BYTES = {"A100": 163 * 1024, "H100": 227 * 1024}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Every launch's kernels for both devices, by a process where Triton compiles."""
    if not HAS_TRITON:
        pytest.skip("needs triton")
    folder = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.ops.compile_attention"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": folder},
        capture_output=True,
        text=True,
    )
    assert not done.returncode, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_compiles_and_fits(compiled):
    assert {(k["device"], k["kernel"]) for k in compiled} == {
        (device, kernel) for device in SHARED_BYTES for kernel in ("attend", "combine")
    }
    attends = [kernel for kernel in compiled if kernel["kernel"] == "attend"]
    assert len(attends) == 22
    assert [k for k in compiled if k["shared_bytes"] > SHARED_BYTES[k["device"]]] == []
    assert [k for k in compiled if k["registers"] * k["threads"] > 65536] == []


def test_no_register_spills(compiled):
    assert [kernel for kernel in compiled if kernel["spilled_bytes"]] == []


def test_the_cache_is_read_ahead_sixteen_bytes_at_once(compiled):
    for kernel in compiled:
        assert kernel["widest_read"] == 16, kernel
        assert kernel["copied_ahead"] == (kernel["kernel"] == "attend"), kernel


def test_sixteen_bit_types_use_the_tensor_cores(compiled):
    for kernel in compiled:
        wanted = ""
        if kernel["kernel"] == "attend" and kernel["dtype"] != "float32":
            # Hopper's own take 64 rows at least.
            wanted = "wgmma" if kernel["device"] == "H100" and kernel["queries"] > 5 else "mma"
        assert kernel["tensor_cores"] == wanted, kernel
