"""`bdlora merge`: a base model with an adapter added to its weights."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bdlora_megatron.cli import output
from bdlora_megatron.cli.sources import add_reading_options, opened
from bdlora_megatron.convert.merge import MergeReport, merge_adapter
from bdlora_megatron.convert.pipeline import companions
from bdlora_megatron.errors import ConfigError

__all__ = ["add_parser", "run"]


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "merge",
        help="add an adapter to its base model's weights",
        description="Write the base model in Hugging Face's format with an adapter, of any format, "
        "added to its weights. One tensor is in memory at a time, and types and shards are the "
        "base's; what rounding to its type takes from the update is told. The folder appears "
        "complete or not at all.",
    )
    parser.add_argument(
        "--adapter", metavar="DIR", type=Path, required=True, help="the adapter's folder"
    )
    parser.add_argument(
        "--out", metavar="DIR", type=Path, required=True, help="the merged model's new folder"
    )
    add_reading_options(parser)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Merge and print what rounding cost.

    Raises:
        ConfigError: The base model is not named.
    """
    if arguments.base is None:
        raise ConfigError("merge needs --base HF_DIR, the model that the adapter is for")
    with opened(arguments.adapter, arguments) as adapter:
        report = merge_adapter(arguments.base, adapter, arguments.out)
    output.result(_text(report, arguments), report.to_dict(), as_json=arguments.json)
    return 0


def _text(report: MergeReport, arguments: argparse.Namespace) -> str:
    lines = [report.table(), ""]
    if report.left_out:
        lines.append(f"left out of {arguments.base}: {', '.join(report.left_out)}")
    if own := [path.name for path in companions(arguments.adapter)]:
        lines.append(
            f"{arguments.adapter} has a tokenizer of its own ({', '.join(own)}); the merged model "
            "has the base's: copy them over it if the adapter was trained with them"
        )
    merged = f"{len(report.modules)} modules merged in {', '.join(report.dtypes)}"
    return "\n".join([*lines, f"{merged}; the model is in {arguments.out}"])
