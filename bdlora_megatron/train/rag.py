"""Retrieval-augmented records: a question, documents of which some may distract, and an answer.

A row that is too long loses documents, never a part of the question or the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any

from bdlora_megatron.train.lines import BadLineError, Keys

__all__ = ["RagOptions", "RagReader", "template_problems"]

#: What a document and a whole prompt may and must say.
_FIELDS = {
    "document": ({"number", "title", "text"}, {"text"}),
    "prompt": ({"documents", "question"}, {"documents", "question"}),
}
_RECORD = ("question", "documents", "answer")


@dataclass(frozen=True, kw_only=True, slots=True)
class RagOptions:
    """How records are laid out.

    Attributes:
        document: Each document, with ``{text}``, and if wanted ``{title}`` and ``{number}``.
        prompt: The user's turn, with ``{documents}`` and ``{question}``.
        seq_length: Positions within which documents must fit; no document is dropped when None.
    """

    document: str = "[{number}] {title}\n{text}\n\n"
    prompt: str = "{documents}Question: {question}"
    seq_length: int | None = None


def template_problems(options: RagOptions) -> list[str]:
    """What is wrong with the two templates."""
    problems = []
    for name, (known, needed) in _FIELDS.items():
        try:
            found = {field for _, field, _, _ in Formatter().parse(getattr(options, name)) if field}
        except ValueError as error:
            problems.append(f"dataset.rag.{name} is no template: {error}")
            continue
        if found - known or needed - found:
            problems.append(
                f"dataset.rag.{name} names {sorted(found)}; wanted {sorted(needed)}, of "
                f"{sorted(known)}"
            )
    return problems


@dataclass(frozen=True, kw_only=True, slots=True)
class _Passage:
    text: str
    title: str
    relevant: bool


class RagReader:
    """Makes prompts and answers of records."""

    def __init__(self, options: RagOptions, keys: Keys, count: Callable[[str], int]) -> None:
        """Prepare to read.

        Args:
            options: How records are laid out.
            keys: Where to note what was dropped.
            count: Tokens of a text.
        """
        self._options, self._keys, self._count = options, keys, count

    def fitted(
        self, record: Mapping[str, Any], length: Callable[[str, str], int]
    ) -> tuple[str, str]:
        """The prompt and the answer of a record, with as many documents as fit.

        Args:
            record: ``question``, ``documents`` and ``answer``.
            length: Positions that a prompt and its answer take together.

        Returns:
            Both.

        Raises:
            BadLineError: The record is not such a one, or does not fit without any document.
        """
        question, passages, answer = _read(record, self._keys)
        limit, kept = self._options.seq_length, list(range(len(passages)))
        prompt = self._prompt(question, passages, kept)
        while limit is not None and (over := length(prompt, answer) - limit) > 0:
            if not kept:
                raise BadLineError(
                    f"question and answer alone are {over} positions over model.seq_length="
                    f"{limit}; raise it"
                )
            for place in self._dropped(passages, kept, over):
                kept.remove(place)
                kind = "" if passages[place].relevant else " that is marked as not relevant"
                self._keys.notes[f"a document{kind} was dropped so that its row fits"] += 1
            prompt = self._prompt(question, passages, kept)
        return prompt, answer

    def _prompt(self, question: str, passages: Sequence[_Passage], kept: Sequence[int]) -> str:
        documents = "".join(
            self._document(number, passages[place]) for number, place in enumerate(kept, 1)
        )
        return self._options.prompt.format(documents=documents, question=question)

    def _document(self, number: int, passage: _Passage) -> str:
        template = self._options.document
        return template.format(number=number, title=passage.title, text=passage.text)

    def _dropped(
        self, passages: Sequence[_Passage], kept: Sequence[int], over: int
    ) -> Iterator[int]:
        """Distractors first, each kind from its end, until what was too much is gone."""
        for place in sorted(kept, key=lambda place: (passages[place].relevant, -place)):
            if over <= 0:
                return
            over -= self._count(self._document(1, passages[place]))
            yield place


def _read(record: Mapping[str, Any], keys: Keys) -> tuple[str, list[_Passage], str]:
    keys.rest_of_line(record, _RECORD)
    question, documents, answer = (record.get(name) for name in _RECORD)
    if not (isinstance(question, str) and isinstance(answer, str) and isinstance(documents, list)):
        raise BadLineError(
            "wanted text under 'question' and 'answer', and a list under 'documents'; found "
            f"{ {name: type(value).__name__ for name, value in record.items()} }"
        )
    return question, [_passage(item, n, keys) for n, item in enumerate(documents, 1)], answer


def _passage(item: Any, number: int, keys: Keys) -> _Passage:
    kept = keys.kept(item) if isinstance(item, dict) else {"text": item}
    text, title, relevant = kept.get("text"), kept.get("title", ""), kept.get("relevant", True)
    if not isinstance(text, str) or not isinstance(title, str) or not isinstance(relevant, bool):
        raise BadLineError(
            f'document {number} is {item!r:.80}; wanted text, or {{"text": ..., "title": ..., '
            '"relevant": true or false}'
        )
    for key in kept.keys() - {"text", "title", "relevant"}:
        keys.notes[f"the key {key!r} of documents is not read"] += 1
    return _Passage(text=text, title=title, relevant=relevant)
