"""What Triton's compiler makes of attention over a cache in blocks, for GPUs that are not here.

    python -m tests.unit.ops.compile_attention

prints one JSON object for each kernel. It is a process of its own, as Triton decides on its first
import whether kernels are compiled or stepped through.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from bdlora_megatron.ops import paged_attention
from benchmarks import compiled_kernels


@dataclass(frozen=True)
class Launch:
    """A step of 8 sequences over 4 key-value heads, whose heads have this width.

    `queries` are each sequence's; with `packed` they come as prompts do.
    """

    name: str
    dtype: str
    width: int
    queries: int
    packed: bool = False
    size: int = 256
    left: int = -1


#: Every shape of a program that a launch can choose, in every type.
LAUNCHES = (
    Launch("prompts", "bfloat16", 128, 512, packed=True),
    Launch("prompts", "float16", 128, 512, packed=True),
    Launch("prompts", "float32", 128, 512, packed=True),
    Launch("short prompts", "bfloat16", 128, 12, packed=True),
    Launch("wide prompts", "bfloat16", 256, 512, packed=True),
    Launch("windows over small blocks", "bfloat16", 80, 512, packed=True, size=48, left=100),
    Launch("steps", "bfloat16", 128, 1),
    Launch("steps", "float16", 64, 1),
    Launch("steps", "float32", 256, 1),
    Launch("steps of several tokens", "bfloat16", 128, 5),
    Launch("wide steps", "bfloat16", 256, 1),
)


class _Elsewhere:
    """Stands for Triton's driver of a device that is not here; compiling asks for no more."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        # Triton keeps what it compiles with by this number.
        return self._target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_all() -> Iterator[dict[str, Any]]:
    """Compile what each launch runs, for each device."""
    made: list[tuple[str, Any]] = []

    def compile_only(kernel: Any, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            made.append((kernel.__name__, kernel.warmup(*args, grid=grid, **kwargs)))

        return launch

    with (
        mock.patch.object(JITFunction, "__getitem__", compile_only),
        # Tensors that are not on a GPU are refused, as kernels would read another memory.
        mock.patch.object(paged_attention, "_check"),
    ):
        for device in compiled_kernels.DEVICES:
            triton.runtime.driver.set_active(_Elsewhere(device.capability))
            for launch in LAUNCHES:
                made.clear()
                _run(launch)
                for name, kernel in made:
                    yield {"device": device.name, **asdict(launch), **_describe(name, kernel)}


def _run(launch: Launch) -> None:
    dtype = getattr(torch, launch.dtype)
    cache = torch.empty(1, launch.size, 4, launch.width, dtype=dtype)
    # As many tokens as the engine rounds up to are enough for the compiler.
    q = torch.empty(8, launch.queries, 16, launch.width, dtype=dtype)
    options: Any = {
        "causal": True,
        "window_size": (launch.left, 0),
        "block_table": torch.empty(8, 8192 // launch.size, dtype=torch.int32),
    }
    if launch.packed:
        sums = torch.empty(9, dtype=torch.int32)
        paged_attention.flash_attn_varlen_func(
            *(q.flatten(0, 1), cache, cache, sums, sums, launch.queries, 8192),
            **options,
            return_attn_probs=True,
        )
    else:
        lengths = torch.empty(8, dtype=torch.int32)
        paged_attention.flash_attn_with_kvcache(
            q, cache, cache, cache_seqlens=lengths, return_softmax_lse=True, **options
        )


def _describe(name: str, kernel: Any) -> dict[str, Any]:
    registers, stack, static, local = compiled_kernels._resources(kernel.asm["cubin"])
    ptx = kernel.asm["ptx"]
    return {
        "kernel": name,
        "registers": registers,
        "spilled_bytes": stack + local,
        "shared_bytes": static + kernel.metadata.shared,
        "threads": 32 * kernel.metadata.num_warps,
        "tensor_cores": "wgmma" if "wgmma." in ptx else "mma" if "mma.sync" in ptx else "",
        "copied_ahead": "cp.async.c" in ptx,
        "widest_read": max(compiled_kernels._read_sizes(ptx)),
    }


if __name__ == "__main__":
    for found in compile_all():
        sys.stdout.write(json.dumps(found) + "\n")
