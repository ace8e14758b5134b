"""Options of several commands that take a list, with commas between its parts."""

from __future__ import annotations

import argparse

__all__ = ["add_target_modules", "numbers"]


def numbers(text: str) -> tuple[int, ...]:
    """The type of an option such as ``--adapters 1,8,32``.

    Raises:
        argparse.ArgumentTypeError: A part is no whole number.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r}; wanted whole numbers with commas between them, such as 1,8,32"
        ) from error


def add_target_modules(parser: argparse.ArgumentParser) -> None:
    """Add ``--target-modules``; None where it is not given."""
    parser.add_argument(
        "--target-modules",
        type=lambda text: tuple(text.split(",")),
        metavar="NAME,...",
        help="the layers that adapters change (default: linear_qkv,linear_proj,linear_fc1,"
        "linear_fc2); the first two for adapters of attention alone",
    )
