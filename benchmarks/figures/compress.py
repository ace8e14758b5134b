"""How long collections of adapters take to compress, and what that saves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.figures.statements import Statement

__all__ = ["STATEMENTS"]


def _values(report: Any) -> Mapping[str, float]:
    rows = {row["module"]: row for row in report["modules"]}
    seconds = {
        name: sum(row[f"{phase}_cpu_seconds"] for phase in ("read", "cluster", "fit"))
        for name, row in rows.items()
    }
    model = report["model"]
    return {
        "small": seconds["k_proj"],
        "large": seconds["gate_proj"],
        "peak": max(row["peak_bytes"] for row in rows.values()) / 1e9,
        "before": model["bytes_before"] / 1e9,
        "after": model["bytes_after"] / 1e9,
        "hours": model["cpu_hours"],
    }


STATEMENTS: Sequence[Statement] = (
    Statement(
        page="docs/compress.md",
        text="took {small:.0f} CPU seconds for a module as large as k_proj and {large:.0f} for one "
        "as large as gate_proj, in at most {peak:.1f} GB of memory, torch included. All modules "
        "together, extrapolated: {before:.0f} GB before, {after:.1f} GB after, in about "
        "{hours:.1f} CPU hours",
        report="compress.json",
        values=_values,
    ),
)
