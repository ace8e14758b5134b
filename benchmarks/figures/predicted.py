"""The cost model's predictions; their report has no JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks.figures.statements import Statement

__all__ = ["STATEMENTS"]


def _predicted(model: str) -> Callable[[Any], Mapping[str, float]]:
    def values(report: Any) -> Mapping[str, float]:
        made = {}
        for tp in (2, 4, 8):
            start = f"| {model} | a100-nvlink | {tp} | "
            (line,) = (line for line in report.splitlines() if line.startswith(start))
            for batch, cell in zip((1, 8, 32, 64), line[len(start) : -2].split(" | "), strict=True):
                made[f"tp{tp}_batch{batch}"] = float(cell)
        return made

    return values


def _readme() -> Iterator[Statement]:
    yield Statement(
        page="README.md",
        text="BD-LoRA of twice the rank decodes one request {tp8_batch1:.2f} times as fast as "
        "S-LoRA on 8 ranks and {tp2_batch1:.2f} times on 2 for Llama-3.1-8B,",
        report="cost_model.md",
        values=_predicted("llama-3.1-8b"),
    )
    yield Statement(
        page="README.md",
        text="for Llama-3.1-8B, {tp8_batch1:.2f} and {tp2_batch1:.2f} for 70B",
        report="cost_model.md",
        values=_predicted("llama-3.1-70b"),
    )


#: What pages say of it.
STATEMENTS: Sequence[Statement] = (*_readme(),)
