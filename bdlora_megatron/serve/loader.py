"""Loads that run in threads beside the model, and how ranks agree on what became of them.

A rank's own threads tell nothing about the other ranks'. So nothing may depend on whether a load is
done until all ranks have said so: they say it together, in one small all-reduce for all loads that
are due.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

__all__ = ["Load", "Outcome", "Threads", "agree"]

Result = TypeVar("Result")

_PENDING, _FAILED, _DONE = 1, 0, 2


class Threads:
    """A few daemon threads that run loads in the order in which they were asked for.

    Daemons, because a read that hangs must not keep a process alive that wants to end.
    """

    def __init__(self, count: int) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], bool] | None] = queue.SimpleQueue()
        self._count = count
        for _ in range(count):
            self._start_thread()

    def start(self, work: Callable[[], Result]) -> Load[Result]:
        """Run ``work`` as soon as a thread is free."""
        load: Load[Result] = Load()

        def job() -> bool:
            """Whether the thread goes on afterwards."""
            if not load.future.set_running_or_notify_cancel():
                return True
            load.began_s = time.monotonic()
            try:
                with torch.no_grad():
                    made = work()
            # Whatever it was, this load has failed and the next may not.
            except Exception as error:
                load.future.set_exception(error)
            else:
                load.future.set_result(made)
            return not load.given_up

        self._jobs.put(job)
        return load

    def give_up(self, load: Load[Any]) -> None:
        """Wait for a load no longer; if a thread hangs in it, another takes the thread's place."""
        if not load.future.cancel() and not load.future.done():
            load.given_up = True
            self._start_thread()

    def close(self) -> None:
        """Let the threads end once they have finished what they are at."""
        for _ in range(self._count):
            self._jobs.put(None)

    def _start_thread(self) -> None:
        threading.Thread(target=self._run, name="adapter-load", daemon=True).start()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            if not job():
                return


@dataclass(slots=True)
class Load(Generic[Result]):
    """One load, on this rank.

    Attributes:
        future: What it will give.
        began_s: When a thread began it, on this rank's monotonic clock.
        given_up: Nobody waits for it any more.
    """

    future: Future[Result] = field(default_factory=Future)
    began_s: float | None = None
    given_up: bool = False

    def wait(self, deadline_s: float) -> None:
        """Wait until the load has ended, or until a time on the monotonic clock."""
        left = deadline_s - time.monotonic()
        if left > 0 and not self.future.done():
            done = threading.Event()
            self.future.add_done_callback(lambda _: done.set())
            done.wait(left)

    def error(self, timeout_s: float) -> str | None:
        """Why it failed on this rank, if it did; one that takes too long has failed."""
        if not self.future.done():
            waited_s = 0.0 if self.began_s is None else time.monotonic() - self.began_s
            return None if waited_s < timeout_s else f"it was not read within {timeout_s:g} s"
        error = self.future.exception()
        return None if error is None else f"{type(error).__name__}: {error}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of a load, the same on every rank.

    Attributes:
        done: It is there on every rank; neither it nor ``error`` means that it goes on.
        error: Why it failed, and on which ranks.
    """

    done: bool = False
    error: str | None = None


def agree(
    states: Sequence[tuple[bool, str | None, int]], *, group: Any, device: torch.device
) -> list[Outcome]:
    """Agree with the other ranks on what became of some loads.

    Args:
        states: Per load, in the same order on every rank: whether it is there on this rank, why it
            failed if it did, and a digest of what was read.
        group: The ranks.
        device: Where the group communicates.

    Returns:
        Per load, what became of it on all ranks together.

    Collectives: one all-reduce of three int64 per load. Only if a load has failed, one more
    exchange of the reasons (``all_gather_object``: two all-gathers).
    """
    codes = [_FAILED if error else _DONE if done else _PENDING for done, error, _ in states]
    digests = [digest for *_, digest in states]
    # One minimum tells the worst state, and the digests' smallest and largest.
    mine = torch.tensor([codes, digests, [-digest for digest in digests]], dtype=torch.int64)
    worst, low, minus_high = _minimum(mine, group, device).tolist()
    torn = [
        code == _DONE and smallest != -largest
        for code, smallest, largest in zip(worst, low, minus_high, strict=True)
    ]
    outcomes = [Outcome(done=code == _DONE) for code in worst]
    failed = [i for i, code in enumerate(worst) if code == _FAILED or torn[i]]
    if not failed:
        return outcomes
    reasons = _reasons([states[i][1] for i in failed], group)
    for i, reason in zip(failed, reasons, strict=True):
        outcomes[i] = Outcome(
            error=reason
            or "ranks read adapters of different modules, ranks or scales; give all of"
            " them the same files"
        )
    return outcomes


def _minimum(mine: Tensor, group: Any, device: torch.device) -> Tensor:
    if group.size() == 1:
        return mine
    shared = mine.to(device)
    torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MIN, group=group)
    return shared.cpu()


def _reasons(mine: Sequence[str | None], group: Any) -> list[str]:
    """Per failed load, what went wrong on which ranks."""
    every: list[Any] = [list(mine)]
    if group.size() > 1:
        every = [None] * group.size()
        torch.distributed.all_gather_object(every, list(mine), group=group)
    return [
        "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(texts) if text)
        for texts in zip(*every, strict=True)
    ]
