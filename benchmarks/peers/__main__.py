"""Make the inputs, run the contenders in turn, and write the report.

Run: `make bench-peers`, or `python -m benchmarks.peers --help`.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from pathlib import Path

from benchmarks.peers.contenders import CONTENDERS, Contender, Visit, visit
from benchmarks.peers.files import bd_rank, make_adapters, make_requests, padded_base
from benchmarks.peers.job import Job, Load
from benchmarks.peers.report import write_report
from examples.demo.base import prepare_base

OUT = Path(__file__).parents[1] / "results" / "peers"
_NUM_BLOCKS = 2
_LENGTHS = (16, 64)


def main() -> None:
    """Run."""
    arguments = _parse()
    started, load = time.perf_counter(), os.getloadavg()[0]
    folder = arguments.cache / "peers"
    folder.mkdir(parents=True, exist_ok=True)
    base = padded_base(prepare_base(arguments.cache), folder / "base")
    loads = _loads(arguments, base, folder)
    chosen = [c for c in CONTENDERS if arguments.only in c.name]
    visits: list[Visit] = []
    for number in range(arguments.rounds):
        # Back and forth, so that a machine that gets slower or faster favours nobody.
        for contender in chosen if number % 2 == 0 else reversed(chosen):
            print(f"round {number + 1} of {arguments.rounds}: {contender.name}", flush=True)
            job = _job(arguments, contender, base, loads)
            visits.append(
                visit(contender, job, folder, threads=arguments.threads, limit_s=arguments.limit_s)
            )
            print(f"  {visits[-1].problem or 'ready'} after {visits[-1].seconds:.0f} s", flush=True)
    facts = {
        "command": shlex.join(["python", "-m", "benchmarks.peers", *sys.argv[1:]]),
        "seconds": time.perf_counter() - started,
        "load_before": load,
        "dtype": arguments.dtype,
        "requests": arguments.requests,
        "answer": arguments.answer,
        "threads": arguments.threads,
        "ranks": {"LoRA": arguments.rank, "BD-LoRA": bd_rank(base, arguments.rank, _NUM_BLOCKS)},
        "num_blocks": _NUM_BLOCKS,
        "prompt": list(_LENGTHS),
    }
    print(write_report(arguments.out, visits, facts))
    if any(found.problem for found in visits):
        raise SystemExit(1)


def _loads(arguments: argparse.Namespace, base: Path, folder: Path) -> list[Load]:
    def requests(adapters: int) -> str:
        path = folder / f"requests-{adapters}.jsonl"
        return str(
            make_requests(
                base,
                path,
                count=arguments.requests,
                adapters=adapters,
                lengths=_LENGTHS,
                answer=arguments.answer,
            )
        )

    rank, most = arguments.rank, max(arguments.adapters)
    blocked = bd_rank(base, rank, _NUM_BLOCKS)
    kinds = {
        "LoRA": make_adapters(
            base, folder / f"lora-r{rank}", count=most, rank=rank, num_blocks=None
        ),
        "BD-LoRA": make_adapters(
            base, folder / f"bdlora-r{blocked}", count=most, rank=blocked, num_blocks=_NUM_BLOCKS
        ),
    }
    loads = [Load(name="base", requests=requests(0))]
    for kind, paths in kinds.items():
        for count in arguments.adapters:
            loads.append(
                Load(
                    name=f"{kind}, {count} adapters",
                    requests=requests(count),
                    adapters=[str(path) for path in paths[:count]],
                )
            )
    return loads


def _job(arguments: argparse.Namespace, contender: Contender, base: Path, loads: list[Load]) -> Job:
    chosen = [load for load in loads if contender.blocks or not load.name.startswith("BD-LoRA")]
    blocked = bd_rank(base, arguments.rank, _NUM_BLOCKS) if contender.blocks else 0
    return Job(
        base=str(base),
        dtype=arguments.dtype,
        tp=contender.tp,
        layout=contender.layout,
        max_rank=max(arguments.rank, blocked),
        repeats=arguments.repeats,
        loads=chosen,
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("--adapters", type=int, nargs="+", default=[8])
    parser.add_argument("--rank", type=int, default=16, help="of the vanilla adapters")
    parser.add_argument("--requests", type=int, default=16, help="at once")
    parser.add_argument("--answer", type=int, default=12, help="tokens of each answer")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each contender")
    parser.add_argument("--repeats", type=int, default=2, help="timed runs in each process")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--only", default="", help="contenders with this in their names")
    parser.add_argument("--limit-s", type=float, default=600.0, help="for one process")
    parser.add_argument("--cache", type=Path, default=Path(".demo"))
    parser.add_argument("--out", type=Path, default=OUT, metavar="STEM")
    return parser.parse_args()


if __name__ == "__main__":
    main()
