"""One layer's adapters for a mixed batch: our CPU path, PEFT's, a dense loop, and the floor.

Run: `python -m benchmarks.grouped`. Writes benchmarks/results/grouped.{md,json,png}.

All candidates are run in turn, round after round in random order, and medians are compared, so that
other work on the machine meets all of them alike. Each is first held to the fp64 reference. The
floor is the time of the bytes that must be read and written at the bandwidth, and of the products
at the rate, that this machine reaches in the same rounds; the larger of the two.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn

from bdlora_megatron.ops import Columns, GroupedBatch, SlotFactors, SlotTable, add_grouped
from benchmarks.grouped_report import write_report

OUT = Path(__file__).parent / "results"
#: Features in and out; the largest pools, 512 adapters of rank 256, then take 1 GiB.
FEATURES = 1024
ADAPTERS, RANKS = (1, 8, 64, 512), (8, 16, 64, 256)
#: Requests of a decode step, each one token; more where there are more adapters.
DECODE_REQUESTS = 64
#: Tokens of a prefill step: eight prompts of 512. More adapters share them in shorter chunks.
PREFILL_TOKENS = 4096
STREAM_ELEMENTS = 32 * 2**20
#: A candidate is repeated until a measurement takes about so long.
LEAST_S, MOST_REPEATS = 0.004, 50


@dataclass(frozen=True, kw_only=True)
class Case:
    """One measurement.

    Attributes:
        step: ``decode`` or ``prefill``.
        adapters: Distinct adapters in the batch.
        rank: Of each of them.
        tokens: Tokens of the batch.
    """

    step: str
    adapters: int
    rank: int
    tokens: int

    @property
    def num_bytes(self) -> int:
        """What must be moved: factors and inputs read, outputs read and written; float32."""
        return 4 * FEATURES * (2 * self.adapters * self.rank + 3 * self.tokens)

    @property
    def flops(self) -> int:
        """Multiplications and additions of both products."""
        return 2 * self.tokens * self.rank * 2 * FEATURES


def cases(quick: bool) -> Iterator[Case]:
    """Every case, or two small ones."""
    for step in ("decode", "prefill"):
        for adapters in (8,) if quick else ADAPTERS:
            tokens = max(DECODE_REQUESTS, adapters) if step == "decode" else PREFILL_TOKENS
            for rank in (8,) if quick else RANKS:
                yield Case(step=step, adapters=adapters, rank=rank, tokens=tokens)


class Problem:
    """The same factors and inputs for every candidate."""

    def __init__(self, case: Case) -> None:
        generator = torch.Generator().manual_seed(0)
        n, r = case.adapters, case.rank
        self.case = case
        self.A = torch.randn(n, r, FEATURES, generator=generator) / 32
        self.B = torch.randn(n, r, FEATURES, generator=generator) / 32
        self.x = torch.randn(case.tokens, FEATURES, generator=generator)
        self.base = torch.randn(case.tokens, FEATURES, generator=generator)
        if case.step == "decode":
            # Requests of a decode step stand in the order of their arrival.
            slot = torch.arange(case.tokens) % n
            self.token_slot = slot[torch.randperm(case.tokens, generator=generator)]
        else:
            self.token_slot = torch.arange(n).repeat_interleave(case.tokens // n)

    def reference(self) -> Tensor:
        """In fp64, adapter after adapter."""
        total = self.base.double()
        for adapter in range(self.case.adapters):
            rows = self.token_slot == adapter
            total[rows] += (
                self.x[rows].double() @ self.A[adapter].double().t() @ (self.B[adapter].double())
            )
        return total


def grouped(problem: Problem) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Our CPU path: a layer after the first of a step, and the first, which also plans."""
    n, r = problem.case.adapters, problem.case.rank
    table = SlotTable.empty(n, 1, max_rank=r)
    for slot in range(n):
        rows = [(slot * r, r)]
        table.note(slot, a_rows=rows, b_rows=rows, scale=[1.0])
        table.upload(slot)
    slots = SlotFactors(
        A=problem.A.flatten(0, 1),
        B=(problem.B.flatten(0, 1),),
        columns=(Columns(width=FEATURES),),
        table=table,
    )
    out, token_slot = problem.base.clone(), problem.token_slot
    batch = GroupedBatch(token_slot, num_slots=n)
    return (
        lambda: add_grouped(out, problem.x, slots, batch),
        lambda: add_grouped(out, problem.x, slots, GroupedBatch(token_slot, num_slots=n)),
    )


def dense_loop(problem: Problem) -> Callable[[], Tensor]:
    """A loop over adapters, two matrix products each on gathered rows, indices known beforehand."""
    out = problem.base.clone()
    rows = [torch.nonzero(problem.token_slot == n)[:, 0] for n in range(problem.case.adapters)]

    def run() -> Tensor:
        for adapter, tokens in enumerate(rows):
            z = problem.x[tokens] @ problem.A[adapter].t()
            out.index_add_(0, tokens, z @ problem.B[adapter])
        return out

    return run


class _Given(nn.Linear):
    """A base layer whose product is there already, so that PEFT's adapters alone are timed."""

    given: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """The base product, not a copy: what is added stays, as with the other candidates."""
        return self.given


def peft_mixed(problem: Problem) -> Callable[[], Tensor]:
    """PEFT's LoRA layer with ``adapter_names``; requests are rows, one token or one chunk each."""
    case = problem.case
    base = _Given(FEATURES, FEATURES, bias=False)
    layer = PeftLinear(base, "0", r=case.rank, lora_alpha=case.rank, config=_peft_config(case.rank))
    for adapter in range(1, case.adapters):
        layer.update_layer(
            str(adapter), case.rank, lora_alpha=case.rank, config=_peft_config(case.rank)
        )
    with torch.no_grad():
        for adapter in range(case.adapters):
            layer.lora_A[str(adapter)].weight.copy_(problem.A[adapter])
            layer.lora_B[str(adapter)].weight.copy_(problem.B[adapter].t())
    requests = case.tokens if case.step == "decode" else max(case.adapters, 8)
    x = problem.x.view(requests, -1, FEATURES)
    base.given = problem.base.clone().view_as(x)
    names = [str(int(slot)) for slot in problem.token_slot.view(requests, -1)[:, 0]]
    layer.eval()
    return lambda: layer(x, adapter_names=names).view(-1, FEATURES)


def _peft_config(rank: int) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=rank, init_lora_weights=False)


class Machine:
    """What this machine reaches: bytes by copying, products by a large matrix product."""

    def __init__(self) -> None:
        self.source = torch.randn(STREAM_ELEMENTS)
        self.target = torch.empty_like(self.source)
        self.square = torch.randn(1024, 1024)
        self.product = torch.empty_like(self.square)

    def stream(self) -> Tensor:
        """Reads and writes 128 MiB each."""
        return self.target.copy_(self.source)

    def multiply(self) -> Tensor:
        """One product of two 1024 by 1024 matrices."""
        return torch.mm(self.square, self.square, out=self.product)

    @property
    def stream_bytes(self) -> int:
        """Bytes that ``stream`` moves."""
        return 2 * 4 * STREAM_ELEMENTS

    @property
    def multiply_flops(self) -> int:
        """Operations of ``multiply``."""
        return 2 * 1024**3


#: What a candidate's time is read from.
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.thread_time}


def measure(
    case: Case, machine: Machine, *, clock: Callable[[], float], rounds: int, budget_s: float
) -> dict[str, Any]:
    """Time every candidate in turn.

    Args:
        case: What to run.
        machine: The floor's two measurements, taken in the same rounds.
        clock: Gives seconds.
        rounds: Rounds at most.
        budget_s: Seconds of the clock on the wall after which no new round begins, once there have
            been five.

    Returns:
        Seconds by candidate and round, and the case.
    """
    problem = Problem(case)
    layer, first = grouped(problem)
    candidates = {
        "grouped": layer,
        "grouped_first_layer": first,
        "peft_mixed": peft_mixed(problem),
        "dense_loop": dense_loop(problem),
    }
    wanted = problem.reference()
    for name, run in candidates.items():
        if name != "grouped_first_layer":  # shares its output with the first
            _check(name, run(), wanted)
    first()
    candidates |= {"stream": machine.stream, "multiply": machine.multiply}
    # Short ones are repeated, so that what ran before them does not decide.
    repeats = {
        name: min(MOST_REPEATS, 1 + int(LEAST_S / max(_time(run, clock, 3), 1e-9)))
        for name, run in candidates.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    began, shuffle = time.perf_counter(), random.Random(0).shuffle
    order = list(candidates)
    for done in range(rounds):
        if done >= 5 and time.perf_counter() - began > budget_s:
            break
        shuffle(order)
        for name in order:
            seconds[name].append(_time(candidates[name], clock, repeats[name]))
    return {**asdict(case), "seconds": seconds}


def _time(run: Callable[[], Tensor], clock: Callable[[], float], repeats: int) -> float:
    start = clock()
    for _ in range(repeats):
        run()
    return (clock() - start) / repeats


def _check(name: str, made: Tensor, wanted: Tensor) -> None:
    error = float((made.double() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())
    if not error < 1e-5:
        raise AssertionError(f"{name} differs from the reference by {error:.1e}")


def summarise(row: dict[str, Any], machine: Machine) -> dict[str, Any]:
    """Medians and spreads in milliseconds, the floor, and ratios."""
    case = Case(**{name: row[name] for name in ("step", "adapters", "rank", "tokens")})
    medians = {name: statistics.median(times) for name, times in row["seconds"].items()}
    bytes_s = case.num_bytes / (machine.stream_bytes / medians["stream"])
    flops_s = case.flops / (machine.multiply_flops / medians["multiply"])
    floor = max(bytes_s, flops_s)
    spread = {
        name: [1e3 * quantile for quantile in statistics.quantiles(times, n=4)[::2]]
        for name, times in row["seconds"].items()
    }
    return {
        **asdict(case),
        "rounds": len(row["seconds"]["grouped"]),
        "median_ms": {name: 1e3 * median for name, median in medians.items()},
        "quartiles_ms": spread,
        "floor_ms": 1e3 * floor,
        "floor_is": "bytes" if bytes_s > flops_s else "products",
        "over_floor": medians["grouped"] / floor,
        "over_peft": medians["peft_mixed"] / medians["grouped"],
        "over_dense": medians["dense_loop"] / medians["grouped"],
    }


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two small cases, to try it out")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--budget-s", type=float, default=6.0, help="seconds for each case")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: the time of one thread on a core, for a machine that does other work",
    )
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    if arguments.clock == "cpu" and arguments.threads != 1:
        parser.error("--clock cpu counts one thread's time; add --threads 1")
    torch.set_num_threads(arguments.threads)
    machine, rows = Machine(), []
    with torch.inference_mode():
        for case in cases(arguments.quick):
            clock = CLOCKS[arguments.clock]
            row = measure(case, machine, clock=clock, rounds=51, budget_s=arguments.budget_s)
            rows.append(summarise(row, machine))
            print(json.dumps({k: v for k, v in rows[-1].items() if not isinstance(v, dict)}))
    write_report(arguments.out, rows, threads=arguments.threads, clock=arguments.clock)


if __name__ == "__main__":
    main()
