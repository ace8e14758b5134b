"""What Megatron-Core's optimizer and schedules need on a CPU; installed by ``enable_cpu``.

It works for float32 parameters and without the distributed optimizer. Of other types, Megatron-Core
itself refuses every tensor that is not on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from megatron.core.optimizer import clip_grads, optimizer
from megatron.core.pipeline_parallel import schedules
from torch import Tensor

__all__ = ["optimizer_replacements"]


def optimizer_replacements() -> dict[Any, dict[str, Any]]:
    """Attributes to set, by the module that they belong to."""
    return {
        # The loss scale, the norm's buffers: torch.zeros(1, device="cuda").
        optimizer: {
            "torch": _TorchOnCPU(),
            "clip_grad_by_total_norm_fp32": _clip_by_total_norm,
        },
        clip_grads: {"torch": _TorchOnCPU(), "l2_norm_impl": _l2_norm},
        # The number of tokens in a step: torch.zeros([], device="cuda").
        schedules: {"torch": _TorchOnCPU()},
    }


class _TorchOnCPU:
    """What a module sees as ``torch``: torch, but for factories that are told ``device="cuda"``."""

    tensor: Callable[..., Tensor]
    zeros: Callable[..., Tensor]

    def __init__(self) -> None:
        self.tensor = _on_cpu(torch.tensor)
        self.zeros = _on_cpu(torch.zeros)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _on_cpu(factory: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def make(*args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return make


def _l2_norm(
    chunk_size: int, overflow: Tensor, tensor_lists: list[list[Tensor]], per_tensor: bool
) -> tuple[Tensor, None]:
    """Apex's function as ``get_grad_norm_fp32`` calls it; Megatron's stand-in is for CUDA."""
    del chunk_size, overflow, per_tensor  # per-tensor norms are never asked for there
    norms = [torch.linalg.vector_norm(tensor) for tensor in tensor_lists[0]]
    return torch.linalg.vector_norm(torch.stack(norms)).reshape(1), None


def _clip_by_total_norm(
    parameters: Iterable[Tensor] | Tensor,
    max_norm: float,
    total_norm: float,
    use_decoupled_grad: bool = False,
) -> None:
    """Megatron's function of this name, without its demand that a gradient is a CUDA tensor."""
    del use_decoupled_grad  # only the distributed optimizer decouples gradients
    scale = max_norm / (total_norm + 1.0e-6)
    if scale < 1.0:
        for parameter in [parameters] if isinstance(parameters, Tensor) else parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(scale)
