"""Answers to questions about CUDA with which the hosts' training loops run on a CPU.

This goes far beyond ``bdlora_megatron.runtime.enable_cpu``, which Megatron-Core itself needs.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _CudaMeansCPU(TorchFunctionMode):
    """What is to be made on a GPU, moved there or pinned for the way there stays on the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        if func is torch.Tensor.to:
            args = tuple("cpu" if _is_cuda(value) else value for value in args)
        return func(*args, **kwargs)


def _is_cuda(device: Any) -> bool:
    return isinstance(device, str | torch.device) and str(device).startswith("cuda")


class _NoStream:
    """A CPU runs things in order; there is nothing to wait for."""

    def wait_stream(self, other: Any) -> None:
        del other


def _nothing(*args: Any, **kwargs: Any) -> None:
    del args, kwargs


def redirect() -> None:
    """Send what asks for CUDA to the CPU, for the rest of this process."""
    _CudaMeansCPU().__enter__()
    for name, value in {
        "Stream": _NoStream,
        "current_stream": _NoStream,
        "stream": lambda stream: contextlib.nullcontext(),
        # Bridge seeds the random streams only if there is a device.
        "device_count": lambda: 1,
        "set_device": _nothing,
        "empty_cache": _nothing,
        "reset_peak_memory_stats": _nothing,
        "memory_allocated": lambda *args: 0,
        "max_memory_allocated": lambda *args: 0,
        "memory_reserved": lambda *args: 0,
        "max_memory_reserved": lambda *args: 0,
        "memory_stats": lambda *args: {},
    }.items():
        setattr(torch.cuda, name, value)
    torch.nn.Module.cuda = lambda module, *args: module  # type: ignore[method-assign]
    # gloo's barrier takes no device.
    barrier = torch.distributed.barrier
    torch.distributed.barrier = lambda *args, **kwargs: barrier(kwargs.get("group"))
