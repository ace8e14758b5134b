"""One copy of a column layer's input for base and adapter, so that one reduction serves both.

Backward, each rank holds a partial sum of dX from the base product and another from the adapter.
Both flow through the tensor made here, where autograd adds them before the one all-reduce (or,
under sequence parallelism, the one reduce-scatter) that the base layer alone would have needed. An
adapter with a copy of its own would pay a second one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from bdlora_megatron.layers.factors import dropped

if TYPE_CHECKING:
    from bdlora_megatron.layers.adapters import Adapter

__all__ = ["gather_and_shrink", "share_and_shrink", "share_input"]


def share_input(x: Tensor, *, allreduce_dgrad: bool, sequence_parallel: bool, group: Any) -> Tensor:
    """Prepare a column layer's input for every branch that multiplies it.

    Args:
        x: ``[S, b, I]``, or ``[S / P, b, I]`` under sequence parallelism.
        allreduce_dgrad: The base layer would all-reduce dX by itself.
        sequence_parallel: The base layer would gather X by itself.
        group: The tensor-parallel group.

    Returns:
        ``[S, b, I]``, whose gradient is the sum over branches of partial sums.

    Collectives: forward none, or one all-gather under sequence parallelism; backward one
    all-reduce, or one reduce-scatter. These are the base layer's own.
    """
    shared = x
    if sequence_parallel:
        shared = gather_from_sequence_parallel_region(
            x, tensor_parallel_output_grad=True, group=group
        )
    elif allreduce_dgrad:
        shared = copy_to_tensor_model_parallel_region(x, group=group)
    return shared


def share_and_shrink(
    adapter: Adapter,
    x: Tensor,
    *,
    allreduce_dgrad: bool,
    sequence_parallel: bool,
    regather: bool,
) -> tuple[Tensor, Tensor]:
    """Prepare a column layer's input, and map it to the adapter's rank.

    Args:
        adapter: The adapter beside the layer.
        x: ``[S, b, I]``, or ``[S / P, b, I]`` under sequence parallelism.
        allreduce_dgrad: The base layer would all-reduce dX by itself.
        sequence_parallel: The base layer would gather X by itself.
        regather: Keep only the local share of a gathered X, and gather it again in backward.

    Returns:
        ``[S, b, I]`` for the base product, and ``[S, b, K_local]``.

    Collectives: as ``share_input``; with ``regather``, as ``gather_and_shrink``.
    """
    if sequence_parallel and regather and torch.is_grad_enabled():
        gathered = (x.size(0) * adapter.tp_group.size(), *x.shape[1:])
        mask = adapter.dropout_mask(gathered, x.device)
        return gather_and_shrink(
            x, adapter.shrink_weight(), mask, 1.0 - adapter.dropout, adapter.tp_group
        )
    shared = share_input(
        x,
        allreduce_dgrad=allreduce_dgrad,
        sequence_parallel=sequence_parallel,
        group=adapter.tp_group,
    )
    return shared, adapter.shrink(shared)


def gather_and_shrink(
    x: Tensor, A: Tensor, mask: Tensor | None, keep: float, group: Any
) -> tuple[Tensor, Tensor]:
    """Gather the input and shrink it, keeping only the local share for backward.

    Args:
        x: ``[S / P, b, I]``.
        A: ``[K_local, I]``.
        mask: Dropout mask over the gathered input, or None.
        keep: Probability that an element survives dropout.
        group: The tensor-parallel group.

    Returns:
        The gathered input ``[S, b, I]`` for the base product, and ``[S, b, K_local]``.

    Collectives: forward one all-gather, shared with the base; backward one reduce-scatter, shared
    with the base, and one all-gather to form dA.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        # Autocast is off again when backward runs; its type must be in what is saved for it.
        A = A.to(torch.get_autocast_dtype(kind))
    shared, z = _GatherAndShrink.apply(x, A, mask, keep, group)  # type: ignore[no-untyped-call]
    return shared, z


class _GatherAndShrink(torch.autograd.Function):
    """See ``gather_and_shrink``; the memory it saves is the point, so nothing gathered is saved."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, A: Tensor, mask: Tensor | None, keep: float, group: Any
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, A, mask)
        ctx.keep, ctx.group = keep, group
        full = _gather(x, group)
        return full, torch.matmul(dropped(full, mask, keep).to(A.dtype), A.t())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        d_full, dz = grads
        x, A, mask = ctx.saved_tensors
        dx = dA = None
        if ctx.needs_input_grad[0]:
            d_full = d_full + dropped(torch.matmul(dz, A).to(x.dtype), mask, ctx.keep)
            dx = torch.empty_like(x)
            torch.distributed.reduce_scatter_tensor(dx, d_full.contiguous(), group=ctx.group)
        if ctx.needs_input_grad[1]:
            full = dropped(_gather(x, ctx.group), mask, ctx.keep).to(A.dtype)
            dA = torch.mm(dz.flatten(0, -2).t(), full.flatten(0, -2))
        return dx, dA, None, None, None


def _gather(x: Tensor, group: Any) -> Tensor:
    full = x.new_empty(x.size(0) * group.size(), *x.shape[1:])
    torch.distributed.all_gather_into_tensor(full, x.contiguous(), group=group)
    return full
