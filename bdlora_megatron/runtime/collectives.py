"""Counting collectives: what a piece of code communicates, operation by operation, in bytes.

The count is taken where torch hands an operation to the process group, below Megatron-Core and
below autograd, so nothing that communicates through ``torch.distributed`` escapes it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Collective", "CollectiveLog", "record_collectives"]

# c10d's operators, and how the bytes on the wire follow from the largest tensor n of a call over P
# ranks, sent by each rank of a ring: https://docs.nvidia.com/deeplearning/nccl (nccl-tests).
_OPERATORS = {
    "allreduce_": ("all_reduce", lambda size: 2 * (size - 1) / size),
    "allreduce_coalesced_": ("all_reduce", lambda size: 2 * (size - 1) / size),
    "_allgather_base_": ("all_gather", lambda size: (size - 1) / size),
    "allgather_": ("all_gather", lambda size: (size - 1) / size),
    "allgather_into_tensor_coalesced_": ("all_gather", lambda size: (size - 1) / size),
    "_reduce_scatter_base_": ("reduce_scatter", lambda size: (size - 1) / size),
    "reduce_scatter_": ("reduce_scatter", lambda size: (size - 1) / size),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", lambda size: (size - 1) / size),
    "alltoall_": ("all_to_all", lambda size: (size - 1) / size),
    "alltoall_base_": ("all_to_all", lambda size: (size - 1) / size),
    "broadcast_": ("broadcast", lambda size: 1.0),
    "reduce_": ("reduce", lambda size: 1.0),
    "gather_": ("gather", lambda size: 1.0),
    "scatter_": ("scatter", lambda size: 1.0),
    "send": ("send", lambda size: 1.0),
    "recv_": ("recv", lambda size: 0.0),
    "barrier": ("barrier", lambda size: 0.0),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Collective:
    """One call.

    Attributes:
        kind: ``all_reduce``, ``all_gather``, ``reduce_scatter``, ...
        payload_bytes: Size of the whole tensor: reduced, gathered, or before scattering.
        wire_bytes: What each rank sends in a ring, rounded down.
        shape: Shape of that whole tensor; the number of parts where it came as a list.
    """

    kind: str
    payload_bytes: int
    wire_bytes: int
    shape: tuple[int, ...]


@dataclass(slots=True)
class CollectiveLog:
    """The calls of one rank, in order."""

    calls: list[Collective] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """Calls by kind."""
        return dict(Counter(call.kind for call in self.calls))

    @property
    def payload_bytes(self) -> int:
        """Payload of all calls together."""
        return sum(call.payload_bytes for call in self.calls)

    @property
    def wire_bytes(self) -> int:
        """What this rank sends, by the ring formula, in all calls together."""
        return sum(call.wire_bytes for call in self.calls)


@contextmanager
def record_collectives() -> Iterator[CollectiveLog]:
    """Record every collective that runs inside the ``with`` block on this rank.

    Backward passes inside the block are recorded too, on the CPU. Groups of one rank, whose
    collectives move nothing, are recorded as torch runs them.

    Yields:
        The log, which fills as the block runs.
    """
    log = CollectiveLog()
    with _Recorder(log):
        yield log


class _Recorder(TorchDispatchMode):
    def __init__(self, log: CollectiveLog) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._log = log

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "c10d":
            known = _OPERATORS.get(func._opname)
            if known is None:
                raise NotImplementedError(f"collective {func} is not counted; add it to the table")
            self._log.calls.append(_describe(known, func, args))
        return func(*args, **(kwargs or {}))


def _describe(known: tuple[str, Any], func: Any, args: tuple[Any, ...]) -> Collective:
    kind, wire = known
    # The whole tensor may come as one argument or as a list of its parts.
    stacks = [list(_tensors(value)) for value in args]
    sizes = [sum(t.numel() * t.element_size() for t in stack) for stack in stacks]
    payload = max(sizes, default=0)
    whole = stacks[sizes.index(payload)] if sizes else []
    return Collective(
        kind=kind,
        payload_bytes=payload,
        wire_bytes=int(payload * wire(_group_size(func, args))),
        shape=tuple(whole[0].shape) if len(whole) == 1 else (len(whole),),
    )


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _group_size(func: Any, args: tuple[Any, ...]) -> int:
    for argument, value in zip(func._schema.arguments, args, strict=False):
        if argument.name == "process_group":
            return int(torch.distributed.ProcessGroup.unbox(value).size())
    raise NotImplementedError(f"collective {func} names no process group")
