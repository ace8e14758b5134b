"""From an answer's text to its calls, piece by piece; the pieces do not change what is read."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

from bdlora_megatron.serve.api.tools.formats import Format

__all__ = ["CallPiece", "CallReader", "Said"]

_SPACE = " \n\r\t"
_W = f"[{_SPACE}]*"


@dataclass(slots=True)
class CallPiece:
    """A piece of a call.

    Attributes:
        name: With the first piece: which function is called.
        arguments: What has come of its arguments, as the model wrote them.
    """

    name: str | None = None
    arguments: str = ""


@dataclass(slots=True)
class Said:
    """What a piece of text has told: content, and pieces of calls by the calls' numbers."""

    content: str = ""
    calls: dict[int, CallPiece] = field(default_factory=dict)


class CallReader:
    """The calls and the content of one answer, as its text comes.

    Text is held back while it may begin a call. A beginning from which no call comes is content.
    """

    def __init__(self, format_: Format, names: Collection[str]) -> None:
        """Begin an answer.

        Args:
            format_: How calls are written.
            names: The functions that can be called; a call of another one is content.
        """
        self._format = format_
        self._names = frozenset(names)
        self._state: Literal["text", "head", "arguments", "after"] = "text"
        self._first, self._again = _heads(format_)
        self._head = self._again
        # What has led to where a call should begin, and is content if there is none.
        self._lead = ""
        self._held = ""
        self._depth, self._quoted, self._escaped, self._braced = 0, False, False, False
        self._said = Said()
        self.count = 0
        if format_.bare:
            self._state = "head"

    @property
    def inside(self) -> bool:
        """Whether a call's arguments have begun and not ended."""
        return self._state == "arguments"

    def push(self, text: str, *, last: bool = False) -> Said:
        """Take a piece of text.

        Args:
            text: What comes next.
            last: Nothing comes after it.

        Returns:
            What is certain now.
        """
        self._held += text
        self._said = Said()
        steps = {
            "text": self._text,
            "head": self._begin,
            "arguments": self._arguments,
            "after": self._after,
        }
        while steps[self._state]():
            pass
        if last:
            self._end()
        return self._said

    def _end(self) -> None:
        """What was held back comes out, but spaces after a call."""
        if self._state in {"text", "head"}:
            rest = self._lead + self._held
            self._said.content += rest if rest.strip(_SPACE) or not self.count else ""
        self._lead = self._held = ""

    # Each of these does what can be done in its state, and tells whether another state came of it.

    def _text(self) -> bool:
        opening = self._format.opening
        at = self._held.find(opening)
        if at < 0:
            # Spaces before a call are its format's, not the content's.
            kept = len(self._held[: len(self._held) - _overlap(self._held, opening)].rstrip(_SPACE))
            self._said.content += self._held[:kept]
            self._held = self._held[kept:]
            return False
        self._said.content += self._held[:at].rstrip(_SPACE)
        self._lead = self._held[len(self._held[:at].rstrip(_SPACE)) : at + len(opening)]
        self._held = self._held[at + len(opening) :]
        self._state, self._head = "head", self._first
        return True

    def _begin(self) -> bool:
        found = self._head.whole(self._held)
        if found is not None and found[1] in self._names:
            self._said.calls[self.count] = CallPiece(found[1])
            self._held = self._held[found.end() :]
            self._lead, self._state = "", "arguments"
            self._depth, self._quoted, self._escaped = 0, False, False
            return True
        if found is None and self._head.begun(self._held):
            return False
        self._said.content += self._lead
        self._lead, self._state = "", "text"
        return True

    def _arguments(self) -> bool:
        if not self._held:
            return False
        end = self._object_end(self._held)
        piece = self._said.calls.setdefault(self.count, CallPiece())
        piece.arguments += self._held[:end]
        self._held = "" if end is None else self._held[end:]
        if end is None:
            return False
        self.count += 1
        self._state, self._braced = "after", self._format.key is None
        return True

    def _object_end(self, text: str) -> int | None:
        """Where the object ends that has begun; None if that is yet to come."""
        for at, character in enumerate(text):
            if self._quoted:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._quoted = False
            elif character == '"':
                self._quoted = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return at + 1
        return None

    def _after(self) -> bool:
        """Pass over what ends an item and stands between two."""
        format_, rest = self._format, self._held.lstrip(_SPACE)
        if not self._braced and rest.startswith("}"):
            self._braced, rest = True, rest[1:].lstrip(_SPACE)
        if not rest or (rest != format_.closing and format_.closing.startswith(rest)):
            self._held = rest
            return False
        self._state = "text"
        if format_.between and rest.startswith(format_.between):
            self._lead, rest = format_.between, rest[len(format_.between) :]
            self._state, self._head = "head", self._again
        elif format_.closing:
            rest = rest.removeprefix(format_.closing)
        self._held = rest
        return True


def _overlap(text: str, marker: str) -> int:
    """How many characters at the end of a text may begin a marker."""
    longest = min(len(marker) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(marker[:n])), 0)


@dataclass(frozen=True, slots=True)
class _Head:
    """What stands before a call's arguments, with the function's name.

    Attributes:
        all: All of it, up to the arguments.
        some: A beginning of it.
    """

    all: tuple[re.Pattern[str], ...]
    some: tuple[re.Pattern[str], ...]

    def whole(self, text: str) -> re.Match[str] | None:
        return next(filter(None, (one.match(text) for one in self.all)), None)

    def begun(self, text: str) -> bool:
        return any(one.fullmatch(text) for one in self.some)


def _head(*ways: Sequence[str]) -> _Head:
    """From units of a regex."""
    some = []
    for units in ways:
        regex = ""
        for unit in reversed(units):
            regex = f"(?:{unit}{regex})?"
        some.append(re.compile(regex))
    return _Head(tuple(re.compile("".join(units) + r"(?=\{)") for units in ways), tuple(some))


@cache
def _heads(format_: Format) -> tuple[_Head, _Head]:
    """A format's head after its marker, and after another item."""
    name = "([a-zA-Z0-9_-]{1,64})"

    def units(text: str) -> list[str]:
        return [re.escape(character) for character in text]

    if format_.key is None:
        mark = [*units(format_.mark), _W]
        number = [*units(format_.number), "[a-zA-Z0-9]+"]
        head = _head([_W, name, *mark], [_W, name, *number, *mark])
        return head, head
    item = [_W]
    for text in ("{", '"name"', ":", '"'):
        item += [*units(text), _W]
    item.pop()
    item.append(name)
    for text in ('"', ",", f'"{format_.key}"', ":"):
        item += [*units(text), _W]
    before = [_W, *units(format_.before)] if format_.before else []
    return _head([*before, *item]), _head(item)
