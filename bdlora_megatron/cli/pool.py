"""Jobs on worker processes, of which any may die without taking the others' work along."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

from bdlora_megatron.cli.jobs import ConversionJob, JobResult, run_job
from bdlora_megatron.runtime.workers import die_with_parent

__all__ = ["run_jobs"]


def run_jobs(jobs: Iterable[ConversionJob], *, workers: int) -> Iterator[JobResult]:
    """Run all jobs, in processes of their own if there is more than one worker.

    Yields:
        Each job's result when it ends, in any order.
    """
    waiting = deque(jobs)
    if min(workers, len(waiting)) < 2:
        yield from map(run_job, waiting)
        return
    while waiting:
        suspects = yield from _run_until_broken(waiting, workers)
        for job in suspects:
            # Alone, it cannot be blamed for another's death.
            alone = deque([job])
            if (yield from _run_until_broken(alone, 1)):
                yield JobResult(
                    name=job.name,
                    status="failed",
                    seconds=0.0,
                    error="the worker process died, perhaps for lack of memory; "
                    "nothing was written; try it with --workers 1",
                )


def _run_until_broken(
    waiting: deque[ConversionJob], workers: int
) -> Generator[JobResult, None, list[ConversionJob]]:
    """Yield results; return the jobs that were running when a worker died, if one did."""
    running: dict[Future[JobResult], ConversionJob] = {}
    context = multiprocessing.get_context("forkserver")
    # Imported once, before any thread or tensor is made; each worker is a cheap fork of that.
    context.set_forkserver_preload(["bdlora_megatron.cli.jobs"])
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start_worker, initargs=(workers,)
    ) as pool:
        while waiting or running:
            # No more than one job per worker: all that are handed out run, and one of them is it.
            while waiting and len(running) < workers:
                job = waiting.popleft()
                running[pool.submit(run_job, job)] = job
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            broken = False
            for future in done:
                if isinstance(future.exception(), BrokenProcessPool):
                    broken = True
                else:
                    del running[future]
                    yield future.result()
            if broken:
                return list(running.values())
    return []


def _start_worker(workers: int) -> None:
    import torch

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    die_with_parent()
