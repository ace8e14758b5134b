"""`bdlora verify A B`: whether two adapters, or all of two folders, compute the same."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bdlora_megatron.cli import output
from bdlora_megatron.cli.sources import add_reading_options, find_sources, holds_many, opened
from bdlora_megatron.convert.adapter import Adapter
from bdlora_megatron.convert.adapter.compare import Comparison, compare_adapters
from bdlora_megatron.convert.adapter.problems import brief_causes
from bdlora_megatron.convert.adapter.tables import format_table
from bdlora_megatron.convert.peft.reader import IGNORED_BY_PEFT
from bdlora_megatron.convert.registry import detect_format
from bdlora_megatron.errors import BDLoRAError, ConfigError, explain

__all__ = ["add_parser", "run"]

_COLUMNS = ("adapter", "verdict", "largest difference", "why")


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "verify",
        help="tell whether two adapters compute the same",
        description="Measure how far two adapters' updates are apart, module by module in fp64, "
        "whatever their formats, ranks and blocks, and whether they act from the same invocation "
        "tokens on; of two folders of adapters, each with the one "
        "of its name. Tensors that PEFT would ignore for their names count as missing. Exit "
        "status: 0 the same within the tolerance, 1 different, 2 one cannot be read or they are "
        "of two base models.",
    )
    parser.add_argument("first", metavar="A", type=Path, help="an adapter's folder, or of several")
    parser.add_argument("second", metavar="B", type=Path, help="another one's")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-6,
        help="largest relative difference of a module's update, in the Frobenius norm "
        "(default: %(default)g)",
    )
    add_reading_options(parser)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Compare and print the table."""
    if holds_many(arguments.first) or holds_many(arguments.second):
        return _run_many(arguments)
    verdict = _compared(arguments.first, arguments.second, arguments)
    output.result(_text(verdict, arguments.tolerance), verdict.to_dict(), as_json=arguments.json)
    return 0 if verdict.same else 1


@dataclass(frozen=True, kw_only=True, slots=True)
class _Verdict:
    """One comparison, and what PEFT would not apply of either adapter.

    Attributes:
        comparison: The updates as the files hold them.
        ignored: How many tensors PEFT would ignore, by adapter.
        tolerance: The largest relative difference of a module to accept.
    """

    comparison: Comparison
    ignored: Mapping[str, int]
    tolerance: float

    @property
    def same(self) -> bool:
        return not self.ignored and self.comparison.is_same(self.tolerance)

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.comparison.to_dict(),
            "ignored_by_peft": dict(self.ignored),
            "tolerance": self.tolerance,
            "same": self.same,
        }


def _compared(first: Path, second: Path, arguments: argparse.Namespace) -> _Verdict:
    with opened(first, arguments) as one, opened(second, arguments) as other:
        ignored = {
            str(path): count
            for path, adapter in ((first, one), (second, other))
            if (count := _ignored(path, adapter))
        }
        return _Verdict(
            comparison=compare_adapters(one, other),
            ignored=ignored,
            tolerance=arguments.tolerance,
        )


def _ignored(path: Path, adapter: Adapter) -> int:
    # Other formats note where an adapter came from, which says nothing of their own files.
    if detect_format(path) != "peft":
        return 0
    return int(adapter.metadata.get(IGNORED_BY_PEFT, "0"))


def _text(verdict: _Verdict, tolerance: float) -> str:
    comparison = verdict.comparison
    largest = comparison.largest
    told = (
        f"same function within {tolerance:g}"
        if verdict.same
        else f"DIFFERENT: {_acts(comparison)}"
        if not comparison.acts_alike
        else f"DIFFERENT: more than {tolerance:g} apart"
        if not comparison.is_same(tolerance)
        else "DIFFERENT in PEFT, the same in the numbers"
    )
    lines = [
        f"{path}: PEFT would ignore {count} of its tensors, for their names or its "
        "target_modules; write it again with bdlora convert --to peft"
        for path, count in verdict.ignored.items()
    ]
    return "\n".join(
        [
            comparison.table(),
            "",
            *lines,
            f"{told}; largest relative difference {largest.relative:.3g} in {largest.key}",
        ]
    )


def _acts(comparison: Comparison) -> str:
    """On which tokens each of the two acts."""
    one, other = (
        "on every token" if tokens is None else f"from {list(tokens)} on"
        for tokens in comparison.invocation_tokens
    )
    return f"one acts {one}, the other {other}"


def _run_many(arguments: argparse.Namespace) -> int:
    """Compare all adapters of two folders by their names.

    Raises:
        ConfigError: The folders have no name in common.
    """
    one, other = (
        {source.name: source.path for source in find_sources([path])}
        for path in (arguments.first, arguments.second)
    )
    if not one.keys() & other.keys():
        raise ConfigError(
            f"no adapter has the same name in {arguments.first} ({', '.join(list(one)[:4])}) and "
            f"{arguments.second} ({', '.join(list(other)[:4])}); pass two adapters, or two folders "
            "with the same names"
        )
    rows, data = [], []
    causes: list[list[str]] = []
    for name in [*one, *(name for name in other if name not in one)]:
        entry: dict[str, Any] = {"name": name}
        if name not in one or name not in other:
            where = arguments.second if name not in other else arguments.first
            entry |= {"verdict": "missing", "why": f"not in {where}"}
        else:
            entry |= _verdict_on(one[name], other[name], arguments, causes)
        relative = entry.get("largest_relative")
        shown = "" if relative is None else f"{relative:.3g}"
        rows.append((name, entry["verdict"], shown, entry["why"].partition("\n")[0]))
        data.append(entry)
    verdicts = [entry["verdict"] for entry in data]
    lines = [format_table(_COLUMNS, rows, text_last=True), ""]
    lines += [f"{entry['name']}: {entry['why']}" for entry in data if "\n" in entry["why"]]
    lines += [output.cause_table(causes), ""] if causes else []
    tally = ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(verdicts))
    output.result("\n".join([*lines, tally]), data, as_json=arguments.json)
    return 2 if "refused" in verdicts else 0 if set(verdicts) == {"same"} else 1


def _verdict_on(
    first: Path, second: Path, arguments: argparse.Namespace, causes: list[list[str]]
) -> dict[str, Any]:
    try:
        verdict = _compared(first, second, arguments)
    except (BDLoRAError, OSError) as error:
        causes.append(brief_causes(error, first, second))
        return {"verdict": "refused", "why": explain(error, first)}
    largest = verdict.comparison.largest
    why = "" if verdict.same else f"largest in {largest.key}"
    if not verdict.comparison.acts_alike:
        why = _acts(verdict.comparison)
    if verdict.ignored:
        why = "; ".join(f"PEFT would ignore {n} tensors of {p}" for p, n in verdict.ignored.items())
    return {
        "verdict": "same" if verdict.same else "different",
        "why": why,
        "largest_relative": largest.relative,
        "ignored_by_peft": dict(verdict.ignored),
    }
