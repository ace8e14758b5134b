"""JSON that stays on one line, whoever splits the lines."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["json_line"]

#: Ends of lines to Python's ``splitlines`` and to many clients, though not to JSON or to
#: server-sent events. Those below U+0020 are escaped by JSON. Halves of surrogate pairs, which a
#: client's JSON may hold as escapes, are no characters that could be sent.
_ESCAPED = (0x85, 0x2028, 0x2029, *range(0xD800, 0xE000))
_ENDS = {code: f"\\u{code:04x}" for code in _ESCAPED}


def json_line(data: dict[str, Any]) -> str:
    """A value as JSON, without any character that ends a line.

    Returns:
        The text, which says the same to any reader of JSON.
    """
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).translate(_ENDS)
