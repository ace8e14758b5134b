"""The layouts' times with Megatron-Bridge's own LoRA beside them, on a CPU.

    make bench-bridge-layouts

`bdlora bench --bridge` does this where Bridge can be imported. On a CPU its import needs stand-ins
for Transformer Engine and answers to questions about CUDA; the tests have both, the package must
not. Writes benchmarks/results/layouts-bridge.{json,md,png}.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

OUT = Path(__file__).parent / "results" / "layouts-bridge"
#: Seconds for a whole run; the ranks' collectives give up a little earlier.
LIMIT_S = 900.0


def main(argv: list[str] | None = None) -> None:
    """Measure on ranks of this machine and write the report."""
    from bdlora_megatron.bench.plan import BenchPlan
    from bdlora_megatron.bench.report import BenchReport, write_report
    from tests.harness import run_ranks

    parser = argparse.ArgumentParser(prog="python -m benchmarks.bridge_layouts")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--layers", type=int, help="decoder layers instead of the model's own")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args(argv)
    plan = BenchPlan(
        tp=arguments.tp,
        layers=arguments.layers,
        repeats=arguments.repeats,
        ranks=(16,),
        decode=((1, 128), (8, 128)),
        mixed=(),
        prefill=((1, 64),),
        train=((1, 64), (2, 128)),
        latencies_s=(0.0, 1e-3),
        bridge=True,
    )
    started, load = time.perf_counter(), os.getloadavg()[0]
    cells = run_ranks(plan.tp, measure_over_stand_ins, plan, timeout_s=LIMIT_S)[0]
    layers = [] if arguments.layers is None else [f"--layers {arguments.layers}"]
    sizes = [f"--tp {plan.tp}", *layers, f"--repeats {plan.repeats}"]
    report = BenchReport.of(
        plan,
        cells,
        command=" ".join(["python -m benchmarks.bridge_layouts", *sizes]),
        seconds=time.perf_counter() - started,
        load=load,
    )
    print(write_report(report, arguments.out))


def measure_over_stand_ins(rank: int, world_size: int, plan: Any) -> Any:
    """One rank: Bridge imported for real over the stand-ins, then all contenders in turn."""
    from tests.fakes.transformer_engine import forget_megatron

    forget_megatron()
    from tests.fakes.bridge_on_cpu import prepare

    prepare()
    # Imported anew: what stood here before knows another Megatron-Core.
    from bdlora_megatron import runtime
    from bdlora_megatron.bench import plan as plans
    from bdlora_megatron.bench.run import measure_rank

    fields = {name: getattr(plan, name) for name in plan.__dataclass_fields__}
    tell = print if rank == 0 else _nothing
    with runtime.model_parallel(world_size):
        return measure_rank(plans.BenchPlan(**fields), tell)


def _nothing(text: str) -> None:
    del text


if __name__ == "__main__":
    main()
