"""The parts, their time boxes, and the processes that they run in."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from benchmarks.device.report import write_report
from benchmarks.device.task import write_json

__all__ = ["PARTS", "ROOT", "Part", "box_s", "run_all", "run_part"]

ROOT = Path(__file__).parents[2]
#: Of what a part's process said, the end is kept.
_LOG_CHARACTERS = 6000
#: A traceback also after a crash, no look at a network, no bars of progress in the log.
_SETTINGS = {"PYTHONFAULTHANDLER": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}


@dataclass(frozen=True, kw_only=True)
class Part:
    """A module with a function ``run(task) -> Outcome``, and its share of the time.

    Attributes:
        name: What the report and its file call it.
        module: Its full name.
        share: Seconds of its time box where all parts together have nine minutes.
    """

    name: str
    module: str
    share: float


def _own(name: str, share: float) -> Part:
    return Part(name=name, module=f"benchmarks.device.{name}", share=share)


#: In the order of what they tell about a machine that may be gone in a moment.
PARTS = (
    _own("facts", 20),
    _own("tests", 110),
    _own("kernels", 110),
    _own("times", 90),
    _own("capture", 30),
    _own("engine", 110),
    _own("train", 70),
)


def run_all(
    parts: Sequence[Part], *, seconds: float, out: Path, tests: Sequence[str] = ("tests",)
) -> list[dict[str, Any]]:
    """Run parts and write what came of each before the next begins.

    Args:
        parts: Which, the machine's facts first.
        seconds: For all of them.
        out: The folder for the results.
        tests: Which tests the part ``tests`` runs.

    Returns:
        What ``run_part`` gave, part by part.
    """
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    results: list[dict[str, Any]] = []
    for number, part in enumerate(parts):
        coming = parts[number + 1 :]
        box = box_s(part, coming, end - time.monotonic())
        results.append(run_part(part, seconds=box, tests=tests))
        write_json(out / f"{part.name}.json", results[-1])
        write_report(out / "report.md", results, waiting=[other.name for other in coming])
        print(f"{part.name}: {results[-1]['state']}: {results[-1]['line']}", flush=True)
    return results


def box_s(part: Part, coming: Sequence[Part], left_s: float) -> float:
    """A part's time box: its share of the time that is left, so that unspent time goes on.

    Args:
        part: The part.
        coming: The parts after it.
        left_s: Seconds for all of them.

    Returns:
        Seconds, at least one.
    """
    return max(1.0, left_s * part.share / (part.share + sum(other.share for other in coming)))


def run_part(part: Part, *, seconds: float, tests: Sequence[str] = ("tests",)) -> dict[str, Any]:
    """Run a part in a process group of its own, which ends with the time box.

    Args:
        part: Which.
        seconds: The time box.
        tests: Which tests the part ``tests`` runs.

    Returns:
        The part's name, ``Outcome``'s fields, the seconds that it took, those of its box, and the
        end of what its process said.
    """
    with tempfile.TemporaryDirectory() as folder:
        result, log = Path(folder, "result.json"), Path(folder, "log")
        command = [sys.executable, "-m", "benchmarks.device.part", part.module]
        command += ["--result", str(result), "--seconds", str(seconds), "--tests", *tests]
        began = time.monotonic()
        with log.open("wb") as stream:
            status = _call(command, stream, seconds)
        took = time.monotonic() - began
        said = log.read_text("utf-8", "replace")[-_LOG_CHARACTERS:]
        outcome = json.loads(result.read_text("utf-8")) if result.exists() else {}
    outcome = _judged(outcome, status, said, seconds)
    times = {"seconds": round(took, 1), "box_s": round(seconds, 1)}
    return {"part": part.name, **outcome, **times, "said_at_the_end": said}


def _call(command: Sequence[str], log: IO[bytes], seconds: float) -> int | None:
    """The command's exit status; None where it was stopped at the end of its time."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **_SETTINGS, "PYTHONPATH": _python_path()},
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        # The whole group, also after a part that ended by itself: a worker may be left over.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _python_path() -> str:
    given = os.environ.get("PYTHONPATH")
    return str(ROOT) if not given else os.pathsep.join([str(ROOT), given])


def _judged(
    outcome: dict[str, Any], status: int | None, said: str, seconds: float
) -> dict[str, Any]:
    """The result that a process left, or what to say where it left none, or not the last."""
    before = f"; until then: {outcome['line']}" if outcome else ""
    unfinished = {"found": {}, "notes": [], **outcome}
    if status is None:
        line = f"time box of {seconds:.0f} s over{before}"
        return {**unfinished, "state": "time box over", "line": line}
    if status or outcome.get("state", "unfinished") == "unfinished":
        how = f"signal {-status}" if status < 0 else f"status {status}"
        last = said.strip().splitlines()[-1:] or ["nothing said"]
        return {**unfinished, "state": "failed", "line": f"ended with {how}: {last[0]}{before}"}
    return outcome
