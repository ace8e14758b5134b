"""Where there is no GPU, Triton's kernels run step by step in its interpreter."""

from __future__ import annotations

import importlib.util
import os

import torch

if importlib.util.find_spec("triton") and not torch.cuda.is_available():
    # Triton reads it on its first import, which Megatron-Core does; so here, before all tests.
    os.environ.setdefault("TRITON_INTERPRET", "1")
