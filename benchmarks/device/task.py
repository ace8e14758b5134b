"""What a part is given, and what it gives back."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

__all__ = ["Outcome", "State", "Task", "judged", "write_json"]

State: TypeAlias = Literal["passed", "failed", "nothing ran", "unfinished", "time box over"]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a part.

    Attributes:
        state: What to think of it; ``nothing ran`` where all was skipped.
        line: The same in one line, with the numbers that matter.
        found: All numbers.
        notes: Lines of Markdown for the report.
    """

    state: State
    line: str
    found: dict[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()


def judged(*, unfinished: bool, wrong: bool) -> State:
    """The state of a part that runs pieces of work.

    Args:
        unfinished: More are to come.
        wrong: Some gave wrong answers, or none has run.

    Returns:
        The state.
    """
    if unfinished:
        return "unfinished"
    return "failed" if wrong else "passed"


class Task:
    """A part's time box, and where its result goes.

    Attributes:
        seconds: The time box.
        tests: Which tests the part ``tests`` runs.
    """

    def __init__(self, result: Path, *, seconds: float, tests: Sequence[str] = ("tests",)) -> None:
        """Start the clock.

        Args:
            result: The file for the result.
            seconds: The time box.
            tests: See above.
        """
        self.seconds = seconds
        self.tests = tuple(tests)
        self._result = result
        self._end = time.monotonic() + seconds

    @property
    def left_s(self) -> float:
        """Seconds until the time box is over."""
        return self._end - time.monotonic()

    @property
    def is_short(self) -> bool:
        """Whether so little is left that no new piece of work should begin."""
        return self.left_s < 0.1 * self.seconds

    def keep(self, outcome: Outcome) -> None:
        """Write down what there is so far, for the case that the process ends here.

        Args:
            outcome: With the state ``unfinished``, unless it is the last.
        """
        write_json(self._result, asdict(outcome))


def write_json(path: Path, content: Any) -> None:
    """Write a file that is there as a whole or not at all.

    Args:
        path: The file.
        content: What JSON can say.
    """
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    unfinished.replace(path)
