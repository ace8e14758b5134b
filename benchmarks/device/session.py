"""One rank's process groups, on the GPU with NCCL or on the CPU with gloo."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from bdlora_megatron import runtime

__all__ = ["one_rank"]


@contextmanager
def one_rank(*, cuda_graphs: bool = False) -> Iterator[str]:
    """Hold Megatron-Core's process groups of a single rank.

    Args:
        cuda_graphs: As for ``runtime.model_parallel``.

    Yields:
        The device, ``cuda`` or ``cpu``.
    """
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(0)
    else:
        from bdlora_megatron.runtime.cpu_inference import enable_cpu_inference

        enable_cpu_inference()
    if sys.platform == "linux":
        # gloo looks the host's name up otherwise, which no one may answer without a network.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group(
            "nccl" if gpu else "gloo", init_method=f"file://{folder}/store", rank=0, world_size=1
        )
        try:
            with runtime.model_parallel(1, cuda_graphs=cuda_graphs):
                yield "cuda" if gpu else "cpu"
        finally:
            torch.distributed.destroy_process_group()
