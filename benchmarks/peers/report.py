"""The page, the numbers and the picture."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from bdlora_megatron.bench.report import machine
from bdlora_megatron.convert.adapter.tables import format_bytes
from benchmarks.peers.contenders import Visit

__all__ = ["write_report"]

#: Whose answers the others' are compared with.
REFERENCE = "PEFT, mixed batch"
Row = dict[str, Any]


def write_report(stem: Path, visits: Sequence[Visit], facts: Mapping[str, Any]) -> str:
    """Write STEM.json, STEM.md and STEM.png.

    Args:
        stem: Where to.
        visits: What was measured.
        facts: How it was.

    Returns:
        The page.
    """
    rows = summarise(visits, int(facts["requests"]) * int(facts["answer"]))
    stem.parent.mkdir(parents=True, exist_ok=True)
    facts = {**facts, **machine()}
    data = {
        "facts": facts,
        "rows": rows,
        "problems": [
            {"contender": asdict(v.contender), "problem": v.problem} for v in visits if v.problem
        ],
    }
    stem.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n", "utf-8")
    picture = stem.with_suffix(".png")
    _draw(rows, picture)
    page = "\n".join(_page(rows, visits, facts, picture.name)) + "\n"
    stem.with_suffix(".md").write_text(page, "utf-8")
    return page


def summarise(visits: Sequence[Visit], tokens: int) -> list[Row]:
    """One row for each load and contender, times of all its processes together.

    Args:
        visits: What was measured.
        tokens: Tokens that a load answers with.

    Returns:
        The rows, load by load.
    """
    outcomes = [(v, v.outcome) for v in visits if v.outcome is not None]
    loads = dict.fromkeys(name for _, outcome in outcomes for name in outcome["seconds"])
    names = dict.fromkeys(v.contender.name for v, _ in outcomes)
    rows = []
    for load in loads:
        wanted = next(
            (
                outcome["answers"][load]
                for v, outcome in outcomes
                if v.contender.name == REFERENCE and load in outcome["answers"]
            ),
            None,
        )
        for name in names:
            found = [(v, o) for v, o in outcomes if v.contender.name == name]
            if load in found[0][1]["seconds"]:
                rows.append(_row(load, name, found, wanted, tokens))
    return rows


def _row(load: str, name: str, found: Sequence[tuple[Visit, Any]], wanted: Any, tokens: int) -> Row:
    seconds = [second for _, outcome in found for second in outcome["seconds"][load]]
    row: Row = {
        "load": load,
        "contender": name,
        "seconds": seconds,
        "tokens_per_s": [tokens / second for second in seconds],
        "start_s": [outcome["start_s"] for _, outcome in found],
        "peak_bytes": max(visit.peak_bytes for visit, _ in found),
        "versions": found[0][1]["versions"],
    }
    if wanted is not None:
        row |= agreement(found[0][1]["answers"][load], wanted)
    return row


def agreement(answers: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]]) -> dict[str, int]:
    """How far answers are the same.

    Args:
        answers: Tokens of each answer.
        wanted: Those of the reference, in the same order.

    Returns:
        How many are the same to the end, of how many, and how many tokens come before the first
        difference, over all answers, of how many.
    """
    same = [
        next((i for i, (a, b) in enumerate(zip(one, two, strict=True)) if a != b), len(two))
        for one, two in zip(answers, wanted, strict=True)
    ]
    return {
        "same_answers": sum(n == len(two) for n, two in zip(same, wanted, strict=True)),
        "answers": len(wanted),
        "same_tokens": sum(same),
        "tokens": sum(map(len, wanted)),
    }


def _page(
    rows: Sequence[Row], visits: Sequence[Visit], facts: Mapping[str, Any], picture: str
) -> Iterator[str]:
    ranks = facts["ranks"]
    yield "# Beside PEFT and vLLM"
    yield ""
    yield f"Made by `{facts['command']}` in {facts['seconds']:.0f} s on {facts['date']}."
    yield ""
    yield (
        f"- Machine: {facts['processor']}; {facts['cores']} cores, {facts['threads']} threads for "
        f"each contender; {facts['accelerator']}; load average before the run "
        f"{facts['load_before']:.1f}."
    )
    for versions in dict.fromkeys(
        ", ".join(f"{name} {number}" for name, number in row["versions"].items()) for row in rows
    ):
        yield f"- Versions: {versions}."
    yield (
        "- Model: SmolLM2-135M-Instruct with a fourth group of heads whose weights are zero, so "
        "that heads divide by two ranks; its outputs are the original's. "
        f"{facts['dtype']} everywhere."
    )
    yield (
        f"- Adapters: all linear layers, random; LoRA of rank {ranks['LoRA']}, BD-LoRA of rank "
        f"{ranks['BD-LoRA']} in {facts['num_blocks']} blocks, which has as many parameters."
    )
    low, high = facts["prompt"]
    yield (
        f"- Load: {facts['requests']} requests at once, prompts of {low} to {high} tokens, "
        f"{facts['answer']} greedy tokens each, adapters in turn; all adapters are loaded before "
        "the clock starts."
    )
    yield (
        "- Each contender runs in a process of its own, one after another, back and forth; a cell "
        "is the median of all its timed runs, with the least and the largest. `ms per token` is "
        "the time of a run over the tokens of one answer, prompts included. Memory is the largest "
        "sum over a contender's processes, of all its loads, shared pages counted once."
    )
    yield ""
    yield f"![Tokens per second]({picture})"
    yield ""
    for load in dict.fromkeys(row["load"] for row in rows):
        yield from _table(load, [row for row in rows if row["load"] == load], facts["answer"])
    for found in visits:
        if found.problem:
            yield f"{found.contender.name} failed: `{' '.join(found.problem.split())}`"
            yield ""


def _table(load: str, rows: Sequence[Row], length: int) -> Iterator[str]:
    yield f"## {load}"
    yield ""
    yield "| | tokens/s | ms per token | same answers as PEFT | peak memory | start, s |"
    yield "|---|---|---|---|---|---|"
    for row in rows:
        same = "" if "answers" not in row else f"{row['same_answers']} of {row['answers']}"
        per_token = [1e3 * second / length for second in row["seconds"]]
        cells = [
            row["contender"],
            _spread(row["tokens_per_s"]),
            _spread(per_token),
            "the reference" if row["contender"] == REFERENCE else same,
            format_bytes(row["peak_bytes"]),
            f"{median(row['start_s']):.0f}",
        ]
        yield f"| {' | '.join(cells)} |"
    yield ""


def _spread(values: Sequence[float]) -> str:
    return f"{median(values):.0f} ({min(values):.0f} to {max(values):.0f})"


def _draw(rows: Sequence[Row], path: Path) -> None:
    from matplotlib.figure import Figure

    loads = list(dict.fromkeys(row["load"] for row in rows))
    figure = Figure(figsize=(8.0, 1.2 + 0.28 * len(rows)), layout="constrained")
    heights = [max(sum(row["load"] == load for row in rows), 1) for load in loads]
    panels = figure.subplots(
        len(loads), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights}
    )[:, 0]
    for axes, load in zip(panels, loads, strict=True):
        chosen = [row for row in rows if row["load"] == load][::-1]
        middle = [median(row["tokens_per_s"]) for row in chosen]
        axes.barh([row["contender"] for row in chosen], middle, height=0.6)
        for place, row in enumerate(chosen):
            values = row["tokens_per_s"]
            axes.hlines(place, min(values), max(values), color="black", linewidth=1.0)
        axes.set_title(load, loc="left", fontsize="small")
        axes.tick_params(labelsize="small")
    panels[-1].set_xlabel("tokens per second")
    figure.savefig(path, format="png", dpi=110)
