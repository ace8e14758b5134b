"""Write the reports' numbers into every page, and say what was changed."""

from __future__ import annotations

from benchmarks.figures import STATEMENTS
from benchmarks.figures.statements import correct

if __name__ == "__main__":
    pages = sorted({statement.page for statement in STATEMENTS})
    changed = [line for page in pages for line in correct(page, STATEMENTS)]
    print("\n".join(changed) or "all figures are those of the reports")
