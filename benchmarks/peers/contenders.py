"""Who takes part, and one run of one of them in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.peers.job import Job

__all__ = ["CONTENDERS", "Contender", "Visit", "visit"]

ROOT = Path(__file__).parents[2]
VLLM_PYTHON = ROOT / ".venv-peers" / "bin" / "python"
_LOOK_S = 0.5
_LAST_WORDS = 400


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to answer the requests.

    Attributes:
        name: What the report calls it.
        runner: Its module in this package.
        tp: Tensor-parallel ranks.
        layout: Its name for how ranks hold vanilla adapters.
        blocks: Runs block-diagonal adapters too.
    """

    name: str
    runner: str
    tp: int = 1
    layout: str = ""
    blocks: bool = False

    @property
    def python(self) -> Path:
        """The interpreter of its environment."""
        return VLLM_PYTHON if self.runner == "run_vllm" else Path(sys.executable)


CONTENDERS = (
    Contender(name="PEFT, mixed batch", runner="run_peft", blocks=True),
    Contender(name="bdlora-megatron, TP=1", runner="run_ours", layout="bdlora", blocks=True),
    Contender(name="vLLM, TP=1", runner="run_vllm"),
    Contender(name="bdlora-megatron, TP=2", runner="run_ours", tp=2, layout="bdlora", blocks=True),
    Contender(name="bdlora-megatron, TP=2, S-LoRA layout", runner="run_ours", tp=2, layout="slora"),
    Contender(name="vLLM, TP=2", runner="run_vllm", tp=2),
    Contender(name="vLLM, TP=2, fully sharded", runner="run_vllm", tp=2, layout="fully_sharded"),
)


@dataclass(frozen=True, kw_only=True)
class Visit:
    """One process of one contender.

    Attributes:
        contender: Whose.
        outcome: What it wrote, as in ``job.Outcome``; None where it failed.
        problem: Why it failed.
        peak_bytes: The most memory that its processes held together, shared pages counted once.
        seconds: From its start to its end.
    """

    contender: Contender
    outcome: dict[str, Any] | None
    problem: str
    peak_bytes: int
    seconds: float


def visit(contender: Contender, job: Job, folder: Path, *, threads: int, limit_s: float) -> Visit:
    """Run a job in a process of its own.

    Args:
        contender: Who.
        job: What.
        folder: For the job, the outcome and what the process says.
        threads: Threads of all its ranks together.
        limit_s: It is ended after so long.

    Returns:
        What came of it.
    """
    files = {name: folder / f"{name}.json" for name in ("job", "outcome")}
    job.write(files["job"])
    files["outcome"].unlink(missing_ok=True)
    command = [contender.python, "-W", "ignore", "-m", f"benchmarks.peers.{contender.runner}"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(threads // contender.tp, 1))}
    begun = time.perf_counter()
    log = folder / "log.txt"
    with log.open("w") as written:
        process = psutil.Popen(
            [*map(str, command), str(files["job"]), str(files["outcome"])],
            cwd=ROOT,
            env=environment,
            stdout=written,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        peak, ended = _watch(process, begun + limit_s)
    problem = "" if ended else f"not ready after {limit_s:.0f} s"
    if ended and process.returncode:
        problem = log.read_text("utf-8", "replace")[-_LAST_WORDS:]
    outcome = None if problem else json.loads(files["outcome"].read_text("utf-8"))
    return Visit(
        contender=contender,
        outcome=outcome,
        problem=problem,
        peak_bytes=peak,
        seconds=time.perf_counter() - begun,
    )


def _watch(process: psutil.Popen, until: float) -> tuple[int, bool]:
    """Look at its memory until it ends; what it started ends with it."""
    peak, family = 0, {process.pid: process}
    try:
        while time.perf_counter() < until:
            family |= {child.pid: child for child in _children(process)}
            peak = max(peak, sum(map(_shared_once, family.values())))
            try:
                process.wait(_LOOK_S)
            except psutil.TimeoutExpired:
                continue
            return peak, True
        return peak, False
    finally:
        _end(list(family.values()))


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def _shared_once(process: psutil.Process) -> int:
    """Its proportional set size; 0 once it has ended."""
    try:
        size: int = process.memory_full_info().pss
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0
    return size


def _end(family: list[psutil.Process]) -> None:
    # psutil looks at a process's start time first: a number that was given anew is left alone.
    for process in family:
        if process.is_running():
            process.terminate()
    _, alive = psutil.wait_procs(family, timeout=10)
    for process in alive:
        process.kill()
    psutil.wait_procs(alive, timeout=10)
