"""Random cases of the grouped product against fp64, each walked by token and by tile.

Whatever a product may not read is NaN: rows of the pools that no slot holds, inputs of tokens
without an adapter and beside the batch, memory that is allocated on the way. Whatever it may not
write must be as it was, bit by bit: outputs of those tokens, columns of no slice, rows beside the
batch. Each case runs twice, to the same bits.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor

from bdlora_megatron.ops import GroupedBatch, SlotFactors, add_grouped
from benchmarks.device.random_cases import Bounds, Setup, batches, draw_setup
from benchmarks.device.task import Outcome, Task, judged
from tests.unit.ops.cases import make_inputs, make_slots

__all__ = ["Product", "all_cases", "check_setup", "run"]

#: Adds to outputs, in place.
Product: TypeAlias = Callable[[Tensor, Tensor, SlotFactors, GroupedBatch], Any]

#: Root mean square of the error and largest error, over the root mean square of what is expected;
#: by the coarsest type that takes part. Three roundings of each: of inputs, ranks and outputs.
_ALLOWED = {
    # And sums of up to a thousand terms.
    torch.float32: (3e-6, 3e-5),
    torch.float16: (2e-3, 2e-2),
    torch.bfloat16: (1e-2, 1e-1),
}
_WALKS = ("token", "segment")

_ON_GPU = Bounds(features=1024, rank=128, slots=24, tokens=(1, 2, 7, 16, 33, 100, 256, 700, 2100))
#: Triton's interpreter steps through every program.
_ON_CPU = Bounds(features=48, rank=20, slots=5, tokens=(1, 3, 9))
#: Setups, batches of each, and processes that take setups in turn, mostly to compile kernels.
_COUNTS_ON_GPU, _COUNTS_ON_CPU = (40, 5), (6, 2)
_WORKERS = 8


def run(task: Task) -> Outcome:
    """Run as many cases as the time box has room for.

    Args:
        task: The part's time box.

    Returns:
        How many cases ran, the errors by type, and every case that was wrong.
    """
    setups, per_setup = _COUNTS_ON_GPU if torch.cuda.is_available() else _COUNTS_ON_CPU
    wanted = setups * per_setup * len(_WALKS)
    cases: list[dict[str, Any]] = []
    workers = min(_WORKERS, (os.cpu_count() or 2) // 2) if torch.cuda.is_available() else 0
    for done in all_cases(range(setups), per_setup, workers):
        cases += done
        if task.is_short:
            break
        task.keep(_outcome(cases, wanted, unfinished=True))
    return _outcome(cases, wanted)


def all_cases(seeds: Sequence[int], per_setup: int, workers: int) -> Iterator[list[dict[str, Any]]]:
    """The cases of each setup, as they are done.

    Args:
        seeds: Of the setups.
        per_setup: Batches of each.
        workers: Processes that take setups in turn; 0 for this one.

    Yields:
        Records, as ``check_setup`` gives them.
    """
    if not workers:
        yield from (_check_seed(seed, per_setup) for seed in seeds)
        return
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        for future in as_completed([pool.submit(_check_seed, seed, per_setup) for seed in seeds]):
            yield future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _check_seed(seed: int, per_setup: int) -> list[dict[str, Any]]:
    bounds = _ON_GPU if torch.cuda.is_available() else _ON_CPU
    return check_setup(draw_setup(seed, bounds), bounds, per_setup, _kernels)


def _kernels(out: Tensor, x: Tensor, slots: SlotFactors, batch: GroupedBatch) -> None:
    add_grouped(out, x, slots, batch, implementation="triton")


def check_setup(setup: Setup, bounds: Bounds, count: int, product: Product) -> list[dict[str, Any]]:
    """Check a product on some batches of a setup.

    Args:
        setup: Layer, adapters and types.
        bounds: How many tokens.
        count: Batches; each is walked in both ways.
        product: What is checked.

    Returns:
        A record of each case; ``wrong`` says what is, and is None where nothing is.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    slots = make_slots(
        setup.geometry,
        ranks=list(setup.ranks),
        dtype=setup.factors,
        device=device,
        seed=setup.seed,
    )
    records = []
    for popularity, token_slot in batches(setup, bounds, count):
        for by in _WALKS:
            record = {
                "seed": setup.seed,
                "data": str(setup.data).removeprefix("torch."),
                "factors": str(setup.factors).removeprefix("torch."),
                "popularity": popularity,
                "tokens": len(token_slot),
                "by": by,
            }
            records.append({**record, **_checked(setup, slots, token_slot, by, product)})
    return records


def _checked(
    setup: Setup, slots: SlotFactors, token_slot: list[int], by: Any, product: Product
) -> dict[str, Any]:
    try:
        return _check(setup, slots, token_slot, by, product)
    except Exception as error:
        if slots.A.is_cuda:
            # An error that CUDA keeps would make every later case fail: end here, with this one.
            torch.cuda.synchronize()
        where = traceback.extract_tb(error.__traceback__)[-1]
        return {"wrong": f"{type(error).__name__}: {error} ({where.name}, line {where.lineno})"}


def _check(
    setup: Setup, slots: SlotFactors, token_slot: list[int], by: Any, product: Product
) -> dict[str, Any]:
    device = slots.A.device
    slot = torch.tensor(token_slot, dtype=torch.int32, device=device)
    batch = GroupedBatch(slot, num_slots=slots.table.num_slots, by=by)
    out, x = make_inputs(
        setup.geometry, len(token_slot), dtype=setup.data, device=device, seed=setup.seed
    )
    touched = _touched(out, slots, slot)
    out[~touched] = float("nan")
    x[slot < 0] = float("nan")
    made = []
    for _ in range(2):
        with _poisoned_memory():
            capacity, rows = _framed(out)
            product(rows, _framed(x)[1], slots, batch)
        made.append(capacity)
    before, frame = _framed(out)[0], _framed(touched)[0]
    wanted = _expected(out, x, slots, slot)
    rms, largest = _errors(made[0][frame], wanted[touched])
    allowed = _ALLOWED[max((setup.data, setup.factors), key=lambda t: _ALLOWED[t])]
    problems = {
        f"error of {rms:.1e}, {largest:.1e} at most": not (
            rms <= allowed[0] and largest <= allowed[1]
        ),
        "two runs differ": not _same_bits(*made),
        "what no adapter changes has changed": not _same_bits(made[0][~frame], before[~frame]),
    }
    wrong = "; ".join(problem for problem, here in problems.items() if here)
    return {"wrong": wrong or None, "rms": rms, "largest": largest, "allowed": allowed}


def _touched(out: Tensor, slots: SlotFactors, slot: Tensor) -> Tensor:
    """Which outputs an adapter may change."""
    touched = torch.zeros_like(out, dtype=torch.bool)
    for part in slots.columns:
        columns = torch.zeros(1, out.shape[1], dtype=torch.int8, device=out.device)
        part.view(columns).fill_(1)
        touched |= (slot >= 0)[:, None] & columns.bool()
    return touched


def _framed(rows: Tensor) -> tuple[Tensor, Tensor]:
    """A copy of rows amid others, of NaN (or False), and the copy alone as a view."""
    T, width = rows.shape
    filling = False if rows.dtype == torch.bool else float("nan")
    capacity = torch.full((T + 2, width + 16), filling, dtype=rows.dtype, device=rows.device)
    inner = capacity[1:-1, :width]
    inner.copy_(rows)
    return capacity, inner


@contextmanager
def _poisoned_memory() -> Iterator[None]:
    """Let torch fill what it allocates with NaN, as it does for who wants the same every time."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _expected(out: Tensor, x: Tensor, slots: SlotFactors, slot: Tensor) -> Tensor:
    """In fp64, slot by slot, without rounding on the way."""
    total = out.double()
    for used in sorted({*slot.tolist()} - {-1}):
        rows = slot == used
        inputs = x[rows].to(slots.A.dtype).double()
        for j, part in enumerate(slots.columns):
            z = inputs @ slots.a(used, j).double().t()
            delta = slots.table.scale[used, j].double() * (z @ slots.b(used, j).double())
            columns = part.view(total)
            columns[rows] = columns[rows] + delta.view(-1, part.groups, part.width)
    return total


def _errors(found: Tensor, wanted: Tensor) -> tuple[float, float]:
    if not wanted.numel():
        return 0.0, 0.0
    size = wanted.square().mean().sqrt()
    difference = found.double() - wanted
    return float(difference.square().mean().sqrt() / size), float(difference.abs().max() / size)


def _same_bits(first: Tensor, second: Tensor) -> bool:
    integers = {2: torch.int16, 4: torch.int32}[first.element_size()]
    return torch.equal(first.view(integers), second.view(integers))


def _outcome(cases: Sequence[dict[str, Any]], wanted: int, *, unfinished: bool = False) -> Outcome:
    wrong = [case for case in cases if case["wrong"]]
    where = "Triton's interpreter, small" if not torch.cuda.is_available() else "the GPU"
    line = f"{len(cases)} of {wanted} random cases ran on {where}: {len(wrong)} wrong"
    worst: dict[str, float] = {}
    for case in cases:
        if "rms" in case:
            types = f"{case['data']} over {case['factors']}"
            worst[types] = max(worst.get(types, 0.0), case["rms"])
    found = {
        "ran": len(cases),
        "wanted": wanted,
        "wrong": wrong,
        "largest_rms_error": worst,
        "by": dict(Counter(case["by"] for case in cases)),
        "popularity": dict(Counter(case["popularity"] for case in cases)),
    }
    state = judged(unfinished=unfinished, wrong=bool(wrong) or not cases)
    notes = [f"- {case['wrong']}: {case}" for case in wrong[:10]]
    return Outcome(state=state, line=line, found=found, notes=notes)
