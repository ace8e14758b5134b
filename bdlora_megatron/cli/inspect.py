"""`bdlora inspect PATH`: what an adapter holds, and whether it could be converted."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bdlora_megatron.blocks import BlockFactors
from bdlora_megatron.cli import output
from bdlora_megatron.convert.adapter import Adapter, ModuleKey
from bdlora_megatron.convert.adapter.lazy import module_facts
from bdlora_megatron.convert.adapter.tables import format_bytes, format_table
from bdlora_megatron.convert.registry import detect_format, open_adapter
from bdlora_megatron.errors import BDLoRAError

__all__ = ["add_parser", "run"]


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the parser.

    Args:
        commands: What `add_subparsers` returned.

    Returns:
        The command's own parser.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        "inspect",
        help="show an adapter's modules and what would be refused of it",
        description="Show an adapter's modules, ranks, blocks, sizes and layout, and what would be "
        "refused of it. Every number is read once, to find NaN and infinity. "
        "Exit status: 0 readable, 1 refused.",
    )
    parser.add_argument("path", metavar="PATH", type=Path, help="the adapter's folder")
    parser.add_argument("--allow-pickle", action="store_true", help="read pickles, tensors only")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Print the table.

    Args:
        arguments: The parsed command line.

    Returns:
        The exit status.
    """
    try:
        kind = detect_format(arguments.path)
        with open_adapter(arguments.path, allow_pickle=arguments.allow_pickle) as adapter:
            facts = module_facts(adapter)
            refused = _broken_modules(adapter)
            base, name, metadata = adapter.base, adapter.name, dict(adapter.metadata)
    except BDLoRAError as error:
        output.result(
            f"refused: {error}",
            {"path": str(arguments.path), "refused": [str(error)]},
            as_json=arguments.json,
        )
        return 1
    known = {side: width for side, width in asdict(base).items() if width is not None}
    data = {
        "path": str(arguments.path),
        "name": name,
        "format": kind,
        "refused": refused,
        "base": known,
        "metadata": metadata,
        "bytes": sum(map(_nbytes, facts.values())),
        "modules": [_as_dict(key, fact) for key, fact in facts.items()],
    }
    output.result(_text(name, kind, facts, known, refused), data, as_json=arguments.json)
    return 1 if refused else 0


def _broken_modules(adapter: Adapter) -> list[str]:
    """Modules whose numbers cannot be read or are not finite, one after the other."""
    refused = []
    for key in adapter.modules:
        try:
            adapter.modules[key]
        except BDLoRAError as error:
            refused.append(str(error))
    return refused


def _as_dict(key: ModuleKey, fact: BlockFactors) -> dict[str, Any]:
    return {
        "key": str(key),
        "rank": fact.rank,
        "num_blocks": fact.num_blocks,
        "layout": _layout(fact),
        "in_features": fact.in_features,
        "out_features": fact.out_features,
        "scale": fact.scale,
        "dtype": str(fact.dtype).removeprefix("torch."),
        "bytes": _nbytes(fact),
    }


def _text(
    name: str,
    kind: str,
    facts: Mapping[ModuleKey, BlockFactors],
    base: Mapping[str, int],
    refused: list[str],
) -> str:
    rows = [
        (
            str(key),
            f"{fact.in_features} -> {fact.out_features}",
            str(fact.rank),
            str(fact.num_blocks),
            _layout(fact),
            f"{fact.scale:g}",
            str(fact.dtype).removeprefix("torch."),
            format_bytes(_nbytes(fact)),
        )
        for key, fact in facts.items()
    ]
    header = ("module", "features", "rank", "blocks", "layout", "scale", "type", "size")
    size = format_bytes(sum(map(_nbytes, facts.values())))
    lines = [
        f"{name}: format {kind}, {len(facts)} modules, {size}",
        f"base model: {', '.join(f'{side} {width}' for side, width in base.items())}",
        "",
        format_table(header, rows),
        "",
    ]
    if refused:
        return "\n".join([*lines, *(f"refused: {why}" for why in refused)])
    return "\n".join([*lines, "nothing would be refused"])


def _layout(fact: BlockFactors) -> str:
    return "vanilla" if fact.num_blocks == 1 else f"blocks in {fact.blocked}"


def _nbytes(fact: BlockFactors) -> int:
    return fact.num_parameters * fact.dtype.itemsize
