"""The command line: its parser, and what it does with errors."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Iterable, Sequence
from typing import Any

from bdlora_megatron.errors import BDLoRAError, explain

__all__ = ["main"]

#: Imported when they are called: half of them need torch, which an API server is to do without.
_COMMANDS = {
    "convert": "bdlora_megatron.cli.convert",
    "compress": "bdlora_megatron.cli.compress",
    "inspect": "bdlora_megatron.cli.inspect",
    "verify": "bdlora_megatron.cli.verify",
    "merge": "bdlora_megatron.cli.merge",
    "plan": "bdlora_megatron.cli.plan",
    "bench": "bdlora_megatron.cli.bench",
    "train": "bdlora_megatron.train.cli",
    "serve": "bdlora_megatron.serve.cli",
    "generate": "bdlora_megatron.serve.generate",
}
_TROUBLE, _INTERRUPTED = 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments after the program's name; those of the process when None.

    Returns:
        The exit status: 0 all good, 1 the command found or left something wrong, 2 it could not
        begin (usage, unreadable input of `verify`), 75 training was stopped by SIGTERM and can be
        started again, 130 interrupted.
    """
    argv = sys.argv[1:] if argv is None else argv
    called = argv[0] if argv else ""
    arguments = _parser([called] if called in _COMMANDS else _COMMANDS).parse_args(argv)
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


def _parser(names: Iterable[str] = tuple(_COMMANDS)) -> argparse.ArgumentParser:
    """A parser of some commands; of all of them, where none is called or its help is asked for."""
    parser = argparse.ArgumentParser(
        prog="bdlora",
        description="LoRA and BD-LoRA adapters for Megatron-Core: convert, plan, train, serve.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name in names:
        command: Any = importlib.import_module(_COMMANDS[name])
        added = command.add_parser(commands)
        # A shortened option means something else once another begins alike.
        added.allow_abbrev = False
        added.add_argument("--json", action="store_true", help="print JSON instead of text")
        added.add_argument("--debug", action="store_true", help="print tracebacks of errors")
        added.set_defaults(run=command.run)
    return parser
