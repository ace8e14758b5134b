"""Timing a call on a GPU, in CUDA graphs and out of them, or on a CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, TypeAlias

import torch

__all__ = ["Call", "CpuClock", "CudaClock"]

Call: TypeAlias = Callable[[], Any]

#: Bytes that are written before a cold measurement; several times any L2.
_FLUSH_BYTES = 512 * 2**20
_ROUNDS, _EAGER_CALLS = 50, 20


class CudaClock:
    """Microseconds of a call by CUDA events, as medians.

    ``cold`` is one call in a graph, after the L2 was flushed; ``warm`` one of several in a graph,
    with whatever the last left in the L2; ``eager`` one of several from Python, where the host may
    be what is waited for. ``cold`` and ``warm`` hold a graph's start, of which ``empty`` tells.
    """

    says = (
        "Microseconds by CUDA events, medians of 50: cold is one call in a graph with the L2 "
        "flushed before, warm one of several in a graph without, eager one of 20 from Python."
    )

    def __init__(self) -> None:
        self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def bandwidth(self) -> float:
        """Bytes a second that a copy within the device reads and writes, together."""
        source = torch.ones(_FLUSH_BYTES // 4, device="cuda")
        target = torch.empty_like(source)
        microseconds = _median(lambda: target.copy_(source), lambda: None, rounds=20)
        return 2 * _FLUSH_BYTES / (1e-6 * microseconds)

    def empty(self) -> float:
        """A graph that writes one number, measured like ``cold``."""
        number = torch.zeros(1, device="cuda")
        return _median(_captured(number.zero_, 1).replay, self._flush.zero_)

    def times(self, call: Call, *, repeats: int = 20) -> dict[str, float]:
        """Measure a call.

        Args:
            call: What can be captured.
            repeats: Calls in the graph of ``warm``.

        Returns:
            Microseconds by name.
        """
        one, several = _captured(call, 1), _captured(call, repeats)

        def eager() -> None:
            for _ in range(_EAGER_CALLS):
                call()

        return {
            "cold": _median(one.replay, self._flush.zero_),
            "warm": _median(several.replay, lambda: None) / repeats,
            "eager": _median(eager, lambda: None, rounds=10) / _EAGER_CALLS,
        }


def _captured(call: Call, repeats: int) -> Any:
    """A graph of calls; the first ones, which compile and allocate, stay out of it."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call()
    return graph


def _median(call: Call, before: Call, *, rounds: int = _ROUNDS) -> float:
    """Microseconds between two events around a call; the host never waits in between."""
    pairs = []
    for _ in range(rounds + 3):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before()
        first.record()
        call()
        last.record()
        pairs.append((first, last))
    torch.cuda.synchronize()
    return 1e3 * statistics.median(first.elapsed_time(last) for first, last in pairs[3:])


class CpuClock:
    """Microseconds of a call on a CPU, to show that the part runs."""

    says = "Microseconds on a CPU, of its own path: they show that this part runs, and no more."

    def bandwidth(self) -> float:
        """Bytes a second that a copy reads and writes, together."""
        source = torch.ones(2**22)
        target = torch.empty_like(source)
        return 2 * 4 * 2**22 / (1e-6 * _wall(lambda: target.copy_(source)))

    def empty(self) -> float:
        """Writing one number."""
        return _wall(torch.zeros(1).zero_)

    def times(self, call: Call, *, repeats: int = 20) -> dict[str, float]:
        """Measure a call.

        Args:
            call: What to measure.
            repeats: Times.

        Returns:
            Microseconds by name.
        """
        return {"warm": _wall(call, rounds=repeats)}


def _wall(call: Call, rounds: int = 5) -> float:
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return 1e6 * statistics.median(seconds)
