"""What Megatron-Core's optimizers and schedules need on a CPU; installed by ``enable_cpu``.

That is the float32 optimizer, the one that keeps float32 copies of sixteen-bit parameters, and the
distributed one, which splits both over data-parallel ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer
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
        optimizer.Float16OptimizerWithFloat16Params: {
            "__init__": _seeing_cuda_types(optimizer.Float16OptimizerWithFloat16Params.__init__)
        },
        distrib_optimizer.DistributedOptimizer: {
            "__init__": _seeing_cuda_types(distrib_optimizer.DistributedOptimizer.__init__),
            **_loads_into_torchs_adam(distrib_optimizer.DistributedOptimizer),
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


def _seeing_cuda_types(constructor: Callable[..., None]) -> Callable[..., None]:
    """Let a constructor sort parameters by the names of CUDA's types, the only ones it knows."""

    @functools.wraps(constructor)
    def construct(*args: Any, **kwargs: Any) -> None:
        with _cuda_type_names():
            constructor(*args, **kwargs)

    return construct


@contextmanager
def _cuda_type_names() -> Iterator[None]:
    """``tensor.type()`` says ``torch.cuda.FloatTensor`` for ``torch.FloatTensor``."""
    asked = Tensor.type

    def type_name(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = asked(tensor, *args, **kwargs)
        # Under a TorchFunctionMode torch looks the method up by its name, and comes here twice.
        if isinstance(answer, str) and not answer.startswith("torch.cuda."):
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    Tensor.type = type_name  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Tensor.type = asked  # type: ignore[method-assign]


def _loads_into_torchs_adam(optimizer: Any) -> dict[str, Callable[..., Any]]:
    """Let a distributed optimizer whose Adam is torch's load a checkpoint before its first step.

    With Apex's or Transformer Engine's Adam it does. With torch's it asks an empty state for the
    number of steps. Once there is a state, it hands all parameters one and the same tensor to count
    in, keeps the dummy step that made the state counted, and looks for a count in the checkpoint's
    tensors, where there is none.
    """
    if distrib_optimizer.HAVE_APEX_OR_TE:
        return {}
    describe, load = optimizer.sharded_state_dict, optimizer.load_state_dict
    put = optimizer._set_main_param_and_optimizer_states

    def sharded_state_dict(
        self: Any, model_state: Any, is_loading: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        if is_loading and not self.optimizer.state:
            self._init_optimizer_states_with_dummy_values()
        return describe(self, model_state, is_loading, *args, **kwargs)

    def load_state_dict(self: Any, state: Any) -> None:
        (steps,) = {float(group["step"]) for group in state["optimizer"]["param_groups"]}
        load(self, state)
        for entry in self.optimizer.state.values():
            entry["step"] = torch.tensor(steps)

    def put_states(self: Any, parameter: Tensor, tensors: dict[str, Any]) -> None:
        kept = self._get_main_param_and_optimizer_states(parameter)
        put(self, parameter, {"step": kept["step"], **tensors})

    return {
        "sharded_state_dict": sharded_state_dict,
        "load_state_dict": load_state_dict,
        "_set_main_param_and_optimizer_states": put_states,
    }


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
