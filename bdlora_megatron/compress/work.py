"""Running tasks on worker processes, and a folder of what they finished.

The folder stands beside the collection that is being made, so that the same command goes on where
it was killed. Files are named by all that decides them.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import resource
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch

from bdlora_megatron.compress.options import CompressOptions
from bdlora_megatron.compress.sources import AdapterFacts, Source, look_at
from bdlora_megatron.compress.tasks import Desk, Task
from bdlora_megatron.convert.folders import held_alone
from bdlora_megatron.errors import CapacityError
from bdlora_megatron.runtime.workers import die_with_parent

__all__ = ["Show", "Workers", "work_folder"]

T = TypeVar("T")
R = TypeVar("R")
#: Wraps the results of a stage, as a progress bar does: they, their number, what they are.
Show = Callable[[Iterable[Any], int, str], Iterable[Any]]

_desk: Desk | None = None


def _no_show(results: Iterable[Any], _: int, __: str) -> Iterable[Any]:
    return results


@dataclass(kw_only=True)
class Workers:
    """Processes for the tasks of one collection; none of their own where one is enough.

    Attributes:
        count: The most at a time.
        show: Shows how far a stage is.
        peak_bytes: The most resident memory that a process had.
    """

    count: int
    show: Show = _no_show
    peak_bytes: int = field(default=0, init=False)

    def look(self, sources: Sequence[Source], options: CompressOptions) -> list[AdapterFacts]:
        """Read every adapter once.

        Returns:
            What is known of each.
        """
        jobs = [(number, source, options) for number, source in enumerate(sources)]
        facts: dict[int, AdapterFacts] = {}
        for number, fact, peak in self.show(
            self._run(_look, jobs, desk=None), len(jobs), "adapter"
        ):
            facts[number] = fact
            self.peak_bytes = max(self.peak_bytes, peak)
        return [facts[number] for number in range(len(sources))]

    def run(
        self, tasks: Sequence[Task], sources: Sequence[Source], options: CompressOptions, unit: str
    ) -> None:
        """Do the tasks whose files are not there yet.

        Args:
            tasks: In the order to begin them.
            sources: The adapters, in their order.
            options: What is made of them.
            unit: What a task is, for who watches.
        """
        left = [task for task in tasks if not task.target.exists()]
        desk = (tuple(sources), options)
        for peak in self.show(self._run(_work, left, desk=desk), len(left), unit):
            self.peak_bytes = max(self.peak_bytes, peak)

    def _run(
        self,
        function: Callable[[T], R],
        jobs: Sequence[T],
        *,
        desk: tuple[Sequence[Source], CompressOptions] | None,
    ) -> Iterator[R]:
        """The results, in any order.

        Raises:
            CapacityError: A process died.
        """
        if min(self.count, len(jobs)) < 2:
            threads = torch.get_num_threads()
            _sit_down(desk)
            try:
                yield from map(function, jobs)
            finally:
                torch.set_num_threads(threads)
                _stand_up()
            return
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["bdlora_megatron.compress.tasks"])
        with ProcessPoolExecutor(
            self.count, mp_context=context, initializer=_start, initargs=(desk,)
        ) as pool:
            waiting, running = iter(jobs), set[Future[R]]()
            try:
                while True:
                    # Few at a time: what is handed out cannot be taken back after an error.
                    running |= {
                        pool.submit(function, job)
                        for job in islice(waiting, 2 * self.count - len(running))
                    }
                    if not running:
                        return
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        yield future.result()
            except BrokenProcessPool:
                raise CapacityError(
                    "a worker process died, perhaps for lack of memory; what was finished is kept: "
                    "run the same command again with fewer --workers"
                ) from None
            finally:
                # After an error nothing more is begun; what runs is finished, and kept.
                pool.shutdown(cancel_futures=True)


def _start(desk: tuple[Sequence[Source], CompressOptions] | None) -> None:
    die_with_parent()
    _sit_down(desk)


def _sit_down(desk: tuple[Sequence[Source], CompressOptions] | None) -> None:
    global _desk
    # Sums in another order round otherwise, and results shall not depend on who computes them.
    torch.set_num_threads(1)
    _desk = None if desk is None else Desk(*desk)


def _stand_up() -> None:
    global _desk
    if _desk is not None:
        _desk.opened.close()
    _desk = None


def _look(job: tuple[int, Source, CompressOptions]) -> tuple[int, AdapterFacts, int]:
    number, source, options = job
    return number, look_at(source, options), _peak()


def _work(task: Task) -> int:
    assert _desk is not None, "set before any task"
    task.run(_desk)
    return _peak()


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def work_folder(out: Path, fingerprint: str) -> Iterator[Path]:
    """The folder of finished tasks beside a collection, held by this process alone.

    What other inputs and options left there is removed, and so is all once the caller is through.

    Args:
        out: The collection's folder.
        fingerprint: Of inputs and options.

    Raises:
        ConfigError: If another process compresses to the same folder.
    """
    root = out.with_name(f".{out.name}.work")
    root.mkdir(parents=True, exist_ok=True)
    refusal = f"another process compresses to {out}; wait for it or pass another --out"
    with held_alone(root, refusal):
        for path in root.iterdir():
            if path.name != fingerprint:
                shutil.rmtree(path)
        folder = root / fingerprint
        folder.mkdir(exist_ok=True)
        for path in folder.glob("*.partial"):
            path.unlink()
        yield folder
        shutil.rmtree(root)


def file_name(*parts: object) -> str:
    """The name of a task's file, by all that decides it."""
    text = json.dumps([str(part) for part in parts])
    return f"{hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}.safetensors"
