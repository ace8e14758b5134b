"""The Triton kernels compile for A100 and H100, to what they were written for; needs no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.ops.cases import HAS_TRITON

ROOT = Path(__file__).parents[3]
_COMPILE = """
import json, sys
from dataclasses import asdict
import torch
from benchmarks.compiled_kernels import compile_all
from benchmarks.rank_layers import LAYERS
dtypes = [getattr(torch, name) for name in sys.argv[1:]]
found = compile_all(dtypes=dtypes, layers=LAYERS[:2], ranks=(16,))
print(json.dumps([asdict(kernel) for kernel in found]))
"""
KERNELS = {"shrink_by_token", "expand_by_token", "shrink_by_tile", "expand_by_tile"}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Every kernel for both devices, in a process where Triton compiles and keeps nothing."""
    if not HAS_TRITON:
        pytest.skip("needs triton")
    folder = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run(
        [sys.executable, "-c", _COMPILE, "bfloat16", "float16", "float32"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": folder},
        capture_output=True,
        text=True,
    )
    assert not done.returncode, done.stderr
    return json.loads(done.stdout)


def test_every_kernel_compiles_and_fits(compiled):
    devices, dtypes, layers = {"A100", "H100"}, {"bfloat16", "float16", "float32"}, {"qkv", "proj"}
    made = {(k["device"], k["dtype"], k["layer"], k["kernel"]) for k in compiled}
    assert made == {
        (device, dtype, layer, kernel)
        for device in devices
        for dtype in dtypes
        for layer in layers
        for kernel in KERNELS
    }
    assert [kernel for kernel in compiled if not kernel["fits"]] == []


def test_no_register_spills(compiled):
    assert [kernel for kernel in compiled if kernel["spilled_bytes"]] == []


def test_factors_are_read_sixteen_bytes_at_once(compiled):
    """What widths and masks are multiples of must reach the compiler, or it reads two by two."""
    assert {kernel["widest_read"] for kernel in compiled} == {16}
    tiles = [kernel for kernel in compiled if kernel["kernel"].endswith("tile")]
    # Slots, ranks and starts are single words; nothing is read in halves of one.
    assert {kernel["narrowest_read"] for kernel in tiles} == {4}


def test_each_device_has_code_of_its_own(compiled):
    """As the code says itself: Triton keeps a compiler for each device number, not for each GPU."""
    assert {(k["device"], k["target"]) for k in compiled} == {("A100", "sm_80"), ("H100", "sm_90a")}
    made = {device: [k for k in compiled if k["device"] == device] for device in ("A100", "H100")}
    launches = ("dtype", "layer", "rank", "tokens", "kernel")
    found = ("registers", "shared_bytes", "tensor_core")
    for old, new in zip(made["A100"], made["H100"], strict=True):
        assert [old[name] for name in launches] == [new[name] for name in launches]
        if old["tensor_core"] != "none":
            assert [old[name] for name in found] != [new[name] for name in found], new


def test_tiles_use_the_tensor_cores_of_their_device(compiled):
    instructions = {"A100": "mma.sync", "H100": "wgmma"}
    for kernel in compiled:
        tile = kernel["kernel"].endswith("tile")
        # A float32 product is exact unless torch allows TF32: no tensor core does that.
        exact = kernel["dtype"] == "float32"
        wanted = instructions[kernel["device"]] if tile and not exact else "none"
        assert kernel["tensor_core"] == wanted, kernel
