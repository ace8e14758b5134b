"""`bdlora plan`: which layout, what rank, how much memory, how fast, before anything is run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bdlora_megatron.cli import output
from bdlora_megatron.cli.lists import add_target_modules, numbers
from bdlora_megatron.config import DEFAULT_TARGETS
from bdlora_megatron.errors import ConfigError
from bdlora_megatron.plan import HARDWARE, PRESETS, ModelShape, find_hardware
from bdlora_megatron.plan.deployment import Deployment, make_plan, make_sweep

__all__ = ["add_parser", "run"]


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "plan",
        help="predict memory and step times of a deployment, by layout",
        description="Predict what adapters cost in each layout, served and trained: exact counts "
        "of bytes, products and collectives, times by a model of the machine. Nothing is run or "
        "measured.",
    )
    parser.add_argument(
        "--model",
        required=True,
        help=f"{' or '.join(PRESETS)}, or a Hugging Face model's folder",
    )
    parser.add_argument("--tp", type=int, required=True, help="tensor-parallel ranks")
    parser.add_argument(
        "--hardware",
        metavar="MACHINE",
        default="a100-nvlink",
        help=f"{', '.join(sorted(HARDWARE))}, or the JSON of `bdlora bench --out`, for the machine "
        "that was measured (default: %(default)s)",
    )
    defaults = Deployment.__dataclass_fields__
    for name, what in (
        ("lora-rank", "rank of the vanilla LoRA whose parameters a BD-LoRA is to match"),
        ("adapters", "different adapters in one batch"),
        ("context", "tokens of each request, prompt and answer"),
        ("prompt", "tokens of a prompt, for the prefill step"),
        ("sequences", "sequences of a training step"),
        ("sequence", "tokens of each of them"),
    ):
        default = defaults[name.replace("-", "_")].default
        parser.add_argument(
            f"--{name}", type=int, default=default, help=f"{what} (default: %(default)s)"
        )
    parser.add_argument(
        "--requests",
        type=numbers,
        default=(defaults["requests"].default,),
        metavar="N,...",
        help="requests that decode at once; of several numbers, a table of all and the plan of the "
        f"largest (default: {defaults['requests'].default})",
    )
    add_target_modules(parser)
    parser.add_argument("--sequence-parallel", action="store_true", help="for the training step")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Print the plan."""
    name, shape = _shape(arguments.model)
    asked = Deployment(
        model=name,
        shape=shape,
        hardware=find_hardware(arguments.hardware),
        tp=arguments.tp,
        lora_rank=arguments.lora_rank,
        adapters=arguments.adapters,
        requests=arguments.requests[0],
        context=arguments.context,
        prompt=arguments.prompt,
        sequences=arguments.sequences,
        sequence=arguments.sequence,
        sequence_parallel=arguments.sequence_parallel,
        target_modules=arguments.target_modules or DEFAULT_TARGETS,
    )
    several = len(arguments.requests) > 1
    plan = make_sweep(asked, arguments.requests) if several else make_plan(asked)
    output.result(plan.table(), plan.to_dict(), as_json=arguments.json)
    return 0


def _shape(model: str) -> tuple[str, ModelShape]:
    if model in PRESETS:
        return model, PRESETS[model]
    folder = Path(model)
    if not folder.is_dir():
        raise ConfigError(
            f"--model {model} is neither a folder nor one of {', '.join(PRESETS)}; pass a folder "
            "with the model's config.json"
        )
    # Imports Megatron-Core, which takes seconds.
    from bdlora_megatron.convert import read_hf_config

    return folder.resolve().name, read_hf_config(folder)
