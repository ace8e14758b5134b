"""A slower link: every collective waits before it starts.

Ranks of one machine exchange messages faster than machines do. The wait stands for the start-up
time of a collective on a real link; bandwidth stays that of this machine.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.distributed import ProcessGroup

from bdlora_megatron.errors import ConfigError

__all__ = ["link_latency"]

#: What ``torch.distributed`` calls on a group; releases differ in which of these they have.
_METHODS = (
    "_allgather_base",
    "_reduce_scatter_base",
    "all_gather_single",
    "all_gather_single_coalesced",
    "all_to_all_single",
    "allgather",
    "allgather_coalesced",
    "allgather_into_tensor_coalesced",
    "allreduce",
    "allreduce_coalesced",
    "alltoall",
    "alltoall_base",
    "broadcast",
    "gather",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_single",
    "reduce_scatter_single_coalesced",
    "reduce_scatter_tensor_coalesced",
    "scatter",
)


@contextmanager
def link_latency(seconds: float, *, wait: Callable[[float], object] = time.sleep) -> Iterator[None]:
    """Delay every collective that this process starts inside the ``with`` block.

    Each rank waits by itself, so that all of them enter the collective that much later. Barriers
    are left alone. The host waits, so this tells nothing where collectives are queued on a GPU.

    Raises:
        ConfigError: ``seconds`` is negative.
    """
    if seconds < 0:
        raise ConfigError(f"a latency of {seconds} seconds; wanted 0 or more")
    # From the class's own table: what `getattr` returns would no longer bind its group.
    own = vars(ProcessGroup)
    originals = {name: own[name] for name in _METHODS if name in own} if seconds else {}
    for name in originals:
        setattr(ProcessGroup, name, _delayed(getattr(ProcessGroup, name), seconds, wait))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(ProcessGroup, name, original)


def _delayed(
    original: Callable[..., Any], seconds: float, wait: Callable[[float], object]
) -> Callable[..., Any]:
    @functools.wraps(original)
    def start(group: ProcessGroup, *args: Any, **kwargs: Any) -> Any:
        if group.size() > 1:
            wait(seconds)
        return original(group, *args, **kwargs)

    return start
