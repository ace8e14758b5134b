"""Plain text tables for reports."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["format_bytes", "format_table"]


def format_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, text_last: bool = False
) -> str:
    """Line up the columns: the first to the left, which names the row, the others to the right.

    Args:
        header: Names of the columns.
        rows: Cells, as many in each row as there are columns.
        text_last: The last column is a sentence, and stands to the left too.

    Returns:
        Lines without trailing blanks and without a final newline.
    """
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    left = (0, len(header) - 1) if text_last else (0,)
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if number in left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def format_bytes(count: float) -> str:
    """A number of bytes for people, in powers of 1000.

    Returns:
        Three digits and a unit, such as `1.66 GB`.
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"
