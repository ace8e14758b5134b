"""The model and the server that most tests share."""

from __future__ import annotations

import pytest

from tests.serve import models, servers

#: Small on purpose: prompts come in chunks, the cache is short, adapters change places.
SIZES = (
    "max_length=256", "block_tokens=8", "cache_bytes=600000", "step_tokens=48", "max_requests=8",
    "max_rank=8", "num_slots=2", "host_cache_bytes=2000000", "patience_steps=8", "max_queue=40",
    "rank_timeout_s=60", "dtype=float32",
)  # fmt: skip


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return models.make(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def server(folder, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "server.log"
    names = [f"{name}={folder / 'adapters' / name}" for name in models.ADAPTERS]
    with servers.RunningServer(
        folder, log, "--tp", "2", "--adapters", *names, "--set", *SIZES,
        f"adapter_dirs=[{folder / 'adapters'}]",
    ) as running:  # fmt: skip
        yield running
