"""Where the figures in README.md and the documentation come from.

Each `Statement` is a piece of a page with places for numbers, and a function that takes them from a
report in benchmarks/results; a module for each kind of report makes them. A test holds the pages to
the reports. After new measurements, `python -m benchmarks.figures` writes the new numbers into the
pages.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.figures import bridge, compress, conversion, layouts, predicted, quality, serving
from benchmarks.figures.statements import Statement

__all__ = ["STATEMENTS"]

#: Everything that is held to a report.
STATEMENTS: Sequence[Statement] = tuple(
    statement
    for reports in (bridge, layouts, serving, quality, predicted, conversion, compress)
    for statement in reports.STATEMENTS
)
