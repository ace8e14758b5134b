"""The one place that lets Megatron-Core run on a CPU, and the one switch that turns it on.

Megatron-Core asks ``torch.cuda`` for the device of every new buffer and for the state of the random
generator. On a machine without CUDA the honest answers are the CPU and the CPU's generator;
``enable_cpu`` installs them. Nothing here runs unless it is called, and where CUDA is present the
call is refused.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.fusions import fused_softmax
from megatron.core.tensor_parallel import layers as megatron_layers
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from torch import Tensor

from bdlora_megatron.errors import ConfigError
from bdlora_megatron.runtime.cpu_optimizer import optimizer_replacements

__all__ = ["cpu_is_enabled", "enable_cpu"]

_MARK = "_bdlora_cpu"


def cpu_is_enabled() -> bool:
    """Whether ``enable_cpu`` has run in this process."""
    return bool(getattr(torch.cuda.current_device, _MARK, False))


def enable_cpu() -> None:
    """Let Megatron-Core run on this machine's CPU, for this process; calling it again does nothing.

    Raises:
        ConfigError: CUDA is present, where Megatron-Core must be left as it is.
    """
    if torch.cuda.is_available():
        raise ConfigError(
            "enable_cpu() on a machine with CUDA; Megatron-Core runs on the GPU there: leave the "
            "call out, or hide the GPUs with CUDA_VISIBLE_DEVICES='' to test on the CPU"
        )
    if cpu_is_enabled():
        return
    setattr(_current_device, _MARK, True)
    replacements: dict[Any, dict[str, Any]] = {
        torch.cuda: {
            # New buffers: torch.empty(..., device=torch.cuda.current_device()).
            "current_device": _current_device,
            # Before a checkpoint is written; a CPU has no queue to wait for.
            "synchronize": _synchronize,
            # Asked for before gradients are reduced, since 0.19; nothing waits on it.
            "current_stream": torch.cpu.current_stream,
            # Dropout's streams, kept and forked by Megatron's tracker.
            "manual_seed": torch.manual_seed,
            "get_rng_state": _get_rng_state,
        },
        # A tied embedding's copy in the last pipeline stage; tensors are where they should be.
        Tensor: {"cuda": _stay},
        # The mask of a forward call without one is made with device="cuda".
        fused_softmax: {"get_default_causal_mask": _causal_mask},
        megatron_random: {
            "_get_cuda_rng_state": _get_rng_state,
            "_set_cuda_rng_state": _set_rng_state,
            "CudaRNGStatesTracker": CPURNGStatesTracker,
            # A tracker of the class above would go on asking for CUDA's generator.
            "_CUDA_RNG_STATE_TRACKER": None,
            "_CUDA_RNG_STATE_TRACKER_INITIALIZED": False,
        },
        # Their backward pass knows whether the forward pass ran under CUDA's autocast only.
        **{
            function: {
                "forward": staticmethod(_on_cpu(torch.amp.custom_fwd, function.forward)),
                "backward": staticmethod(_on_cpu(torch.amp.custom_bwd, function.backward)),
            }
            for function in (
                megatron_layers.LinearWithFrozenWeight,
                megatron_layers.LinearWithGradAccumulationAndAsyncCommunication,
            )
        },
        # Recomputing norms and activation functions.
        CheckpointWithoutOutput: {"__init__": _without_fp8(CheckpointWithoutOutput.__init__)},
        **optimizer_replacements(),
        WrappedTorchNorm: {"__new__": _norm_under_sequence_parallelism(WrappedTorchNorm.__new__)},
    }
    for owner, attributes in replacements.items():
        for name, value in attributes.items():
            setattr(owner, name, value)


def _on_cpu(decorate: Any, decorated: Any) -> Any:
    """What a decorator for CUDA's autocast made of a function, made anew for the CPU's."""
    return decorate(decorated.__wrapped__, device_type="cpu")


def _current_device() -> torch.device:
    return torch.device("cpu")


def _synchronize(device: Any = None) -> None:
    del device


def _stay(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    del args, kwargs
    return tensor


def _causal_mask(length: int) -> Tensor:
    # True hides: everything after the query's own position.
    return torch.ones(length, length, dtype=torch.bool).triu(diagonal=1)


def _get_rng_state(*args: Any, **kwargs: Any) -> Tensor:
    # Megatron's own has a device and CUDA-graph options, which mean nothing here.
    del args, kwargs
    return torch.get_rng_state()


def _set_rng_state(new_state: Tensor, *args: Any, **kwargs: Any) -> None:
    del args, kwargs
    torch.set_rng_state(new_state)


class CPURNGStatesTracker(megatron_random.CudaRNGStatesTracker):
    """Megatron's tracker of named random streams, over the CPU's generator.

    Each tensor-parallel rank can so have a stream of its own (``model-parallel-rng``) beside the
    one that all share, as on GPUs. Megatron's ``fork`` warns when the CPU's generator moves inside
    it; here that is the point, so this one does not.
    """

    states_: dict[str, Tensor]
    _active: str | None = None

    @contextlib.contextmanager
    def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
        """Draw from the stream called ``name`` inside the ``with`` block.

        Args:
            name: A stream that was added, or set with ``set_states``.

        Raises:
            KeyError: There is no such stream; ``model_parallel_cuda_manual_seed`` makes them.
        """
        if name not in self.states_:
            raise KeyError(
                f"random stream {name!r} was not added; call "
                "megatron.core.tensor_parallel.model_parallel_cuda_manual_seed(seed) first"
            )
        outside, outer = torch.get_rng_state(), self._active
        if outer is not None:
            # Kept up to date, for a fork of the same stream inside its own.
            self.states_[outer] = outside
        self._active = name
        torch.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            self._active = outer
            torch.set_rng_state(outside if outer is None else self.states_[outer])


def _without_fp8(original: Any) -> Any:
    """Keep a recomputation from asking Transformer Engine whether it computes in fp8.

    Megatron-Core 0.16 passes False for no and takes anything but None for yes.
    """

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.fp8 = False

    return init


def _norm_under_sequence_parallelism(original: Any) -> Any:
    """Let torch's norms stand in a sequence-parallel model.

    Megatron refuses that because torch's norms do not mark their parameters, whose gradients would
    then not be summed over ranks. The mark is all that is missing.
    """

    def build(cls: type, config: Any, *args: Any, **kwargs: Any) -> Any:
        relaxed = copy.copy(config)
        relaxed.sequence_parallel = False
        norm = original(cls, relaxed, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm

    return build
