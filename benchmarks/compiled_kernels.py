"""What Triton's compiler makes of the grouped product for GPUs that are not here.

Compiling needs no GPU. Each kernel is compiled as `bdlora_megatron.ops.gpu` launches it for one
tensor-parallel rank of Llama-3.1-8B, and NVIDIA's own tools, which Triton ships, say what came out:
registers, spills, shared memory, tensor core instructions and how wide memory is read. Which GPU
the code is for is read from the code itself.

    python -m benchmarks.compiled_kernels

Writes benchmarks/results/compiled_kernels.{md,json}. That a kernel compiles says that it can run
there, and what bounds it. It says nothing about how long it takes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Before Triton is imported, which decides then whether kernels are compiled or stepped through.
os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from bdlora_megatron.ops import GroupedBatch, SlotFactors, SlotTable, gpu
from benchmarks.rank_layers import LAYERS, Layer

OUT = Path(__file__).parent / "results" / "compiled_kernels"
#: What the system keeps of each block's shared memory; since 9.0, `cuobjdump` counts it as used.
_KEPT_BYTES = 1024
_TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_LOADED = re.compile(r"ld\.global[.\w]*?(?:\.v(\d))?\.b(\d+)\b")
_COPIED = re.compile(r"cp\.async\.c[ag]\.shared\.global[^;]*?, 0x([0-9a-f]+)")
_TARGET = re.compile(r"^\.target (\w+)", re.MULTILINE)
_TENSOR_CORE = re.compile(r"\b(?:mma\.sync|wgmma)\b")


@dataclass(frozen=True)
class Device:
    """What a multiprocessor has (CUDA C++ Programming Guide, table of compute capabilities)."""

    name: str
    capability: int
    shared_bytes: int
    block_shared_bytes: int
    registers: int = 65536
    threads: int = 2048
    blocks: int = 32


DEVICES = (
    Device("A100", 80, 164 * 1024, 163 * 1024),
    Device("H100", 90, 228 * 1024, 227 * 1024),
)


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """One kernel as compiled for one launch.

    `target` is the architecture that the compiled code names, and `tensor_core` the instruction by
    which it multiplies: `mma.sync`, `wgmma`, both, or none. `registers` are a thread's;
    `spilled_bytes` is what did not fit into them. `occupancy` is the share of a multiprocessor's
    threads that can be there at once. `widest_read` is the most bytes that a thread reads from
    memory in one instruction, and `narrowest_read` the least.
    """

    device: str
    target: str
    dtype: str
    layer: str
    rank: int
    tokens: int
    kernel: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    fits: bool
    occupancy: float
    widest_read: int
    narrowest_read: int
    tensor_core: str


class _Elsewhere:
    """Stands for Triton's driver of a device that is not here; compiling asks for no more."""

    def __init__(self, device: Device) -> None:
        self._number = device.capability
        self._target = GPUTarget("cuda", device.capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        # Of its own for each target: Triton keeps one compiler and one cache for each number.
        return self._number

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_all(
    devices: Sequence[Device] = DEVICES,
    dtypes: Sequence[torch.dtype] = (torch.bfloat16,),
    layers: Sequence[Layer] = LAYERS,
    ranks: Sequence[int] = (16, 64),
    tokens: Sequence[int] = (32, 4096),
) -> Iterator[Compiled]:
    """Compile every kernel for every launch; `tokens` decides which kernels a launch takes."""
    made: list[tuple[str, Any]] = []

    def compile_only(kernel: Any, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            made.append((kernel.__name__, kernel.warmup(*args, grid=grid, **kwargs)))

        return launch

    JITFunction.__getitem__ = compile_only
    # The launcher refuses tensors that are not on a GPU, as kernels would read another memory.
    gpu._check = lambda tensor, slots: None
    for device in devices:
        triton.runtime.driver.set_active(_Elsewhere(device))
        for dtype, layer, rank, count in itertools.product(dtypes, layers, ranks, tokens):
            made.clear()
            _launch(layer, dtype, rank, count)
            for name, kernel in made:
                yield _describe(device, dtype, layer, rank, count, name, kernel)


def _launch(layer: Layer, dtype: torch.dtype, rank: int, tokens: int) -> None:
    slots, slices = 8, len(layer.columns)
    factors = SlotFactors(
        A=torch.zeros(slots * slices * rank, layer.in_features, dtype=dtype),
        B=tuple(torch.zeros(slots * rank, part.features, dtype=dtype) for part in layer.columns),
        columns=layer.columns,
        table=SlotTable.empty(slots, slices, max_rank=rank),
    )
    batch = GroupedBatch(torch.zeros(tokens, dtype=torch.int32), num_slots=slots)
    x = torch.zeros(tokens, layer.in_features, dtype=dtype)
    gpu.add(torch.zeros(tokens, layer.out_features, dtype=dtype), x, factors, batch)


def _describe(
    device: Device,
    dtype: torch.dtype,
    layer: Layer,
    rank: int,
    tokens: int,
    name: str,
    kernel: Any,
) -> Compiled:
    registers, stack, static, local = _resources(kernel.asm["cubin"])
    shared = static + kernel.metadata.shared - (_KEPT_BYTES if device.capability >= 90 else 0)
    threads = 32 * kernel.metadata.num_warps
    # Registers are handed out to warps in units of 256.
    of_warp = -(-registers * 32 // 256) * 256
    together = min(
        device.registers // (of_warp * kernel.metadata.num_warps),
        device.shared_bytes // (shared + _KEPT_BYTES),
        device.threads // threads,
        device.blocks,
    )
    ptx = kernel.asm["ptx"]
    reads = list(_read_sizes(ptx))
    return Compiled(
        device=device.name,
        target=_target(ptx),
        dtype=str(dtype).removeprefix("torch."),
        layer=layer.name,
        rank=rank,
        tokens=tokens,
        kernel=name,
        registers=registers,
        spilled_bytes=stack + local,
        shared_bytes=shared,
        fits=shared <= device.block_shared_bytes and together > 0,
        occupancy=together * threads / device.threads,
        widest_read=max(reads),
        narrowest_read=min(reads),
        tensor_core=", ".join(sorted(set(_TENSOR_CORE.findall(ptx)))) or "none",
    )


def _target(ptx: str) -> str:
    """The architecture that compiled code says it is for, such as ``sm_90a``."""
    found = _TARGET.search(ptx)
    if not found:
        raise RuntimeError(f"no .target in the compiled code: {ptx[:200]}")
    return found[1]


def _read_sizes(ptx: str) -> Iterator[int]:
    """Bytes of each read from global memory, by a thread."""
    for line in ptx.splitlines():
        if found := _COPIED.search(line):
            yield int(found[1], 16)
        elif found := _LOADED.search(line):
            yield int(found[1] or 1) * int(found[2]) // 8


def _resources(cubin: bytes) -> tuple[int, int, int, int]:
    """Registers of a thread, and bytes of stack, static shared and local memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_TOOL, "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = _RESOURCES.search(said)
    if not found:
        raise RuntimeError(f"cuobjdump says no resources: {said[-200:]}")
    registers, stack, static, local = map(int, found.groups())
    return registers, stack, static, local


def _report(found: Sequence[Compiled]) -> Iterator[str]:
    yield "# The grouped product's kernels, as compiled for GPUs"
    yield ""
    yield (
        f"`python -m benchmarks.compiled_kernels`: compiled by Triton {triton.__version__} without "
        "a GPU, in bfloat16, for one rank of Llama-3.1-8B at TP=8, and read by NVIDIA's "
        "`cuobjdump`. None of them has run on a GPU: this says what they need, not how fast they "
        "are. Ranges are over the four layers (qkv, proj, gate and up, down)."
    )
    yield ""
    yield (
        "By token is a decoding step of 32 tokens, by tile a prefill of 4096, in tiles of 64: "
        "`wgmma` takes no smaller ones, and prefills of fewer than 2048 tokens go in tiles of 16. "
        "Occupancy is the share of a multiprocessor's threads that can be there at once. A read is "
        "a thread's, from global memory; 16 bytes are the most there are."
    )
    yield ""
    columns = (
        "GPU",
        "compiled for",
        "kernel",
        "adapter's rank on one rank",
        "registers",
        "spilled, bytes",
    )
    more = ("shared memory, KiB", "occupancy, %", "widest read, bytes", "tensor core")
    yield f"| {' | '.join((*columns, *more))} |"
    yield "|---" * len((*columns, *more)) + "|"
    for (device, target, name, rank), group in itertools.groupby(sorted(found, key=_row), _row):
        kernels = list(group)
        cells = (
            _range(kernel.registers for kernel in kernels),
            _range(kernel.spilled_bytes for kernel in kernels),
            _range(round(kernel.shared_bytes / 1024, 1) for kernel in kernels),
            _range(round(kernel.occupancy * 100) for kernel in kernels),
            _range(kernel.widest_read for kernel in kernels),
            " or ".join(sorted({kernel.tensor_core for kernel in kernels})),
        )
        yield f"| {device} | {target} | `{name}` | {rank} | {' | '.join(cells)} |"


def _row(kernel: Compiled) -> tuple[str, str, str, int]:
    return kernel.device, kernel.target, kernel.kernel, kernel.rank


def _range(numbers: Iterable[float]) -> str:
    low, *_, high = [*sorted(numbers)] * 2
    return f"{low}" if low == high else f"{low} to {high}"


def main() -> None:
    """Compile and write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compiled_kernels", description=__doc__
    )
    parser.add_argument("--out", type=Path, default=OUT, metavar="STEM")
    out = parser.parse_args().out
    found = list(compile_all())
    facts = {"triton": triton.__version__, "kernels": [asdict(kernel) for kernel in found]}
    out.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
    out.with_suffix(".md").write_text("\n".join(_report(found)) + "\n", "utf-8")
    print(out.with_suffix(".md").read_text("utf-8"))


if __name__ == "__main__":
    main()
