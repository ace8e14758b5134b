"""What must be settled before any test runs: Triton's interpreter and the fork server."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

from bdlora_megatron.errors import UnsupportedError
from bdlora_megatron.runtime.versions.known import require_engine
from tests.harness import start_fork_server

if importlib.util.find_spec("triton") and not torch.cuda.is_available():
    # Without a GPU its kernels run step by step. Triton reads this on its first import, which
    # Megatron-Core does.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_sessionstart(session):
    start_fork_server()


def pytest_collection_modifyitems(items):
    """Skip what runs an engine that is refused; tests/runtime sees that it is."""
    try:
        require_engine()
    except UnsupportedError as error:
        for item in items:
            if item.get_closest_marker("engine"):
                item.add_marker(pytest.mark.skip(reason=str(error)))
