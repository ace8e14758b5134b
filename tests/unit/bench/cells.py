"""Made-up measurements."""

from __future__ import annotations

from bdlora_megatron.bench.plan import BenchPlan
from bdlora_megatron.bench.run import Cell


def small_plan(**changes):
    settings = {
        "ranks": (16,),
        "decode": ((1, 128), (8, 128)),
        "mixed": (),
        "prefill": ((1, 64), (1, 256)),
        "train": ((1, 64),),
        "latencies_s": (0.0, 1e-3),
        "repeats": 3,
    }
    return BenchPlan(**{**settings, **changes})


def make_cells(plan, seconds):
    """A cell for each contender and setting; `seconds(cell)` are its rounds."""
    cells = []
    for setting, variant in plan.pairs():
        cell = Cell(
            setting=setting, variant=variant, collectives={"all_reduce": 5}, payload_bytes=2500
        )
        cell.seconds = seconds(cell)
        cells.append(cell)
    return cells
