"""The report in Markdown: the machine first, then a line for each part, then what they noted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

__all__ = ["write_report"]


def write_report(path: Path, results: Sequence[dict[str, Any]], *, waiting: Sequence[str]) -> None:
    """Write what there is so far.

    Args:
        path: The file.
        results: As ``run_part`` gives them; the machine's facts first.
        waiting: Names of the parts to come.
    """
    path.write_text("\n".join(_lines(results, waiting)) + "\n", "utf-8")


def _lines(results: Sequence[dict[str, Any]], waiting: Sequence[str]) -> Iterator[str]:
    facts, *parts = results
    yield "# This package on this machine"
    yield ""
    yield f"`python -m benchmarks.device`: {facts['line']}"
    yield ""
    for name, value in facts["found"].items():
        yield f"- {name}: {value}"
    yield ""
    yield "| part | state | seconds, of its box | in a line |"
    yield "|---|---|---|---|"
    for result in parts:
        spent = f"{result['seconds']:.0f} of {result['box_s']:.0f}"
        yield f"| {result['part']} | {result['state']} | {spent} | {_cell(result['line'])} |"
    for name in waiting:
        yield f"| {name} | has not begun | | |"
    for result in results:
        yield from _notes(result)


def _notes(result: dict[str, Any]) -> Iterator[str]:
    if result["state"] in ("failed", "time box over"):
        yield from ("", f"## {result['part']}, at the end", "", "```")
        yield from result["said_at_the_end"].strip().splitlines()[-25:]
        yield "```"
    if result["notes"]:
        yield from ("", f"## {result['part']}", "", *result["notes"])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
