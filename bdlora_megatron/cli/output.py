"""What a command prints: its result on stdout, everything else on stderr."""

from __future__ import annotations

import json
import sys
from typing import Any

__all__ = ["note", "result"]


def result(text: str, data: Any, *, as_json: bool) -> None:
    """Print a command's result.

    Args:
        text: For people.
        data: For programs.
        as_json: Print the latter.
    """
    print(json.dumps(data, indent=2) if as_json else text)  # noqa: T201


def note(text: str) -> None:
    """Tell something on the way.

    Args:
        text: One or more lines.
    """
    print(text, file=sys.stderr, flush=True)  # noqa: T201
