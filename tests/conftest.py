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


#: What starts servers, trainings or commands, has many ranks meet, or steps through many kernels:
#: left out by `make test-fast`.
SLOW = (
    "tests/docs",
    "tests/golden/test_peft_logits.py",
    "tests/hosts",
    "tests/runtime/test_attention.py",
    "tests/runtime/test_launch.py",
    "tests/runtime/test_versions.py",
    "tests/serve",
    "tests/tp/test_bridge_format.py",
    "tests/tp/test_collectives.py",
    "tests/tp/test_cuda_graphs.py",
    "tests/tp/test_data_parallel.py",
    "tests/tp/test_engine.py",
    "tests/tp/test_hf_base.py",
    "tests/tp/test_hybrid.py",
    "tests/tp/test_local_plan.py",
    "tests/tp/test_mixed_precision.py",
    "tests/tp/test_peers.py",
    "tests/tp/test_pipeline.py",
    "tests/tp/test_prefix_cache.py",
    "tests/tp/test_store_schedules.py",
    "tests/tp/test_te_",
    "tests/tp/test_training_plan.py",
    "tests/tp/test_triton_attention.py",
    "tests/train",
    "tests/unit/bench/test_device",
    "tests/unit/cli",
    "tests/unit/compress/test_kill.py",
    "tests/unit/convert/test_field_cases.py",
    "tests/unit/convert/test_fuzz.py",
    "tests/unit/convert/test_merge.py",
    "tests/unit/convert/test_training_checkpoints.py",
    "tests/unit/ops",
)


def pytest_collection_modifyitems(config, items):
    """Mark what is slow, and skip what runs an engine that is refused (as tests/runtime sees).

    What is slow comes first, so that no worker is left with a long file when the others are done.
    """
    for item in items:
        if item.path.relative_to(config.rootpath).as_posix().startswith(SLOW):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    try:
        require_engine()
    except UnsupportedError as error:
        for item in items:
            if item.get_closest_marker("engine"):
                item.add_marker(pytest.mark.skip(reason=str(error)))
