"""Plain tables for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

_WIDTH = 100


def format_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table whose columns fit their widest cell; numbers are set to the right.

    Floats are shown with three significant digits and integers with thousands separated; give a
    string for anything else.
    """
    cells = [[_format_cell(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(headers, *cells, strict=True)]
    numeric = [
        bool(rows) and all(isinstance(value, int | float) for value in column)
        for column in (zip(*rows, strict=True) if rows else [()] * len(headers))
    ]

    def line(values: Sequence[str]) -> str:
        padded = (
            value.rjust(width) if right else value.ljust(width)
            for value, width, right in zip(values, widths, numeric, strict=True)
        )
        return "  ".join(padded).rstrip()

    return "\n".join([line(headers), "  ".join("-" * width for width in widths), *map(line, cells)])


def format_answer(name: str, text: str) -> str:
    """Return a model's answer, wrapped and indented below its name."""
    lines = [
        wrapped
        for line in text.strip().splitlines()
        for wrapped in textwrap.wrap(line, _WIDTH - 12) or [""]
    ]
    first, *rest = lines or ["(nothing)"]
    return "\n".join([f"{name:>10}  {first}", *(f"{'':12}{line}" for line in rest)])


def _format_cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)
