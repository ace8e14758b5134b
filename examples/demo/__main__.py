"""Run the demo: `python -m examples.demo`."""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from examples.demo.base import prepare_base
from examples.demo.compare import agreement_rows, cost_rows, speed_rows
from examples.demo.megatron import TP, LayoutCost, MegatronResult, run_megatron
from examples.demo.reference import Answer, Reference, Speed, peft_reference
from examples.demo.report import format_answer, format_table
from examples.demo.train import read_record, train_adapters

PROMPTS = ("What is love?", "What is sleep?", "What is honour?")


def main() -> None:
    """Prepare the base model, train the adapters and show what each of them answers."""
    args = _parse_args()
    _quieten_libraries()
    started = time.perf_counter()
    base_dir = prepare_base(args.cache_dir)
    print(f"base model: {base_dir}")
    adapters = train_adapters(base_dir, args.cache_dir / "adapters", steps=args.steps)
    print_training(adapters)
    reference = peft_reference(base_dir, adapters, PROMPTS)
    megatron = run_megatron(base_dir, adapters, reference.prompt_ids)
    print_answers(PROMPTS, megatron.answers, AutoTokenizer.from_pretrained(base_dir))
    print_agreement(reference, megatron)
    print_speeds([*reference.speeds, megatron.speed])
    print_costs(megatron.costs)
    print(f"\n{time.perf_counter() - started:.0f} s in all")


def print_training(adapters: Mapping[str, Path]) -> None:
    """Print how each adapter was trained."""
    records = {name: read_record(path) for name, path in adapters.items()}
    rows = [
        (
            name,
            record.text_name,
            record.rank,
            record.num_parameters,
            f"{record.held_out_loss_before:.3f}",
            f"{record.held_out_loss_after:.3f}",
            f"{record.seconds:.0f}",
        )
        for name, record in records.items()
    ]
    headers = ("adapter", "text", "rank", "parameters", "loss before", "after", "seconds")
    print("\nLoss on held-out text, per token")
    print(format_table(headers, rows))


def print_answers(
    prompts: Sequence[str], answers: Mapping[str, Sequence[Answer]], tokenizer: Any
) -> None:
    """Print what the base model and each adapter answer to each prompt."""
    for index, prompt in enumerate(prompts):
        print(f"\n> {prompt}")
        for name, given in answers.items():
            text = tokenizer.decode(given[index].token_ids, skip_special_tokens=True)
            print(format_answer(name, text))


def print_agreement(reference: Reference, megatron: MegatronResult) -> None:
    """Print how far Megatron's numbers are from PEFT's."""
    print(f"\nMegatron at TP={TP} against PEFT in one process, fp32, same prompts")
    headers = ("adapter", "largest logit difference", "largest logit", "same answers")
    print(format_table(headers, agreement_rows(reference.answers, megatron.answers)))


def print_speeds(speeds: Sequence[Speed]) -> None:
    """Print how fast the answers came."""
    print(
        f"\nGreedy answers in fp32: PEFT in one process with {torch.get_num_threads()} threads, "
        f"Megatron in {TP} with one thread each, on the same cores"
    )
    headers = ("answers by", "tokens", "passes", "seconds", "tokens/s")
    print(format_table(headers, speed_rows(speeds)))


def print_costs(costs: Sequence[LayoutCost]) -> None:
    """Print what each layout communicates."""
    print(
        f"\nCollectives per decoder layer beyond the base model's own, counted at TP={TP} "
        f"on {costs[0].tokens} tokens in fp32"
    )
    headers = ("layout", "adapter", "forward", "bytes", "backward", "bytes")
    print(format_table(headers, cost_rows(costs)))


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__)
    parser.add_argument("--cache-dir", type=Path, default=Path(".demo"))
    parser.add_argument("--steps", type=int, default=20, help="training steps for each adapter")
    return parser.parse_args()


def _quieten_libraries() -> None:
    transformers_logging.disable_progress_bar()
    # PEFT 0.21 calls a property that transformers 5 is about to rename.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")


if __name__ == "__main__":
    main()
