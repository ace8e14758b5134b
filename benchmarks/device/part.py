"""The process of one part: `python -m benchmarks.device.part MODULE --result FILE --seconds N`.

A part is a module with a function ``run(task) -> Outcome``.
"""

from __future__ import annotations

import argparse
import importlib
import os
from pathlib import Path

import torch

from benchmarks.device.task import Task


def main() -> None:
    """Run the part and write its result; an exception ends the process with its traceback."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device.part", description=__doc__)
    parser.add_argument("module", help="where the part's `run` is")
    parser.add_argument("--result", type=Path, required=True, metavar="FILE")
    parser.add_argument("--seconds", type=float, required=True, help="the part's time box")
    parser.add_argument("--tests", nargs="+", default=["tests"], metavar="PATH")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        # Without a GPU its kernels run step by step. Triton reads this on its first import.
        os.environ.setdefault("TRITON_INTERPRET", "1")
    task = Task(arguments.result, seconds=arguments.seconds, tests=arguments.tests)
    task.keep(importlib.import_module(arguments.module).run(task))


if __name__ == "__main__":
    main()
