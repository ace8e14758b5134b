"""The grouped product behind one function: choose an implementation, check, and call it.

Everything is one rank's local share. BD-LoRA needs no communication between the two halves; the
S-LoRA layout does, so ``shrink`` and ``expand`` can also be called by themselves.

Shapes: T tokens, N slots, J slices of the layer, I and O input and output features, Z rank room.
"""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from bdlora_megatron.errors import ConfigError, ShapeError, UnsupportedError
from bdlora_megatron.ops import cpu, reference
from bdlora_megatron.ops.batch import GroupedBatch
from bdlora_megatron.ops.table import SlotFactors

__all__ = ["Implementation", "add_grouped", "choose", "expand", "shrink"]

Implementation: TypeAlias = Literal["reference", "cpu", "triton"]


def choose(
    device: torch.device | str, implementation: Implementation | None = None
) -> Implementation:
    """Say which implementation runs on a device.

    Args:
        device: Where the tensors are.
        implementation: What to use instead of the device's own.

    Returns:
        ``triton`` on CUDA (and ROCm), ``cpu`` on a CPU, ``reference`` anywhere else; or
        ``implementation``.

    Raises:
        ConfigError: There is no such implementation, or it cannot run on ``device``.
    """
    kind = torch.device(device).type
    own: dict[str, Implementation] = {"cuda": "triton", "cpu": "cpu"}
    if implementation is None:
        return own.get(kind, "reference")
    if implementation not in get_args(Implementation):
        raise ConfigError(
            f"implementation={implementation!r}, wanted one of {get_args(Implementation)}"
        )
    if implementation == "cpu" and kind != "cpu":
        raise ConfigError(f"implementation='cpu' for tensors on {kind}; use 'reference' or None")
    return implementation


def shrink(
    x: Tensor,
    slots: SlotFactors,
    batch: GroupedBatch,
    *,
    implementation: Implementation | None = None,
) -> Tensor:
    """Map each token to its adapter's ranks.

    Semantics:
        ```
        for t, a in enumerate(batch.token_slot.tolist()):
            for j in range(slots.table.num_slices if a >= 0 else 0):
                z[t, j, :len(slots.a(a, j))] = slots.a(a, j) @ x[t].to(slots.A.dtype)
        ```

    Args:
        x: Inputs ``[T, I]``.
        slots: The layer's factors.
        batch: Which slot each token uses.
        implementation: Instead of the device's own.

    Returns:
        ``[T, J, Z]``, zero beyond a token's rank; float32 (float64 from ``reference`` and from
        float64 factors).

    Raises:
        ShapeError: The sizes of ``x``, ``slots`` and ``batch`` disagree.
        UnsupportedError: A gradient would be recorded.
    """
    _check(x, slots, batch)
    _refuse_gradients(x, slots.A)
    chosen = choose(x.device, implementation)
    if chosen == "reference":
        return reference.shrink(x, slots, batch)
    if chosen == "cpu":
        z = _empty_z(x, slots).zero_()
        cpu.shrink(x, slots, batch, z)
        return z
    from bdlora_megatron.ops import gpu

    return gpu.shrink(x, slots, batch)


def expand(
    out: Tensor,
    z: Tensor,
    slots: SlotFactors,
    batch: GroupedBatch,
    *,
    implementation: Implementation | None = None,
) -> Tensor:
    """Map each token's ranks to its outputs and add them.

    Semantics:
        ```
        for t, a in enumerate(batch.token_slot.tolist()):
            for j, columns in enumerate(slots.columns if a >= 0 else ()):
                delta = slots.table.scale[a, j] * (z[t, j, :len(slots.b(a, j))] @ slots.b(a, j))
                columns.view(out)[t] += delta.view(columns.groups, columns.width)
        ```

    Args:
        out: Base outputs ``[T, O]``.
        z: What ``shrink`` gave, ``[T, J, Z]``; what lies beyond a token's rank is not read.
        slots: The layer's factors.
        batch: Which slot each token uses.
        implementation: Instead of the device's own.

    Returns:
        ``out``, changed in place. A token of slot -1 is as it was, bit by bit.

    Raises:
        UnsupportedError: A gradient would be recorded.
        ShapeError: The sizes of ``out``, ``z``, ``slots`` and ``batch`` disagree.
    """
    _check_out(out, z, slots, batch)
    _refuse_gradients(out, z, *slots.B)
    chosen = choose(out.device, implementation)
    if chosen == "reference":
        reference.expand(out, z, slots, batch)
    elif chosen == "cpu":
        cpu.expand(out, z, slots, batch)
    else:
        from bdlora_megatron.ops import gpu

        gpu.expand(out, z, slots, batch)
    return out


def add_grouped(
    out: Tensor,
    x: Tensor,
    slots: SlotFactors,
    batch: GroupedBatch,
    *,
    implementation: Implementation | None = None,
) -> Tensor:
    """Add to each token's outputs what its adapter makes of its inputs.

    Semantics:
        ```
        for t, a in enumerate(batch.token_slot.tolist()):
            for j, columns in enumerate(slots.columns if a >= 0 else ()):
                delta = slots.table.scale[a, j] * (x[t] @ slots.a(a, j).t() @ slots.b(a, j))
                columns.view(out)[t] += delta.view(columns.groups, columns.width)
        ```

    Args:
        out: Base outputs ``[T, O]``.
        x: Inputs ``[T, I]``; taken in the factors' type.
        slots: The layer's factors.
        batch: Which slot each token uses.
        implementation: Instead of the device's own.

    Returns:
        ``out``, changed in place. A token of slot -1 is as it was, bit by bit.

    Raises:
        UnsupportedError: A gradient would be recorded.
        ShapeError: The sizes of ``out``, ``x``, ``slots`` and ``batch`` disagree.
    """
    _refuse_gradients(out, x, slots.A, *slots.B)
    chosen = choose(out.device, implementation)
    if chosen == "reference":
        z = shrink(x, slots, batch, implementation=chosen)
        return expand(out, z, slots, batch, implementation=chosen)
    _check(x, slots, batch)
    # Nothing beyond a token's rank is read again, so nothing there needs to be cleared.
    z = _empty_z(x, slots)
    _check_out(out, z, slots, batch)
    if chosen == "cpu":
        cpu.shrink(x, slots, batch, z)
        cpu.expand(out, z, slots, batch)
    else:
        from bdlora_megatron.ops import gpu

        gpu.add(out, x, slots, batch)
    return out


def _refuse_gradients(*tensors: Tensor) -> None:
    """Serving needs none, and a result written in place could not give any.

    Raises:
        UnsupportedError: A gradient would be recorded.
    """
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise UnsupportedError(
            "gradients through the grouped product of several adapters; run the model under "
            "torch.inference_mode() or torch.no_grad(), or train one adapter with apply_lora()"
        )


def _empty_z(x: Tensor, slots: SlotFactors) -> Tensor:
    wide = torch.float64 if slots.A.dtype == torch.float64 else torch.float32
    return x.new_empty(len(x), slots.table.num_slices, slots.table.max_rank, dtype=wide)


def _check(x: Tensor, slots: SlotFactors, batch: GroupedBatch) -> None:
    if x.shape != (batch.num_tokens, slots.in_features):
        raise ShapeError(
            f"x has shape {list(x.shape)}, wanted [{batch.num_tokens}, {slots.in_features}] "
            "(tokens of the batch, columns of the pool of A)"
        )
    if batch.num_slots != slots.table.num_slots:
        raise ShapeError(
            f"a batch over {batch.num_slots} slots with a table of {slots.table.num_slots}; "
            "build it with the table's num_slots"
        )


def _check_out(out: Tensor, z: Tensor, slots: SlotFactors, batch: GroupedBatch) -> None:
    columns = max(columns.end for columns in slots.columns)
    if out.ndim != 2 or len(out) != batch.num_tokens or out.shape[1] < columns:
        raise ShapeError(
            f"out has shape {list(out.shape)}, wanted [{batch.num_tokens}, {columns} or more]"
        )
    wanted = (batch.num_tokens, slots.table.num_slices, slots.table.max_rank)
    if z.shape != wanted:
        raise ShapeError(f"z has shape {list(z.shape)}, wanted {list(wanted)}")
    if batch.num_slots != slots.table.num_slots:
        raise ShapeError(
            f"a batch over {batch.num_slots} slots with a table of {slots.table.num_slots}; "
            "build it with the table's num_slots"
        )
