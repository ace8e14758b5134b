"""The repository's tests that want a GPU, with warnings that stay warnings."""

from __future__ import annotations

import importlib.util
from collections import Counter
from typing import Any

import pytest
import torch

from benchmarks.device.task import Outcome, State, Task

__all__ = ["run"]

#: Processes, where pytest-xdist is there: kernels compile side by side, and a crash ends one only.
_WORKERS = 4


def run(task: Task) -> Outcome:
    """Run `pytest -m gpu`.

    Args:
        task: The part's time box and where the tests are.

    Returns:
        Counts, and the names of failures. Where all tests were skipped, nothing ran.
    """
    record = _Record(task)
    # A warning that only CUDA gives is no reason to fail here; the project's settings would.
    options = ["-m", "gpu", "-W", "default", "-q", "-p", "no:cacheprovider"]
    options.append("--continue-on-collection-errors")
    if torch.cuda.is_available() and importlib.util.find_spec("xdist"):
        options += ["-n", str(_WORKERS)]
    pytest.main([*options, *task.tests], plugins=[record])
    return record.outcome(record.state)


class _Record:
    """What pytest says of each test, kept as it comes."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._counts: Counter[str] = Counter()
        self._failures: dict[str, str] = {}
        self._reasons: Counter[str] = Counter()
        self._not_read: dict[str, str] = {}
        self._running = ""

    @property
    def state(self) -> State:
        if self._failures:
            return "failed"
        return "passed" if self._counts["passed"] else "nothing ran"

    def outcome(self, state: State) -> Outcome:
        """What there is so far."""
        counts = ", ".join(f"{self._counts[name]} {name}" for name in _OUTCOMES)
        parts = [counts]
        if state == "unfinished" and self._running:
            parts.append(f"at {self._running}")
        if state == "nothing ran":
            reasons = [reason for reason, _ in self._reasons.most_common(1)]
            parts.append(f"most for: {reasons[0]}" if reasons else "no test is marked gpu here")
        if self._not_read:
            parts.append(f"{len(self._not_read)} files of tests could not be imported")
        found = {
            "counts": {name: self._counts[name] for name in _OUTCOMES},
            "failures": self._failures,
            "skipped_for": dict(self._reasons),
            "not_imported": self._not_read,
        }
        return Outcome(state=state, line="; ".join(parts), found=found, notes=self._notes())

    def _notes(self) -> list[str]:
        failed = [f"- `{name}`: {why}" for name, why in self._failures.items()]
        return failed + [f"- not imported: `{n}`: {why}" for n, why in self._not_read.items()]

    def pytest_collectreport(self, report: Any) -> None:
        """A file that cannot be imported, mostly for a package that is not there."""
        if report.failed:
            self._not_read[report.nodeid] = _last_line(report.longreprtext)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """A test begins; whoever reads the record after a crash sees which."""
        self._running = nodeid

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Set-up, call or tear-down of a test has ended."""
        if report.failed:
            self._counts["failed"] += report.nodeid not in self._failures
            self._failures[report.nodeid] = _last_line(report.longreprtext)
        elif report.skipped:
            self._counts["skipped"] += 1
            self._reasons[str(report.longrepr[-1])] += 1
        elif report.when == "call":
            self._counts["passed"] += 1
        else:
            return
        self._task.keep(self.outcome("unfinished"))


_OUTCOMES = ("passed", "failed", "skipped")


def _last_line(text: str) -> str:
    """Of a traceback, what was raised; of another text, its end."""
    raised = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")]
    return (raised or text.strip().splitlines()[-1:] or ["no reason given"])[0][:300]
