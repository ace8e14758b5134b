"""What adapters learn, by rank and blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks.figures.statements import Statement

__all__ = ["STATEMENTS"]

_QUALITY_ROW = " | ".join(f"{{r{rank}:+.4f}} ± {{r{rank}_spread:.4f}}" for rank in (8, 16, 32, 64))


def _quality(num_blocks: int) -> Callable[[Any], Mapping[str, float]]:
    def values(report: Any) -> Mapping[str, float]:
        made = {}
        for row in report["table"]:
            if row["num_blocks"] == num_blocks:
                made[f"r{row['lora_rank']}"] = row["loss_over_lora"]
                made[f"r{row['lora_rank']}_spread"] = row["loss_over_lora_spread"]
        return made

    return values


def _quality_statements() -> Iterator[Statement]:
    for page in ("README.md", "docs/tutorials/rank.md"):
        for blocks in (3, 8):
            yield Statement(
                page=page,
                text=f"| BD-LoRA, N={blocks} | {_QUALITY_ROW} |",
                report="quality.json",
                values=_quality(blocks),
            )


#: What pages say of it.
STATEMENTS: Sequence[Statement] = (*_quality_statements(),)
