"""The grouped product's times against their floor and against a loop over adapters.

The floor is the bytes that must be moved (each adapter's factors once, inputs, outputs read and
written) at the bandwidth of a copy, measured in the same run. The loop multiplies the rows of one
adapter after another by its dense factors, indices known beforehand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from bdlora_megatron.ops import Columns, GroupedBatch, SlotFactors, SlotTable, add_grouped
from benchmarks.device.clocks import CpuClock, CudaClock
from benchmarks.device.task import Outcome, Task, judged
from benchmarks.rank_layers import LAYERS, Layer

__all__ = ["Size", "run"]

_TYPE = torch.bfloat16
#: Of the difference between product and loop, over the loop: both round to bfloat16.
_ALLOWED = 2e-2


@dataclass(frozen=True, kw_only=True)
class Size:
    """One measurement.

    Attributes:
        layer: A rank's share of a layer.
        tokens: Of the step.
        adapters: Of one rank each, used by equally many tokens.
        rank: Of each, on this tensor-parallel rank.
    """

    layer: Layer
    tokens: int
    adapters: int
    rank: int

    @property
    def floor_bytes(self) -> int:
        """What must be read and written."""
        features = sum(part.features for part in self.layer.columns)
        a_row = len(self.layer.columns) * self.layer.in_features
        factors = self.adapters * self.rank * (a_row + features)
        rows = self.tokens * (self.layer.in_features + 2 * features)
        return _TYPE.itemsize * (factors + rows)


_LAYERS = {layer.name: layer for layer in LAYERS}
#: Layer, tokens, adapters, rank; those that say most first.
_ON_GPU = (
    ("qkv", 32, 32, 16),
    ("gate, up", 256, 64, 16),
    ("down", 32, 32, 16),
    ("gate, up", 4096, 8, 64),
    ("qkv", 1, 1, 16),
    ("proj", 32, 32, 16),
    ("gate, up", 32, 32, 64),
    ("down", 256, 64, 16),
    ("qkv", 256, 64, 64),
    ("gate, up", 512, 8, 16),
    ("qkv", 4096, 8, 16),
    ("down", 4096, 8, 64),
)
_TINY = Layer("tiny", 64, (Columns(width=48), Columns(width=16, offset=48)))


def run(task: Task) -> Outcome:
    """Measure as many sizes as the time box has room for.

    Args:
        task: The part's time box.

    Returns:
        Bandwidth, an empty call's time, and a row for each size.
    """
    clock: CudaClock | CpuClock = CudaClock() if torch.cuda.is_available() else CpuClock()
    found: dict[str, Any] = {
        "clock": clock.says,
        "copy_gb_per_s": clock.bandwidth() / 1e9,
        "empty_us": clock.empty(),
        "rows": [],
    }
    wanted = list(_sizes())
    for size in wanted:
        if task.is_short:
            break
        found["rows"].append(_measure(size, clock, found["copy_gb_per_s"]))
        task.keep(_outcome(found, len(wanted), unfinished=True))
    return _outcome(found, len(wanted))


def _sizes() -> Iterator[Size]:
    if torch.cuda.is_available():
        for layer, tokens, adapters, rank in _ON_GPU:
            yield Size(layer=_LAYERS[layer], tokens=tokens, adapters=adapters, rank=rank)
    else:
        for tokens in (4, 300):
            yield Size(layer=_TINY, tokens=tokens, adapters=2, rank=4)


@torch.inference_mode()
def _measure(size: Size, clock: Any, copy_gb_per_s: float) -> dict[str, Any]:
    problem = _Problem(size)
    row = {**asdict(size), "layer": size.layer.name}
    error = problem.error()
    if not error <= _ALLOWED:
        # Times of a wrong answer would mean nothing.
        return {**row, "wrong": f"differs from the loop by {error:.1e}"}
    ours = clock.times(problem.grouped)
    # A graph of many loops has many nodes.
    loop = clock.times(problem.loop, repeats=2)
    floor = 1e-3 * size.floor_bytes / copy_gb_per_s
    name = "cold" if "cold" in ours else "warm"
    return {
        **row,
        "grouped_us": ours,
        "loop_us": loop,
        "floor_us": floor,
        "over_floor": ours[name] / floor,
        "loop_over_grouped": loop[name] / ours[name],
        "wrong": None,
    }


class _Problem:
    """The same factors and inputs for both."""

    def __init__(self, size: Size) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._size = size
        self._generator = torch.Generator(device).manual_seed(0)
        layer, slices = size.layer, len(size.layer.columns)
        rows = size.adapters * size.rank
        table = SlotTable.empty(size.adapters, slices, max_rank=size.rank, device=device)
        for slot in range(size.adapters):
            a_rows = [((slot * slices + j) * size.rank, size.rank) for j in range(slices)]
            b_rows = [(slot * size.rank, size.rank)] * slices
            table.note(slot, a_rows=a_rows, b_rows=b_rows, scale=[1.0] * slices)
            table.upload(slot)
        self._slots = SlotFactors(
            A=self._draw(rows * slices, layer.in_features) / layer.in_features**0.5,
            B=tuple(self._draw(rows, part.features) / size.rank**0.5 for part in layer.columns),
            columns=layer.columns,
            table=table,
        )
        self._x = self._draw(size.tokens, layer.in_features)
        self._base = self._draw(size.tokens, layer.out_features)
        self._out = self._base.clone()
        order = torch.randperm(size.tokens, generator=self._generator, device=device)
        # A decoding step's tokens stand in the order in which requests came, a prefill's together.
        token_slot = torch.arange(size.tokens, device=device) * size.adapters // size.tokens
        token_slot = token_slot if size.tokens > 256 else token_slot[order]
        self._batch = GroupedBatch(token_slot, num_slots=size.adapters)
        self._rows = [torch.nonzero(token_slot == n)[:, 0] for n in range(size.adapters)]

    def _draw(self, *shape: int) -> Tensor:
        drawn = torch.randn(*shape, generator=self._generator, device=self._generator.device)
        return drawn.to(_TYPE)

    def grouped(self) -> Tensor:
        """Our product."""
        return add_grouped(self._out, self._x, self._slots, self._batch)

    def loop(self) -> Tensor:
        """One adapter after another."""
        rank, columns = self._size.rank, self._slots.columns
        for adapter, rows in enumerate(self._rows):
            A = self._slots.A[adapter * rank * len(columns) :][: rank * len(columns)]
            z = self._x[rows] @ A.t()
            for j, part in enumerate(columns):
                B = self._slots.B[j][adapter * rank :][:rank]
                out = self._out[:, part.offset : part.end]
                out.index_add_(0, rows, z[:, j * rank :][:, :rank] @ B)
        return self._out

    def error(self) -> float:
        """Root mean square of the difference between the two, over the loop's."""
        made = []
        for product in (self.grouped, self.loop):
            self._out.copy_(self._base)
            made.append(self._product(product))
        difference = (made[0] - made[1]).square().mean().sqrt()
        return float(difference / made[1].square().mean().sqrt())

    def _product(self, product: Callable[[], Tensor]) -> Tensor:
        return product().double() - self._base.double()


def _outcome(found: dict[str, Any], wanted: int, *, unfinished: bool = False) -> Outcome:
    rows = found["rows"]
    right = [row for row in rows if row["wrong"] is None]
    wrong = len(rows) - len(right)
    line = f"{len(rows)} of {wanted} sizes; a copy moves {found['copy_gb_per_s']:.0f} GB/s"
    if right:
        over = sorted(row["over_floor"] for row in right)
        line += f"; {over[0]:.1f} to {over[-1]:.1f} times the floor"
    if wrong:
        line += f"; {wrong} sizes gave wrong answers"
    if not torch.cuda.is_available():
        line += " (CPU, tiny: to show that it runs)"
    state = judged(unfinished=unfinished, wrong=bool(wrong) or not rows)
    return Outcome(state=state, line=line, found=found, notes=[*_table(found)])


def _table(found: dict[str, Any]) -> Iterator[str]:
    kinds = ("cold", "warm", "eager")
    yield f"{found['clock']} An empty call takes {found['empty_us']:.1f}."
    yield "The floor is the bytes that must be moved, at the bandwidth of a copy."
    yield ""
    heads = ("layer", "tokens", "adapters", "rank", "floor", *kinds, "over floor")
    loops = [f"loop, {kind}" for kind in kinds]
    yield f"| {' | '.join((*heads, *loops, 'loop / ours'))} |"
    yield "|---" * (len(heads) + len(loops) + 1) + "|"
    for row in found["rows"]:
        cells = [str(row[name]) for name in ("layer", "tokens", "adapters", "rank")]
        yield f"| {' | '.join([*cells, *_cells(row, kinds)])} |"


def _cells(row: dict[str, Any], kinds: Sequence[str]) -> list[str]:
    if row["wrong"] is not None:
        return [row["wrong"], *[""] * (2 * len(kinds) + 2)]
    ours, loop = (_microseconds(row[name], kinds) for name in ("grouped_us", "loop_us"))
    over, ratio = f"{row['over_floor']:.1f}", f"{row['loop_over_grouped']:.1f}"
    return [f"{row['floor_us']:.1f}", *ours, over, *loop, ratio]


def _microseconds(times: dict[str, float], kinds: Sequence[str]) -> list[str]:
    return [f"{times[kind]:.1f}" if kind in times else "" for kind in kinds]
