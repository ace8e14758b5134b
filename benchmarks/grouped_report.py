"""The tables, the numbers and the figure of ``benchmarks.grouped``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib as mpl

from bdlora_megatron.bench.report import machine

mpl.use("Agg")
import matplotlib.pyplot as plt

CANDIDATES = {
    "grouped": "grouped product",
    "dense_loop": "dense loop over adapters",
    "peft_mixed": "PEFT, adapter_names",
}
STEPS = ("decode", "prefill")
CLOCKS = {
    "wall": "Times are the clock's on the wall; other work on the machine shows in the quartiles.",
    "cpu": (
        "Times are those that the one thread spent on a core, because the machine did other work; "
        "caches and memory were still shared with it."
    ),
}


def write_report(folder: Path, rows: Sequence[dict[str, Any]], *, threads: int, clock: str) -> None:
    """Write ``grouped.json``, ``grouped.png`` and ``grouped.md``.

    Args:
        folder: Where to.
        rows: What ``summarise`` gave, case by case.
        threads: Threads of torch.
        clock: ``wall`` or ``cpu``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    facts = {**_machine(threads), "clock": clock}
    text = json.dumps({"machine": facts, "cases": list(rows)}, indent=1)
    (folder / "grouped.json").write_text(text + "\n", "utf-8")
    _figure(folder / "grouped.png", rows)
    (folder / "grouped.md").write_text("\n".join(_text(rows, facts)) + "\n", "utf-8")


def _machine(threads: int) -> dict[str, Any]:
    here = machine()
    return {
        "cpu": here["processor"],
        "cores": here["cores"],
        "threads": threads,
        "load": [round(load, 1) for load in os.getloadavg()],
        "python": here["versions"]["Python"],
        "torch": here["versions"]["torch"],
        "peft": version("peft"),
        "command": " ".join(["python -m benchmarks.grouped", *sys.argv[1:]]),
    }


def _text(rows: Sequence[dict[str, Any]], facts: dict[str, Any]) -> Iterator[str]:
    yield "# The grouped product on a CPU"
    yield ""
    yield (
        f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads of torch "
        f"{facts['torch']}, PEFT {facts['peft']}, Python {facts['python']}. Load average when the "
        f"run ended: {facts['load'][0]} over one minute, {facts['load'][2]} over fifteen. "
        f"{CLOCKS[facts['clock']]} Made by `{facts['command']}`."
    )
    yield ""
    yield (
        "One layer of 1024 by 1024 features, float32, adapters alone (the base product is there "
        "already). Decode: one token per request, 64 requests or as many as adapters, in random "
        "order. Prefill: 4096 tokens; eight prompts of 512 tokens for up to 8 adapters, and with "
        "more adapters a chunk of 64 or 8 tokens for each. Candidates run in turn, round after "
        "round in random order, short ones several times in a row; medians, with the quartiles in "
        "brackets, in milliseconds. Each is first held to an fp64 reference. Floor: what must be "
        "read and written at the bandwidth of a copy, or the products at the rate of a large "
        "matrix product, whichever is longer, both measured in the same rounds; what fits a cache "
        "can beat it. `first layer` also derives what later layers of the step share."
    )
    for step in STEPS:
        yield from ("", f"## {step.capitalize()}", "")
        yield (
            "| adapters | rank | floor | grouped | first layer | dense loop | PEFT | over floor "
            "| faster than dense | faster than PEFT |"
        )
        yield "|---" * 10 + "|"
        yield from (_line(row) for row in rows if row["step"] == step)
    yield from ("", "![Time over the floor](grouped.png)", "")
    yield from _verdict(rows)


def _line(row: dict[str, Any]) -> str:
    names = ("grouped", "grouped_first_layer", "dense_loop", "peft_mixed")
    cells = [str(row["adapters"]), str(row["rank"]), f"{row['floor_ms']:.2f} ({row['floor_is']})"]
    for name in names:
        low, high = row["quartiles_ms"][name]
        cells.append(f"{row['median_ms'][name]:.2f} [{low:.2f}, {high:.2f}]")
    cells += [f"{row[name]:.1f}" for name in ("over_floor", "over_dense", "over_peft")]
    return "| " + " | ".join(cells) + " |"


def _verdict(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The aims, and whether this run met them, from the numbers alone."""
    decode = [row for row in rows if row["step"] == "decode" and row["adapters"] == 64]
    yield "## Against the aims"
    yield ""
    if decode:
        ratios = ", ".join(f"{row['over_peft']:.1f} at rank {row['rank']}" for row in decode)
        met = all(row["over_peft"] >= 3 for row in decode)
        yield (
            f"- At least 3 times as fast as PEFT's mixed batch at 64 adapters, decode: "
            f"{'met' if met else 'not met everywhere'} ({ratios})."
        )
    beyond = [row for row in rows if row["over_floor"] > 2]
    named = "; ".join(
        f"{row['step']}, {row['adapters']} adapters, rank {row['rank']}: {row['over_floor']:.1f}"
        for row in beyond
    )
    yield (
        f"- Within twice the floor: {len(rows) - len(beyond)} of {len(rows)} cases"
        f"{'. Beyond it: ' + named if beyond else ''}."
    )


def _figure(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for axis, step in zip(axes, STEPS, strict=True):
        of_step = [row for row in rows if row["step"] == step]
        labels = [f"{row['adapters']}\nr{row['rank']}" for row in of_step]
        for name, label in CANDIDATES.items():
            values = [row["median_ms"][name] / row["floor_ms"] for row in of_step]
            axis.plot(range(len(values)), values, marker="o", markersize=4, label=label)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.axhline(2, color="black", linewidth=0.8, linestyle=":")
        axis.set_yscale("log")
        axis.set_xticks(range(len(labels)), labels, fontsize=7)
        axis.set_title(step)
        axis.set_xlabel("adapters in the batch, rank")
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("time over the floor")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
