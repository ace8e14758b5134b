"""What a training step takes as rows get longer: memory and seconds, one example to a row.

    python -m benchmarks.long_rows --out benchmarks/results/long_rows
    python -m benchmarks.long_rows --out benchmarks/results/long_rows --beside OTHER_CHECKOUT

Each length runs in a process of its own. `--beside` runs the same steps with another checkout's
package, for a before and an after in one report.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bdlora_megatron.bench.report import machine

ROOT = Path(__file__).parents[1]
LENGTHS = tuple(2**n for n in range(10, 16))
MODEL = {
    "vocab_size": 32000,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LENGTHS[-1],
}
#: A row that would take more is not tried.
LIMIT_BYTES = 12e9
STEPS = 3


def main() -> None:
    """Measure every length, write the report, or be the process of one length."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.long_rows")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--beside", type=Path)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(_one(arguments.out, arguments.one)))
        return
    checkouts = {"packed": ROOT, **({"masked": arguments.beside} if arguments.beside else {})}
    report: dict[str, Any] = {"machine": machine(), "model": MODEL, "steps": STEPS}
    with tempfile.TemporaryDirectory() as folder:
        _make_base(Path(folder))
        for name, checkout in checkouts.items():
            report[name] = list(_all(Path(folder), checkout.resolve()))
    _write(report, arguments.out)


def _all(folder: Path, checkout: Path) -> Any:
    bytes_before = 0.0
    for length in LENGTHS:
        # Four times the last one is what a square would take.
        if 4 * bytes_before > LIMIT_BYTES and bytes_before > 1e9:
            return
        found = subprocess.run(
            [
                *(sys.executable, "-W", "ignore", str(Path(__file__).resolve())),
                *("--out", str(folder), "--one", str(length)),
            ],
            env={**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"},
            cwd=checkout,
            capture_output=True,
            text=True,
            check=True,
        )
        row = json.loads(found.stdout.splitlines()[-1])
        print(length, row, file=sys.stderr)
        bytes_before = row["bytes"]
        yield {"length": length, **row}


def _make_base(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(**MODEL)).save_pretrained(folder / "base")


def _one(folder: Path, length: int) -> dict[str, float]:
    """Peak bytes of a step beyond what was there before it, and the median step's seconds."""
    import numpy as np
    import psutil

    from bdlora_megatron import runtime
    from bdlora_megatron.train.config import from_mapping
    from bdlora_megatron.train.data import RowDataset
    from bdlora_megatron.train.examples import Example
    from bdlora_megatron.train.model import build_model
    from bdlora_megatron.train.step import Stepper

    runtime.enable_cpu()
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ[name] = value
    os.environ["MASTER_PORT"] = "0"
    config = from_mapping(
        {
            "model": {"hf_path": str(folder / "base"), "seq_length": length},
            "dataset": {"train": "none.jsonl"},
            "train": {"train_iters": STEPS, "global_batch_size": 1},
            "peft": {"bdlora": {"num_blocks": 2, "rank": 16}},
            "checkpoint": {"save": str(folder / "run")},
        }
    )
    tokens = (np.arange(length + 1) % MODEL["vocab_size"]).astype(np.int32)
    example = Example(tokens, np.ones(length + 1, dtype=bool))
    batch = RowDataset([example], length, packing=True, seed=0).batch([0])
    with runtime.model_parallel(1):
        stepper = Stepper(build_model(config)[0], config)
        before, seconds = psutil.Process().memory_info().rss, []
        Path("/proc/self/clear_refs").write_text("5")
        for step in range(STEPS):
            started = time.perf_counter()
            stepper.train_step(step, [batch])
            seconds.append(time.perf_counter() - started)
    status = Path("/proc/self/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    return {"bytes": peak - before, "seconds": sorted(seconds)[STEPS // 2]}


def _write(report: dict[str, Any], stem: Path) -> None:
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    _draw(report, stem.with_suffix(".png"))
    about = report["machine"]
    lines = [
        "# Training steps over long rows",
        "",
        "Made by `python -m benchmarks.long_rows`: a Llama of two layers, hidden size 128, four",
        "heads and a vocabulary of 32,000; BD-LoRA of rank 16; one example as long as the row,",
        f"every token learnt; float32 on one thread of {about['processor']},",
        f"{about['date']}, torch {about['versions']['torch']}. Memory is the process's peak beyond",
        "what it held before the first step; seconds are the median of",
        f"{report['steps']} steps. *Masked* is commit 9e4b01b: a dense mask, unfused attention,",
        "the logits of the whole row.",
        "",
        f"![Memory and seconds by the row's length]({stem.with_suffix('.png').name})",
        "",
        "| tokens a row | packed MB | seconds | masked MB | seconds |",
        "|---|---|---|---|---|",
    ]
    masked = {row["length"]: row for row in report.get("masked", [])}
    for row in report["packed"]:
        other = masked.get(row["length"])
        cells = [f"{row['bytes'] / 1e6:,.0f}", f"{row['seconds']:.2f}"]
        cells += [f"{other['bytes'] / 1e6:,.0f}", f"{other['seconds']:.2f}"] if other else ["", ""]
        lines.append(f"| {row['length']:,} | {' | '.join(cells)} |")
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n", "utf-8")


def _draw(report: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 3.2), layout="constrained")
    for axes, key, unit, scale in zip(
        figure.subplots(1, 2), ("bytes", "seconds"), ("peak MB", "seconds a step"), (1e6, 1.0),
        strict=True,
    ):  # fmt: skip
        for name in ("packed", "masked"):
            rows = report.get(name, [])
            axes.loglog(
                [row["length"] for row in rows],
                [row[key] / scale for row in rows],
                marker="o",
                label=name,
                base=2,
            )
        axes.set_xlabel("tokens a row")
        axes.set_ylabel(unit)
        axes.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
