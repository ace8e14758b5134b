"""`bdlora inspect PATH`: what an adapter holds, and whether it could be converted."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bdlora_megatron.blocks import BlockFactors
from bdlora_megatron.cli import output
from bdlora_megatron.cli.sources import add_reading_options, find_sources, holds_many, opened
from bdlora_megatron.convert.adapter import Adapter, ModuleKey
from bdlora_megatron.convert.adapter.lazy import module_facts
from bdlora_megatron.convert.adapter.problems import brief_causes
from bdlora_megatron.convert.adapter.tables import format_bytes, format_table
from bdlora_megatron.convert.registry import detect_format
from bdlora_megatron.errors import BDLoRAError, explain

__all__ = ["add_parser", "run"]

_COUNTED = ("rank", "num_blocks")


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "inspect",
        help="show an adapter's modules and what would be refused of it",
        description="Show an adapter's modules, ranks, blocks, sizes and layout, and what would be "
        "refused of it; of a folder of adapters, a line for each, and how many are refused for "
        "what. Every number is read once, to find NaN and infinity. "
        "Exit status: 0 readable, 1 refused.",
    )
    parser.add_argument(
        "path", metavar="PATH", type=Path, help="an adapter's folder, or a folder of such folders"
    )
    add_reading_options(parser)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Print the table."""
    if holds_many(arguments.path):
        return _run_many(arguments)
    found = _inspected(arguments.path, arguments)
    output.result(found.text, found.data, as_json=arguments.json)
    return 1 if found.data["refused"] else 0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Found:
    """What is there to say of one adapter.

    Attributes:
        text: For people.
        data: For programs.
        facts: Its modules, none where it is refused.
        causes: Why it is refused, in few words.
    """

    text: str
    data: dict[str, Any]
    facts: Mapping[ModuleKey, BlockFactors] = field(default_factory=dict)
    causes: Sequence[str] = ()


def _inspected(path: Path, arguments: argparse.Namespace) -> _Found:
    try:
        kind = detect_format(path)
        with opened(path, arguments) as adapter:
            facts = module_facts(adapter)
            broken = _broken_modules(adapter)
            base, name, metadata = adapter.base, adapter.name, dict(adapter.metadata)
            invocation = adapter.invocation_tokens
    except (BDLoRAError, OSError) as error:
        return _Found(
            text=f"refused: {explain(error, path)}",
            data={"path": str(path), "refused": [explain(error, path)]},
            causes=brief_causes(error, path),
        )
    refused = [str(error) for error in broken]
    known = {side: width for side, width in asdict(base).items() if width is not None}
    data = {
        "path": str(path),
        "name": name,
        "format": kind,
        "refused": refused,
        "base": known,
        "invocation_tokens": None if invocation is None else list(invocation),
        "metadata": metadata,
        "bytes": sum(map(_nbytes, facts.values())),
        "modules": [_as_dict(key, fact) for key, fact in facts.items()],
    }
    causes = [cause for error in broken for cause in brief_causes(error, path)]
    return _Found(
        text=_text(name, kind, facts, known, invocation, refused),
        data=data,
        facts=facts,
        causes=list(dict.fromkeys(causes)),
    )


def _run_many(arguments: argparse.Namespace) -> int:
    """A line for each adapter, and how many are refused for what."""
    sources = find_sources([arguments.path])
    found = {source.name: _inspected(source.path, arguments) for source in sources}
    rows = []
    for name, one in found.items():
        counts = [sorted({getattr(fact, side) for fact in one.facts.values()}) for side in _COUNTED]
        rows.append(
            (
                name,
                one.data.get("format", ""),
                str(len(one.facts) or ""),
                *(" ".join(map(str, numbers)) for numbers in counts),
                format_bytes(one.data["bytes"]) if one.facts else "",
                f"refused: {'; '.join(one.causes)}" if one.causes else "ok",
            )
        )
    header = ("adapter", "format", "modules", "rank", "blocks", "size", "outcome")
    refused = [one.causes for one in found.values() if one.causes]
    lines = [format_table(header, rows, text_last=True), ""]
    lines += [output.cause_table(refused), ""] if refused else []
    lines += [f"{len(found) - len(refused)} readable, {len(refused)} refused"]
    output.result("\n".join(lines), [one.data for one in found.values()], as_json=arguments.json)
    return 1 if refused else 0


def _broken_modules(adapter: Adapter) -> list[BDLoRAError]:
    """Why modules' numbers cannot be read or are not finite, one after the other."""
    refused = []
    for key in adapter.modules:
        try:
            adapter.modules[key]
        except BDLoRAError as error:
            refused.append(error)
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
    invocation: tuple[int, ...] | None,
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
        *([] if invocation is None else [f"acts from the invocation tokens {list(invocation)} on"]),
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
