"""The command line: its parser, and what it does with errors."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Sequence

from bdlora_megatron.cli import bench, convert, inspect, plan, verify
from bdlora_megatron.errors import BDLoRAError, explain
from bdlora_megatron.serve import cli as serve
from bdlora_megatron.serve import generate
from bdlora_megatron.train import cli as train

__all__ = ["main"]

_COMMANDS = (convert, inspect, verify, plan, bench, train, serve, generate)
_TROUBLE, _INTERRUPTED = 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments after the program's name; those of the process when None.

    Returns:
        The exit status: 0 all good, 1 the command found or left something wrong, 2 it could not
        begin (usage, unreadable input of `verify`), 130 interrupted.
    """
    arguments = _parser().parse_args(argv)
    logging.basicConfig(format="bdlora: %(levelname)s: %(message)s", level=logging.WARNING)
    try:
        status: int = arguments.run(arguments)
        sys.stdout.flush()
    except (BDLoRAError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            # The reader of our output has gone, as `head` does; Python would complain at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        if arguments.debug:
            traceback.print_exc()
        print(f"bdlora: error: {explain(error)}", file=sys.stderr)  # noqa: T201
        return _TROUBLE
    except KeyboardInterrupt:
        print("bdlora: interrupted; finished adapters are kept", file=sys.stderr)  # noqa: T201
        return _INTERRUPTED
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bdlora",
        description="LoRA and BD-LoRA adapters for Megatron-Core: convert, plan, train, serve.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in _COMMANDS:
        added = command.add_parser(commands)
        # A shortened option means something else once another begins alike.
        added.allow_abbrev = False
        added.add_argument("--json", action="store_true", help="print JSON instead of text")
        added.add_argument("--debug", action="store_true", help="print tracebacks of errors")
        added.set_defaults(run=command.run)
    return parser
