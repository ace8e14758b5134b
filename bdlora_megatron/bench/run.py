"""Running a plan: ranks of this machine, all contenders in turn, round after round."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path

import torch
from torch.multiprocessing.spawn import start_processes

from bdlora_megatron import runtime
from bdlora_megatron.bench.contenders import Contenders
from bdlora_megatron.bench.latency import link_latency
from bdlora_megatron.bench.plan import BenchPlan, Setting, Variant
from bdlora_megatron.errors import ConfigError
from bdlora_megatron.runtime.launch import bind_gloo, join_ranks, start_method

__all__ = ["Cell", "measure", "measure_rank"]

_TIMEOUT = timedelta(minutes=10)


@dataclass(kw_only=True, slots=True)
class Cell:
    """One contender at one setting.

    Attributes:
        setting: The step and the link.
        variant: The contender.
        collectives: What one step starts, by kind.
        payload_bytes: What those carry.
        seconds: One for each round: the slowest rank's.
    """

    setting: Setting
    variant: Variant
    collectives: dict[str, int]
    payload_bytes: int
    seconds: list[float] = field(default_factory=list)


def _silence(text: str) -> None:
    """Tells nobody; unlike a lambda it can be sent to ranks."""


def measure(
    plan: BenchPlan,
    *,
    tell: Callable[[str], None] = _silence,
    interface: str | None = None,
) -> list[Cell]:
    """Time every contender at every setting.

    In each round every setting is visited, and there every contender, in an order that is drawn
    anew: what disturbs the machine for a while disturbs all of them.

    Args:
        plan: What to measure.
        tell: Is told of progress, on rank 0; must pickle.
        interface: Network interface of gloo; see ``runtime.launch.bind_gloo``.

    Returns:
        A cell for each contender and setting.

    Raises:
        ConfigError: Latencies on GPUs, where they would be waited for while others still compute;
            fewer GPUs than ranks; or no such interface.
    """
    if torch.cuda.is_available():
        if any(plan.latencies_s):
            raise ConfigError("added latencies are for CPUs; on GPUs leave only 0")
        if torch.cuda.device_count() < plan.tp:
            raise ConfigError(f"tp={plan.tp} on {torch.cuda.device_count()} GPUs")
    bind_gloo(interface, one_machine=True)
    with tempfile.TemporaryDirectory() as folder:
        start_processes(
            _rank_main,
            args=(Path(folder), plan, tell, interface),
            nprocs=plan.tp,
            start_method=start_method(),
        )
        # Written by our own rank a moment ago.
        cells: list[Cell] = torch.load(Path(folder, "cells"), weights_only=False)
    return cells


def _rank_main(
    rank: int,
    folder: Path,
    plan: BenchPlan,
    tell: Callable[[str], None],
    interface: str | None,
) -> None:
    torch.set_num_threads(1)
    if not join_ranks(rank, plan.tp, f"{folder}/store", interface=interface, timeout=_TIMEOUT):
        runtime.enable_cpu()
    with runtime.model_parallel(plan.tp):
        cells = measure_rank(plan, tell if rank == 0 else _silence)
    if rank == 0:
        torch.save(cells, folder / "cells")
    torch.distributed.destroy_process_group()


def measure_rank(plan: BenchPlan, tell: Callable[[str], None]) -> list[Cell]:
    """One rank's part of ``measure``, in process groups that exist."""
    contenders = Contenders(plan)
    # What a step communicates does not depend on the link's speed.
    counted = {
        (at.step, variant): _count(contenders, variant, at) for at, variant in _fastest(plan)
    }
    cells = [
        replace(counted[at.step, variant], setting=at, seconds=[]) for at, variant in plan.pairs()
    ]
    # Ranks visit in the same order, so they draw from the same seed.
    order = random.Random(0)
    groups = [[c for c in cells if c.setting == setting] for setting in plan.settings()]
    for number in range(plan.warmup + plan.repeats):
        tell(f"round {number + 1} of {plan.warmup + plan.repeats}")
        for group in order.sample(groups, len(groups)):
            for cell in order.sample(group, len(group)):
                seconds = _time(contenders, cell)
                if number >= plan.warmup:
                    cell.seconds.append(seconds)
    _keep_slowest(cells, contenders.device)
    return cells


def _fastest(plan: BenchPlan) -> Iterator[tuple[Setting, Variant]]:
    """Every step of every contender, on the first link."""
    for setting, variant in plan.pairs():
        if setting.latency_s == plan.latencies_s[0]:
            yield setting, variant


def _count(contenders: Contenders, variant: Variant, setting: Setting) -> Cell:
    contenders.choose(variant, setting)
    step = contenders.step(variant, setting)
    # The first call may also fill a cache.
    step()
    with runtime.record_collectives() as log:
        step()
    return Cell(
        setting=setting,
        variant=variant,
        collectives=log.counts(),
        payload_bytes=log.payload_bytes,
    )


def _time(contenders: Contenders, cell: Cell) -> float:
    contenders.choose(cell.variant, cell.setting)
    step = contenders.step(cell.variant, cell.setting)
    with link_latency(cell.setting.latency_s):
        torch.distributed.barrier()
        started = time.perf_counter()
        step()
        return time.perf_counter() - started


def _keep_slowest(cells: list[Cell], where: torch.device) -> None:
    """A step has ended when its last rank has."""
    times = torch.tensor([cell.seconds for cell in cells], dtype=torch.float64, device=where)
    torch.distributed.all_reduce(times, torch.distributed.ReduceOp.MAX)
    for cell, seconds in zip(cells, times.tolist(), strict=True):
        cell.seconds = seconds
