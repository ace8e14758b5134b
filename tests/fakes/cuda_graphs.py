"""What stands for CUDA graphs on a CPU: linear layers are recorded once and then only replayed.

A graph does again, on the same memory, the operations that ran while it was captured: no Python, no
decision, no other tensor. Here torch's operations and Triton's launches are recorded with the very
tensors that they read and wrote. A replay therefore gives the right answer only if all that has
changed since was changed in place. What makes the host wait for the device, which no graph can
hold, is refused while recording.

Megatron-Core captures whole transformer layers. The attention that this package has for CPUs reads
lengths on the host, so here it stays outside: each layer that may carry adapters is recorded alone.
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

#: How often something was recorded and replayed in this process; tests read and clear it.
COUNTS: Counter[str] = Counter()

_WAITS = (
    "item",
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "unique",
    "equal",
    "is_nonzero",
)


class _Tape(TorchDispatchMode):
    """Records what runs, as calls that can be made again."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        masks = [a for a in args if isinstance(a, (list, tuple))]
        by_mask = name.startswith("index") and any(
            isinstance(t, Tensor) and t.dtype is torch.bool for mask in masks for t in mask
        )
        if any(name.startswith(word) for word in _WAITS) or by_mask:
            raise AssertionError(f"{func} makes the host wait for the device")
        out = func(*args, **kwargs)
        self.calls.append(lambda: _again(func, args, kwargs, out))
        return out


def _again(func, args, kwargs, out):
    """Run an operation once more, and leave its result where the recorded one is."""
    new = func(*args, **kwargs)
    pairs = [(new, out)] if isinstance(out, Tensor) else zip(new, out, strict=True)
    for fresh, kept in pairs:
        if isinstance(kept, Tensor) and fresh.data_ptr() != kept.data_ptr():
            kept.copy_(fresh)


class _Launches:
    """A kernel whose launches go on the tape as one call each, whatever the interpreter does."""

    def __init__(self, kernel: Any, tape: _Tape) -> None:
        self._kernel, self._tape = kernel, tape

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            def call():
                with _disable_current_modes():
                    self._kernel[grid](*args, **kwargs)

            call()
            COUNTS["launches"] += 1
            self._tape.calls.append(call)

        return launch


class Recording:
    """What a call does to its tensors, done again by ``replay``; in the place of a graph."""

    def __init__(self, call: Any) -> None:
        """Call twice: as before a capture, so that what is made once is made, and recorded.

        Args:
            call: Without arguments.
        """
        from bdlora_megatron.ops import gpu, kernels

        call()
        tape = _Tape()
        names = [name for name in dir(kernels) if "_by_" in name]
        with ExitStack() as stack:
            for name in names:
                proxy = _Launches(getattr(kernels, name), tape)
                stack.enter_context(mock.patch.object(gpu.kernels, name, proxy))
            stack.enter_context(tape)
            self.made = call()
        self._calls = tape.calls

    def replay(self) -> None:
        for call in self._calls:
            call()


class _Graph:
    """One layer at one size."""

    def __init__(self, layer: Any, x: Tensor) -> None:
        self.x = x.clone()
        self._recording = Recording(lambda: type(layer).forward(layer, self.x))

    def replay(self, x: Tensor) -> Any:
        self.x.copy_(x)
        self._recording.replay()
        out, bias = self._recording.made
        return out.clone(), bias


class GraphManager(torch.nn.Module):
    """In the place of ``megatron.core.transformer.cuda_graphs.CudaGraphManager``."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self._graphs: dict[Any, _Graph] = {}

    def __call__(self, module, args, kwargs):
        from bdlora_megatron.layers.lora_linear import LoRALinear

        context = kwargs["inference_context"]
        assert context.is_decode_only()
        kwargs = {k: v for k, v in kwargs.items() if k != "dynamic_inference_decode_only"}
        layers = {n: m for n, m in module.named_modules() if isinstance(m, LoRALinear)}
        with ExitStack() as stack:
            for name, layer in layers.items():

                def forward(x, *, name=name, layer=layer):
                    key = (name, context.padded_batch_dimensions)
                    if key not in self._graphs:
                        COUNTS["recorded"] += 1
                        self._graphs[key] = _Graph(layer, x)
                    COUNTS["replayed"] += 1
                    return self._graphs[key].replay(x)

                stack.enter_context(mock.patch.object(layer, "forward", forward))
            return module.forward(*args, **kwargs)


def install() -> None:
    """Let models with ``cuda_graph_impl="local"`` be built with recordings in place of graphs."""
    from megatron.core.transformer import cuda_graphs

    cuda_graphs.CudaGraphManager = GraphManager
    torch.cuda.memory_stats = lambda *args: Counter()
