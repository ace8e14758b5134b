"""Megatron-Core's process groups on the CPU, for the length of one test body."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bdlora_megatron import runtime


@contextmanager
def model_parallel(tp: int, **options: Any) -> Iterator[None]:
    """Initialise tensor parallelism over the ranks that the harness has joined."""
    runtime.enable_cpu()
    with runtime.model_parallel(tp, **options):
        yield
