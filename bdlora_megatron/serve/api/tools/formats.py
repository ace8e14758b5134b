"""How families of models write calls down, and how to find which way a model has.

A format is a marker, then one item per call: JSON with a name and arguments, or a name, a mark and
the arguments. Where something may stand ``between`` items, one marker serves several.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from bdlora_megatron.errors import ConfigError

if TYPE_CHECKING:
    from bdlora_megatron.serve.api.text import Tokenizer

__all__ = ["BARE", "Format", "Written", "look_at"]

ParserName: TypeAlias = Literal["hermes", "llama3_json", "mistral"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """How calls are written.

    Attributes:
        opening: The marker before the first item, and before each where nothing is ``between``.
        key: What arguments are called in an item of JSON; None where an item is none.
        before: What stands between the marker and the first item.
        between: What stands between two items of one marker, if one has several.
        closing: What follows the last item.
        mark: What stands between a name and its arguments, in an item that is no JSON.
        number: What comes before that, with an identifier, from some models.
        bare: An answer may also begin with an item, without the marker.
    """

    opening: str
    key: str | None = None
    before: str = ""
    between: str = ""
    closing: str = ""
    mark: str = ""
    number: str = ""
    bare: bool = False

    @property
    def markers(self) -> tuple[str, ...]:
        """What may be a token of its own, and then a special one."""
        told = self.opening, self.closing, self.mark, self.number
        return tuple(text for text in told if len(text) > 1)


_HERMES = Format(opening="<tool_call>", key="arguments", closing="</tool_call>")
_LIST = Format(opening="[TOOL_CALLS]", key="arguments", before="[", between=",", closing="]")
_MARKED = Format(opening="[TOOL_CALLS]", mark="[ARGS]", number="[CALL_ID]")
#: The plainest, for a model that knows none.
BARE = Format(opening="<|python_tag|>", key="parameters", between=";", bare=True)


@dataclass(frozen=True, slots=True)
class Written:
    """What a chat template makes of tools and calls.

    Attributes:
        told: It tells the model of the tools.
        format: How it writes calls down; None where that is unknown.
        several: It writes several calls of one answer down.
    """

    told: bool
    format: Format | None
    several: bool


def look_at(tokenizer: Tokenizer, parser: ParserName | None) -> Written:
    """See what a chat template makes of a tool, of a call and of two.

    Args:
        tokenizer: Whose template.
        parser: Use this family's format, instead of the one that the template writes.
    """
    asked = _render(tokenizer, []) or ""
    one, two = _render(tokenizer, ["5"]) or "", _render(tokenizer, ["5", "7"])
    call = one.removeprefix(asked) if one.startswith(asked) else one.rpartition(_QUESTION)[2]
    found = _format(call) if _NAME in call else None
    if parser is not None and (found is None or found not in _PARSERS[parser]):
        found = _PARSERS[parser][0]
        if parser == "mistral" and tokenizer.token_of(_MARKED.mark) is not None:
            found = _MARKED
    return Written(_NAME in asked, found, two is not None and two.count(_NAME) > one.count(_NAME))


_QUESTION, _NAME = "Which one?", "look_it_up"
_PARSERS: dict[ParserName, tuple[Format, ...]] = {
    "hermes": (_HERMES,),
    "llama3_json": (BARE,),
    "mistral": (_LIST, _MARKED),
}


def _format(call: str) -> Format | None:
    """The format of a call as a template wrote it."""
    json = '"name"' in call
    if _LIST.opening in call:
        return _MARKED if _MARKED.mark in call else _LIST if json else None
    if _HERMES.opening in call:
        return _HERMES if json and '"arguments"' in call else None
    return BARE if json and '"parameters"' in call else None


def _render(tokenizer: Tokenizer, answers: Sequence[str]) -> str | None:
    """A question with a tool, and an answer that calls it so often; None where that is refused."""
    number = {"type": "object", "properties": {"number": {"type": "string", "description": ""}}}
    function = {"name": _NAME, "description": "Looks it up", "parameters": number}
    messages: list[dict[str, Any]] = [{"role": "user", "content": _QUESTION}]
    calls = [
        # As long as Mistral's templates want it.
        {"id": f"{'0' * 8}{n}", "type": "function", "function": {
            "name": _NAME, "arguments": {"number": n}}}
        for n in answers
    ]  # fmt: skip
    if calls:
        messages.append({"role": "assistant", "content": "", "tool_calls": calls})
    try:
        return tokenizer.write_chat(
            messages, tools=[{"type": "function", "function": function}], prompts=not calls
        )
    except ConfigError:
        return None
