"""Run the parts one after another: `python -m benchmarks.device`.

Each part has a time box and a process of its own, and its result is in --out before the next
begins: PART.json, and a line in report.md. A part that fails or overruns its box is noted, and the
next one begins. Without a GPU every part runs small, on the CPU, to show that it would run.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.device.parts import PARTS, ROOT, Part, run_all

OUT = ROOT / "build" / "device"


def main() -> int:
    """Run what the command line asks for; 1 where a part failed or overran its box."""
    arguments = _parser().parse_args()
    # So that the part that runs is ended too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    results = run_all(
        _chosen(arguments.only, arguments.more),
        seconds=60 * arguments.minutes,
        out=arguments.out,
        tests=arguments.tests,
    )
    print(f"{arguments.out / 'report.md'} has the whole")
    return int(any(result["state"] in ("failed", "time box over") for result in results))


def _chosen(only: Sequence[str] | None, more: Sequence[str]) -> list[Part]:
    """The facts, and the parts that are asked for."""
    added = [Part(name=n, module=m, share=60) for n, _, m in (text.partition("=") for text in more)]
    wanted = [*(PARTS[1:] if only is None else (p for p in PARTS[1:] if p.name in only)), *added]
    return [PARTS[0], *wanted]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device", description=__doc__)
    parser.add_argument("--minutes", type=float, default=9.0, help="for all parts together")
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR")
    names = [part.name for part in PARTS[1:]]
    parser.add_argument("--only", nargs="*", choices=names, metavar="PART", help=", ".join(names))
    parser.add_argument(
        "--more",
        nargs="+",
        default=[],
        metavar="NAME=MODULE",
        help="parts of your own, last: modules with a function run(task) -> Outcome",
    )
    parser.add_argument(
        "--tests", nargs="+", default=["tests"], metavar="PATH", help="where to look for tests"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
