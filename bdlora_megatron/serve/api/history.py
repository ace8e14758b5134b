"""What the status page shows of the last minutes: what was served, and what went wrong.

Both are bounded, and hold neither prompts nor answers.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Fault", "Faults", "History"]

#: Of a fault's message; a client may have asked for a model with a long name.
_TOLD = 300


@dataclass(slots=True)
class _Served:
    tokens: int = 0
    first_s: float = 0.0
    firsts: int = 0
    prompt: int = 0
    cached: int = 0


class History:
    """What was served in the last minutes, by model, in pieces of some seconds.

    Attributes:
        piece_s: Seconds of a piece.
        pieces: How many are kept.
        requests: By model, those that have ended since the start.
        tokens: By model, those of answers since the start.
    """

    def __init__(
        self,
        *,
        piece_s: float = 5.0,
        pieces: int = 120,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.piece_s, self.pieces, self._clock = piece_s, pieces, clock
        self.requests: Counter[str] = Counter()
        self.tokens: Counter[str] = Counter()
        self._served: dict[int, dict[str, _Served]] = {}
        self._began = self._now()

    def _now(self) -> int:
        return int(self._clock() // self.piece_s)

    def add(
        self,
        model: str,
        *,
        tokens: int,
        first_s: float | None = None,
        prompt: int = 0,
        cached: int = 0,
    ) -> None:
        """Count what was just served.

        Args:
            model: By whom.
            tokens: Of an answer.
            first_s: How long the first of them took, if it is among them.
            prompt: With an answer's first token: how many its prompt has.
            cached: How many of those were in the prefix cache.
        """
        now = self._now()
        if now not in self._served:
            for old in [number for number in self._served if number < now - self.pieces]:
                del self._served[old]
            self._served[now] = {}
        served = self._served[now].setdefault(model, _Served())
        served.tokens += tokens
        self.tokens[model] += tokens
        served.prompt += prompt
        served.cached += cached
        if first_s is not None:
            served.first_s += first_s
            served.firsts += 1

    def forget(self, model: str) -> None:
        """Drop a model that was unloaded."""
        del self.requests[model], self.tokens[model]
        for served in self._served.values():
            served.pop(model, None)

    def series(self, models: Collection[str]) -> dict[str, Any]:
        """What some models served, oldest piece first; the piece that still goes on is left out.

        Returns:
            ``piece_s``; ``tokens_s``, tokens in a second, null before the server's start;
            ``first_s``, the mean time to a first token, null where there was none; ``cached``, the
            share of prompts' tokens that were in the prefix cache, null where there was no prompt.
        """
        now = self._now()
        lines: dict[str, list[float | None]] = {"tokens_s": [], "first_s": [], "cached": []}
        for number in range(now - self.pieces, now):
            piece = self._served.get(number, {})
            found = [served for model, served in piece.items() if model in models]
            firsts, prompt = sum(s.firsts for s in found), sum(s.prompt for s in found)
            started = number >= self._began
            lines["tokens_s"].append(
                sum(s.tokens for s in found) / self.piece_s if started else None
            )
            lines["first_s"].append(sum(s.first_s for s in found) / firsts if firsts else None)
            lines["cached"].append(sum(s.cached for s in found) / prompt if prompt else None)
        return {"piece_s": self.piece_s, **lines}


@dataclass(slots=True)
class Fault:
    """Answers with the same error.

    Attributes:
        at_s: When the last one was sent, in seconds since 1970.
        status: HTTP's.
        message: What the last client was told.
        model: What was asked for, if that was known; it need not exist.
        count: How many.
    """

    at_s: float
    status: int
    message: str
    model: str | None
    count: int = 1


class Faults:
    """The errors that clients were last told, each kind once.

    Attributes:
        total: All since the start, by status.
    """

    def __init__(self, *, most: int = 50) -> None:
        self.total: Counter[int] = Counter()
        self._most = most
        # In order of the last time.
        self._kinds: OrderedDict[tuple[Any, ...], Fault] = OrderedDict()

    def add(self, status: int, message: str, *, kind: str, model: str | None) -> None:
        """Note an error; ``kind`` tells those of a status and a model apart."""
        self.total[status] += 1
        before = self._kinds.pop((status, kind, model), None)
        count = 1 if before is None else before.count + 1
        fault = Fault(time.time(), status, message[:_TOLD], model, count)
        self._kinds[status, kind, model] = fault
        if len(self._kinds) > self._most:
            self._kinds.popitem(last=False)

    def told(self, models: Collection[str] | None) -> list[dict[str, Any]]:
        """The last ones, newest first: all, or those of some models."""
        faults = reversed(self._kinds.values())
        return [asdict(fault) for fault in faults if models is None or fault.model in models]
