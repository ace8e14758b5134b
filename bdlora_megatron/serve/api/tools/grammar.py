"""Grammars of answers that may or must call tools, in llguidance's words.

Free text goes on until a call's marker, spelt out or as a token of its own; from there on, the
answer is held to calls. Special tokens that are no markers may stand anywhere in the free text.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bdlora_megatron.serve.api.tools.formats import Format

__all__ = ["Function", "Markers", "grammar_of_calls"]

# Bounded: some small models write spaces until they are cut.
_W = "[ \\n\\r\\t]{0,4}"
_TEXT = "TEXT: /(?s:.)+/"
_GAP = "GAP: /[ \\n\\r\\t]{1,4}/"


@dataclass(frozen=True, slots=True)
class Function:
    """A function, and the grammar of its arguments as llguidance takes it."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Markers:
    """A tokenizer's special tokens.

    Attributes:
        tokens: The markers that are tokens.
        others: Special tokens that are none and end nothing.
    """

    tokens: Mapping[str, int]
    others: Collection[int]

    def one(self, text: str) -> str:
        """A marker, spelt out or as a token."""
        told = json.dumps(text)
        return f"({told} | {_tokens([self.tokens[text]])})" if text in self.tokens else told


def grammar_of_calls(
    format_: Format,
    functions: Sequence[Function],
    markers: Markers,
    *,
    free: bool,
    several: bool,
    form: str | None = None,
) -> str:
    """The grammar of an answer.

    Args:
        format_: How calls are written.
        functions: What may be called.
        markers: The tokenizer's.
        free: The answer may also be text, or text and calls.
        several: It may call more than once.
        form: A grammar that an answer without calls must follow, as llguidance takes it; none for
            any text.
    """
    rules = _calls(format_, functions, markers, several=several)
    parts = {f"a{i}": function.arguments for i, function in enumerate(functions)}
    if not free:
        rules.append("start: calls")
    elif form is not None:
        rules.append("start: @form | calls")
        parts["form"] = form
    else:
        rules += _free(format_, functions, markers)
    grammars: list[dict[str, Any]] = [{"lark_grammar": "\n".join(rules)}]
    for name, text in parts.items():
        # What the library makes of a schema, a regex or rules is a list of one.
        (whole,) = json.loads(text)["grammars"]
        grammars.append({**whole, "name": name})
    return json.dumps({"grammars": grammars})


def _calls(
    format_: Format, functions: Sequence[Function], markers: Markers, *, several: bool
) -> list[str]:
    """Rules: ``calls`` are all of them, ``tail`` is what follows a marker, ``more`` comes after."""
    opening, closing = markers.one(format_.opening), ""
    if format_.closing:
        closing = markers.one(format_.closing)
    before = "BEFORE item" if format_.before else "item"
    again = f"({json.dumps(format_.between)} item)*" if format_.between and several else ""
    rules = [
        f"calls: {opening}{'?' if format_.bare else ''} tail more",
        f"tail: {before} {again} {closing}",
        f"more: (GAP? {opening} tail)* GAP?" if several and not format_.between else "more: GAP?",
        f"item: {' | '.join(f'item{i}' for i in range(len(functions)))}",
        _GAP,
        f"END: /{_W}\\}}{_W}/",
    ]
    if format_.before:
        rules.append(f"BEFORE: /{_W}{_literal(format_.before)}/")
    number = f"({markers.one(format_.number)} NUMBER)?" if format_.number else ""
    if number:
        rules.append("NUMBER: /[a-zA-Z0-9]{9}/")
    for i, function in enumerate(functions):
        if format_.key is None:
            head, end = f"{json.dumps(function.name)} {number} {markers.one(format_.mark)}", ""
        else:
            head, end = f"HEAD{i}", "END"
            key = f'{_W},{_W}"{format_.key}"{_W}:{_W}'
            rules.append(f"HEAD{i}: /{_name(function.name)}{key}/")
        rules.append(f"item{i}: {head} @a{i} {end}")
    return rules


def _free(format_: Format, functions: Sequence[Function], markers: Markers) -> list[str]:
    """Rules: free text, perhaps with calls at its end."""
    spelt, other = json.dumps(format_.opening), _tokens(markers.others)
    rules = [_TEXT, f"spelt[lazy]: TEXT? {spelt}", f"spelt_first[lazy]: FIRST? {spelt}"]
    names = "|".join(function.name for function in functions)
    if format_.bare:
        # A text that begins as a call is one.
        rules += ["FIRST: TEXT & ~CALL", f"CALL: /{_name(f'({names})')}(?s:.)*/"]
    else:
        rules.append("FIRST: TEXT")
    begin, start = ["spelt_first"], ["FIRST?"]
    if format_.opening in markers.tokens:
        begin.append(f"FIRST? {_tokens([markers.tokens[format_.opening]])}")
    if markers.others:
        rules.append(f"parts: FIRST? {other} (TEXT? {other})*")
        start.append("parts TEXT?")
        begin.append("parts spelt")
        if format_.opening in markers.tokens:
            begin.append(f"parts TEXT? {_tokens([markers.tokens[format_.opening]])}")
    rules.append(f"begin: {' | '.join(begin)}")
    start.append("begin tail more")
    if format_.bare:
        start.append("tail more")
    return [*rules, f"start: {' | '.join(start)}"]


def _name(name: str) -> str:
    """A regex of an item of JSON up to the end of the function's name."""
    return f'{_W}\\{{{_W}"name"{_W}:{_W}"{name}"'


def _literal(text: str) -> str:
    return "".join(f"\\{character}" for character in text)


def _tokens(ids: Collection[int]) -> str:
    """One of some tokens, as ranges."""
    ranges: list[list[int]] = []
    for token in sorted(ids):
        if ranges and token == ranges[-1][1] + 1:
            ranges[-1][1] = token
        else:
            ranges.append([token, token])
    told = (str(low) if low == high else f"{low}-{high}" for low, high in ranges)
    return f"<[{','.join(told)}]>"
