"""`bdlora bench`: what each layout costs on this machine."""

from __future__ import annotations

import argparse
import os
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bdlora_megatron.cli import output
from bdlora_megatron.cli.lists import add_target_modules, numbers
from bdlora_megatron.runtime.launch import INTERFACE_HELP

__all__ = ["add_parser", "run"]

_PHASES = ("decode", "mixed", "prefill", "train")


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "bench",
        help="time the layouts on this machine",
        description="Time a decoding step, one of a mixed batch (with adapters from slots), a "
        "prefill and a training step of the base model and of BD-LoRA (at twice and at four times "
        "the rank), half-sharded LoRA and S-LoRA, on tensor-parallel ranks of this machine: NCCL "
        "on GPUs, gloo on CPUs. All in one run, in turn. Then fit the cost model of "
        "`bdlora_megatron.plan` to half of it and predict the rest. Exit status: 0 measured.",
    )
    parser.add_argument("--tp", type=int, default=2, help="ranks (default: %(default)s)")
    parser.add_argument("--model", default="small", help="sizes: small, llama-3.1-8b, ...")
    parser.add_argument("--layers", type=int, help="decoder layers instead of the model's own")
    parser.add_argument(
        "--lora-ranks",
        type=numbers,
        metavar="R,R",
        help="ranks of vanilla LoRA (default: 16,64)",
    )
    add_target_modules(parser)
    for phase in _PHASES:
        parser.add_argument(
            f"--{phase}",
            type=_sizes,
            metavar="BATCHxLENGTH,...",
            help=f"sizes of {phase} steps; 'none' for no such step",
        )
    parser.add_argument(
        "--adapters",
        type=numbers,
        metavar="N,...",
        help="how many different adapters the requests of a mixed step use (default: 1,8,32)",
    )
    parser.add_argument(
        "--latency-ms",
        type=_latencies,
        metavar="MS,...",
        help="waits to add before every collective; CPUs only (default: 0,0.2,1)",
    )
    parser.add_argument(
        "--bridge",
        action="store_true",
        help="also Megatron-Bridge's LoRA, where megatron-bridge can be imported",
    )
    parser.add_argument("--interface", metavar="NAME", help=INTERFACE_HELP)
    parser.add_argument("--repeats", type=int, default=7, help="rounds (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, metavar="STEM", help="write STEM.json, STEM.md and STEM.png"
    )
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Measure, calibrate and report."""
    # Late: they import Megatron-Core, which takes seconds that other commands need not wait.
    from bdlora_megatron.bench.calibrate import least_squares
    from bdlora_megatron.bench.plot import figure_class
    from bdlora_megatron.bench.report import BenchReport, write_report
    from bdlora_megatron.bench.run import measure

    plan = _plan(arguments)
    least_squares()
    if arguments.out is not None:
        figure_class()
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
    started, load = time.perf_counter(), os.getloadavg()[0]
    cells = measure(plan, tell=output.note, interface=arguments.interface)
    report = BenchReport.of(
        plan,
        cells,
        command=" ".join(["bdlora bench", *_said(arguments)]),
        seconds=time.perf_counter() - started,
        load=load,
    )
    output.result(report.markdown(), report.to_dict(), as_json=arguments.json)
    if arguments.out is not None:
        write_report(report, arguments.out)
    return 0


def _plan(arguments: argparse.Namespace) -> Any:
    from bdlora_megatron.bench.plan import BenchPlan

    chosen = {
        "ranks": arguments.lora_ranks,
        "target_modules": arguments.target_modules,
        "adapters": arguments.adapters,
        **{phase: getattr(arguments, phase) for phase in _PHASES},
        "latencies_s": arguments.latency_ms,
    }
    given = {name: value for name, value in chosen.items() if value is not None}
    return BenchPlan(
        model=arguments.model,
        layers=arguments.layers,
        tp=arguments.tp,
        repeats=arguments.repeats,
        bridge=arguments.bridge,
        **given,
    )


def _said(arguments: argparse.Namespace) -> Iterator[str]:
    """The options that make the same run, as they would be typed."""
    yield from ("--tp", str(arguments.tp), "--model", shlex.quote(arguments.model))
    if arguments.layers is not None:
        yield from ("--layers", str(arguments.layers))
    if arguments.lora_ranks is not None:
        yield from ("--lora-ranks", ",".join(map(str, arguments.lora_ranks)))
    if arguments.target_modules is not None:
        yield from ("--target-modules", ",".join(arguments.target_modules))
    for phase in _PHASES:
        sizes = getattr(arguments, phase)
        if sizes is not None:
            yield from (f"--{phase}", ",".join(f"{b}x{n}" for b, n in sizes) or "none")
    if arguments.adapters is not None:
        yield from ("--adapters", ",".join(map(str, arguments.adapters)))
    if arguments.latency_ms is not None:
        yield from ("--latency-ms", ",".join(f"{1e3 * s:g}" for s in arguments.latency_ms))
    if arguments.bridge:
        yield "--bridge"
    yield from ("--repeats", str(arguments.repeats))


def _latencies(text: str) -> tuple[float, ...]:
    return tuple(float(part) / 1e3 for part in text.split(","))


def _sizes(text: str) -> tuple[tuple[int, int], ...]:
    if text == "none":
        return ()
    sizes = []
    for part in text.split(","):
        batch, _, length = part.partition("x")
        if not (batch.isdigit() and length.isdigit()):
            raise argparse.ArgumentTypeError(
                f"a step of {part!r}; wanted batch and length, such as 8x128"
            )
        sizes.append((int(batch), int(length)))
    return tuple(sizes)
