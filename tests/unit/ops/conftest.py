"""Where there is no GPU, Triton's kernels run step by step in its interpreter."""

from __future__ import annotations

import os

from tests.unit.ops.cases import HAS_GPU, HAS_TRITON

if HAS_TRITON and not HAS_GPU:
    # Read when the kernels are imported, which only a test that asks for them does.
    os.environ.setdefault("TRITON_INTERPRET", "1")
