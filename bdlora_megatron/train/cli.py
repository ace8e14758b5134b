"""``train``: from a YAML file to a trained adapter."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from typing import Any

from bdlora_megatron.errors import ConfigError
from bdlora_megatron.runtime.launch import INTERFACE_HELP
from bdlora_megatron.train.config import load_config
from bdlora_megatron.train.stop import STATUS, PreemptedError

__all__ = ["add_parser", "run"]


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command to a program's sub-commands.

    Args:
        subparsers: From ``ArgumentParser.add_subparsers``.

    Returns:
        The command's parser; its default ``run`` is this module's. With ``json`` set, the last line
        of output is the result as JSON.
    """
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "train",
        help="fine-tune an adapter",
        description="Fine-tune an adapter of a Hugging Face base model on Megatron-Core.",
    )
    add_arguments(parser)
    parser.set_defaults(run=run, json=False)
    return parser


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's own arguments."""
    parser.add_argument("config", metavar="CONFIG.yaml", help="the run's settings")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings that win over the file's, such as peft.bdlora.rank=24",
    )
    parser.add_argument(
        "--ranks",
        type=int,
        help="processes to start; one copy of the model, or all GPUs, when unset",
    )
    parser.add_argument("--interface", metavar="NAME", help=INTERFACE_HELP)
    parser.add_argument(
        "--check",
        action="store_true",
        help="check the settings against the base model's config and the ranks, and stop",
    )


def run(args: argparse.Namespace) -> int:
    """Carry the command out.

    Args:
        args: Parsed arguments.

    Returns:
        The exit status; 75 where SIGTERM stopped the run and it can be started again.

    Raises:
        ConfigError: The settings are wrong; further errors are those of ``train``.
    """
    config = load_config(args.config, args.overrides)
    if args.ranks is not None and args.ranks < 1:
        raise ConfigError(f"--ranks is {args.ranks}; wanted at least 1")
    if args.check:
        from bdlora_megatron.train.launch import check_launch

        check_launch(config, ranks=args.ranks)
        return 0
    # Only now: importing Megatron-Core takes seconds, which a misspelt key need not wait for.
    from bdlora_megatron.train.launch import launch

    try:
        result = launch(config, ranks=args.ranks, interface=args.interface)
    except PreemptedError as stopped:
        sys.stderr.write(f"{stopped}\n")
        return STATUS
    if os.environ.get("RANK", "0") != "0":
        return 0  # one of torchrun's; the first one tells
    if args.json:
        exported = [str(path) for path in result.exported]
        summary = {**asdict(result), "exported": exported}
        sys.stdout.write(json.dumps(summary) + "\n")
    else:
        sys.stdout.writelines(f"adapter: {path}\n" for path in result.exported)
    return 0
