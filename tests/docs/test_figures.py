"""Every measured figure in README.md is its report's; so are those that other pages are held to."""

from __future__ import annotations

import re

import pytest

from benchmarks.figures import STATEMENTS, statements
from tests.docs.pages import ROOT

#: The part of README.md that reports what was measured.
SECTION = re.compile(r"^## What was measured.*?(?=^## )", re.MULTILINE | re.DOTALL)
#: Numbers that look like a measurement, wherever they stand.
MEASUREMENT = re.compile(
    r"\d(?:[\d.,]*\d)?\s?(?:%|ms\b|s\b|[KMG]i?B\b|GFLOP|times\b|x\b|requests/s|tokens/s)"
)
#: Numbers in that part that were not measured: what the tables' heads and the sentences say of how.
SETTINGS = (
    "two ranks",
    "| | LoRA rank 8 | 16 | 32 | 64 |",
    "LoRA's rank is 16, BD-LoRA's 32 when decoding",
    "40 steps of SmolLM2-135M",
    "the paper reports up to 1.63 and 1.79 on eight",
    "A100s",
)


def cases():
    return [
        pytest.param(statement, id=f"{statement.page}-{statement.report}-{number}")
        for number, statement in enumerate(STATEMENTS)
    ]


def wrong_figures(statement, text):
    """A line for every figure that is not its report's."""
    (start, _), found = statements.find(statement, text)
    line = text.count("\n", 0, start) + 1
    return [
        f"{statement.page}:{line}: {figure.said} should be {figure.wanted} "
        f"({figure.name} in benchmarks/results/{statement.report}); "
        "python -m benchmarks.figures writes it"
        for figure in found
        if figure.said != figure.wanted
    ]


@pytest.mark.parametrize("statement", cases())
def test_figures_are_those_of_the_reports(statement):
    wrong = wrong_figures(statement, (ROOT / statement.page).read_text("utf-8"))
    assert not wrong, "\n".join(wrong)


def test_readme_has_no_other_measured_figure():
    text = (ROOT / "README.md").read_text("utf-8")
    spans = [
        statements.find(statement, text)[0]
        for statement in STATEMENTS
        if statement.page == "README.md"
    ]
    for start, end in spans:
        text = text[:start] + re.sub(r"[^\n]", " ", text[start:end]) + text[end:]
    section = SECTION.search(text)
    assert section, "README.md has no section of measurements; is the pattern still right?"
    rest = re.sub(r"\]\([^)]*\)", "]", section[0])
    for settings in SETTINGS:
        rest = rest.replace(settings, "")
    untraced = [line for line in rest.splitlines()[1:] if re.search(r"\d", line)]
    assert not untraced, "no statement in benchmarks/figures vouches for\n" + "\n".join(untraced)
    elsewhere = MEASUREMENT.findall(text.replace(section[0], ""))
    assert not elsewhere, f"figures outside the section of measurements: {elsewhere}"


def test_a_wrong_figure_is_named_with_the_right_one():
    statement = STATEMENTS[0]
    text = (ROOT / statement.page).read_text("utf-8")
    (start, end), found = statements.find(statement, text)
    first = found[0]
    broken = text[: first.start] + "1234.5" + text[first.end :]
    message = wrong_figures(statement, broken)[0]
    assert f"1234.5 should be {first.wanted}" in message
    assert statement.report in message
    with pytest.raises(statements.MissingStatementError, match="wanted once"):
        statements.find(statement, text[:start] + text[end:])


def test_correct_writes_the_reports_figures(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("It took\n1.00 ms, or -3 in\nall.", "utf-8")
    statement = statements.Statement(
        page="page.md",
        text="It took {time:.2f} ms, or {change:+d} in all.",
        report="bridge.json",
        values=lambda report: {"time": 12.345, "change": 4},
    )
    monkeypatch.setattr(statements, "ROOT", tmp_path)
    changed = statements.correct("page.md", [statement])
    assert page.read_text("utf-8") == "It took\n12.35 ms, or +4 in\nall."
    assert len(changed) == 2
    assert statements.correct("page.md", [statement]) == []
