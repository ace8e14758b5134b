"""The grouped product by Triton kernels: shapes of blocks, grids and launches.

Nothing here waits for the device or depends on what a batch holds, so that a CUDA graph can capture
it: sizes come from shapes, and everything else is read by the kernels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bdlora_megatron.errors import ConfigError, MissingDependencyError, UnsupportedError
from bdlora_megatron.ops.batch import GroupedBatch
from bdlora_megatron.ops.table import Columns, SlotFactors

try:
    import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
    import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]

    from bdlora_megatron.ops import kernels
except ImportError as error:
    raise MissingDependencyError(
        f"the grouped product on a GPU needs triton ({error}): pip install triton, "
        "or pass implementation='reference'"
    ) from error

__all__ = [
    "add",
    "dot_type",
    "expand",
    "interpreted",
    "on_device_of",
    "shrink",
    "tf32_is_allowed",
]

#: Programs that fill a large GPU a few times over (A100: 108 multiprocessors, H100: 132).
ENOUGH_PROGRAMS = 512
MAX_SPLITS = 8
MAX_SLICES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class _Blocks:
    """How a layer's output columns are cut for programs.

    Attributes:
        table: Per block (slice, first feature, first column, columns, features of the slice),
            int32 ``[blocks, 5]`` on the device.
        size: Columns of a block at most.
        align: What divides every first feature, first column, number of columns and features.
    """

    table: Tensor
    size: int
    align: int


def shrink(x: Tensor, slots: SlotFactors, batch: GroupedBatch) -> Tensor:
    """Map tokens to their adapters' ranks.

    Args:
        x: Inputs ``[T, I]``.
        slots: The layer's factors.
        batch: Which slot each token uses.

    Returns:
        ``[T, J, Z]`` float32, zero beyond a token's rank.
    """
    z = _shares(x, slots, batch).zero_()
    _shrink(x, slots, batch, z)
    return z.sum(0)


def expand(out: Tensor, z: Tensor, slots: SlotFactors, batch: GroupedBatch) -> None:
    """Map ranks to outputs and add them in place.

    Args:
        out: Outputs ``[T, O]``.
        z: What ``shrink`` gave.
        slots: The layer's factors.
        batch: Which slot each token uses.
    """
    _expand(out, z.contiguous().unsqueeze(0), slots, batch)


def add(out: Tensor, x: Tensor, slots: SlotFactors, batch: GroupedBatch) -> None:
    """Both halves, leaving the sum over shares to the second.

    Args:
        out: Outputs ``[T, O]``, added to in place.
        x: Inputs ``[T, I]``.
        slots: The layer's factors.
        batch: Which slot each token uses.
    """
    z = _shares(x, slots, batch)
    _shrink(x, slots, batch, z)
    _expand(out, z, slots, batch)


def _shares(x: Tensor, slots: SlotFactors, batch: GroupedBatch) -> Tensor:
    """Room for ``z``: more shares of the input features where there are few programs."""
    table = slots.table
    programs = table.num_slices * (
        batch.num_tokens if batch.by == "token" else len(batch.tiles.spans)
    )
    wanted = triton.next_power_of_2(triton.cdiv(ENOUGH_PROGRAMS, max(programs, 1)))
    # A share is at least one block of input features.
    available = triton.next_power_of_2(triton.cdiv(slots.in_features, _block_k(slots.in_features)))
    splits = min(wanted, available, MAX_SPLITS)
    shape = (splits, len(x), table.num_slices, table.max_rank)
    return torch.empty(shape, dtype=torch.float32, device=x.device)


def _shrink(x: Tensor, slots: SlotFactors, batch: GroupedBatch, z: Tensor) -> None:
    _check(x, slots)
    if not z.numel():
        return
    table, sizes = slots.table, _sizes(z, slots)
    x = x if x.stride(1) == 1 else x.contiguous()
    where = (table.a_start, table.a_rank, table.row, z, len(x), slots.in_features)
    with on_device_of(x):
        if batch.by == "token":
            grid = _shrink_grid(len(x), z, 16)
            kernels.shrink_by_token[grid](
                x, x.stride(0), slots.A, batch.token_slot, *where, **sizes, BLOCK_R=16
            )
        else:
            tiles, block_r = batch.tiles, _block_r(table.max_rank)
            grid = _shrink_grid(len(tiles.spans), z, block_r)
            kernels.shrink_by_tile[grid](
                x,
                x.stride(0),
                slots.A,
                tiles.order,
                tiles.spans,
                *where,
                **sizes,
                TILE=tiles.size,
                BLOCK_R=block_r,
                **_dot(slots),
            )


def _expand(out: Tensor, z: Tensor, slots: SlotFactors, batch: GroupedBatch) -> None:
    _check(out, slots)
    if not z.numel():
        return
    table, blocks = slots.table, _cut(slots.columns, out.device)
    if out.stride(1) != 1:
        raise UnsupportedError("the output's columns must be contiguous in memory")
    pools = (slots.B * MAX_SLICES)[:MAX_SLICES]
    held = (table.b_start, table.b_rank, table.scale, table.row, z.shape[1])
    sizes = {
        "J": table.num_slices,
        "Z": table.max_rank,
        "SPLITS": z.shape[0],
        "BLOCK_R": 16,
        "BLOCK_O": blocks.size,
        "ALIGN": blocks.align,
    }
    first = (out, out.stride(0), z, *pools, blocks.table)
    with on_device_of(out):
        if batch.by == "token":
            grid = (len(out), len(blocks.table))
            kernels.expand_by_token[grid](*first, batch.token_slot, *held, **sizes)
        else:
            tiles = batch.tiles
            grid = (len(tiles.spans), len(blocks.table))
            kernels.expand_by_tile[grid](
                *first,
                tiles.order,
                tiles.spans,
                *held,
                **sizes,
                TILE=tiles.size,
                **_dot(slots),
            )


def _sizes(z: Tensor, slots: SlotFactors) -> dict[str, Any]:
    return {
        "J": slots.table.num_slices,
        "Z": slots.table.max_rank,
        "SPLITS": z.shape[0],
        "BLOCK_K": _block_k(slots.in_features),
    }


def _shrink_grid(tokens: int, z: Tensor, block_r: int) -> tuple[int, int, int]:
    splits, _, slices, capacity = z.shape
    return tokens, slices * triton.cdiv(capacity, block_r), splits


def _block_k(in_features: int) -> int:
    return _between(16, in_features, 128)


def _block_r(max_rank: int) -> int:
    return _between(16, max_rank, 64)


def _between(low: int, size: int, high: int) -> int:
    """The power of two at or above ``size``, within bounds."""
    power: int = triton.next_power_of_2(size)
    return min(high, max(low, power))


@cache  # so that only a geometry's first call copies to the device
def _cut(columns: tuple[Columns, ...], device: torch.device) -> _Blocks:
    """Cut each group of each slice into blocks of contiguous columns."""
    widest = max(part.width for part in columns)
    size = _between(16, widest, 128)
    rows = [
        (
            j,
            group * part.width + first,
            part.offset + group * part.stride + first,
            min(size, part.width - first),
            part.features,
        )
        for j, part in enumerate(columns)
        for group in range(part.groups)
        for first in range(0, part.width, size)
    ]
    shared = math.gcd(*(number for row in rows for number in row[1:]))
    table = torch.tensor(rows, dtype=torch.int32).to(device)
    return _Blocks(table=table, size=size, align=math.gcd(shared, 16))


def _dot(slots: SlotFactors) -> dict[str, Any]:
    """What tensor cores are given; for float32 factors torch's own switch decides."""
    own = dot_type(slots.A.dtype)
    tf32 = own is tl.float32 and tf32_is_allowed()
    return {"DOT": own, "PRECISION": "tf32" if tf32 else "ieee"}


def tf32_is_allowed() -> bool:
    """Whether torch may multiply float32 matrices in TF32.

    Torch's older switch, ``allow_tf32``, raises on reading once the newer one was set to TF32.
    """
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)
    return bool(matmul.allow_tf32 if precision is None else precision == "tf32")


def dot_type(dtype: torch.dtype) -> Any:
    """What tensor cores are given for factors, or a cache, of this type."""
    types = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    # The interpreter multiplies the bits of bfloat16 as integers. In float32, where products of
    # bfloat16 are exact, it computes what tensor cores do.
    return tl.float32 if interpreted() else types.get(dtype, tl.float32)


def interpreted() -> bool:
    """Whether Triton steps through kernels on a CPU, as was settled when it was imported."""
    return not isinstance(kernels.shrink_by_token, triton.runtime.JITFunction)


def on_device_of(tensor: Tensor) -> Any:
    """Launches go to the current device, which need not be the tensors'."""
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)


def _check(tensor: Tensor, slots: SlotFactors) -> None:
    """Refuse what the kernels would compute wrongly or not at all.

    Raises:
        ConfigError: The tensors are on a CPU, and Triton's interpreter is off.
        UnsupportedError: fp64, or more slices than the kernels know.
    """
    if not (tensor.is_cuda or interpreted()):
        raise ConfigError(
            f"implementation='triton' for tensors on {tensor.device}; use None, or set "
            "TRITON_INTERPRET=1 before triton is imported to run the kernels step by step"
        )
    if torch.float64 in (tensor.dtype, slots.A.dtype):
        raise UnsupportedError("the Triton kernels sum in float32; use 'reference' for float64")
    if len(slots.B) > MAX_SLICES:
        raise UnsupportedError(
            f"{len(slots.B)} slices in a layer; the Triton kernels take {MAX_SLICES} at most"
        )
