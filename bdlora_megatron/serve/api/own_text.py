"""The tokenizer and the chat template that an adapter brings along."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bdlora_megatron.errors import ConfigError
from bdlora_megatron.serve.api.text import VOCABULARIES, chat_template

__all__ = ["own_text"]


def own_text(folder: Path, base: Path) -> list[str]:
    """What an adapter has that is not its base model's.

    Returns:
        ``chat template``, ``tokenizer``, both or nothing.

    Raises:
        ConfigError: A file of either can't be read.
    """
    own = chat_template(folder)
    found = ["chat template"] if own and own != chat_template(base) else []
    if any(_differs(folder / name, base / name) for name in VOCABULARIES):
        found.append("tokenizer")
    return found


def _differs(own: Path, base: Path) -> bool:
    if not own.is_file():
        return False
    try:
        mine, theirs = own.read_bytes(), base.read_bytes() if base.is_file() else b""
        if mine == theirs:
            return False
        return own.suffix != ".json" or _vocabulary(mine) != _vocabulary(theirs or b"{}")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"no tokenizer could be read from {own.parent}: {error}") from error


def _vocabulary(text: bytes) -> dict[str, Any]:
    """A tokenizer without what training leaves in it."""
    return {k: v for k, v in json.loads(text).items() if k not in {"padding", "truncation"}}
