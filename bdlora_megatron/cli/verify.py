"""`bdlora verify A B`: whether two adapters compute the same."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bdlora_megatron.cli import output
from bdlora_megatron.convert.adapter.compare import Comparison, compare_adapters
from bdlora_megatron.convert.registry import open_adapter

__all__ = ["add_parser", "run"]


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the parser.

    Args:
        commands: What `add_subparsers` returned.

    Returns:
        The command's own parser.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        "verify",
        help="tell whether two adapters compute the same",
        description="Measure how far two adapters' updates are apart, module by module in fp64, "
        "whatever their formats, ranks and blocks. Exit status: 0 the same within the tolerance, "
        "1 different, 2 one cannot be read or they are of two base models.",
    )
    parser.add_argument("first", metavar="A", type=Path, help="an adapter's folder")
    parser.add_argument("second", metavar="B", type=Path, help="another one's")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-6,
        help="largest relative difference of a module's update, in the Frobenius norm "
        "(default: %(default)g)",
    )
    parser.add_argument("--allow-pickle", action="store_true", help="read pickles, tensors only")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Compare and print the table.

    Args:
        arguments: The parsed command line.

    Returns:
        The exit status.
    """
    with (
        open_adapter(arguments.first, allow_pickle=arguments.allow_pickle) as first,
        open_adapter(arguments.second, allow_pickle=arguments.allow_pickle) as second,
    ):
        comparison = compare_adapters(first, second)
    same = comparison.is_same(arguments.tolerance)
    data = {**comparison.to_dict(), "tolerance": arguments.tolerance, "same": same}
    output.result(_text(comparison, arguments.tolerance), data, as_json=arguments.json)
    return 0 if same else 1


def _text(comparison: Comparison, tolerance: float) -> str:
    largest = comparison.largest
    verdict = (
        f"same function within {tolerance:g}"
        if comparison.is_same(tolerance)
        else f"DIFFERENT: more than {tolerance:g} apart"
    )
    return (
        f"{comparison.table()}\n\n{verdict}; largest relative difference {largest.relative:.3g} "
        f"in {largest.key}"
    )
