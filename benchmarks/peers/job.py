"""What a contender is asked and what it answers: JSON files, read and written without torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["BASE", "Job", "Load", "Outcome", "Request", "read_requests", "timed"]

#: Stands for a request without an adapter.
BASE = ""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One line of the requests' file.

    Attributes:
        prompt: Tokens.
        max_tokens: Length of the greedy answer; no token ends it earlier.
        adapter: The adapter's number, or -1 for the base model.
    """

    prompt: list[int]
    max_tokens: int
    adapter: int


@dataclass(frozen=True, kw_only=True)
class Load:
    """Requests that arrive at once.

    Attributes:
        name: What the report calls it.
        requests: Their file.
        adapters: The folders of the adapters, by number; none for the base model alone.
    """

    name: str
    requests: str
    adapters: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one contender runs, in one process.

    Attributes:
        base: The model's folder.
        dtype: ``float32`` or ``bfloat16``.
        tp: Tensor-parallel ranks.
        layout: How ranks hold adapters; each contender has names of its own.
        max_rank: The largest rank of any adapter.
        repeats: Times that each load is timed, after one that is not.
        loads: What to run.
    """

    base: str
    dtype: str
    tp: int
    layout: str
    max_rank: int
    repeats: int
    loads: list[Load]

    @classmethod
    def read(cls, path: str) -> Job:
        """The job in a file."""
        data = json.loads(Path(path).read_text("utf-8"))
        return cls(**{**data, "loads": [Load(**load) for load in data["loads"]]})

    def write(self, path: Path) -> None:
        """Write it to a file."""
        path.write_text(json.dumps(asdict(self)), "utf-8")

    @property
    def slots(self) -> int:
        """Different adapters in the largest load."""
        return max((len(load.adapters) for load in self.loads), default=0)


@dataclass(kw_only=True)
class Outcome:
    """What one contender did.

    Attributes:
        versions: Of what ran.
        start_s: Seconds until the first request could be answered.
        seconds: By load, one for each repeat.
        answers: By load, the tokens of each request's answer.
    """

    versions: dict[str, str]
    start_s: float
    seconds: dict[str, list[float]] = field(default_factory=dict)
    answers: dict[str, list[list[int]]] = field(default_factory=dict)

    def write(self, path: str) -> None:
        """Write it to a file."""
        Path(path).write_text(json.dumps(asdict(self)), "utf-8")


def read_requests(path: str) -> list[Request]:
    """The requests of a file."""
    lines = Path(path).read_text("utf-8").splitlines()
    return [Request(**json.loads(line)) for line in lines]


def timed(
    job: Job,
    outcome: Outcome,
    answer: Callable[[Load, Sequence[Request]], list[list[int]]],
    clock: Callable[[], float],
) -> None:
    """Run every load, once to warm up and then ``job.repeats`` times.

    Args:
        job: What to run.
        outcome: Where times and answers go.
        answer: Answers a load's requests.
        clock: Seconds.
    """
    for load in job.loads:
        requests = read_requests(load.requests)
        # What a first call compiles, loads or allocates is not what serving costs.
        answer(load, requests)
        outcome.seconds[load.name] = []
        for _ in range(job.repeats):
            begun = clock()
            outcome.answers[load.name] = answer(load, requests)
            outcome.seconds[load.name].append(clock() - begun)
        _check(load, requests, outcome.answers[load.name])


def _check(load: Load, requests: Sequence[Request], answers: Any) -> None:
    wanted = [request.max_tokens for request in requests]
    got = [len(tokens) for tokens in answers]
    if wanted != got:
        raise SystemExit(f"{load.name}: answers of {got} tokens; wanted {wanted}")
