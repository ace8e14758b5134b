"""Statements of pages, found whatever numbers stand there, and the numbers of their reports."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from string import Formatter
from typing import Any

__all__ = ["Figure", "MissingStatementError", "Statement", "correct", "find", "load", "on_link"]

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"

#: A number as a page has it; signs are ASCII, so that a search finds them.
NUMBER = r"[-+]?\d(?:[\d.,]*\d)?"


@dataclass(frozen=True, kw_only=True, slots=True)
class Statement:
    """A piece of a page and the report that vouches for its numbers.

    Attributes:
        page: The page, from the repository's root.
        text: The piece, with a place such as ``{median:.2f}`` for every number that was measured;
            white space of any kind and length may stand for a space.
        report: The report's name in benchmarks/results.
        values: The numbers by the names of their places, from the report's content.
    """

    page: str
    text: str
    report: str
    values: Callable[[Any], Mapping[str, float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A number on a page beside the one that its report has.

    Attributes:
        name: Its place in the statement.
        start: Where it begins in the page's text.
        end: Where it ends.
        said: What the page says.
        wanted: What the report says.
    """

    name: str
    start: int
    end: int
    said: str
    wanted: str


class MissingStatementError(LookupError):
    """A page does not have a statement, or has it more than once."""


def find(statement: Statement, text: str) -> tuple[tuple[int, int], list[Figure]]:
    """Look for a statement on its page, whatever numbers stand there.

    Args:
        statement: What to look for.
        text: The page's text.

    Returns:
        Where the piece begins and ends, and its numbers.

    Raises:
        MissingStatementError: It is not there once; the message says how it should read.
    """
    wanted = _wanted(statement)
    found = list(re.finditer(_pattern(statement.text), text))
    if len(found) != 1:
        raise MissingStatementError(
            f"{statement.page} has {len(found)} times, wanted once (take the statement out of "
            f"benchmarks/figures if it is no longer made):\n{statement.text.format(**wanted)}"
        )
    match = found[0]
    figures = [
        Figure(
            name=name,
            start=match.start(name),
            end=match.end(name),
            said=match[name],
            wanted=shown,
        )
        for name, shown in _shown(statement.text, wanted)
    ]
    return match.span(), figures


def correct(page: str, statements: Sequence[Statement]) -> list[str]:
    """Write the reports' numbers into a page.

    Args:
        page: The page, from the repository's root.
        statements: What is said, on this page and on others.

    Returns:
        What was changed.
    """
    path = ROOT / page
    text = path.read_text("utf-8")
    wrong = [
        figure
        for statement in statements
        if statement.page == page
        for figure in find(statement, text)[1]
        if figure.said != figure.wanted
    ]
    for figure in sorted(wrong, key=lambda figure: figure.start, reverse=True):
        text = text[: figure.start] + figure.wanted + text[figure.end :]
    path.write_text(text, "utf-8")
    return [f"{page}: {figure.said} is now {figure.wanted} ({figure.name})" for figure in wrong]


@cache
def load(report: str) -> Any:
    """A report's content: what its JSON holds, or its text where it has none."""
    text = (RESULTS / report).read_text("utf-8")
    return json.loads(text) if report.endswith(".json") else text


def on_link(cell: Any, link_ms: float) -> bool:
    """Whether a cell was measured with this wait before each collective."""
    return abs(1e3 * cell["latency_s"] - link_ms) < 1e-9


def _pattern(text: str) -> str:
    parts = []
    for literal, name, _, _ in Formatter().parse(text):
        parts.append(r"\s+".join(re.escape(word) for word in re.split(r"\s+", literal)))
        if name is not None:
            parts.append(f"(?P<{name}>{NUMBER})")
    return "".join(parts)


def _shown(text: str, values: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    for _, name, spec, _ in Formatter().parse(text):
        if name is not None:
            yield name, format(values[name], spec or "")


def _wanted(statement: Statement) -> Mapping[str, float]:
    return statement.values(load(statement.report))
