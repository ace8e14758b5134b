"""A step of fine-tuning beside `transformers` and PEFT: seconds, tokens and memory, same rows.

    python -m examples.train.data
    python -m benchmarks.training_step --out benchmarks/results/training_step

Every contender runs in processes of its own, one thread each. They take turns, step by step, and
the first step's losses must agree: a fresh adapter changes nothing, so all compute the same.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bdlora_megatron.bench.report import machine

RANK = 24
ROWS = 1
ROUNDS = 7
#: Name, ranks.
CONTENDERS = (("PEFT, LoRA", 1), ("BD-LoRA, TP=1", 1), ("BD-LoRA, TP=3", 3))


@dataclass(frozen=True)
class Work:
    """What is learnt, in rows of how many tokens."""

    name: str
    format: str
    file: str
    seq_length: int


WORKS = (
    Work("text, 512 tokens a row", "text", "topics", 512),
    Work("RAG, up to 2,048 tokens a row", "rag", "rag", 2048),
)


def main() -> None:
    """Measure, write the report, or be a contender's process."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_step")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path(".demo"))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contender:
        _contend(arguments)
        return
    report: dict[str, Any] = {"machine": machine(), "rank": RANK, "rows": ROWS, "works": []}
    report["load"] = round(os.getloadavg()[0], 1)
    for number, work in enumerate(WORKS):
        with tempfile.TemporaryDirectory() as folder:
            found = _measure(number, Path(folder), arguments)
        report["works"].append({**asdict(work), "contenders": found})
        print(json.dumps(report["works"][-1], indent=1), file=sys.stderr)
    _write(report, arguments.out)


def _measure(work: int, folder: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All contenders' steps, in turns."""
    everyone = [_start(name, size, work, folder, arguments) for name, size in CONTENDERS]
    try:
        for ranks in everyone:
            _answers(ranks)
        steps: list[list[list[dict[str, float]]]] = [[] for _ in everyone]
        # The first step is not timed: it allocates.
        for _ in range(arguments.rounds + 1):
            for taken, ranks in zip(steps, everyone, strict=True):
                for rank in ranks:
                    rank.stdin.write("step\n")
                    rank.stdin.flush()
                taken.append(_answers(ranks))
    finally:
        for rank in (rank for ranks in everyone for rank in ranks):
            rank.kill()
            rank.wait()
    losses = [taken[0][0]["loss"] for taken in steps]
    if max(losses) - min(losses) > 1e-3:
        raise SystemExit(f"the contenders do not compute the same: first losses {losses}")
    return [
        {"name": name, "ranks": size, **_summary(taken)}
        for (name, size), taken in zip(CONTENDERS, steps, strict=True)
    ]


def _summary(taken: Sequence[Sequence[dict[str, float]]]) -> dict[str, Any]:
    return {
        "first_loss": taken[0][0]["loss"],
        "seconds": [max(rank["seconds"] for rank in step) for step in taken[1:]],
        "tokens": [step[0]["tokens"] for step in taken[1:]],
        "peak_bytes": max(rank["peak"] for rank in taken[-1]),
        "held_bytes": max(rank["held"] for rank in taken[-1]),
    }


def _start(
    name: str, size: int, work: int, folder: Path, arguments: argparse.Namespace
) -> list[Any]:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.training_step"]
    command += ["--contender", name, "--work", str(work), "--out", str(folder)]
    command += ["--data", str(arguments.data)]
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(size)}
    return [
        subprocess.Popen(
            command,
            env={**os.environ, **where, "RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def _answers(ranks: Sequence[Any]) -> list[dict[str, float]]:
    lines = [rank.stdout.readline() for rank in ranks]
    if not all(lines):
        raise SystemExit("a contender's process ended; see its messages above")
    return [json.loads(line) for line in lines]


def _contend(arguments: argparse.Namespace) -> None:
    """Step whenever the parent says so, and answer with what it took."""
    import psutil

    size = int(os.environ["WORLD_SIZE"])
    make = _peft if arguments.contender.startswith("PEFT") else _ours
    for step in make(WORKS[arguments.work], arguments.data, arguments.out, size):
        held = psutil.Process().memory_info().rss
        Path("/proc/self/clear_refs").write_text("5")
        print(json.dumps({"held": held}), flush=True)
        for number, _ in enumerate(sys.stdin):
            started = time.perf_counter()
            loss, tokens = step(number)
            seconds = time.perf_counter() - started
            status = Path("/proc/self/status").read_text()
            peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
            answer = {"seconds": seconds, "loss": loss, "tokens": tokens, "peak": peak}
            print(json.dumps({**answer, "held": held}), flush=True)


def _rows(work: Work, data: Path, kept: Path) -> Any:
    """The rows of all contenders, in the order in which they are learnt."""
    from bdlora_megatron.train.corpus import Storage, read_examples
    from bdlora_megatron.train.data import RowDataset
    from bdlora_megatron.train.examples import Documents, load_tokenizer
    from bdlora_megatron.train.rag import RagOptions

    path = data / "data" / work.file / "train.jsonl"
    format: Any = work.format
    rag = RagOptions(seq_length=work.seq_length)
    documents = Documents(load_tokenizer(str(_base(data))), format, rag=rag)
    examples = read_examples(
        [path], documents, seq_length=work.seq_length, too_long="truncate",
        storage=Storage(cache_dir=kept),
    )  # fmt: skip
    whole = [example for example in examples if len(example) >= 0.9 * work.seq_length]
    return RowDataset(whole, work.seq_length, packing=False, seed=0)


def _base(data: Path) -> Path:
    return data / "SmolLM2-135M-Instruct"


Step = Callable[[int], tuple[float, float]]


def _ours(work: Work, data: Path, folder: Path, size: int) -> Iterator[Step]:
    from bdlora_megatron import runtime
    from bdlora_megatron.train.config import from_mapping
    from bdlora_megatron.train.model import build_model
    from bdlora_megatron.train.step import Stepper

    runtime.enable_cpu()
    config = from_mapping(
        {
            "model": {
                "hf_path": str(_base(data)),
                "seq_length": work.seq_length,
                "tensor_model_parallel_size": size,
            },
            "dataset": {"train": "unused.jsonl"},
            "train": {"train_iters": 100, "global_batch_size": ROWS},
            "peft": {"bdlora": {"num_blocks": 3, "rank": RANK}},
            "optimizer": {"clip_grad": 0},
            "checkpoint": {"save": str(folder / "run")},
        }
    )
    rows = _rows(work, data, folder)
    with runtime.model_parallel(size):
        stepper = Stepper(build_model(config)[0], config)

        def step(number: int) -> tuple[float, float]:
            places = range(number * ROWS, (number + 1) * ROWS)
            batches = [rows.batch([rows.in_training_order(place)]) for place in places]
            result = stepper.train_step(number, batches)
            return result.loss, float(sum(batch.starts.diff()[0] for batch in batches))

        yield step


def _peft(work: Work, data: Path, folder: Path, size: int) -> Iterator[Step]:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    del size
    rows = _rows(work, data, folder)
    base = AutoModelForCausalLM.from_pretrained(_base(data), dtype=torch.float32)
    settings = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    model = get_peft_model(base, settings).train()
    factors = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(factors, lr=1e-4, weight_decay=0.0)

    def step(number: int) -> tuple[float, float]:
        places = range(number * ROWS, (number + 1) * ROWS)
        batches = [rows.batch([rows.in_training_order(place)]) for place in places]
        learnt, total, tokens = sum(len(batch.learnt) for batch in batches), 0.0, 0.0
        optimizer.zero_grad()
        for batch in batches:
            length = int(batch.starts[1])
            labels = torch.full_like(batch.labels, -100)
            labels[batch.learnt] = batch.labels[batch.learnt]
            logits = model(input_ids=batch.tokens[:, :length]).logits[0]
            loss = torch.nn.functional.cross_entropy(logits, labels[:length], reduction="sum")
            (loss / learnt).backward()
            total, tokens = total + loss.item(), tokens + length
        optimizer.step()
        return total / learnt, tokens

    yield step


def _write(report: dict[str, Any], stem: Path) -> None:
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    about = report["machine"]
    lines = [
        "# A training step beside PEFT",
        "",
        "Made by `python -m benchmarks.training_step`: SmolLM2-135M in float32, adapters of rank",
        f"{report['rank']} on all linear layers (BD-LoRA in three blocks), on the text of Python's",
        f"reference; rows a step: {report['rows']}. Every process has one thread of",
        f"{about['processor']} ({about['cores']} cores), {about['date']}, torch",
        f"{about['versions']['torch']}, load average before {report['load']}.",
        "Contenders take turns, step by step; seconds are medians of",
        f"{len(report['works'][0]['contenders'][0]['seconds'])} steps (smallest to largest),",
        "*beside PEFT* the median of the ratios round by round. PEFT runs in a plain loop over",
        "`transformers`' model. Memory is one rank's: the peak, and what it held with the model",
        "loaded, before the first step. Three ranks share the cores here.",
    ]
    for work in report["works"]:
        lines += ["", f"## {work['name']}", ""]
        lines += [
            "| | tokens/s | beside PEFT | seconds a step | peak MB a rank | model loaded MB |"
        ]
        lines += ["|---|---|---|---|---|---|"]
        first = work["contenders"][0]
        lines += [_row(contender, first) for contender in work["contenders"]]
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n", "utf-8")


def _row(contender: dict[str, Any], beside: dict[str, Any]) -> str:
    seconds = contender["seconds"]
    pairs = zip(beside["seconds"], seconds, strict=True)
    cells = [
        contender["name"],
        f"{sum(contender['tokens']) / sum(seconds):,.0f}",
        f"{statistics.median(theirs / own for theirs, own in pairs):.2f}",
        f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})",
        f"{contender['peak_bytes'] / 1e6:,.0f}",
        f"{contender['held_bytes'] / 1e6:,.0f}",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
