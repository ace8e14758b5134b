"""How fast adapters are converted, and in how much memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks.figures.statements import Statement

__all__ = ["STATEMENTS"]


def _converting() -> Iterator[Statement]:
    def speeds(report: Any) -> Mapping[str, float]:
        ways = {row["way"]: row for row in report["throughput"]}
        plain = ways["plain safetensors load and save"]
        bare, kept = ways["PEFT to PEFT"], ways["PEFT to PEFT, hashed and recorded"]
        return {
            "size": report["bytes"] / 1e6,
            "plain": plain["gb_per_s"],
            "bare": bare["gb_per_s"],
            "share": bare["of_plain"],
            "kept": kept["gb_per_s"],
            "peak": kept["peak_bytes"] / 1e6,
        }

    yield Statement(
        page="docs/convert.md",
        text="an 8B-shaped adapter of {size:.0f} MB went from PEFT to PEFT at {bare:.2f} GB/s, "
        "{share:.2f} of the plain copy's {plain:.2f}, and at {kept:.2f} GB/s with the hashes and "
        "records that the command keeps, in {peak:.0f} MB of memory",
        report="conversion.json",
        values=speeds,
    )
    for way, unit, digits in (
        ("exact", "GB", 2),
        ("truncate to rank 64", "MB", 0),
        ("truncate to equal parameters", "GB", 2),
    ):
        yield Statement(
            page="docs/convert.md",
            text=f"| {way} | {{rank}} | {{{unit}:.{digits}f}} {unit} | {{seconds:.0f}} s "
            "| {peak:.0f} MB |",
            report="conversion.json",
            values=_large(way),
        )


def _large(way: str) -> Callable[[Any], Mapping[str, float]]:
    """What became of the 70B-shaped adapter."""

    def values(report: Any) -> Mapping[str, float]:
        (run,) = (run for run in report["large"]["runs"] if run["way"] == way)
        return {
            "rank": run["rank"],
            "GB": run["bytes"] / 1e9,
            "MB": run["bytes"] / 1e6,
            "seconds": run["seconds"],
            "peak": run["peak_bytes"] / 1e6,
        }

    return values


#: What pages say of it.
STATEMENTS: Sequence[Statement] = (*_converting(),)
