"""Which waiting requests run next, when there are more adapters than slots. Plain Python.

Requests run in the order in which they came, but for those whose adapter is in no slot: the ones
behind them go first, so that the adapters that are in slots serve all they can before they leave.
That alone would let a busy adapter keep its slot for ever. So a request that has waited long enough
is passed by no longer, and closes one of the adapters in use: no further request for it starts, its
slot falls idle as soon as those that run have ended, and goes to the one who waits.

Everything follows from the sequence of calls, so that ranks that make the same calls decide alike.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from bdlora_megatron.errors import BDLoRAError, ConfigError

__all__ = ["Admission", "Admitted", "Refused", "Take"]


class Take(Enum):
    """What became of an attempt to take an adapter into use."""

    TAKEN = "taken"
    """It is in a slot, and stays there."""

    NO_SLOT = "no slot"
    """All slots are in use."""

    LOADING = "loading"
    """It is on its way from the disk."""


class AdapterSlots(Protocol):
    """What the queue asks about adapters."""

    def is_resident(self, adapter: str) -> bool:
        """Whether it is in a slot, used or not."""

    def take(self, adapter: str) -> Take:
        """Take it into use if that can be done now.

        Raises an error of this package where it can't be had at all.
        """


@dataclass(frozen=True, slots=True)
class Admitted:
    """A request that may run now.

    Attributes:
        request_id: Which.
        adapter: Its adapter, taken into use for it; None for the base model.
    """

    request_id: int
    adapter: str | None


@dataclass(frozen=True, slots=True)
class Refused:
    """A request that can't run.

    Attributes:
        request_id: Which.
        reason: Why its adapter can't be had.
        kind: The error's class.
    """

    request_id: int
    reason: str
    kind: str


class Admission:
    """The queue of requests that do not run yet."""

    def __init__(
        self, *, patience: int = 64, lookahead: int = 8, per_adapter: int | None = None
    ) -> None:
        """Start empty.

        Args:
            patience: Steps after which a request for an adapter without a slot closes an adapter
                that has one; and once more after as many steps again, as long as that takes.
            lookahead: At most so many adapters that are in no slot are asked for in one step, so
                that they do not push each other out of host memory.
            per_adapter: Requests of one adapter that run at once, at most.

        Raises:
            ConfigError: A number is not positive.
        """
        if min(patience, lookahead, per_adapter or 1) < 1:
            raise ConfigError(
                f"patience={patience}, lookahead={lookahead}, per_adapter={per_adapter}; all of "
                "them are at least 1"
            )
        self.patience = patience
        self.lookahead = lookahead
        self.per_adapter = per_adapter
        # Request to (adapter, step of arrival), in order of arrival.
        self._queue: dict[int, tuple[str | None, int]] = {}
        self._running: Counter[str] = Counter()
        # Closed adapters, each with the adapter that waits for its slot.
        self._closed: dict[str, str] = {}
        self._step = 0

    def __len__(self) -> int:
        return len(self._queue)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._queue

    @property
    def closed(self) -> frozenset[str]:
        """Adapters that start no further request until another has had their slot."""
        return frozenset(self._closed)

    def uses(self, adapter: str) -> int:
        """Requests of an adapter, waiting and running."""
        return self._running[adapter] + sum(a == adapter for a, _ in self._queue.values())

    def add(self, request_id: int, adapter: str | None) -> None:
        """Put a request at the end of the queue."""
        self._queue[request_id] = (adapter, self._step)

    def remove(self, request_id: int) -> None:
        """Take a request out of the queue, if it is in it."""
        adapter, _ = self._queue.pop(request_id, (None, 0))
        if not any(waiting == adapter for waiting, _ in self._queue.values()):
            self._open_for(adapter)

    def finished(self, adapter: str | None) -> None:
        """Say that a request that was admitted has ended."""
        if adapter is not None:
            self._running[adapter] -= 1
            if not self._running[adapter]:
                del self._running[adapter]

    def admit(self, capacity: int, slots: AdapterSlots) -> list[Admitted | Refused]:
        """Begin a step: choose the requests that run from now on.

        Args:
            capacity: How many may be added to those that run.
            slots: The adapters.
        """
        self._step += 1
        left: list[Admitted | Refused] = []
        asked = _Asked()
        for request_id, (adapter, since) in self._in_turn(slots):
            if capacity == 0:
                break
            if adapter is not None:
                if not self._may_ask(adapter, asked):
                    continue
                try:
                    took = slots.take(adapter)
                except BDLoRAError as error:
                    left.append(Refused(request_id, str(error), type(error).__name__))
                    self.remove(request_id)
                    continue
                if took is not Take.TAKEN:
                    self._refuse(adapter, took, asked, waited=self._step - since)
                    continue
                self._running[adapter] += 1
                self._open_for(adapter)
            left.append(Admitted(request_id, adapter))
            self.remove(request_id)
            capacity -= 1
        return left

    def _in_turn(self, slots: AdapterSlots) -> list[tuple[int, tuple[str | None, int]]]:
        """The queue, with those at the end who would need a slot and can still wait."""
        names = {adapter for adapter, _ in self._queue.values() if adapter is not None}
        absent = {adapter for adapter in names if not slots.is_resident(adapter)}

        def can_wait(item: tuple[int, tuple[str | None, int]]) -> bool:
            adapter, since = item[1]
            return adapter in absent and self._step - since < self.patience

        return sorted(self._queue.items(), key=can_wait)

    def _may_ask(self, adapter: str, asked: _Asked) -> bool:
        if adapter in asked.in_vain or adapter in self._closed:
            return False
        if self.per_adapter is not None and self._running[adapter] >= self.per_adapter:
            return False
        # Any other adapter might take the slot that is being cleared for one that has waited.
        free = not asked.held and len(asked.in_vain) < self.lookahead
        return adapter in self._running or free

    def _refuse(self, adapter: str, took: Take, asked: _Asked, *, waited: int) -> None:
        asked.in_vain.add(adapter)
        if took is Take.NO_SLOT:
            self._make_way(adapter, waited)
        asked.held |= adapter in self._closed.values()

    def _make_way(self, adapter: str, waited: int) -> None:
        """Close as many adapters as a wait of so many steps justifies."""
        owed = waited // self.patience - sum(w == adapter for w in self._closed.values())
        if owed <= 0:
            return
        open_ = (a for a in self._running if a not in self._closed and a != adapter)
        for victim in sorted(open_, key=lambda a: (self._running[a], a))[:owed]:
            self._closed[victim] = adapter

    def _open_for(self, adapter: str | None) -> None:
        """Open what was closed for an adapter."""
        self._closed = {v: w for v, w in self._closed.items() if w != adapter}


@dataclass(slots=True)
class _Asked:
    """What one step has asked for so far.

    Attributes:
        in_vain: Adapters that can't be had in this step.
        held: One of them has an adapter closed for it.
    """

    in_vain: set[str] = field(default_factory=set)
    held: bool = False
