"""JSON that stays on one line, whoever splits the lines."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["json_line"]

#: Ends of lines to Python's ``splitlines`` and to many clients, though not to JSON or to
#: server-sent events. Those below U+0020 are escaped by JSON.
_ENDS = str.maketrans({end: f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"})


def json_line(data: dict[str, Any]) -> str:
    """A value as JSON, without any character that ends a line.

    Args:
        data: The value.

    Returns:
        The text, which says the same to any reader of JSON.
    """
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).translate(_ENDS)
