"""The tables, the numbers and the figure of ``benchmarks.serving``."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from bdlora_megatron.bench.plot import figure_class
from bdlora_megatron.bench.report import machine

#: Layouts of `bdlora serve`, and ``base`` for requests without adapters.
KINDS = ("base", "bdlora", "half_sharded", "slora")
LIMITS_S = (1.0, 6.0)


def label(kind: str, settings: Mapping[str, Any]) -> str:
    """What the tables call a contender."""
    rank = settings["rank"]
    return {
        "base": "base only",
        "bdlora": f"BD-LoRA, rank {settings['bdlora_rank']}",
        "half_sharded": f"half-sharded, rank {rank}",
        "slora": f"S-LoRA layout, rank {rank}",
    }[kind]


def summary(loads: list[dict[str, Any]]) -> dict[str, Any]:
    """The loads of one kind, rate and latency together: all their requests are one sample."""
    requests = [request for one in loads for request in one["requests"]]
    took_s = sum(one["took_s"] for one in loads)
    firsts = sorted(request["first_s"] for request in requests)
    gaps = [
        (request["total_s"] - request["first_s"]) / (request["tokens"] - 1)
        for request in requests
        if request["tokens"] > 1
    ]
    return {
        "requests": len(requests),
        "requests_per_s": len(requests) / took_s,
        "tokens_per_s": sum(request["tokens"] for request in requests) / took_s,
        "first_token_p50_s": median(firsts),
        "first_token_p99_s": firsts[min(int(len(firsts) * 0.99), len(firsts) - 1)],
        "per_token_p50_s": median(gaps),
        **{
            f"first_token_within_{limit:g}_s": sum(f <= limit for f in firsts) / len(firsts)
            for limit in LIMITS_S
        },
        "slot_loads": sum(one["slot_loads"] for one in loads),
        "slot_hits": 1 - sum(one["slot_loads"] for one in loads) / len(requests),
        "resident": max(one["resident"] for one in loads),
        "tokens_per_s_by_round": [
            sum(request["tokens"] for request in one["requests"]) / one["took_s"] for one in loads
        ],
    }


def write_report(
    out: Path, args: argparse.Namespace, found: list[dict[str, Any]], seconds: float
) -> None:
    """Write ``.json``, ``.png`` and ``.md``.

    Args:
        out: Their path without the ending.
        args: What was asked.
        found: The loads.
        seconds: How long the run took.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    settings = {key: value for key, value in vars(args).items() if key != "out"}
    facts = {
        "command": shlex.join(["python", "-m", "benchmarks.serving", *sys.argv[1:]]),
        "machine": {**machine(), "load_after": [round(load, 1) for load in os.getloadavg()]},
        "settings": settings,
        "seconds": round(seconds),
    }
    cells = [
        {
            "kind": kind,
            "rate": rate,
            "latency_s": latency_s,
            **summary(
                [
                    one
                    for one in found
                    if (one["kind"], one["rate"], one["latency_s"]) == (kind, rate, latency_s)
                ]
            ),
        }
        for latency_s in args.latencies
        for rate in args.rates
        for kind in KINDS
    ]
    text = json.dumps({**facts, "cells": cells, "loads": found}, separators=(",", ":"))
    out.with_suffix(".json").write_text(text + "\n", "utf-8")
    _figure(out.with_suffix(".png"), args, cells)
    out.with_suffix(".md").write_text("\n".join(_text(facts, cells, out.name)) + "\n", "utf-8")


def _text(facts: dict[str, Any], cells: list[dict[str, Any]], name: str) -> Iterator[str]:
    settings, about = facts["settings"], facts["machine"]
    where = "a CPU, over gloo" if settings["cpu"] else "GPUs, over NCCL"
    yield "# Load on a server with many adapters"
    yield ""
    yield f"Made by `{facts['command']}` in {facts['seconds']} s."
    yield ""
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    loads = ", ".join(map(str, about["load_after"]))
    yield (
        f"- Machine: {about['processor']}; {about['cores']} cores; {about['accelerator']}; "
        f"{about['date']}; {versions}; load averages after the run {loads}."
    )
    yield (
        f"- TP={settings['tp']} on {where}. A random Llama of width {settings['hidden']} and "
        f"{settings['layers']} layers; {settings['adapters']} adapters on all linear layers, "
        f"{_room(settings)}."
    )
    yield (
        "- Requests as in S-LoRA's benchmark (arXiv 2311.03285, section 7.1): Gamma arrivals with "
        f"cv {settings['cv']:g}, adapters by a power law of exponent {settings['alpha']:g}; "
        f"prompts of {settings['prompt'][0]} to {settings['prompt'][1]} tokens, answers of "
        f"{settings['answer'][0]} to {settings['answer'][1]}. Every server got the same ones, "
        f"{settings['seconds']:g} s of arrivals in each of {settings['rounds']} rounds; the "
        "servers take turns, load by load. Throughput counts the time until the last answer, so "
        "that it says what a server can do where requests come faster than that."
    )
    yield (
        "- `within` is S-LoRA's satisfaction: the share of requests whose first token came by "
        "then. The limit there is 6 s. p99 of so few requests is nearly the slowest."
    )
    yield "- `link` is a wait added before every collective, the server's own broadcasts included."
    yield ""
    for latency_s in settings["latencies"]:
        yield f"## Link of {1e3 * latency_s:g} ms"
        yield ""
        yield from _table([c for c in cells if c["latency_s"] == latency_s], settings)
        yield ""
    yield f"![Throughput, first token and satisfaction by rate]({name}.png)"
    yield ""
    yield (
        "On a CPU, a collective costs far less beside the arithmetic than on a GPU, and a step far "
        "more: the order of the layouts is what to read here, not their times."
    )


def _room(settings: Mapping[str, Any]) -> str:
    if settings["bytes"] is None:
        return f"over {settings['slots']} slots"
    return f"{settings['bytes'] / 1e6:g} MB for them on each rank, and as many parameters in each"


def _table(cells: list[dict[str, Any]], settings: Mapping[str, Any]) -> Iterator[str]:
    limits = " | ".join(f"within {limit:g} s" for limit in LIMITS_S)
    yield (
        "| requests/s asked | layout | requests/s | tokens/s (by round) | first token p50, s | p99 "
        f"| per token p50, ms | {limits} | adapters on the device | slot hits |"
    )
    yield "|---" * (9 + len(LIMITS_S)) + "|"
    for cell in cells:
        rounds = ", ".join(f"{value:.0f}" for value in cell["tokens_per_s_by_round"])
        adapted = cell["kind"] != "base"
        within = [f"{100 * cell[f'first_token_within_{limit:g}_s']:.0f}%" for limit in LIMITS_S]
        row = [
            f"{cell['rate']:g}",
            label(cell["kind"], settings),
            f"{cell['requests_per_s']:.1f}",
            f"{cell['tokens_per_s']:.0f} ({rounds})",
            f"{cell['first_token_p50_s']:.3f}",
            f"{cell['first_token_p99_s']:.2f}",
            f"{1e3 * cell['per_token_p50_s']:.1f}",
            *within,
            *([str(cell["resident"]), f"{100 * cell['slot_hits']:.0f}%"] if adapted else ["", ""]),
        ]
        yield f"| {' | '.join(row)} |"


def _figure(path: Path, args: argparse.Namespace, cells: list[dict[str, Any]]) -> None:
    panels = {
        "tokens_per_s": "tokens per second",
        "first_token_p50_s": "time to first token, median, s",
        f"first_token_within_{LIMITS_S[0]:g}_s": f"first token within {LIMITS_S[0]:g} s",
    }
    rows = len(args.latencies)
    figure = figure_class()(figsize=(10.0, 2.7 * rows + 0.6), layout="constrained")
    grid = figure.subplots(rows, len(panels), sharex=True, squeeze=False)
    for row, latency_s in zip(grid, args.latencies, strict=True):
        for axes, (name, title) in zip(row, panels.items(), strict=True):
            for kind in KINDS:
                values = [
                    c[name] for c in cells if (c["kind"], c["latency_s"]) == (kind, latency_s)
                ]
                named = label(kind, vars(args)) if axes is grid[0][0] else None
                axes.plot(args.rates, values, marker="o", label=named)
            axes.set_title(f"{title}; link {1e3 * latency_s:g} ms", fontsize="small")
            axes.set_ylim(bottom=0)
            axes.set_xlabel("requests per second asked", fontsize="small")
    figure.legend(loc="outside lower center", ncols=len(KINDS), fontsize="small")
    figure.savefig(path, format="png", dpi=110)
