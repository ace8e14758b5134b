"""What a command prints: its result on stdout, everything else on stderr."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from bdlora_megatron.convert.adapter.tables import format_table

__all__ = ["cause_table", "note", "result", "told_of"]

_NAMED = 4


def result(text: str, data: Any, *, as_json: bool) -> None:
    """Print a command's result."""
    print(json.dumps(data, indent=2) if as_json else text)  # noqa: T201


def note(text: str) -> None:
    """Tell something on the way."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201


def cause_table(refused: Sequence[Sequence[str]]) -> str:
    """How many adapters each cause holds back.

    Args:
        refused: The causes of every adapter that was refused.
    """
    counts = Counter(cause for causes in refused for cause in dict.fromkeys(causes))
    rows = [(cause, str(count)) for cause, count in counts.most_common()]
    return format_table(("refused because", "adapters"), rows)


def told_of(texts: Mapping[str, Sequence[str]]) -> list[str]:
    """What was said of adapters, each text once.

    Returns:
        Lines, each with the adapters that it holds for.
    """
    names: dict[str, list[str]] = {}
    for name, said in texts.items():
        for text in said:
            names.setdefault(text, []).append(name)
    return [
        f"{', '.join(own[:_NAMED])}"
        f"{f' and {len(own) - _NAMED} more' if len(own) > _NAMED else ''}: {text}"
        for text, own in names.items()
    ]
