"""Pages in Markdown: their fenced blocks, their links, and the commands in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

_FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)#]+)[^)]*\)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """A fenced block; `line` is the number of the line above its body."""

    language: str
    body: str
    line: int

    def commands(self) -> list[str]:
        """The shell commands of the block, continued lines joined."""
        lines = self.body.replace("\\\n", " ").splitlines()
        return [line for line in lines if line.strip() and not line.startswith("#")]


def blocks(text: str, *languages: str) -> list[Block]:
    """The fenced blocks of these languages, or of all."""
    return [
        Block(
            language=match["language"],
            body=match["body"],
            line=text.count("\n", 0, match.start("body")),
        )
        for match in _FENCE.finditer(text)
        if not languages or match["language"] in languages
    ]


def links(text: str) -> list[str]:
    """What the page links to within the repository or the site."""
    prose = _FENCE.sub("", text)
    targets = [match["target"] for match in _LINK.finditer(prose)]
    return [target for target in targets if "://" not in target]


def documents() -> Iterator[Path]:
    """Every page below docs/, but those of the reference, which are made of docstrings."""
    for path in sorted((ROOT / "docs").rglob("*.md")):
        if "api" not in path.parts:
            yield path
