"""What must be settled before any test runs: Triton's interpreter and the fork server."""

from __future__ import annotations

import importlib.util
import os

import torch

from tests.harness import start_fork_server

if importlib.util.find_spec("triton") and not torch.cuda.is_available():
    # Without a GPU its kernels run step by step. Triton reads this on its first import, which
    # Megatron-Core does.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_sessionstart(session):
    start_fork_server()
